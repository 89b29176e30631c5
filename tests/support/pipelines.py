"""Tiny diffusers models and pipelines, built from configurations in a fraction of a second; no file is read."""

from __future__ import annotations

import json
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from support.copies import fresh

WORDS = ("a", "cat", "dog", "cartoon", "of", "make", "it", "red")


@cache
def _vocabulary() -> str:
    """A folder with a real CLIP tokenizer: the letters, and the words above, merged letter by letter."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    names = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    return str(folder)


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(_vocabulary(), model_max_length=12)


def text_encoder(seed: int = 1, *, projection: bool = False, hidden: int = 24) -> nn.Module:
    made, state = _text_encoder(seed, projection, hidden)
    torch.default_generator.set_state(state)
    return fresh(made)


@cache
def _text_encoder(seed: int, projection: bool, hidden: int) -> tuple[nn.Module, torch.Tensor]:
    """The model, and how making it leaves the generator."""
    words = tokenizer()
    torch.default_generator.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    return model, torch.default_generator.get_state()


def unet(seed: int = 0, *, channels: int = 4, **settings: Any) -> UNet2DConditionModel:
    """Self and cross attention at both resolutions, 40 projections; 8 x 8 latents."""
    torch.default_generator.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**config | settings).eval()


def small_unet(seed: int = 0, *, channels: int = 4) -> UNet2DConditionModel:
    """One resolution instead of two, 16 projections: for what exports, compiles or tries something a hundred times."""
    one = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    return unet(seed, channels=channels, **one)


def xl_unet(seed: int = 0, *, channels: int = 4, **more: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "cross_attention_dim": 40,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 64,
    }
    return unet(seed, channels=channels, **settings | more)


def small_xl_unet(channels: int = 4) -> UNet2DConditionModel:
    """One resolution instead of two, as `small_unet`."""
    one = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    return xl_unet(channels=channels, **one, attention_head_dim=2, transformer_layers_per_block=1)


def vae(**more: Any) -> AutoencoderKL:
    torch.default_generator.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **more,
    ).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, beta_schedule="scaled_linear", steps_offset=1)


_PLAIN = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion(cls: Any = StableDiffusionPipeline) -> Any:
    pipe = cls(vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=unet(), scheduler=scheduler(), **_PLAIN)
    return quiet(pipe)


def instruct_pix2pix(cls: Any = StableDiffusionInstructPix2PixPipeline) -> Any:
    model = unet(channels=8)
    pipe = cls(vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=model, scheduler=scheduler(), **_PLAIN)
    return quiet(pipe)


def small(pipe: Any) -> Any:
    """The pipeline with a UNet of one resolution: for what trains it or draws with it many times."""
    made = small_xl_unet if pipe.unet.config.addition_embed_type else partial(small_unet, 0)
    pipe.unet = made(channels=pipe.unet.config.in_channels)
    return pipe


def stable_diffusion_xl(cls: Any = StableDiffusionXLPipeline) -> Any:
    pipe = cls(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(3, projection=True, hidden=16),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=xl_unet(),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    return quiet(pipe)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(seed: int = 0) -> SD3Transformer2DModel:
    torch.default_generator.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    ).eval()


def flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.default_generator.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def pixart(seed: int = 0) -> PixArtTransformer2DModel:
    torch.default_generator.manual_seed(seed)
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    ).eval()


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Random inputs of one call, the same every time."""
    torch.default_generator.manual_seed(7)
    images, text, steps = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24), torch.tensor([3, 3])
    if isinstance(model, SD3Transformer2DModel):
        return {
            "hidden_states": images,
            "encoder_hidden_states": text,
            "pooled_projections": torch.randn(2, 16),
            "timestep": steps,
        }
    if isinstance(model, FluxTransformer2DModel):
        return {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": text,
            "pooled_projections": torch.randn(2, 16),
            "timestep": steps / 10,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        }
    if isinstance(model, PixArtTransformer2DModel):
        return {"hidden_states": images, "encoder_hidden_states": text, "timestep": steps}
    given: dict[str, Any] = {"sample": torch.randn(2, model.config.in_channels, 8, 8), "timestep": steps[0]}  # type: ignore[union-attr, operator]
    if model.config.addition_embed_type == "text_time":  # type: ignore[union-attr]
        added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
        return given | {"encoder_hidden_states": torch.randn(2, 6, 40), "added_cond_kwargs": added}
    return given | {"encoder_hidden_states": text}


def output_of(model: nn.Module, **more: Any) -> torch.Tensor:
    """The output of one call of the model, without gradients."""
    with torch.no_grad():
        return model(**inputs_of(getattr(model, "_orig_mod", model)), **more, return_dict=False)[0]


def picture(pipe: Any, prompt: str = "a cat", **more: Any) -> torch.Tensor:
    """One step of a pipeline with a fixed seed, as an image tensor (1, height, width, 3)."""
    given: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(5)}
    if isinstance(pipe, StableDiffusionInstructPix2PixPipeline):
        given["image"] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    else:
        given |= {"height": 16, "width": 16}
    return torch.as_tensor(pipe(prompt, **given | more).images).cpu()
