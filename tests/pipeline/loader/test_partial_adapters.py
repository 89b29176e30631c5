"""Adapters of chosen layers, and models in which other code has hung modules of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from torch import Tensor, nn

import loca_vision.diffusers
from loca_vision import LoCAConfig, LoRAConfig, adapters, inject, remove
from support import pipelines as tiny
from support.formulas import stir
from support.pipelines import output_of, picture, stable_diffusion

CHOICES = {
    "cross-attention": ("*attn2*", 20),
    "one block": ("up_blocks.0.attentions.1", 8),
    "a list": (("mid_block", "down_blocks.0"), 16),
    "all but one": ("!mid_block", 32),
    "both": (("*attn2", "!*.1.*"), 12),
    "by their own names": (("*.to_k", "*time_emb_proj"), 18),
}
ALL = ("q", "k", "v", "out")


def chosen(layers: Any, **settings: Any) -> Any:
    """A pipeline with an adapter of some layers of its UNet, that shows."""
    pipe = stable_diffusion()
    targets = ("q", "v") if "to_k" in str(layers) else ALL
    inject(pipe.unet, LoCAConfig(n_components=20, targets=targets, layers=layers, **settings))
    stir(pipe.unet)
    for spectrum in adapters(pipe.unet).values():
        spectrum.requires_grad_(False)
    return pipe


@pytest.mark.parametrize("choice", CHOICES)
def test_an_adapter_of_chosen_layers(choice: str, tmp_path: Path) -> None:
    """It is saved, loaded, weighed, fused and taken out like any other."""
    layers, count = CHOICES[choice]
    pipe, fresh = chosen(layers), stable_diffusion()
    before, wanted = picture(fresh), picture(pipe)
    pipe.save_loca_weights(tmp_path, "default")
    fresh.load_loca_weights(tmp_path, "a")
    assert list(adapters(fresh.unet, "a")) == list(adapters(pipe.unet)) and len(adapters(fresh.unet, "a")) == count
    assert torch.equal(picture(fresh), wanted) and (wanted - before).abs().max() > 1e-4
    fresh.fuse_loca()
    assert (picture(fresh) - wanted).abs().max() < 1e-5
    fresh.unfuse_loca()
    fresh.unload_loca_weights()
    assert torch.equal(picture(fresh), before)


def test_adapters_of_different_layers_add_up(tmp_path: Path) -> None:
    for name, layers in (("cross", "*attn2"), ("self", "*attn1")):
        chosen(layers).save_loca_weights(tmp_path / name, "default")
    chosen(None).save_loca_weights(tmp_path / "both", "default")
    pipe = stable_diffusion()
    pipe.load_loca_weights(tmp_path / "cross", "cross")
    pipe.load_loca_weights(tmp_path / "self", "self")
    pipe.set_loca_adapters(["cross", "self"], [1.0, 0.5])
    oracle = tiny.unet()
    with torch.no_grad():
        for name, strength in (("cross", 1.0), ("self", 0.5)):
            for projection, spectrum in adapters(pipe.unet, name).items():
                parent, _, part = projection.rpartition(".")
                layer: Any = oracle.get_submodule(f"{parent}.to_{part}{'.0' * (part == 'out')}")
                layer.weight += strength * spectrum.delta()
    assert (output_of(pipe.unet) - output_of(oracle)).abs().max() < 1e-5


def test_hot_swap_to_fewer_layers(tmp_path: Path) -> None:
    """Those that the new adapter has nothing for rest; an adapter of more layers than the old one is refused."""
    chosen(None).save_loca_weights(tmp_path / "all", "default")
    cross = chosen("*attn2")
    cross.save_loca_weights(tmp_path / "cross", "default")
    pipe = stable_diffusion()
    pipe.load_loca_weights(tmp_path / "all", "a")
    pipe.load_loca_weights(tmp_path / "cross", "a", hotswap=True)
    assert (picture(pipe) - picture(cross)).abs().max() < 1e-6
    pipe.save_loca_weights(tmp_path / "again", "a")
    again = stable_diffusion()
    again.load_loca_weights(tmp_path / "again", "a")
    assert len(adapters(again.unet, "a")) == 20
    other = stable_diffusion()
    other.load_loca_weights(tmp_path / "cross", "a")
    before = picture(other)
    with pytest.raises(ValueError, match=r"attn1\.q is not among the projections of adapter 'a'"):
        other.load_loca_weights(tmp_path / "all", "a", hotswap=True)
    assert torch.equal(picture(other), before)


def test_a_file_of_layers_that_the_model_has_not(tmp_path: Path) -> None:
    chosen("*attn2").save_loca_weights(tmp_path, "default")
    pipe = stable_diffusion()
    pipe.unet = tiny.small_unet()
    with pytest.raises(ValueError, match=r"unet: the model has no projection down_blocks\.1\."):
        pipe.load_loca_weights(tmp_path)


# Guests


def with_ip_adapter(unet: Any) -> Any:
    """An IP-Adapter Plus, whose image projection has attention layers of its own."""
    generator = torch.Generator().manual_seed(6)
    unet._load_ip_adapter_weights([_ip_adapter(unet, generator)])
    return unet


def _ip_adapter(unet: Any, generator: torch.Generator, dim: int = 16, cross: int = 24, emb: int = 10) -> dict[str, Any]:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    ip: dict[str, Tensor] = {}
    for number, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        rows = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        ip |= {f"{2 * number + 1}.to_{part}_ip.weight": made(rows, cross) for part in "kv"}
    image = {"latents": made(1, 4, dim), "proj_in.weight": made(dim, emb), "proj_in.bias": made(dim)}
    image |= {"proj_out.weight": made(cross, dim), "proj_out.bias": made(cross)}
    image |= {"norm_out.weight": torch.ones(cross), "norm_out.bias": torch.zeros(cross)}
    for layer in range(4):
        image |= {f"layers.{layer}.0.norm{n}.{kind}": torch.ones(dim) for n in (1, 2) for kind in ("weight", "bias")}
        image |= {f"layers.{layer}.0.to_q.weight": made(64, dim), f"layers.{layer}.0.to_kv.weight": made(128, dim)}
        image |= {f"layers.{layer}.0.to_out.weight": made(dim, 64)}
        image |= {f"layers.{layer}.1.0.{kind}": torch.ones(dim) for kind in ("weight", "bias")}
        image |= {f"layers.{layer}.1.1.weight": made(4 * dim, dim), f"layers.{layer}.1.3.weight": made(dim, 4 * dim)}
    return {"image_proj": image, "ip_adapter": ip}


@pytest.mark.parametrize("arrival", ("before", "after"))
@pytest.mark.parametrize("targets", (ALL, ("linear",)))
def test_beside_an_ip_adapter(arrival: str, targets: Any, tmp_path: Path) -> None:
    source = stable_diffusion()
    inject(source.unet, LoCAConfig(n_components=10, targets=targets))
    stir(source.unet).requires_grad_(False)
    source.save_loca_weights(tmp_path, "default")
    pipe, oracle = stable_diffusion(), stable_diffusion()
    if arrival == "before":
        with_ip_adapter(pipe.unet)
    pipe.load_loca_weights(tmp_path, "a")
    if arrival == "after":
        with_ip_adapter(pipe.unet)
    remove(source.unet, merge=True)
    oracle.unet.load_state_dict(source.unet.state_dict())
    with_ip_adapter(oracle.unet)
    image = torch.randn(2, 1, 5, 10, generator=torch.Generator().manual_seed(1))
    given = {"added_cond_kwargs": {"image_embeds": [image]}}
    assert (output_of(pipe.unet, **given) - output_of(oracle.unet, **given)).abs().max() < 1e-4
    pipe.load_loca_weights(tmp_path, "a", hotswap=True)
    names = inject(pipe.unet, LoCAConfig(n_components=3, targets=targets), "b")
    assert names == tuple(adapters(pipe.unet, "a"))


def test_guests_are_adapted_when_they_are_named() -> None:
    unet = with_ip_adapter(tiny.unet())
    names = inject(unet, LoCAConfig(n_components=3, layers="encoder_hid_proj*"))
    assert names and all(name.startswith("encoder_hid_proj.") for name in names)
    remove(unet)
    with pytest.raises(ValueError, match=r"the pattern 'encoder_hid_projection' fits no projection .*perhaps encoder_hid_proj"):
        inject(unet, LoCAConfig(n_components=3, layers="encoder_hid_projection"))


def motion_unet() -> UNetMotionModel:
    """AnimateDiff's: the UNet of Stable Diffusion with motion modules in its blocks."""
    torch.default_generator.manual_seed(0)
    motion = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_mid_block_layers_per_block=1,
    )
    return UNetMotionModel.from_unet2d(tiny.unet(), motion)


class _Animation:
    """Of a pipeline, what the loader asks for."""

    def __init__(self, unet: nn.Module) -> None:
        self.components = {"unet": unet}


def test_an_adapter_of_stable_diffusion_in_animate_diff(tmp_path: Path) -> None:
    source = stable_diffusion()
    inject(source.unet, LoRAConfig(r=2, targets=(*ALL, "fc1")))
    stir(source.unet)
    source.save_loca_weights(tmp_path, "default")
    model = motion_unet()
    loca_vision.diffusers.load_loca_weights(_Animation(model), tmp_path, "a")
    assert list(adapters(model, "a")) == list(adapters(source.unet))
    given = {
        "sample": torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3)),
        "encoder_hidden_states": torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(4)),  # one a frame
        "timestep": torch.tensor(3),
    }
    oracle = motion_unet()
    with torch.no_grad():
        for projection, update in adapters(model, "a").items():
            parent, _, part = projection.rpartition(".")
            path = "net.0.proj" if part == "fc1" else f"to_{part}{'.0' * (part == 'out')}"
            layer: Any = oracle.get_submodule(f"{parent}.{path}")
            layer.weight += update.delta()
        found, wanted = model(**given, return_dict=False)[0], oracle(**given, return_dict=False)[0]
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert (wanted - motion_unet()(**given, return_dict=False)[0]).abs().max() > 1e-2
