"""The pipeline that InstructPix2Pix training works on, its adapter in the UNet, and what is trained."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn
from torch.optim import AdamW, Optimizer

from loca_vision.model.conv_in import widen_conv_in
from loca_vision.model.inject import inject
from loca_vision.model.schedule import parameter_groups
from loca_vision.model.traversal import all_updates
from loca_vision.recipes.editing.encoders import Encoders
from loca_vision.recipes.editing.pipeline import pipeline_of
from loca_vision.recipes.editing.recipe import EditRecipe, adapter_of

NAME = "default"  # of the adapter in the pipeline
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EditModels:
    """A pipeline on its device, frozen but for the adapter and, with --train_conv_in, the first convolution.

    Args:
        recipe: settled.
        accelerator: says device and precision. Frozen weights are kept in that precision; what is trained is float32.

    Attributes:
        pipe: a `StableDiffusionInstructPix2PixPipeline`.
        encoders: its autoencoder, text encoder and tokenizer.
        scheduler: adds noise, and says what is to be predicted.

    Raises:
        OSError: the pipeline cannot be had.
        ValueError: it is not a pipeline of InstructPix2Pix, or the adapter or the resolution does not fit it.
    """

    def __init__(self, recipe: EditRecipe, accelerator: Accelerator) -> None:
        if accelerator.mixed_precision not in _DTYPES:
            raise ValueError(f"mixed_precision={accelerator.mixed_precision!r}: the choices are {', '.join(_DTYPES)}")
        self.recipe = recipe
        self.pipe = pipeline_of(
            recipe.pretrained_model_name_or_path,
            revision=recipe.revision,
            variant=recipe.variant,
            cache_dir=recipe.cache_dir,
        )
        if recipe.prediction_type is not None:
            self.pipe.scheduler.register_to_config(prediction_type=recipe.prediction_type)
        _check_texts(recipe, self.pipe)
        _check_resolution(recipe, self.pipe)
        for model in (self.pipe.vae, self.pipe.text_encoder, self.pipe.unet):
            model.requires_grad_(False)
            # Module's own: that of diffusers warns of layers to be kept in float32, and these models have none.
            nn.Module.to(model, accelerator.device, _DTYPES[accelerator.mixed_precision])
        _adapt(self.pipe.unet, recipe)
        self.encoders = Encoders(self.pipe.vae, self.pipe.text_encoder, self.pipe.tokenizer)
        self.scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of one image."""
        side = self.recipe.resolution // self.pipe.vae_scale_factor
        return (int(self.pipe.unet.config.out_channels), side, side)

    def optimizer(self, processes: int) -> Optimizer:
        """AdamW over what is trained, each group at its rate."""
        of = self.recipe
        rate = of.learning_rate
        if of.scale_lr:
            rate *= processes * of.gradient_accumulation_steps * of.train_batch_size
        groups = parameter_groups(
            self.pipe.unet, lr=rate, location_lr=of.location_lr, head_lr=of.conv_in_lr, weight_decay=of.adam_weight_decay
        )
        settings: dict[str, Any] = {"lr": rate, "betas": (of.adam_beta1, of.adam_beta2), "eps": of.adam_epsilon}
        if not of.use_8bit_adam:
            return AdamW(groups, **settings)
        from bitsandbytes.optim import AdamW8bit

        small: Optimizer = AdamW8bit(groups, **settings)
        return small

    def counts(self) -> dict[str, int]:
        """Trained numbers: the adapter's, its locations, and those of the first convolution."""
        updates = all_updates(self.pipe.unet)
        return {
            "trained_parameters": sum(p.numel() for update in updates for p in update.trainable()),
            "location_parameters": sum(p.numel() for update in updates for p in update.location_parameters()),
            "conv_in_parameters": sum(p.numel() for p in self.pipe.unet.conv_in.parameters() if p.requires_grad),
        }


def _check_texts(recipe: EditRecipe, pipe: Any) -> None:
    """The UNet must take the output of one text encoder only; that of Stable Diffusion XL takes more."""
    config, width = pipe.unet.config, pipe.text_encoder.config.hidden_size
    if config.addition_embed_type is not None or config.cross_attention_dim != width:
        raise ValueError(
            f"{recipe.pretrained_model_name_or_path}: its UNet takes more than texts of width {width}, which its text encoder "
            "gives: Stable Diffusion 1 and 2 can be trained so, and XL and others cannot"
        )


def _check_resolution(recipe: EditRecipe, pipe: Any) -> None:
    factor = pipe.vae_scale_factor
    if recipe.resolution % factor:
        raise ValueError(f"resolution must be a multiple of {factor}, as the autoencoder's, got {recipe.resolution}")


def _adapt(unet: nn.Module, recipe: EditRecipe) -> None:
    config: Any = unet.config
    latents = config.out_channels
    if config.in_channels == latents and not recipe.train_conv_in:
        raise ValueError(
            f"{recipe.pretrained_model_name_or_path}: its UNet takes {latents} channels, and sees no image to edit; "
            "--train_conv_in widens it and trains the first convolution too"
        )
    if config.in_channels not in (latents, 2 * latents):
        raise ValueError(
            f"{recipe.pretrained_model_name_or_path}: its UNet takes {config.in_channels} channels; "
            f"{2 * latents} are noise and image, and {latents} noise alone"
        )
    widen_conv_in(unet, 2 * latents)
    if recipe.enable_xformers_memory_efficient_attention:
        _use_xformers(unet)
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    if recipe.train_conv_in:
        unet.conv_in.float()
    inject(unet, adapter_of(recipe), NAME, modules_to_save=("conv_in",) if recipe.train_conv_in else ())


def _use_xformers(unet: Any) -> None:
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:
        raise ValueError(f"--enable_xformers_memory_efficient_attention: {' '.join(str(error).split())}") from error
