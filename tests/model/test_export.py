"""Exported, traced and scripted programs equal the adapted model, and leave nothing in it."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision import (
    AdapterConfig,
    FourierFTConfig,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    SeLoRAConfig,
    adapters,
    inject,
    remove,
    set_adapters,
)
from support.adapter_files import IMAGES, tiny
from support.pipelines import inputs_of, output_of, small_unet

METHODS = {
    "LoCA": LoCAConfig(n_components=40, targets=("q", "v", "out", "fc1")),
    "sDCTFT": SDCTFTConfig(n_components=30),
    "FourierFT": FourierFTConfig(n_components=30),
    "LoRA": LoRAConfig(r=2),
    "DoRA": LoRAConfig(r=2, use_dora=True),
    "SeLoRA": SeLoRAConfig(r=4),
}
WARM = pytest.mark.parametrize("warm", [False, True], ids=["at once", "after a call"])
GRADIENTS = pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])


def adapted(method: str) -> nn.Module:
    return with_values(tiny(depth=1), METHODS[method])


def with_values(model: nn.Module, config: AdapterConfig) -> nn.Module:
    inject(model, config)
    with torch.no_grad():
        for update in adapters(model).values():
            for parameter in update.trainable():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def kinds(model: nn.Module) -> dict[str, str]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: type(tensor).__name__ for name, tensor in tensors.items()}


def assert_equals(model: nn.Module, result: Tensor) -> None:
    with torch.no_grad():
        expected = model(IMAGES)
        set_adapters(model, [])
        base = model(IMAGES)
        set_adapters(model, "default")
    torch.testing.assert_close(result.detach(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize(("method", "strict"), [*((method, False) for method in METHODS), ("LoCA", True)])
def test_torch_export(method: str, strict: bool) -> None:
    model = adapted(method)
    before = kinds(model)
    program = torch.export.export(model, (IMAGES,), strict=strict)
    assert kinds(model) == before and not any("loca_vision" in str(node.target) for node in program.graph.nodes)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    assert_equals(model, torch.export.load(saved).module()(IMAGES))


@GRADIENTS
def test_what_comes_after_an_export_is_right(gradients: bool) -> None:
    model = adapted("LoCA").requires_grad_(False)
    with torch.set_grad_enabled(gradients):
        torch.export.export(model, (IMAGES,))
        assert_equals(model, torch.compile(model, backend="eager")(IMAGES))
        assert_equals(model, torch.export.export(model, (IMAGES,)).module()(IMAGES))
    assert_equals(model, model(IMAGES))


@WARM
@GRADIENTS
@pytest.mark.parametrize("method", METHODS)
def test_a_trace(method: str, gradients: bool, warm: bool) -> None:
    model = adapted(method)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if warm:
            model(IMAGES)
        traced = torch.jit.trace(model, (IMAGES,))
    assert not any("loca_vision" in node.kind() for node in traced.inlined_graph.nodes())
    assert_equals(model, traced(IMAGES))


def test_a_trace_of_a_model_of_diffusers() -> None:
    unet = with_values(small_unet(), METHODS["LoCA"])
    inputs = inputs_of(unet)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(unet, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        found = traced(**inputs)
    assert torch.allclose(found["sample"], output_of(unet), atol=1e-5)


def test_a_script_is_refused_and_leaves_the_model_alone() -> None:
    model = adapted("LoCA")
    before = dict(model.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=r"script a merged copy \(copy.deepcopy, then remove\(copy, merge=True\)\)"):
            torch.jit.script(model)
        merged = copy.deepcopy(model)
        remove(merged, merge=True)
        assert_equals(model, torch.jit.script(merged)(IMAGES))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(("method", "dynamo"), [*((method, False) for method in METHODS), ("LoCA", True), ("FourierFT", True)])
def test_onnx(method: str, dynamo: bool, tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = adapted(method), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (IMAGES,), file, dynamo=dynamo, input_names=["images"], verbose=False)
    result = runtime.InferenceSession(str(file)).run(None, {"images": IMAGES.numpy()})[0]
    assert_equals(model, torch.from_numpy(result))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_unet_with_the_scale_of_the_call(scale: float | None) -> None:
    model = with_values(small_unet(), LoCAConfig(n_components=40))
    given = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    inputs = inputs_of(model) | given | {"return_dict": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        (result,) = program.module()(**inputs)
    torch.testing.assert_close(result, output_of(model, **given), rtol=1e-4, atol=1e-5)
    assert not program.graph_signature.buffers_to_mutate
