"""Adapted linear layers under autocast, in half precision, copied, checkpointed, compiled, and without gradients."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from loca_vision import LoCAConfig, adapters, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.functional.row_linear import add_rows
from loca_vision.layers.weight_updates import WeightUpdates
from support.timm_models import randomise

CONFIG = LoCAConfig(n_components=40, targets=("q", "v", "out", "fc1"))


@pytest.fixture
def adapted(vit):
    inject(vit, CONFIG)
    randomise(vit)
    return vit


def gradients(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_without_gradients_a_weight_is_built_once(adapted, images, builds):
    with torch.no_grad():
        first = adapted(images)
        once = len(builds)
        assert torch.equal(adapted(images), first)
    with torch.inference_mode():
        assert torch.equal(adapted(images), first)
    assert len(builds) == once == 6  # qkv, out and fc1 of two blocks: q and v share a weight


CHANGES = {
    "in place": lambda s: s.coefficients.mul_(2),
    "through .data": lambda s: s.coefficients.data.mul_(2),
    "new data": lambda s: setattr(s.coefficients, "data", s.coefficients.data * 2),
    "locations": lambda s: s.locations.data.copy_(1 - s.locations),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_kept_weight_follows_every_change(adapted, images, change):
    with torch.no_grad():
        before = adapted(images)
        for spectrum in adapters(adapted).values():
            change(spectrum)
        after = adapted(images)
        fresh = copy.deepcopy(adapted)(images)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_a_kept_weight_follows_the_base(adapted, images):
    with torch.no_grad():
        before = adapted(images)
        adapted.load_state_dict({k: v * 1.5 for k, v in adapted.state_dict().items()})
        assert torch.equal(adapted(images), copy.deepcopy(adapted)(images))
        assert not torch.equal(adapted(images), before)


def test_a_weight_kept_in_inference_mode_serves_training(adapted, images):
    with torch.inference_mode():
        adapted(images)
    for spectrum in adapters(adapted).values():
        spectrum.requires_grad_(False)
    inputs = images.clone().requires_grad_()
    adapted(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_a_base_trained_with_a_frozen_adapter_gets_its_gradient(adapted, images):
    for spectrum in adapters(adapted).values():
        spectrum.requires_grad_(False)
    adapted.blocks[0].attn.qkv._parameters["weight"].requires_grad_(True)
    adapted(images).sum().backward()
    assert adapted.blocks[0].attn.qkv._parameters["weight"].grad.abs().sum() > 0


def test_a_weight_that_cannot_be_built_is_not_taken_for_the_base(adapted, images):
    """Python would answer an AttributeError inside a property by finding W itself."""
    for spectrum in adapters(adapted).values():
        del spectrum.scale
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"the adapted weight cannot be built: .*scale"):
        adapted(images)


def test_threads_never_see_the_base_weight(adapted, images):
    layer, stop, seen = adapted.blocks[0].attn.qkv, threading.Event(), []

    def train():
        while not stop.is_set():
            layer(torch.ones(1, 48))

    thread = threading.Thread(target=train)
    thread.start()
    with torch.no_grad():
        seen = [layer.weight is layer._parameters["weight"] for _ in range(3000)]
    stop.set()
    thread.join()
    assert not any(seen)


def test_the_weight_is_read_only(adapted):
    """As for the replicas of `nn.DataParallel`, which have tensors in the place of parameters."""
    replica = copy.copy(adapted.blocks[0].attn.qkv)
    replica.__dict__["_parameters"] = {}
    with pytest.raises(RuntimeError, match="to be read only"):
        replica.weight = torch.zeros(144, 48)


def test_a_layer_is_called_like_the_one_it_was(adapted):
    layer, x = adapted.blocks[0].attn.qkv, torch.randn(2, 48)
    assert torch.equal(layer(input=x), layer(x))


def test_a_base_stored_in_eight_bits():
    base = torch.randn(6, 5).to(torch.float8_e4m3fn)
    delta = torch.randn(6, 5)
    assert torch.equal(add_rows(base, [(None, delta)]).float(), (base.float() + delta).to(base.dtype).float())


def test_autocast_leaves_float64_alone(adapted, images):
    adapted.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted.blocks[0].attn.qkv(torch.randn(2, 48).double()).dtype == torch.float64


def test_training_does_not_keep_weights(adapted, images):
    with torch.no_grad():
        adapted(images)
    adapted(images)
    assert all(module._cached is None for module in adapted.modules() if isinstance(module, WeightUpdates))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_models_keep_exact_adapters(adapted, images, dtype):
    before = {name: [p.detach().clone() for p in s.parameters()] for name, s in adapters(adapted).items()}
    exact = adapted.blocks[0].attn.qkv.weight.detach()
    half = copy.deepcopy(adapted).to(dtype)
    for name, spectrum in adapters(half).items():
        for old, new in zip(before[name], spectrum.parameters(), strict=True):
            assert new.dtype == torch.float32 and torch.equal(old, new)
    weight = half.blocks[0].attn.qkv.weight
    assert weight.dtype == dtype
    # W was rounded with the model, the sum is rounded once more: no more than two half units in the last place.
    assert ((weight.float() - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + 0.05)).all()
    gradient = gradients(half, images.to(dtype))
    assert all(g.dtype == torch.float32 for name, g in gradient.items() if "loca" in name)


def test_the_sum_is_rounded_once():
    base = torch.randn(64, 64).to(torch.bfloat16)
    deltas = [torch.randn(64, 64) * 1e-3 for _ in range(2)]
    expected = (base.float() + deltas[0]).to(torch.bfloat16)
    assert torch.equal(add_rows(base, [(None, deltas[0])]), expected)
    assert torch.equal(add_rows(base, [(slice(0, 32), deltas[0][:32])])[:32], expected[:32])


@pytest.mark.parametrize("kind", ("slices", "index", "mixed"))
def test_rows_without_an_update_stay_bit_identical(kind):
    base = torch.randn(12, 5).to(torch.bfloat16)
    where = {"slices": [slice(8, 12), slice(0, 4)], "index": [torch.tensor([0, 3, 9]), torch.tensor([1, 11])]}
    rows = where.get(kind, [slice(0, 4), torch.tensor([9, 5])])
    updates = [(r, torch.randn(len(base[r]), 5)) for r in rows]
    expected = base.float()
    for r, delta in updates:
        expected[r] += delta
    result = add_rows(base, updates)
    assert torch.equal(result, expected.to(base.dtype))
    untouched = sorted(set(range(12)) - {int(i) for r in rows for i in torch.arange(12)[r]})
    assert torch.equal(result[untouched], base[untouched])


def test_autocast_gives_the_gradients_of_float32_nearly(adapted, images):
    exact = gradients(adapted, images)
    adapted.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted(images)
    output.float().square().sum().backward()
    for name, value in exact.items():
        got = dict(adapted.named_parameters())[name].grad
        assert got.dtype == torch.float32
        assert (got - value).norm() <= 0.1 * value.norm() + 1e-4


def test_gradient_checkpointing_changes_nothing(adapted, images):
    adapted.train()
    exact = gradients(adapted, images)
    adapted.set_grad_checkpointing(True)
    checkpointed = gradients(adapted, images)
    assert exact.keys() == checkpointed.keys()
    assert all(torch.equal(exact[name], checkpointed[name]) for name in exact)


@pytest.mark.parametrize("clone", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
def test_copies_are_independent_and_complete(adapted, images, clone):
    with torch.no_grad():
        output = adapted(images)
        twin = clone(adapted)
        assert torch.equal(twin(images), output)
        for spectrum in adapters(twin).values():
            spectrum.coefficients.zero_()
        assert torch.equal(adapted(images), output)
        remove(twin)
    assert type(twin.blocks[0].attn.qkv) is nn.Linear


def test_whole_models_go_through_torch_save(adapted, images):
    stream = io.BytesIO()
    torch.save(adapted, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(images), adapted(images))


def test_state_dict_travels_between_injected_models(adapted, build, images):
    other = build("vit")
    inject(other, LoCAConfig(n_components=40, targets=CONFIG.targets, seed=9))
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(images), adapted(images))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
@pytest.mark.parametrize("learned", (True, False))
def test_compiled_after_injection(adapted, images, learned, tmp_path):
    """One graph, with the gradients of the eager model, and adapter functions that see through the wrapper."""
    exact = gradients(adapted, images)
    reference = adapted(images).detach()
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    if not learned:
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), reference, rtol=1e-5, atol=1e-5)
        return
    adapted.zero_grad()
    compiled(images).square().sum().backward()
    for name, value in exact.items():
        torch.testing.assert_close(dict(adapted.named_parameters())[name].grad, value, rtol=1e-3, atol=1e-4)
    assert adapters(compiled).keys() == adapters(adapted).keys()
    file = save_adapter(compiled, tmp_path)
    set_adapters(compiled, [])
    remove(compiled)
    load_adapter(compiled, file)
    torch.testing.assert_close(adapted(images), reference)
