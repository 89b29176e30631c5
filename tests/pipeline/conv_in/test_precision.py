"""An eight-channel conv_in in a four-channel UNet: precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import loca_vision.diffusers  # noqa: F401
from loca_vision.model.conv_in import widen_conv_in
from loca_vision.model.state import state_of
from support import pipelines as tiny
from support.reference_weights import Made, adapter, assert_near
from support.wide_conv_in import CONV_IN, UNET, as_base, assert_as_before, everything, is_wide, pipeline, widened

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype, wide: Made) -> None:
    by_hand, unet = widened().unet.to(dtype), tiny.unet().to(dtype)
    pipe = pipeline()
    pipe.unet = unet
    kept = {key: (id(p), p.detach().clone()) for key, p in unet.named_parameters()}
    pipe.load_loca_weights(wide.state(), "a")
    load_into(by_hand, wide)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny.inputs_of(unet).items()}
    assert unet.conv_in.weight.dtype == dtype
    with torch.no_grad():
        assert torch.equal(unet(**given).sample, by_hand(**given).sample)
    pipe.unload_loca_weights()
    assert all((id(p), p.dtype) == (kept[k][0], dtype) and torch.equal(p, kept[k][1]) for k, p in unet.named_parameters())


def load_into(unet: nn.Module, made: Made) -> None:
    pipe = pipeline()
    pipe.unet = unet
    pipe.load_loca_weights(made.state())


def test_the_old_layer_follows_the_model(wide: Made) -> None:
    pipe = pipeline()
    old = pipe.unet.conv_in.weight
    values = old.detach().clone()
    pipe.load_loca_weights(wide.state(), "a")
    pipe.unet.to(torch.bfloat16)
    pipe.unload_loca_weights()
    assert pipe.unet.conv_in.weight is old and torch.equal(old, values.bfloat16())
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_in_inference_mode(wide: Made, wanted: Tensor) -> None:
    pipe = pipeline()
    before = everything(pipe)
    with torch.inference_mode():
        pipe.load_loca_weights(wide.state(), "a")
    assert not pipe.unet.conv_in.weight.is_inference() and torch.equal(tiny.picture(pipe), wanted)
    with torch.inference_mode():
        pipe.unload_loca_weights()
    assert_as_before(pipe, before)


OFFLOADS: dict[str, Callable[[nn.Module], Any]] = {
    "sequential": lambda unet: cpu_offload(unet, execution_device=CPU),
    "model": lambda unet: cpu_offload_with_hook(unet, execution_device=CPU),
    "leaves": lambda unet: apply_group_offloading(unet, onload_device=CPU, offload_type="leaf_level"),
    "blocks": lambda unet: apply_group_offloading(unet, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1),
}


def loaded_and_offloaded(pipe: Any, kind: str, when: str, made: Made) -> Any:
    if when == "before":
        OFFLOADS[kind](pipe.unet)
    pipe.load_loca_weights(made.state(), "a")
    if when == "after":
        OFFLOADS[kind](pipe.unet)
    return pipe


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded(kind: str, when: str, wide: Made, base: Tensor) -> None:
    wanted = tiny.picture(loaded_and_offloaded(widened(), kind, when, wide))
    pipe = pipeline()
    shown = tiny.picture(as_base(pipe))
    loaded_and_offloaded(pipe, kind, when, wide)
    assert is_wide(pipe) and torch.equal(tiny.picture(pipe), wanted)
    pipe.disable_loca()
    assert torch.equal(tiny.picture(pipe), base)
    pipe.enable_loca()
    assert torch.equal(tiny.picture(pipe), wanted)
    pipe.unload_loca_weights()
    assert is_wide(pipe, 4) and torch.equal(tiny.picture(as_base(pipe)), shown)
    if kind == "sequential":
        remove_hook_from_module(pipe.unet, recurse=True)
        assert torch.equal(pipe.unet.conv_in.weight, tiny.unet().conv_in.weight)


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_offloaded_to_a_disk_it_is_refused(kind: dict[str, Any], wide: Made, tmp_path: Path) -> None:
    """There, what the parameter holds is nothing, and a new one would never be looked at."""
    pipe = pipeline()
    before = tiny.picture(as_base(pipe))
    apply_group_offloading(pipe.unet, onload_device=CPU, offload_to_disk_path=str(tmp_path), **kind)
    with pytest.raises(ValueError, match="conv_in is offloaded to a disk or by a stream: load it first"):
        pipe.load_loca_weights(wide.state(), "a")
    assert is_wide(pipe, 4) and torch.equal(tiny.picture(as_base(pipe)), before)


def test_compiled() -> None:
    by_hand, pipe = tiny.small(pipeline()), tiny.small(pipeline())
    widen_conv_in(by_hand.unet)
    made = adapter(by_hand, UNET, whole=CONV_IN)
    by_hand.load_loca_weights(made.state())
    wanted = tiny.picture(by_hand)
    narrow = tiny.picture(as_base(pipe))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    given = tiny.inputs_of(pipe.unet._orig_mod)
    with torch.no_grad():
        pipe.unet(**given)
    pipe.load_loca_weights(made.state(), "a")
    assert is_wide(pipe)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.picture(pipe), wanted)
    with torch.no_grad():
        found = pipe.unet(**tiny.inputs_of(pipe.unet._orig_mod)).sample
    assert_near(found, tiny.output_of(by_hand.unet))
    pipe.unload_loca_weights()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.picture(as_base(pipe)), narrow)
    with torch.no_grad():
        assert_near(pipe.unet(**given).sample, tiny.output_of(tiny.small_unet()))


def test_a_layer_that_somebody_puts_there_since_is_left_alone(wide: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    theirs = pipe.unet.conv_in = nn.Conv2d(5, 16, 3, padding=1)
    pipe.unload_loca_weights()
    assert pipe.unet.conv_in is theirs and theirs.weight.shape == (16, 5, 3, 3) and state_of(pipe.unet) is None
