"""Narrow models of ComfyUI's own classes, with the weights of tiny models of diffusers and transformers."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CHECKOUT = os.environ.get("COMFYUI_PATH", "")
NODES = Path(__file__).parents[2] / "examples" / "comfyui" / "loca_comfyui"
_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LETTERS = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")


def import_comfyui() -> None:
    """Put ComfyUI on the path, on the CPU; skip the tests where COMFYUI_PATH names no checkout."""
    if not (Path(CHECKOUT) / "comfy" / "lora.py").is_file():
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)
    if CHECKOUT not in sys.path:
        sys.path.insert(0, CHECKOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.sd


# The models of diffusers


def unet(seed: int = 0, *, xl: bool = False, channels: int = 4) -> UNet2DConditionModel:
    """Of Stable Diffusion 1.5, with 1 x 1 convolutions about its transformers; or of XL. ComfyUI normalises 32 groups."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": channels,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
    }
    if xl:
        settings |= {
            "block_out_channels": (64, 128),  # for ComfyUI, each head has 64 channels
            "cross_attention_dim": 40,
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (2, 2),
            "projection_class_embeddings_input_dim": 64,
        }
    return UNet2DConditionModel(**settings).eval()


def sd3(seed: int = 0) -> SD3Transformer2DModel:
    """ComfyUI tells the width of SD3 from its depth: 64 times as much."""
    torch.manual_seed(seed)
    settings = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
    settings |= {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(joint_attention_dim=24, pooled_projection_dim=16, **settings).eval()


def flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    settings = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 16}
    return FluxTransformer2DModel(joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), **settings).eval()


def clip_encoder(seed: int = 1, *, projection: bool = False, hidden: int = 24) -> nn.Module:
    """With the vocabulary and the positions of CLIP, as ComfyUI has them; its projection is square."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(hidden_size=hidden, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config.projection_dim, config.eos_token_id = hidden, 49407
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"d_model": 24, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 100}
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


# The same for ComfyUI


def patcher(model: nn.Module, dtype: torch.dtype = torch.float32, *, cast: bool = False) -> Any:
    """A `ModelPatcher` of a diffusion model, its weights rounded to `dtype`; `cast`: by layers that may cast what they use."""
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models as known

    kind, config = _config_of(model)
    config = getattr(known, kind)(config)
    manual = None if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
    config.set_inference_dtype(dtype, manual)
    config.custom_operations = comfy.ops.manual_cast if cast else None
    held = config.get_model({})
    weights = {key.removeprefix("diffusion_model."): value for key, value in named(model).items()}
    missing, unexpected = held.diffusion_model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(held.to(dtype).eval(), load_device=cpu, offload_device=cpu)


def named(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a diffusion model by ComfyUI's names, copied, as it reads checkpoints of diffusers."""
    import comfy.model_detection
    import comfy.utils

    held = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if isinstance(model, UNet2DConditionModel):
        names = comfy.utils.unet_to_diffusers(_config_of(model)[1])
        found = {names[key]: value for key, value in held.items()}
    else:
        found = comfy.model_detection.convert_diffusers_mmdit(dict(held))
    return {f"diffusion_model.{key}": value for key, value in found.items()}


def _config_of(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The class in `comfy.supported_models`, and the settings that it is given for a model of this size."""
    import comfy.model_detection

    config: Any = model.config
    if isinstance(model, SD3Transformer2DModel):
        return "SD3", comfy.model_detection.detect_unet_config(named(model), "diffusion_model.")
    if isinstance(model, FluxTransformer2DModel):
        found = comfy.model_detection.detect_unet_config(named(model), "diffusion_model.")
        heads = config.num_attention_heads
        sizes = {"hidden_size": 8 * heads, "num_heads": heads, "axes_dim": [2, 2, 4], "context_in_dim": 24, "out_channels": 4}
        return "Flux", found | sizes
    xl = config.use_linear_projection
    depth = 2 if xl else 1
    sizes = {"in_channels": config.in_channels, "out_channels": 4, "model_channels": 64 if xl else 32, "channel_mult": (1, 2)}
    sizes |= {"num_res_blocks": [1, 1], "transformer_depth": [depth, 0], "transformer_depth_output": [depth, depth, 0, 0]}
    sizes |= {"transformer_depth_middle": depth, "context_dim": config.cross_attention_dim, "use_linear_in_transformer": xl}
    sizes |= {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False}
    sizes |= {"num_classes": "sequential", "adm_in_channels": 64} if xl else {"adm_in_channels": None}
    return "SDXL" if xl else "SD15" if config.in_channels == 4 else "SD15_instructpix2pix", sizes


def clip(family: str, **encoders: nn.Module) -> Any:
    """A `CLIP` of "sd15", "sd2", "sdxl", its "refiner", "sd3" or "flux", with encoders by ComfyUI's names, such as `clip_l`."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    import comfy.text_encoders.sd2_clip
    import comfy.text_encoders.sd3_clip

    wanted = {name: _LETTERS if name == "t5xxl" else _WIDTHS for name in encoders}
    options = {f"{name}_model_config": {w: getattr(encoders[name].config, w) for w in ws} for name, ws in wanted.items()}
    made = {
        "sd15": comfy.sd1_clip.SD1ClipModel,
        "sd2": comfy.text_encoders.sd2_clip.SD2ClipModel,
        "sdxl": comfy.sdxl_clip.SDXLClipModel,
        "refiner": comfy.sdxl_clip.SDXLRefinerClipModel,
        "sd3": comfy.text_encoders.sd3_clip.SD3ClipModel,
        "flux": comfy.text_encoders.flux.FluxClipModel,
    }[family](model_options=options)
    made.load_state_dict(encoder_weights(**encoders), strict=False)
    found = comfy.sd.CLIP(no_init=True)
    cpu = torch.device("cpu")
    found.patcher = comfy.model_patcher.ModelPatcher(made.eval(), load_device=cpu, offload_device=cpu)
    found.cond_stage_model, found.tokenizer, found.layer_idx = made, None, None
    found.tokenizer_options, found.use_clip_schedule, found.apply_hooks_to_conds = {}, False, None
    return found


def encoder_weights(**encoders: nn.Module) -> dict[str, Tensor]:
    """Their weights by ComfyUI's names, copied."""
    found = {}
    for name, encoder in encoders.items():
        lost = "text_model." if name != "t5xxl" and not hasattr(encoder, "text_model") else ""  # with transformers 5
        for key, value in encoder.state_dict().items():
            path = key if key.startswith("text_projection") else lost + key
            if path != "encoder.embed_tokens.weight":  # the same as `shared`
                found[f"{name}.transformer.{path}"] = value.detach().clone()
    return found


def effective(patched: Any) -> dict[str, Tensor]:
    """The weights that a `ModelPatcher` computes with, copied; then the model is as before."""
    with torch.no_grad():
        patched.patch_model(torch.device("cpu"))
    found = {key: value.detach().clone() for key, value in patched.model.state_dict().items()}
    patched.unpatch_model(torch.device("cpu"))
    return found


class Parts:
    """What stands for a pipeline of diffusers here: its components, whatever they are."""

    def __init__(self, **components: nn.Module) -> None:
        self.components = components
