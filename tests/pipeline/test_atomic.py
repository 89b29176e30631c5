"""Every verb on a pipeline fails once in each of its steps, and all components are as they were before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loca_vision.diffusers  # noqa: F401, which gives pipelines their methods
from support.injected_failures import assert_same, everything, fail_in, functions_called
from support.pipelines import small_unet, stable_diffusion
from support.reference_weights import Made, adapter

ROOMS = ("pipeline/", "model/", "layers/class_swap", "layers/weight_updates")
VERBS: dict[str, Callable[[Any, dict[str, Made]], Any]] = {
    "load": lambda pipe, made: pipe.load_loca_weights(made["new"].state(), "new"),
    "hot swap": lambda pipe, made: pipe.load_loca_weights(made["new"].state(), "a", hotswap=True),
    "unload": lambda pipe, made: pipe.unload_loca_weights(),
    "unload what is fused": lambda pipe, made: pipe.unload_loca_weights(),
    "delete": lambda pipe, made: pipe.delete_loca_adapters(["a", "b"]),
    "set": lambda pipe, made: pipe.set_loca_adapters(["b", "a"], [0.5, {"unet": {"mid": 2.0}}]),
    "disable": lambda pipe, made: pipe.disable_loca(),
    "fuse": lambda pipe, made: pipe.fuse_loca(),
    "fuse more": lambda pipe, made: pipe.fuse_loca(adapter_names=["b"], safe_fusing=True),
    "unfuse": lambda pipe, made: pipe.unfuse_loca(),
    "low memory": lambda pipe, made: pipe.enable_loca_low_memory(),
}


def small() -> Any:
    pipe = stable_diffusion()
    pipe.unet = small_unet()
    return pipe


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    parts = {"unet": ("q",), "text_encoder": ("out",)}  # few layers: every verb runs some fifty times
    wholes = {"a": ["unet.conv_in.bias"], "b": [], "new": ["unet.conv_in.bias"]}
    return {name: adapter(small(), parts, seed=i, whole=whole) for i, (name, whole) in enumerate(wholes.items())}


def loaded(verb: str, made: dict[str, Made]) -> Any:
    pipe = small()
    pipe.load_loca_weights(made["b"].state(), "b")
    pipe.load_loca_weights(made["a"].state(), "a")
    pipe.set_loca_adapters(["a", "b"], [1.0, 0.5])
    if verb in ("fuse more", "unfuse", "unload what is fused"):
        pipe.fuse_loca(adapter_names=["a"])
    return pipe


def state(pipe: Any) -> dict[str, Any]:
    nothing = torch.zeros(())
    return {name: everything(getattr(pipe, name), lambda: nothing) for name in ("unet", "text_encoder")}


@pytest.mark.parametrize("verb", VERBS)
def test_what_fails_half_way_leaves_all_components_as_they_were(verb: str, made: dict[str, Made], tmp_path: Path) -> None:
    pipe, other, act = loaded(verb, made), loaded(verb, made), VERBS[verb]
    before = state(pipe)
    for step, calls in functions_called(lambda: act(other, made)).items():
        if step.startswith(ROOMS):  # the second call is often that for the second component
            assert fail_in(step, lambda: act(pipe, made), call=min(calls, 2))
            after = state(pipe)
            for component in before:
                assert_same(after[component], before[component], step)
