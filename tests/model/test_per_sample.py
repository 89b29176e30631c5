"""Several adapters in one batch: each sample answers, and teaches, as in a call of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loca_vision import LoCAConfig, LoRAConfig, adapters, inject, per_sample, remove, set_adapters
from support.mixed import ENTRIES, KINDS, one_by_one, stir, with_adapters
from support.timm_models import batch, tiny


def images(count: int = len(ENTRIES)) -> Tensor:
    return torch.randn(count, 3, 32, 32)


@torch.no_grad()
def test_every_sample_has_its_own_adapters() -> None:
    model, x = with_adapters(tiny("vit").eval()), images()
    wanted = one_by_one(model, x, ENTRIES)
    set_adapters(model, ["loca", "lora"])  # which makes no difference
    with per_sample(model, ENTRIES):
        found = model(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    differences = torch.pdist(wanted)
    assert differences[:-1].min() > 1e-3  # all but the two base samples differ, whose images do too


def test_gradients_go_to_each_adapter_from_its_own_samples() -> None:
    model, weights = with_adapters(tiny("vit").train()), torch.randn(len(ENTRIES), 10)
    learned = [p for name in KINDS for update in adapters(model, name).values() for p in update.parameters() if p.requires_grad]
    x = images().requires_grad_()
    with per_sample(model, ENTRIES):
        found = model(x)
    mine = torch.autograd.grad(found, [x, *learned], weights[:, : found.shape[1]])
    wanted = one_by_one(model, x, ENTRIES)
    theirs = torch.autograd.grad(wanted, [x, *learned], weights[:, : found.shape[1]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for own, alone in zip(mine, theirs, strict=True):
        assert alone.abs().max() > 0
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-5)


def test_one_step_teaches_every_adapter_what_its_own_step_would() -> None:
    first = with_adapters(tiny("vit").train(), {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)})
    second, x, entries = copy.deepcopy(first), images(4), ["a", "b", "b", "a"]
    for model, samples in ((first, None), (second, entries)):
        optimizer = torch.optim.SGD([p for n in "ab" for u in adapters(model, n).values() for p in u.parameters()], lr=1e-2)
        if samples is None:
            one_by_one(model, x, entries).square().sum().backward()
        else:
            with per_sample(model, samples):
                model(x).square().sum().backward()
        optimizer.step()
    for name in "ab":
        for mine, theirs in zip(adapters(first, name).values(), adapters(second, name).values(), strict=True):
            for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_a_context_that_spans_steps_follows_what_is_learned() -> None:
    model, x = with_adapters(tiny("vit").train(), {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)}), images(2)
    learned = [p for n in "ab" for u in adapters(model, n).values() for p in u.parameters()]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    with per_sample(model, ["a", "b"]):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        found = model.eval()(x)
    torch.testing.assert_close(found, one_by_one(model, x, ["a", "b"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_run_again_with_the_same_adapters(reentrant: bool) -> None:
    model: Any = with_adapters(tiny("vit").train(), {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)})
    x, entries = images(3).requires_grad_(), ["a", None, {"b": 1.5}]
    learned = [p for n in "ab" for u in adapters(model, n).values() for p in u.parameters() if p.requires_grad]

    def run(blocks: nn.Module, tokens: Tensor) -> Tensor:
        result: Tensor = checkpoint(blocks, tokens, use_reentrant=reentrant)
        return result

    with per_sample(model, entries):
        wanted = torch.autograd.grad(model(x).square().sum(), learned)
        blocks, model.blocks.forward = model.blocks, None  # the loss is computed by hand, with a checkpoint in it
        del blocks.forward
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        loss = model.forward_head(model.norm(run(model.blocks, tokens))).square().sum()
    set_adapters(model, "a")
    for parameter in learned:
        parameter.grad = None
    loss.backward()  # outside of the context
    for parameter, grad in zip(learned, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_other_threads_and_calls_are_not_touched() -> None:
    model, x = with_adapters(tiny("vit").eval()), images(4)
    lists: list[list[Any]] = [["loca", None, "lora", "dora"], ["lora", "selora", "loca", {"loca": 2.0}], [None] * 4]
    wanted = [one_by_one(model, x, own) for own in lists]
    set_adapters(model, "sdctft")
    usual = model(x)
    found: list[list[Tensor]] = [[] for _ in range(4)]
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for _ in range(8):
            with torch.no_grad():
                if number == 3:
                    found[3].append(model(x))
                    continue
                with per_sample(model, lists[number]):
                    found[number].append(model(x))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, right in zip(found, [*wanted, usual], strict=True):
        assert len(answers) == 8
        for answer in answers:
            torch.testing.assert_close(answer, right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_contexts_nest_and_end_with_an_error() -> None:
    model, x = with_adapters(tiny("vit").eval()), images(2)
    set_adapters(model, "loca")
    usual = model(x)
    with pytest.raises(KeyError), per_sample(model, ["lora", None]):
        outer = model(x)
        with per_sample(model, ["dora", "loca"]):
            inner = model(x)
        assert torch.equal(model(x), outer) and not torch.allclose(inner, outer)
        raise KeyError
    assert torch.equal(model(x), usual)


@torch.no_grad()
def test_what_a_call_uses_stays_though_the_adapter_is_removed_meanwhile() -> None:
    model, x = with_adapters(tiny("vit").eval(), {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)}), images(2)
    wanted = one_by_one(model, x, ["a", "b"])
    with per_sample(model, ["a", "b"]):
        remove(model, "a")
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no adapter 'a'"), per_sample(model, ["a", "b"]):
        pass


@torch.no_grad()
def test_a_copy_is_another_model() -> None:
    model, x = with_adapters(tiny("vit").eval(), {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)}), images(2)
    with per_sample(model, ["a", "b"]):
        wanted = model(x)
    other = copy.deepcopy(model)
    set_adapters(other, "b")
    alone = other(x)
    with per_sample(model, ["a", "b"]):
        torch.testing.assert_close(other(x), alone)
    with per_sample(other, ["a", "b"]):
        torch.testing.assert_close(other(x), wanted)


@torch.no_grad()
def test_half_precision_autocast_and_double() -> None:
    model, x = with_adapters(tiny("vit").eval()), images()
    wanted = one_by_one(model, x, ENTRIES)
    with per_sample(model, ENTRIES), torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    model.double()
    wanted = one_by_one(model, x.double(), ENTRIES)
    with per_sample(model, ENTRIES):
        assert (model(x.double()) - wanted).abs().max() < 1e-5
    model.to(torch.bfloat16)
    with per_sample(model, ENTRIES):
        assert (model(x.bfloat16()).float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_adapters_inside_inference_mode() -> None:
    model, x = with_adapters(tiny("vit").eval()), images()
    with torch.inference_mode():
        wanted = one_by_one(model, x, ENTRIES)
        with per_sample(model, ENTRIES):
            torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_kind_of_ones_own_needs_no_more_than_a_matrix() -> None:
    from loca_vision.functional.transforms import ordinary_tensors
    from loca_vision.methods.update import Update

    class Constant(Update):
        def __init__(self, shape: tuple[int, int]) -> None:
            super().__init__(shape)
            self.value = nn.Parameter(torch.tensor(0.01))

        def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
            return strength * self.value.expand(self.shape)

    model, x = with_adapters(tiny("vit").eval(), {"a": LoCAConfig(n_components=20)}), images(2)
    inject(model, LoRAConfig(r=1), "b")
    with ordinary_tensors():
        for site in (module.loca for module in model.modules() if hasattr(module, "loca")):
            for index, slot in enumerate(site.slots):
                if slot.adapter == "b":
                    site.updates[index] = Constant(site.updates[index].shape)
    set_adapters(model, ["a", "b"])
    wanted = one_by_one(model, x, [{"a": 1.0, "b": 0.5}, "b"])
    with per_sample(model, [{"a": 1.0, "b": 0.5}, "b"]):
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


BAD: list[tuple[Any, type[Exception], str]] = [
    (["nope", "loca"], ValueError, r"no adapter 'nope' in the model; it has 'loca', "),
    (["locaa", None], ValueError, "perhaps loca"),
    ([], ValueError, r"names=\[\]: expected one entry for each sample"),
    ("loca", TypeError, "names is a str: expected a list with one entry for each sample"),
    ([1, None], TypeError, r"names\[0\]=1: expected the name of an adapter, None, or a mapping"),
    ([{"loca": float("nan")}, None], ValueError, r"names\[0\]\['loca'\]=nan: expected a finite number"),
    ([{"loca": "much"}, None], ValueError, r"names\[0\]\['loca'\]='much'"),
]


@pytest.mark.parametrize(("names", "error", "sentence"), BAD)
def test_bad_entries_are_refused_before_anything_runs(names: Any, error: type[Exception], sentence: str) -> None:
    model = with_adapters(tiny("vit").eval())
    with pytest.raises(error, match=sentence), per_sample(model, names):
        pytest.fail("entered")


@pytest.mark.parametrize("call", ["__call__", "forward_features"])
def test_another_number_of_entries_than_samples_is_refused(call: str) -> None:
    model = with_adapters(tiny("vit").eval())
    with (
        pytest.raises(
            ValueError, match="has 2 entries, one for each sample, and VisionTransformer was called with a batch of 4"
        ),
        per_sample(model, ["loca", None]),
    ):
        getattr(model, call)(images(4))


def test_what_has_no_adapters_or_is_no_model_is_refused() -> None:
    for model, error, sentence in (
        (tiny("vit"), ValueError, "VisionTransformer has no adapter; inject or load one first"),
        (nn.DataParallel(tiny("vit")), TypeError, "use DistributedDataParallel"),
        ({"unet": 1}, TypeError, r"a pipeline takes loca_adapters=\[...\]"),
    ):
        with pytest.raises(error, match=sentence), per_sample(model, ["a"]):  # type: ignore[arg-type]
            pytest.fail("entered")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_export_is_refused_in_a_sentence() -> None:
    model = with_adapters(tiny("vit").eval(), {"a": LoCAConfig(n_components=5), "b": LoRAConfig(r=2)})
    with per_sample(model, ["a", "b"]), pytest.raises(Exception, match="per_sample cannot be exported or traced"):
        torch.export.export(model, (images(2),), strict=False)
    with torch.no_grad(), per_sample(model, ["a", "b"]), pytest.raises(RuntimeError, match="cannot be exported or traced"):
        torch.jit.trace(model, images(2))
    torch.export.export(model, (images(2),), strict=False)  # outside it can


class Transposed(nn.Module):
    """Attention is called with the tokens first, and one layer with no batch at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.places = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.places(torch.ones(4, 2))  # as long as a batch of two is divisible by
        first = self.fc1(x.transpose(0, 1)).transpose(0, 1)
        result: Tensor = self.fc2(first + bias[:1])
        return result


@pytest.mark.parametrize(("layers", "works"), [(["fc2"], True), (["fc1"], False), (["places"], False)])
def test_layers_that_have_the_batch_elsewhere_are_refused(layers: Sequence[str], works: bool) -> None:
    model, x = Transposed(), torch.randn(2, 4, 8)
    for name in "ab":
        inject(model, LoRAConfig(r=1, targets=("linear",), layers=layers), name)
        stir(model, name)
    with torch.no_grad():
        wanted = one_by_one(model, x, ["a", "b"])
        alike = one_by_one(model, x, ["a", "a"])
        with per_sample(model, ["a", "a"]):  # all samples alike: it does not matter where they are
            torch.testing.assert_close(model(x), alike)
        with per_sample(model, ["a", "b"]):
            if works:
                torch.testing.assert_close(model(x), wanted)
            else:
                with pytest.raises(ValueError, match="its updates cannot differ between the 2 samples"):
                    model(x)


def test_trying_a_model_leaves_the_generator_alone() -> None:
    model = with_adapters(tiny("vit").train(), {"a": LoCAConfig(n_components=5), "b": LoRAConfig(r=2)})
    torch.manual_seed(0)
    with per_sample(model, ["a", "b"]):
        model(images(2))
        state = torch.get_rng_state()
        torch.manual_seed(0)
        model(images(2))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["eva02", "beit", "swinv2", "swin", "xcit", "tiny_vit", "crossvit", "mobilevit", "naflexvit"]
)
def test_families_that_read_weights_have_windows_or_keep_statistics(family: str) -> None:
    model = tiny(family).eval().double()
    x = torch.cat([batch(family)] * 3)[:3].double()
    x = x + 0.3 * torch.randn_like(x)
    for name, config in {"a": LoCAConfig(n_components=6), "b": LoRAConfig(r=1)}.items():
        inject(model, config, name)
        stir(model, name)
    wanted = one_by_one(model, x, ["a", None, "b"])
    with per_sample(model, ["a", None, "b"]):
        found = model(x)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
