"""Mixed batches in compiled models: other names compile nothing anew, and everything else stays right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from loca_vision import adapters, per_sample, set_adapters
from support.mixed import ENTRIES, KINDS, one_by_one, with_adapters
from support.timm_models import batch, tiny


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@torch.no_grad()
def test_other_names_compile_nothing_anew() -> None:
    model, x = with_adapters(tiny("vit").eval()), torch.randn(len(ENTRIES), 3, 32, 32)
    lists = [ENTRIES, ENTRIES[::-1], ["loca"] * len(ENTRIES), ([None, "dora"] * len(ENTRIES))[: len(ENTRIES)]]
    wanted = [one_by_one(model, x, own) for own in lists]
    set_adapters(model, ["loca", "lora"])
    usual = model(x)
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), usual)
    with per_sample(model, lists[0]):
        torch.testing.assert_close(compiled(x), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(x), usual, atol=1e-5, rtol=1e-5)
    before = counter.frame_count
    for own, right in zip(lists[1:], wanted[1:], strict=True):
        with per_sample(model, own):
            torch.testing.assert_close(compiled(x), right, atol=1e-5, rtol=1e-5)
    set_adapters(model, "selora")
    torch.testing.assert_close(compiled(x), one_by_one(model, x, ["selora"] * len(ENTRIES)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == before
    with pytest.raises(ValueError, match="has 4 entries"), per_sample(model, ENTRIES[:4]):
        compiled(x)


@torch.no_grad()
def test_inductor_computes_the_same() -> None:
    vit = tiny("vit").eval()
    del vit.blocks[1:]  # whose kernels would take as long as those of the first
    model, x = with_adapters(vit), torch.randn(len(ENTRIES), 3, 32, 32)
    wanted = one_by_one(model, x, ENTRIES)
    with per_sample(model, ENTRIES):
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler, where it begins a graph anew
def test_training_in_compiled_code_teaches_the_same() -> None:
    model, x = with_adapters(tiny("vit").train()), torch.randn(len(ENTRIES), 3, 32, 32)
    learned = [p for name in KINDS for u in adapters(model, name).values() for p in u.parameters() if p.requires_grad]

    def gradients(call: nn.Module) -> tuple[Tensor, ...]:
        with per_sample(model, ENTRIES):
            return torch.autograd.grad(call(x).square().sum(), learned)

    torch.testing.assert_close(gradients(torch.compile(model, backend="aot_eager")), gradients(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["eva02", "beit", "swin"])
def test_families_that_read_weights_compile(family: str) -> None:
    configs = {name: KINDS[name] for name in ("lora", "selora")}
    model = with_adapters(tiny(family).eval(), configs)
    x = torch.cat([batch(family)] * 3)[:3]
    with per_sample(model, ["lora", None, "selora"]):
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)
