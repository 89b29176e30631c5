"""Pipelines with four and eight input channels, and checks, for the tests in pipeline/conv_in/."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

import loca_vision.diffusers  # noqa: F401
from loca_vision import LoCAConfig, inject
from loca_vision.model.conv_in import widen_conv_in
from support import pipelines as tiny
from support.reference_weights import assert_same, facts
from support.timm_models import randomise

UNET = {"unet": ("q", "v")}


CONV_IN = ("unet.conv_in.weight", "unet.conv_in.bias")


def pipeline() -> Any:
    """An InstructPix2Pix pipeline around the models of Stable Diffusion, whose UNet takes four channels."""
    parts = {name: part for name, part in tiny.stable_diffusion().components.items() if name != "image_encoder"}
    return tiny.quiet(StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def widened() -> Any:
    """The same pipeline after an explicit `widen_conv_in`."""
    pipe = pipeline()
    widen_conv_in(pipe.unet)
    return pipe


def as_base(pipe: Any) -> Any:
    """The same models in the base pipeline, which can draw while the UNet takes four channels."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return tiny.quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def everything(pipe: Any) -> dict[str, Any]:
    return facts(as_base(pipe)) | {"config": dict(pipe.unet.config), "channels": pipe.unet.conv_in.in_channels}


def assert_as_before(pipe: Any, before: dict[str, Any]) -> None:
    """Check that parameters (bit for bit), settings and hooks are the same as before."""
    assert dict(pipe.unet.config) == before["config"] and pipe.unet.conv_in.in_channels == before["channels"]
    assert_same(as_base(pipe), {fact: value for fact, value in before.items() if fact not in ("config", "channels")})


def is_wide(pipe: Any, channels: int = 8) -> bool:
    unet = pipe.unet
    return {unet.conv_in.in_channels, unet.config.in_channels, unet.conv_in.weight.shape[1]} == {channels}


def trained(pipe: Any) -> Any:
    """The pipeline after one training step from a plain base."""
    widen_conv_in(pipe.unet)
    inject(pipe.unet, LoCAConfig(n_components=8, targets=("q", "v")))
    randomise(pipe.unet)
    pipe.unet.conv_in.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=1e-2)
    pipe.unet(**tiny.inputs_of(pipe.unet)).sample.square().mean().backward()
    optimiser.step()
    return pipe
