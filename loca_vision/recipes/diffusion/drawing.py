"""Pictures by a pipeline in training: the same text and seed give the same picture, and the pipeline stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from loca_vision.checks import check_count, check_seed, is_finite
from loca_vision.model.activation import activate
from loca_vision.model.state import refuse_fused
from loca_vision.pipeline.components import adapted_in, models_in

_LEFT_BY_A_CALL = (
    "_guidance_scale", "_image_guidance_scale", "_num_timesteps", "_progress_bar_config", "_guidance_rescale", "_clip_skip",
    "_cross_attention_kwargs", "_joint_attention_kwargs", "_attention_kwargs", "_interrupt", "_current_timestep",
    "_denoising_end", "_skip_layer_guidance_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """How a picture is drawn.

    Args:
        height, width: in pixels.
        steps: steps of the scheduler, from 1 up.
        guidance_scale: how strongly the text counts; None for the pipeline's default.
        more: further arguments of the call, such as max_sequence_length.

    Raises:
        ValueError: a value is out of range.
    """

    height: int
    width: int
    steps: int = 25
    guidance_scale: float | None = None
    more: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if self.guidance_scale is not None and (not is_finite(self.guidance_scale) or self.guidance_scale < 0):
            raise ValueError(f"guidance_scale={self.guidance_scale!r}: expected a finite number from 0 up")


def pictures(
    pipe: Any, prompt: str | list[str], seeds: list[int], how: Picture, *, scale: float = 1.0, progress: bool = False
) -> list[Image.Image]:
    """Return a picture for each seed, RGB, drawn in one batch.

    The noise is drawn on the CPU by the seed, so that every device makes the same picture up to rounding, and no global
    generator is used. Afterwards the pipeline is as it was: its models' training modes, its scheduler, its progress bar.

    Args:
        pipe: a text-to-image pipeline, with or without adapters.
        prompt: one for all seeds, or a list with one for each.
        seeds: each from 0 to 2**63 - 1.
        scale: the strength of the pipeline's adapters, times their weights. At 0 they are inactive: the base, bit for bit.

    Raises:
        ValueError: a seed or a scale is out of range; or the scale is not 1 and an adapter is fused.
    """
    for seed in seeds:
        check_seed(seed)
    if not is_finite(scale):
        raise ValueError(f"scale={scale!r}: expected a finite number")
    told = {"guidance_scale": how.guidance_scale} if how.guidance_scale is not None else {}
    with ExitStack() as around:
        around.enter_context(untouched(pipe))
        around.enter_context(without_adapters(pipe) if scale == 0 else at_scale(pipe, scale))
        drawn = pipe(
            prompt=prompt,
            height=how.height,
            width=how.width,
            num_inference_steps=how.steps,
            num_images_per_prompt=len(seeds) if isinstance(prompt, str) else 1,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **told,
            **(how.more or {}),
        ).images
    return [one.convert("RGB") for one in drawn]


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Set evaluation mode, no progress bar, a copy of the scheduler, and an autoencoder without autocast; restore all later."""
    modes = [(module, module.training) for model in models_in(pipe).values() for module in model.modules()]
    left = {name: vars(pipe)[name] for name in _LEFT_BY_A_CALL if name in vars(pipe)}
    scheduler = pipe.scheduler
    try:
        for module, _ in modes:
            module.training = False
        pipe.scheduler = copy.deepcopy(scheduler)  # a call leaves its timesteps in the scheduler
        pipe.set_progress_bar_config(disable=True)
        with in_its_own_dtype(pipe.vae):
            yield
    finally:
        pipe.scheduler = scheduler
        for name in _LEFT_BY_A_CALL:
            vars(pipe).pop(name, None)
        vars(pipe).update(left)
        for module, training in modes:
            module.training = training


@contextmanager
def in_its_own_dtype(vae: Any) -> Iterator[None]:
    """Let an autoencoder compute in its own dtype inside: XL's, kept in float32, overflows in the float16 of autocast."""
    before = {name: vars(vae)[name] for name in ("encode", "decode") if name in vars(vae)}

    def exact(method: Any) -> Any:
        def call(given: torch.Tensor, *more: Any, **named: Any) -> Any:
            with torch.autocast(given.device.type, enabled=False):
                return method(given.to(vae.dtype), *more, **named)

        return call

    methods = {name: exact(getattr(vae, name)) for name in ("encode", "decode")}
    try:
        vars(vae).update(methods)
        yield
    finally:
        for name in methods:
            vars(vae).pop(name, None)
        vars(vae).update(before)


@contextmanager
def without_adapters(pipe: Any) -> Iterator[None]:
    """Deactivate all adapters inside the `with`."""
    records = list(adapted_in(pipe).values())
    for _, record in records:
        refuse_fused(record, record.fused.adapters)
    before = [record.enabled for _, record in records]
    try:
        for model, record in records:
            activate(model, record, record.active, enabled=False)
        yield
    finally:
        for (model, record), enabled in zip(records, before, strict=True):
            activate(model, record, record.active, enabled=enabled)


@contextmanager
def at_scale(pipe: Any, scale: float) -> Iterator[None]:
    """Multiply the strength of every adapter by a scale inside the `with`, in all components."""
    records = list(adapted_in(pipe).values()) if scale != 1 else []
    for _, record in records:
        refuse_fused(record, record.fused.adapters)
    before = [record.active for _, record in records]
    try:
        for model, record in records:
            activate(model, record, {name: _times(weight, scale) for name, weight in record.active.items()})
        yield
    finally:
        for (model, record), active in zip(records, before, strict=True):
            activate(model, record, active)


def _times(weight: Any, scale: float) -> Any:
    """Multiply a weight, or the weights of blocks, by a scale."""
    return {name: _times(value, scale) for name, value in weight.items()} if isinstance(weight, Mapping) else weight * scale
