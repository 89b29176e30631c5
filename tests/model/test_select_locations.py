"""Locations by the gradient: against whole weights in autograd's hands, and what is refused."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from loca_vision import (
    AlternatingSchedule,
    LoCAConfig,
    LoRAConfig,
    adapters,
    inject,
    load_adapter,
    parameter_groups,
    save_adapter,
    select_locations,
    set_adapters,
)
from loca_vision.dct import dct2
from loca_vision.model.select_locations import _largest, _perturbed
from loca_vision.model.target_checks import targets_for
from support.pipelines import unet as tiny_unet
from support.timm_models import batch, tiny

CONFIG = LoCAConfig(n_components=25, scale=1.5, targets=("q", "v", "fc1"), location_init="gradient")


def images(number):
    return torch.randn(batch("vit").shape, generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def answer(model, x):
    return model(x)


def losses(model, count=3):
    """Computed one by one."""
    for number in range(count):
        yield model(images(number)).square().sum()


def spectra(count=3):
    """|sum of Z| of each projection, from gradients of the weights of a model without adapters."""
    model = tiny("vit")
    model.train()
    sum(losses(model, count)).backward()
    found = {}
    for target in targets_for(model, CONFIG):
        gradient = target.layer.weight.grad
        found[target.name] = dct2(gradient if target.rows is None else gradient[target.rows])
    return found


@pytest.fixture
def injected():
    model = tiny("vit")
    inject(model, CONFIG)
    return model.train()


def test_components_stand_where_the_summed_spectrum_is_largest(injected):
    chosen, wanted = select_locations(injected, losses(injected)), spectra()
    assert set(chosen) == set(wanted) == set(adapters(injected))
    for name, cells in chosen.items():
        values = wanted[name].abs()
        assert len(cells.unique(dim=0)) == 25
        at = values[cells[:, 0], cells[:, 1]]
        rest = values.clone()
        rest[cells[:, 0], cells[:, 1]] = 0
        assert at.min() >= rest.max() * 0.999 and (at.diff() <= 1e-3 * at[0]).all()
        assert torch.equal(adapters(injected)[name].cells, cells)


def test_their_first_gradient_is_what_they_were_chosen_by(injected):
    select_locations(injected, losses(injected))
    sum(losses(injected)).backward()
    for name, update in adapters(injected).items():
        wanted = CONFIG.scale * spectra()[name][update.cells[:, 0], update.cells[:, 1]]
        torch.testing.assert_close(update.coefficients.grad, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_one_budget_for_the_model(injected, tmp_path):
    """As many components in all, at least one to each, and none that is smaller than one that was left out."""
    chosen, wanted = select_locations(injected, losses(injected), budget="model"), spectra()
    counts = {name: len(cells) for name, cells in chosen.items()}
    assert sum(counts.values()) == 25 * len(counts) and min(counts.values()) >= 1 and len(set(counts.values())) > 1
    inside, outside = [], []
    for name, cells in chosen.items():
        values = wanted[name].abs()
        inside += values[cells[1:, 0], cells[1:, 1]].tolist()
        values[cells[:, 0], cells[:, 1]] = 0
        outside.append(float(values.max()))
    assert min(inside) >= 0.999 * max(outside)
    groups = parameter_groups(injected, lr=0.1)
    assert sum(p.numel() for p in groups[0]["params"]) == sum(counts.values())
    injected(images(5)).sum().backward()
    torch.optim.SGD(groups).step()
    again = tiny("vit")
    load_adapter(again, save_adapter(injected, tmp_path))
    torch.testing.assert_close(answer(again, images(6)), answer(injected, images(6)), rtol=0, atol=1e-5)


def test_sampled_components_are_larger_than_most_and_follow_the_seed():
    found = {}
    for seed in (0, 0, 1):
        model = tiny("vit")
        inject(model, replace(CONFIG, seed=seed))
        chosen = select_locations(model.train(), losses(model), rule="sampled")
        assert all(len(cells.unique(dim=0)) == 25 for cells in chosen.values())
        if seed in found:
            assert all(torch.equal(cells, found[seed][name]) for name, cells in chosen.items())
        found[seed] = chosen
    assert any(not torch.equal(cells, found[1][name]) for name, cells in found[0].items())
    for name, values in spectra().items():
        energy = values.square()
        at = found[0][name]
        taken, largest = energy[at[:, 0], at[:, 1]].sum(), energy.flatten().topk(25).values.sum()
        assert 25 * energy.mean() < taken < largest


@pytest.mark.parametrize("budget", ["projection", "model"])
def test_cells_are_drawn_in_proportion_to_their_squares(budget):
    sizes, counts = torch.tensor([3.0, 0.0, 1.0]), {"a": 1}
    drawn = [_largest({"a": _perturbed(sizes, "a", seed)}, counts, budget)["a"].item() for seed in range(400)]
    assert set(drawn) == {0, 2} and stats.binomtest(drawn.count(0), 400, 0.9).pvalue > 1e-4


def test_nothing_else_changes(injected):
    """Flags, gradients, values, other adapters; and the output, as coefficients are zero."""
    inject(injected, LoRAConfig(r=2), "other")
    set_adapters(injected, ["other", "default"])
    injected.head.weight.grad = torch.ones_like(injected.head.weight)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in injected.named_parameters()}
    state = torch.get_rng_state()
    output = answer(injected, images(9))
    select_locations(injected, losses(injected))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in injected.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert name.endswith("locations") or torch.equal(parameter, before[name][1])
        assert (parameter.grad is None) == (name != "head.weight")
    assert torch.equal(injected.head.weight.grad, torch.ones_like(injected.head.weight))
    assert torch.equal(answer(injected, images(9)), output)


def test_training_waits_for_a_choice(injected, tmp_path):
    """Neither trained nor saved before; restored locations are a choice, too."""
    assert torch.equal(answer(injected, images(1)), answer(tiny("vit").train(), images(1)))
    with pytest.raises(RuntimeError, match="locations are not chosen yet; call select_locations"):
        injected(images(1))
    with pytest.raises(ValueError, match=r"locations holds NaN"):
        save_adapter(injected, tmp_path)
    chosen = tiny("vit").train()
    inject(chosen, CONFIG)
    select_locations(chosen, losses(chosen))
    schedule = AlternatingSchedule(chosen)
    assert schedule.phase == "coefficients"
    injected.load_state_dict(chosen.state_dict())
    assert torch.equal(injected(images(1)), chosen(images(1)))


def test_a_unet_with_checkpointing():
    unet = tiny_unet().train()
    inject(unet, LoCAConfig(n_components=9, targets=("q", "out"), location_init="gradient"))
    noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, unet.config.cross_attention_dim)
    cells = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        one = (unet(noisy, 3, text).sample.square().mean() for _ in range(1))
        cells.append(select_locations(unet, one))
    assert cells[0].keys() == cells[1].keys() == adapters(unet).keys()
    agreed = [len({*map(tuple, one.tolist())} & {*map(tuple, cells[1][name].tolist())}) for name, one in cells[0].items()]
    assert min(agreed) >= 8


REFUSED = {
    "computed before": (lambda model: [answer(model, images(0)).sum()], {}, "do not depend on the adapter"),
    "of another model": (lambda model: (p.sum() for p in [torch.ones(2, requires_grad=True)]), {}, "do not depend"),
    "none": (lambda model: [], {}, "losses: expected at least one"),
    "no scalar": (lambda model: (model(images(0)) for _ in range(1)), {}, r"number 1 has shape \(2, 3\)"),
    "no tensor": (lambda model: [1.0], {}, "number 1 has type float"),
    "not finite": (lambda model: (model(images(0)).sum() * torch.inf for _ in range(1)), {}, "number 1 is "),
    "no such adapter": (losses, {"name": "other"}, "name='other': the model has no such adapter"),
    "no such budget": (losses, {"budget": "layer"}, "budget='layer'"),
    "no such rule": (losses, {"rule": "any"}, "rule='any'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case, injected):
    made, how, sentence = REFUSED[case]
    flags = [p.requires_grad for p in injected.parameters()]
    with pytest.raises(ValueError, match=sentence):
        select_locations(injected, made(injected), **how)
    assert all(update.locations.isnan().all() for update in adapters(injected).values())
    assert [p.requires_grad for p in injected.parameters()] == flags and all(p.grad is None for p in injected.parameters())


def test_adapters_that_cannot_be_placed(injected):
    model = tiny("vit").train()
    inject(model, LoCAConfig(n_components=5))
    with pytest.raises(ValueError, match="location_init='uniform': expected one with"):
        select_locations(model, losses(model))
    inject(model, LoRAConfig(r=1), "low")
    with pytest.raises(ValueError, match="location_init=None"):
        select_locations(model, losses(model), name="low")
    select_locations(injected, losses(injected))
    torch.nn.init.ones_(adapters(injected)["blocks.0.attn.q"].coefficients)
    with pytest.raises(ValueError, match=r"has been trained: the coefficients of blocks\.0\.attn\.q"):
        select_locations(injected, losses(injected))
    set_adapters(injected, [])
    with pytest.raises(ValueError, match="does not act"):
        select_locations(injected, losses(injected))
