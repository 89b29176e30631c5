"""Properties of every kind of adapter in a timm model, against weights computed by its formula."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from loca_vision import (
    AlternatingSchedule,
    LoRAConfig,
    active_adapters,
    adapters,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    save_adapter,
    set_adapters,
)
from loca_vision.model.target_checks import targets_for
from support.formulas import KINDS, changed, numbers, stir, written
from support.timm_models import batch, tiny

every_kind = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("family", ("vit", "maxvit", "beit"))  # fused, interleaved, around the forward
PARTS = {"vit": ("q", "v", "out", "fc1"), "maxvit": ("q", "v", "out"), "beit": ("q", "v", "out")}
WITHOUT_LOCATIONS = ("lora", "dora", "selora haar", "selora fft", "selora dora")


def config_of(kind, targets=None):
    config = copy.copy(KINDS[kind])
    object.__setattr__(config, "targets", targets or config.targets)
    return config


def adapted(kind, family="vit", name="default", model=None):
    """A model with an adapter that shows."""
    model = model or tiny(family)
    inject(model, config_of(kind, PARTS[family]), name)
    return stir(model, name)


def term(kind, model, strength=1.0, name="default", family="vit"):
    """For `written`."""
    return config_of(kind, PARTS[family]), adapters(model, name), strength


@torch.no_grad()
def output(model, family="vit"):
    return model(batch(family))


def near(found, wanted, tolerance=2e-5):
    assert found.shape == wanted.shape and found.isfinite().all()
    assert (found - wanted).abs().max() < tolerance, (found - wanted).abs().max()


def gradients(model, family="vit"):
    model.zero_grad()
    model(batch(family)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Values and gradients


@every_kind
@families
def test_nothing_changes_at_first_and_every_key_stays(kind, family):
    base, model = tiny(family), tiny(family)
    inject(model, config_of(kind, PARTS[family]))
    assert torch.equal(output(model, family), output(base, family))
    images = batch(family).clone().requires_grad_()  # then torch takes the same kernels for both
    assert torch.equal(model(images), base.requires_grad_(False)(images))
    state = model.state_dict()
    assert [key for key in state if ".loca." not in key] == list(base.state_dict())
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())


@every_kind
@families
def test_the_output_is_that_of_the_weights_by_the_formula(kind, family):
    model = adapted(kind, family)
    wanted = output(written(tiny(family), term(kind, model, family=family)), family)
    assert (wanted - output(tiny(family), family)).abs().max() > 1e-2
    near(output(model, family), wanted)
    near(model(batch(family)).detach(), wanted)


@every_kind
@families
def test_gradients_are_those_through_the_formula(kind, family):
    """Of the numbers that are learned; the weights are whole matrices in autograd's hands, and the model runs in float64."""
    model, base = adapted(kind, family), tiny(family).double()
    config, values, weights = config_of(kind, PARTS[family]), dict(base.named_parameters()), {}
    leaves = {}
    for target in targets_for(base, config):
        update = adapters(model)[target.name]
        mine = {id(p) for p in update.trainable()}
        held = dict(update.named_parameters())
        given = {k: v.double() if v.is_floating_point() else v for k, v in numbers(update).items()}
        given = {k: v.requires_grad_() if k in held and id(held[k]) in mine else v for k, v in given.items()}
        leaves |= {(target.name, k): v for k, v in given.items() if v.requires_grad}
        key, rows = f"{target.layer_path}.weight", torch.arange(len(target.layer.weight))
        rows = rows if target.rows is None else rows[target.rows]
        weight = weights.get(key, values[key].detach())
        weights[key] = weight.index_put((rows,), changed(config, given, target.weight()))
    answer = torch.func.functional_call(base, values | weights, (batch(family).double(),))
    wanted = dict(zip(leaves, torch.autograd.grad(answer.square().sum(), list(leaves.values())), strict=True))
    model.double()(batch(family).double()).square().sum().backward()
    size = max(gradient.abs().max() for gradient in wanted.values())
    for (name, key), gradient in wanted.items():
        found = adapters(model)[name].get_parameter(key).grad
        assert found.dtype == torch.float32 and gradient.abs().max() > 0
        near(found.double(), gradient, 1e-4 * float(size))


@every_kind
def test_gradients_of_a_base_that_learns_too(kind, images):
    """As somebody may have it who trains everything: W counts where the update depends on it as well."""
    model = adapted(kind)
    layer = model.blocks[0].attn.proj
    base = layer._parameters["weight"].requires_grad_()
    wanted = torch.func.vjp(
        lambda w: changed(config_of(kind), numbers(adapters(model)["blocks.0.attn.out"]), w).float(), base.detach()
    )[1](direction := torch.randn(48, 48))[0]
    (found,) = torch.autograd.grad(layer.weight, base, direction)
    near(found, wanted, 1e-4)


@every_kind
def test_half_a_strength_is_half_the_change(kind):
    model = adapted(kind)
    set_adapters(model, "default", 0.5)
    near(output(model), output(written(tiny("vit"), term(kind, model, 0.5))))
    set_adapters(model, "default", -1.5)
    near(model(batch("vit")).detach(), output(written(tiny("vit"), term(kind, model, -1.5))))
    set_adapters(model, [])
    assert torch.equal(output(model), output(tiny("vit")))


@every_kind
@pytest.mark.parametrize("other", ("loca", "dora"))
def test_two_adapters_of_different_kinds_at_once(kind, other):
    """On the same rows of the same fused weight: both changes are of W, and add."""
    model = adapted(kind, name="a")
    adapted(other, name="b", model=model)
    stir(model, "b", seed=8)
    set_adapters(model, ["a", "b"], [0.7, -0.4])
    terms = term(kind, model, 0.7, "a"), term(other, model, -0.4, "b")
    wanted = output(written(tiny("vit"), *terms))
    near(output(model), wanted)
    near(model(batch("vit")).detach(), wanted)
    remove(model, "a")
    near(output(model), output(written(tiny("vit"), terms[1])))
    remove(model)
    assert torch.equal(output(model), output(tiny("vit")))


# Coming and going


@every_kind
def test_remove_restores_bits_classes_and_what_learns(kind):
    model, base = adapted(kind), tiny("vit")
    output(model)
    remove(model)
    assert torch.equal(output(model), output(base))
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert [(k, p.requires_grad) for k, p in model.named_parameters()] == [(k, True) for k, _ in base.named_parameters()]
    found = base.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


@every_kind
@families
def test_merged_weights_are_those_by_the_formula(kind, family):
    model = adapted(kind, family)
    wanted = written(tiny(family), term(kind, model, 0.5, family=family))
    set_adapters(model, "default", 0.5)
    remove(model, merge=True)
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert [type(module) for module in model.modules()] == [type(module) for module in wanted.modules()]


@every_kind
def test_saved_and_loaded_it_is_the_same_bit_for_bit(kind, tmp_path):
    model = adapted(kind)
    fresh = tiny("vit")
    # float32 locations are stored as cells: what acts is the same
    assert load_adapter(fresh, save_adapter(model, tmp_path)) == tuple(adapters(model))
    assert torch.equal(output(fresh), output(model))
    for name, update in adapters(fresh).items():
        for key, value in numbers(update).items():
            assert key == "locations" or torch.equal(value, numbers(adapters(model)[name])[key])
    save_adapter(fresh, tmp_path / "again")
    first, second = (next(folder.glob("*.safetensors")).read_bytes() for folder in (tmp_path, tmp_path / "again"))
    assert first == second


def in_order(update):
    return (update.cells[:, 0] * update.shape[1] + update.cells[:, 1]).argsort(stable=True)


@every_kind
def test_stored_in_float16_it_is_nearly_the_same(kind, tmp_path):
    """And exactly so what would change the whole weight: the magnitudes of DoRA, whole numbers. Cells come in their order."""
    model, fresh = adapted(kind), tiny("vit")
    full = save_adapter(model, tmp_path / "full").stat().st_size
    file = save_adapter(model, tmp_path, dtype=torch.float16)
    assert file.stat().st_size < full
    load_adapter(fresh, file)
    for name, update in adapters(fresh).items():
        for key, value in numbers(update).items():
            exact = numbers(adapters(model)[name])[key]
            if key == "coefficients":
                exact = exact[in_order(adapters(model)[name])]
            if key == "magnitude" or not value.is_floating_point():
                assert torch.equal(value, exact)
            elif key != "locations":
                assert value.dtype == torch.float32 and torch.equal(value, exact.half().float())
    effect = (output(model) - output(tiny("vit"))).abs().max()
    assert 0 < (output(fresh) - output(model)).abs().max() < 0.01 * effect


@every_kind
def test_a_file_is_read_whatever_the_defaults_are(kind, tmp_path):
    model, fresh = adapted(kind), tiny("vit")
    save_adapter(model, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            load_adapter(fresh, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output(fresh), output(model))
    assert gradients(fresh).keys() == gradients(adapted(kind)).keys() - {k for k in gradients(model) if "locations" in k}


@every_kind
def test_neither_default_dtype_nor_device_nor_inference_mode_matters(kind):
    expected, model = tiny("vit"), tiny("vit")
    inject(expected, config_of(kind))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            inject(model, config_of(kind))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, update in adapters(model).items():
        for key, value in numbers(adapters(expected)[name]).items():
            assert numbers(update)[key].dtype == value.dtype and torch.equal(numbers(update)[key], value)
        assert not any(p.is_inference() for p in update.parameters())


# Training


@every_kind
def test_parameter_groups_hold_what_is_trained_once_and_nothing_else(kind):
    model = adapted(kind)
    groups = parameter_groups(model, lr=0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    by_name = {group["name"]: group["params"] for group in groups}
    assert {id(p) for p in by_name["head"]} == {id(p) for p in model.head.parameters()}
    assert ("locations" in by_name) == (kind == "loca")
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


@every_kind
def test_training_moves_it_and_the_base_stays(kind, images, tmp_path):
    model, base = tiny("vit"), tiny("vit").state_dict()
    inject(model, config_of(kind))
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.01, weight_decay=0.1))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    found = model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in base.items() if not k.startswith("head."))
    fresh = tiny("vit")
    load_adapter(fresh, save_adapter(model, tmp_path))
    assert torch.equal(output(fresh), output(model))


@every_kind
def test_a_schedule_pauses_only_what_has_locations_to_learn(kind):
    """So that a training loop stays the same when the kind changes."""
    model = adapted(kind)
    schedule = AlternatingSchedule(model, coefficient_steps=0)
    learning = all(p.requires_grad for update in adapters(model).values() for p in update.trainable())
    assert (schedule.phase, learning) == (("locations", False) if kind == "loca" else ("coefficients", True))
    schedule.step()
    assert schedule.steps_done == 1


@pytest.mark.parametrize("kind", WITHOUT_LOCATIONS)
def test_a_schedule_leaves_other_kinds_alone(kind):
    model = adapted(kind)
    adapted("loca", name="b", model=model)
    AlternatingSchedule(model, coefficient_steps=0)
    assert all(p.requires_grad for update in adapters(model).values() for p in update.trainable())
    assert not any(update.coefficients.requires_grad for update in adapters(model, "b").values())


@every_kind
def test_gradient_checkpointing_changes_nothing(kind):
    model = adapted(kind).train()
    exact = gradients(model)
    model.set_grad_checkpointing(True)
    checkpointed = gradients(model)
    assert exact.keys() == checkpointed.keys()
    assert all(torch.equal(exact[name], checkpointed[name]) for name in exact)


# Precision


@every_kind
def test_half_precision_models_keep_exact_adapters(kind):
    model = adapted(kind)
    before = {name: numbers(update) for name, update in adapters(model).items()}
    exact, effect = output(model), (output(model) - output(tiny("vit"))).abs().max()
    model.to(torch.bfloat16)
    for name, update in adapters(model).items():
        for key, value in numbers(update).items():
            assert value.dtype == before[name][key].dtype and torch.equal(value, before[name][key])
    with torch.no_grad():
        answer = model(batch("vit").bfloat16())
    assert answer.dtype == torch.bfloat16 and (answer - exact).abs().max() < 0.25 * effect
    model(batch("vit").bfloat16()).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for update in adapters(model).values() for p in update.trainable())


@every_kind
def test_autocast_is_for_activations(kind):
    model = adapted(kind)
    exact, effect = output(model), (output(model) - output(tiny("vit"))).abs().max()
    model = copy.deepcopy(model)  # nothing is kept of before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (output(model) - exact).abs().max() < 0.25 * effect
    assert torch.equal(output(model), exact)  # what was made and kept under autocast is no less precise
    wanted = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = model(batch("vit"))
    answer.float().square().sum().backward()
    for name, value in wanted.items():
        found = dict(model.named_parameters())[name].grad
        assert found.dtype == torch.float32 and (found - value).norm() <= 0.15 * value.norm() + 1e-3


@every_kind
def test_what_is_kept_follows_every_change(kind):
    """Of a single number, and through `.data`, which no version tells of."""
    model = adapted(kind)
    output(model)
    for key, parameter in adapters(model)["blocks.0.attn.q"].named_parameters():
        if key != "locations":
            parameter.data.view(-1)[3] += 2.0
            near(output(model), output(written(tiny("vit"), term(kind, model))))


# Copies and compilers

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@every_kind
@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
def test_copies_are_independent_and_complete(kind, clone):
    model = adapted(kind)
    answer, twin = output(model), clone(model)
    assert torch.equal(output(twin), answer)
    stir(twin, seed=9)
    assert torch.equal(output(model), answer)
    assert not torch.equal(output(twin), answer)
    remove(twin)
    assert torch.equal(output(twin), output(tiny("vit")))


@every_kind
def test_the_norm_is_that_of_the_matrix(kind):
    """Also with two components at one cell, and at a cell and its mirror image."""
    for update in adapters(adapted(kind)).values():
        if kind in ("loca", "fourierft"):
            update.locations.data[1] = update.locations[0]
            update.locations.data[2] = ((-update.cells[0]) % torch.tensor(update.shape)) / (torch.tensor(update.shape) - 1)
        if update.needs_weight:
            assert update.norm() is None
        else:
            assert update.norm() == pytest.approx(update.delta().norm().item(), rel=1e-4)


@every_kind
def test_state_dicts_and_whole_models_travel(kind):
    model, other = adapted(kind), tiny("vit")
    inject(other, config_of(kind))
    output(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), output(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(output(torch.load(stream, weights_only=False)), output(model))


class Two(nn.Module):
    """An attention layer as timm has it, with little else, for what takes a compiler long."""

    def __init__(self):
        super().__init__()
        self.attn = copy.deepcopy(tiny("vit").blocks[0].attn)

    def forward(self, x):
        return self.attn(x)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
@pytest.mark.parametrize(
    ("kind", "learned"),
    [
        *((kind, True) for kind in ("fourierft", "lora", "dora", "selora haar")),
        *((kind, False) for kind in ("lora", "dora", "selora fft")),
    ],
)
def test_compiled_it_is_the_same(kind, learned):
    torch._dynamo.reset()
    model, x = Two(), torch.randn(2, 5, 48)
    inject(model, config_of(kind, ("q", "v", "out")))
    stir(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if not learned:
        with torch.no_grad():
            near(compiled(x), model(x))
            set_adapters(model, "default", 0.5)
            near(compiled(x), model(x))
            stir(model, seed=9)
            set_adapters(model, "default", 2.0)
            near(compiled(x), copy.deepcopy(model)(x))
        return
    found, wanted = [], []
    for run, into in ((compiled, found), (model, wanted)):
        model.zero_grad()
        run(x).square().sum().backward()
        into += [p.grad for update in adapters(model).values() for p in update.trainable()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# Settings that do not fit, and merging what others depend on


@every_kind
def test_settings_that_do_not_fit_name_the_projection_and_touch_nothing(kind):
    model, before = tiny("vit"), tiny("vit").state_dict()
    config = config_of(kind)
    object.__setattr__(config, "r" if hasattr(config, "r") else "n_components", 10**9)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q"):
        inject(model, config)
    assert model.state_dict().keys() == before.keys() and not active_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_a_weight_decomposed_adapter_depends_on_is_not_merged_under_it():
    """Its change is of W, not of W with another in it: the output would jump."""
    model = adapted("lora", name="a")
    adapted("dora", name="b", model=model)
    answer = output(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q: adapter 'b' depends on the weight"):
        remove(model, "a", merge=True)
    assert torch.equal(output(model), answer)
    remove(model, merge=True)
    near(output(model), answer)


def test_a_weight_decomposed_adapter_is_merged_under_others():
    model = adapted("dora", name="a")
    adapted("lora", name="b", model=model)
    answer = output(model)
    remove(model, "a", merge=True)
    near(output(model), answer)


def test_a_model_without_values_has_no_weight_to_start_from():
    model = tiny("vit").to("meta")
    for kind in ("sdctft", "dora"):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q: its weight has no values yet"):
            inject(model, config_of(kind))
    inject(model, LoRAConfig())
    assert model(batch("vit").to("meta")).shape == (2, 3)
