"""LoRA and DoRA against peft's layers, and products of factors with activations against dense matrices."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from loca_vision import LoRAConfig, adapters, inject
from loca_vision.functional.low_rank_linear import add_low_rank, low_rank_term
from loca_vision.methods.lora import LoRA
from support.formulas import stir
from support.timm_models import tiny

ROWS = {
    "all": [None],
    "query and value": [slice(0, 4), slice(8, 12)],
    "interleaved": [torch.tensor([0, 1, 6, 7]), torch.tensor([4, 5, 10, 11])],
    "two on the same rows": [slice(2, 9), slice(2, 9), None],
    "a mixture": [slice(0, 3), torch.tensor([11, 0, 5]), None],
}
rows_of_all_sorts = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


# Factors on activations


def pairs_of(rows, dtype=torch.float64, ranks=(2, 1, 3)):
    sizes = [len(torch.arange(12)[slice(None) if where is None else where]) for where in rows]
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    return [(where, make(size, rank), make(rank, 5)) for where, size, rank in zip(rows, sizes, ranks, strict=False)]


def added(result, x, pairs):
    """`result` + the terms, by a whole matrix in autograd's hands."""
    whole = torch.zeros(12, 5, dtype=x.dtype)
    for where, up, down in pairs:
        index = torch.arange(12)[slice(None) if where is None else where]
        whole = whole.index_add(0, index, up @ down)
    return result + F.linear(x, whole)


@rows_of_all_sorts
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("learns_x", (True, False))
def test_values_and_gradients_are_those_of_whole_matrices(rows, lead, learns_x):
    pairs, x = pairs_of(rows), torch.randn(*lead, 5, dtype=torch.float64, requires_grad=learns_x)
    weight = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    inputs = [weight, *(x,) * learns_x, *(factor for _, *of in pairs for factor in of)]
    mine, whole = add_low_rank(F.linear(x, weight), x, pairs), added(F.linear(x, weight), x, pairs)
    torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(mine)
    ours, theirs = (torch.autograd.grad(answer, inputs, direction) for answer in (mine, whole))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_activations_that_do_not_lie_in_a_row():
    pairs, x = pairs_of([slice(0, 4), torch.tensor([5, 9])]), torch.randn(5, 3, 2, dtype=torch.float64).transpose(0, 2)
    torch.testing.assert_close(low_rank_term(x, 12, pairs), added(0, x, pairs), rtol=1e-12, atol=1e-12)


def test_what_wants_no_gradient_gets_none():
    pairs = pairs_of([slice(0, 4), slice(8, 12)], torch.float32)
    pairs[1][1].requires_grad_(False)
    low_rank_term(torch.randn(7, 5), 12, pairs).sum().backward()
    assert pairs[1][1].grad is None
    assert all(factor.grad.abs().sum() > 0 for factor in (*pairs[0][1:], pairs[1][2]))


@rows_of_all_sorts
def test_under_autocast_and_out_of_it(rows):
    """The product is in autocast's dtype, gradients in those of the factors and of x."""
    pairs, x = pairs_of(rows, torch.float32), torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(12, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = add_low_rank(F.linear(x, weight), x, pairs)
        alone = low_rank_term(x, 12, pairs)
    exact = added(F.linear(x, weight), x, pairs)
    assert answer.dtype == alone.dtype == torch.bfloat16
    for found, wanted in ((answer, exact), (alone, exact - F.linear(x, weight))):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
    inputs = [x, *(factor for _, *of in pairs for factor in of)]
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), inputs) for y in (answer, exact))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.04 * other.norm()


def test_autocast_leaves_float64_alone():
    pairs, x = pairs_of([slice(0, 4)]), torch.randn(7, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = low_rank_term(x, 12, pairs)
    torch.testing.assert_close(found, added(0, x, pairs), rtol=1e-12, atol=1e-12)


# peft's layers


def as_peft(model, names, update_of, **settings):
    """The model with peft's layers, which have the factors and magnitudes of mine."""
    theirs = get_peft_model(model, LoraConfig(target_modules=list(names), **settings))
    with torch.no_grad():
        for path, layer in theirs.base_model.model.named_modules():
            if path in names:
                update = update_of(path)
                layer.lora_A["default"].weight.copy_(update.down)
                layer.lora_B["default"].weight.copy_(update.up)
                if update.magnitude is not None:
                    layer.lora_magnitude_vector["default"].weight.copy_(update.magnitude)
    return theirs


def learned_by(model, path):
    layer = model.base_model.model.get_submodule(path)
    magnitude = {"magnitude": layer.lora_magnitude_vector["default"].weight} if layer.lora_magnitude_vector else {}
    return {"up": layer.lora_B["default"].weight, "down": layer.lora_A["default"].weight} | magnitude


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize(("r", "alpha"), [(1, 1.0), (3, 2.0), (5, 16.0)])
def test_a_layer_is_peft_s(use_dora, r, alpha):
    linear = nn.Sequential(nn.Linear(7, 9))
    mine = LoRA((9, 7), r, alpha / r, weight_decomposed=use_dora)
    for key, value in mine.named_parameters():
        nn.init.uniform_(value, 0.5, 2.0) if key == "magnitude" else nn.init.normal_(value)
    theirs = as_peft(linear, ["0"], lambda path: mine, r=r, lora_alpha=alpha, use_dora=use_dora)
    layer, x = theirs.base_model.model[0].base_layer, torch.randn(4, 7, requires_grad=True)
    weight = layer.weight.detach()
    answer = F.linear(x, weight + mine.delta(weight=weight), layer.bias)
    torch.testing.assert_close(answer, theirs(x), rtol=1e-5, atol=1e-5)
    direction, others = torch.randn(4, 9), learned_by(theirs, "0")
    ours = torch.autograd.grad(answer, (x, *(getattr(mine, key) for key in others)), direction)
    peft_s = torch.autograd.grad(theirs(x), (x, *others.values()), direction)
    for one, other in zip(ours, peft_s, strict=True):
        torch.testing.assert_close(one, other.view_as(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", (False, True))
def test_a_vision_transformer_is_peft_s(images, use_dora):
    """Where a projection is a layer of its own: out and fc1."""
    config = LoRAConfig(r=4, alpha=6.0, targets=("out", "fc1"), use_dora=use_dora)
    mine = tiny("vit")
    inject(mine, config)
    stir(mine)
    names = {"attn.proj": "attn.out", "mlp.fc1": "mlp.fc1"}
    projection = {f"blocks.{i}.{path}": f"blocks.{i}.{name}" for i in (0, 1) for path, name in names.items()}
    found = adapters(mine)
    assert set(projection.values()) == set(found)
    theirs = as_peft(tiny("vit"), projection, lambda path: found[projection[path]], r=4, lora_alpha=6.0, use_dora=use_dora)
    torch.testing.assert_close(mine(images), theirs(images), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(mine(images), theirs(images), rtol=1e-4, atol=1e-5)
    for model in (mine, theirs):
        model(images).square().sum().backward()
    for path, name in projection.items():
        for key, parameter in learned_by(theirs, path).items():
            wanted = parameter.grad.view_as(getattr(found[name], key))
            torch.testing.assert_close(getattr(found[name], key).grad, wanted, rtol=1e-3, atol=1e-4)


# The start, and what is refused


def test_the_inner_factor_begins_as_peft_s_does():
    """Uniform in +-1 / sqrt(q), from seed and name."""
    model = tiny("vit")
    inject(model, LoRAConfig(r=32))
    downs = torch.cat([update.down.detach().flatten() for update in adapters(model).values()])
    assert downs.abs().max() <= 48**-0.5 and downs.abs().max() > 0.99 * 48**-0.5
    assert downs.var().item() == pytest.approx(1 / (3 * 48), rel=0.03)
    assert all(torch.count_nonzero(update.up) == 0 for update in adapters(model).values())
    again, other = tiny("vit"), tiny("vit")
    inject(again, LoRAConfig(r=32))
    inject(other, LoRAConfig(r=32, seed=1))
    for name, update in adapters(model).items():
        assert torch.equal(update.down, adapters(again)[name].down)
        assert not torch.equal(update.down, adapters(other)[name].down)
    assert len(torch.stack([update.down[0, 0] for update in adapters(model).values()]).unique()) == 4


def test_the_magnitudes_begin_as_the_norms_of_the_rows():
    model, base = tiny("vit"), tiny("vit")
    inject(model, LoRAConfig(use_dora=True))
    norms = base.blocks[0].attn.qkv.weight.norm(dim=1)
    assert torch.equal(adapters(model)["blocks.0.attn.q"].magnitude, norms[:48])
    assert torch.equal(adapters(model)["blocks.0.attn.v"].magnitude, norms[96:])


def test_a_row_of_zeros_changes_nothing_and_learns():
    weight = torch.randn(4, 6)
    weight[2] = 0
    update = LoRA((4, 6), 2, 1.0, weight_decomposed=True)
    nn.init.normal_(update.down)
    update.magnitude.data.copy_(weight.norm(dim=1))
    delta = update.delta(weight=weight)
    torch.testing.assert_close(delta, torch.zeros(4, 6), rtol=0, atol=1e-6)
    delta.sum().backward()
    assert all(p.grad.isfinite().all() for p in update.parameters())


@pytest.mark.parametrize("r", (49, 10**6, 10**12, 10**30))
def test_a_rank_no_matrix_has_is_refused_before_anything_is_made(vit, r):
    before = vit.state_dict().keys()
    with pytest.raises(ValueError, match=rf"blocks\.0\.attn\.q: r={r}: a 48 x 48 matrix has at most the rank 48"):
        inject(vit, LoRAConfig(r=r))
    assert vit.state_dict().keys() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("r", 2.0), ("r", True), ("alpha", 0), ("use_dora", None), ("targets", ("q", "q")), ("seed", 2**63)],
)
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        LoRAConfig(**{field: value})
