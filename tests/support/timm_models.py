"""Tiny models of every supported timm family, and adapters with a visible effect."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision import adapters
from support.copies import fresh


@dataclass(frozen=True)
class Family:
    """How to make a tiny model of a family: a name in timm's registry, or a constructor where the registry fixes sizes."""

    model: str | Callable[..., nn.Module]
    kwargs: dict[str, Any]
    size: int = 32  # of the images, in pixels


def _timm_class(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    return lambda **kwargs: getattr(importlib.import_module(f"timm.models.{module}"), name)(**kwargs)


def _caformer(**kwargs: Any) -> nn.Module:
    """The mixers and norms of timm's `caformer_s18`, whose registry function fixes the widths."""
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

    mixers, norms = [SepConv] * 2 + [Attention] * 2, [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2
    return MetaFormer(token_mixers=mixers, norm_layers=norms, **kwargs)


def _mvitv2(img_size: tuple[int, int], num_classes: int, **settings: Any) -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(MultiScaleVitCfg(**settings), img_size=img_size, num_classes=num_classes)


def _vitamin(**kwargs: Any) -> nn.Module:
    import timm
    from timm.models.vitamin import VitCfg, VitConvCfg

    stem = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stages = VitCfg(embed_dim=(8, 16, 48), depths=(1, 1, 1), stem_width=8, conv_cfg=stem, head_type="1d")
    return timm.create_model("vitamin_small_224", embed_cfg=stages, **kwargs)


def _clip_resnet(**kwargs: Any) -> nn.Module:
    """A convolutional network that ends in an attention pool, as the ResNets of CLIP."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    blocks = tuple(ByoBlockCfg(type="bottle", d=1, c=width, s=2, br=0.25) for width in (16, 64))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_chs=8, head_type="attn_abs"), **kwargs)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_GATED = _VIT | {"mlp_ratio": 2}
_STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
_MAXVIT = {"img_size": 64, "embed_dim": (16, 32), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8} | {
    "transformer_dim_head": 8,
    "transformer_window_size": (2, 2),
    "transformer_grid_size": (2, 2),
}
_DAVIT = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2), "window_size": 4}
_COAT = {"img_size": 32, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "num_heads": 8, "mlp_ratios": (2,) * 4}

FAMILIES: dict[str, Family] = {
    # plain vision transformers
    "vit": Family("vit_tiny_patch16_224", _VIT),
    "deit": Family("deit_tiny_patch16_224", _VIT),
    "deit_distilled": Family("deit_tiny_distilled_patch16_224", _VIT),
    "deit3": Family("deit3_small_patch16_224", _VIT),
    "dinov2_reg": Family("vit_small_patch14_reg4_dinov2", _VIT),
    "clip": Family("vit_base_patch32_clip_quickgelu_224", _VIT),
    "siglip": Family("vit_base_patch16_siglip_224", _VIT),  # attention pool: q and a fused kv
    "aimv2": Family("aimv2_large_patch14_224", _GATED),
    "parallel_branches": Family("vit_small_patch16_18x2_224", _VIT),
    "parallel_scaling": Family("vit_base_patch16_xp_224", _VIT),  # MLP, q, k and v in one projection
    "differential": Family("vit_dwee_patch16_reg1_gap_256", _VIT),
    "differential_parallel": Family("vit_dpwee_patch16_reg1_gap_256", _VIT),
    "relpos": Family("vit_relpos_small_patch16_224", _VIT),
    "hybrid": Family("vit_tiny_r_s16_p8_224", _VIT | {"img_size": 64, "patch_size": 4}, 64),
    "samvit": Family(
        "samvit_base_patch16", _VIT | {"window_size": 2, "global_attn_indexes": (1,), "neck_chans": 16, "global_pool": "avg"}
    ),
    "naflexvit": Family("naflexvit_base_patch16_gap", {k: v for k, v in _VIT.items() if k != "img_size"}),
    "vitamin": Family(_vitamin, {k: v for k, v in _VIT.items() if k != "patch_size"}),
    "clip_resnet": Family(_clip_resnet, {"img_size": 32}),  # its output projection is the classifier
    # those that read the weight around the layer's forward, rotate, or share keys between heads
    "beit": Family("beit_base_patch16_224", _VIT),
    "beitv2": Family("beitv2_base_patch16_224", _VIT),
    "eva": Family("eva_large_patch14_196", _VIT),
    "eva02": Family("eva02_tiny_patch14_224", _GATED),
    "eva02_separate": Family("eva02_base_patch14_224", _GATED),
    "dinov3": Family("vit_small_plus_patch16_dinov3", _GATED),
    "pe": Family("vit_pe_core_tiny_patch16_384", _GATED),
    "rope_mixed": Family("vit_small_patch16_rope_mixed_224", _VIT),
    "grouped_query": Family("eva02_base_patch14_224", _GATED | {"attn_type": "rope", "num_kv_heads": 1}),
    "deepseek_vit": Family("deepseek_vit_412m", _VIT),
    "qwen3_vit": Family("qwen3_vit_88m", _VIT | {"pos_embed_grid_size": 4}),
    # other attention over all tokens
    "cait": Family("cait_xxs24_224", _VIT | {"depth_token_only": 1}),
    "crossvit": Family(
        "crossvit_tiny_240",
        {"img_size": 32, "img_scale": (1.0, 1.0), "patch_size": (8, 16), "embed_dim": (16, 24), "depth": ((1, 1, 0),)}
        | {"num_heads": (2, 2), "mlp_ratio": (2, 2, 1)},
    ),
    "xcit": Family("xcit_nano_12_p16_224", _VIT | {"patch_size": 16, "img_size": 64, "cls_attn_layers": 1}, 64),
    "convit": Family("convit_tiny", _VIT | {"embed_dim": 12, "num_heads": 4, "local_up_to_layer": 1}),  # 12 for each head
    "tnt": Family(
        "tnt_s_patch16_224",
        {"img_size": 32, "embed_dim": 48, "depth": 1, "inner_dim": 12, "num_heads_inner": 2, "num_heads_outer": 3},
    ),
    "volo": Family(
        _timm_class("volo.VOLO"),
        {"img_size": 64, "layers": (1, 1, 1, 1), "stem_hidden_dim": 8, "embed_dims": (16, 32, 32, 32), "num_heads": (2,) * 4},
        64,
    ),
    "pit": Family(
        "pit_ti_distilled_224",
        {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 4)},
    ),
    "pvt_v2": Family("pvt_v2_b0", _STAGES, 64),
    "coat_lite": Family("coat_lite_tiny", _COAT),
    "coat": Family("coat_tiny", _COAT | {"parallel_depth": 1}),
    # attention within windows
    "swin": Family("swin_tiny_patch4_window7_224", _SWIN),
    "swinv2": Family("swinv2_tiny_window8_256", _SWIN),
    "swinv2_cr": Family("swinv2_cr_tiny_224", _SWIN),
    "hiera": Family(
        "hiera_tiny_224",
        {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1), "q_pool": 2, "mask_unit_size": (4, 4)}
        | {"mask_unit_attn": (True, True, False)},
        64,
    ),
    "hieradet": Family(
        "hieradet_small",
        {"embed_dim": 16, "stages": (1, 2, 1), "q_pool": 2, "window_spec": (4, 2, 2), "global_att_blocks": (2,)},
        64,
    ),
    "mvitv2": Family(_mvitv2, {"img_size": (64, 64), "depths": (1, 1), "embed_dim": 16, "stride_q": ((1, 1), (2, 2))}, 64),
    "twins_pcpvt": Family("twins_pcpvt_small", _STAGES | {"img_size": 64}, 64),
    "twins_svt": Family("twins_svt_small", _STAGES | {"img_size": 64, "depths": (2, 1, 1, 2), "wss": (2, 2, 2, 2)}, 64),
    "nest": Family(
        _timm_class("nest.Nest"),
        {"img_size": 32, "num_levels": 2, "embed_dims": (16, 32), "num_heads": (2, 2), "depths": (1, 1)},
    ),
    "gcvit": Family(
        _timm_class("gcvit.GlobalContextVit"),
        {"img_size": 64, "window_size": (4, 4), "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)},
        64,
    ),
    "davit": Family("davit_tiny", _DAVIT),
    "davit_v2": Family("davit_tiny", _DAVIT | {"channel_attn_v2": True}),
    # attention among convolutions
    "tiny_vit": Family("tiny_vit_5m_224", _STAGES | {"window_sizes": (2, 2, 2, 2)}, 64),
    "efficientformer": Family(  # its position biases are made for 224 pixels
        "efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 16, 16), "num_vit": 1}, 224
    ),
    "maxvit": Family("maxvit_tiny_rw_224", _MAXVIT, 64),  # q, k, v in every head
    "maxvit_tf": Family("maxvit_tiny_tf_224", _MAXVIT, 64),  # heads in q, k and v
    "maxxvit": Family("maxxvit_rmlp_nano_rw_256", _MAXVIT, 64),
    "caformer": Family(_caformer, {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 32)}, 64),
    "mobilevit": Family("mobilevit_xxs", {}, 64),
    "edgenext": Family(
        "edgenext_xx_small",
        {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "heads": (2,) * 4, "global_block_counts": (0, 0, 1, 1)},
        64,
    ),
    "fastvit": Family("fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "mlp_ratios": (2,) * 4}, 64),
    "nextvit": Family("nextvit_small", {"stem_chs": (8, 8, 8), "depths": (1, 1, 5, 1)}, 64),  # the other widths are fixed
}


def tiny(family: str) -> nn.Module:
    """A tiny model of the family in evaluation mode, 3 classes, random weights: a fresh copy, the same at every call."""
    return fresh(_made(family))


@cache
def batch(family: str) -> Tensor:
    """Two images of the size that the family's tiny model takes."""
    size = FAMILIES[family].size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@cache
def _made(family: str) -> nn.Module:
    import timm

    recipe = FAMILIES[family]
    make = recipe.model if callable(recipe.model) else lambda **kwargs: timm.create_model(recipe.model, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(num_classes=3, **recipe.kwargs).eval()
    _fill(model)
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random values of sensible size: as timm creates them, many projections reach the output through zeros or 1e-5."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif "bias" in name or "lambda" in name:
            parameter.copy_(noise / 10)
        else:
            parameter.copy_(1 + noise / 10)


@torch.no_grad()
def randomise(model: nn.Module, name: str = "default", size: float = 0.3) -> None:
    """Give an adapter seeded normal coefficients, so that it has an effect, and spread its locations over the spectrum."""
    generator = torch.Generator().manual_seed(3)
    for spectrum in adapters(model, name).values():
        spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator) * size)
        spectrum.locations.copy_(torch.rand(spectrum.locations.shape, generator=generator))
