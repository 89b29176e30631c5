"""Presets of InstructPix2Pix training: the paper's cartoonization (LoCA, Appendix L)."""

from __future__ import annotations

from typing import Any

# The paper leaves the number of components open. 3000 of them are as dense as in its ViT-B: 0.5 % of a 768 x 768 weight's
# cells, and the 128 projections of Stable Diffusion 1.5 have 731,000 cells on average. That is 384,000 numbers, below half of
# LoRA's at diffusers' default rank of 4. Rates are constant because the paper names no schedule; images are square already.
# Pictures are drawn by steps: with few photographs an epoch has few steps, and drawing after each would cost as much as
# hundreds of steps.
_CARTOONIZATION: dict[str, Any] = {
    "original_image_column": "original_image",
    "edited_image_column": "cartoonized_image",
    "targets": ("q", "k", "v", "out"),
    "n_components": 3000,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_train_steps": 10000,
    "adam_weight_decay": 1e-2,
    "resolution": 256,
    "center_crop": True,
    "random_flip": True,
    "conditioning_dropout_prob": 0.05,
    "validation_prompt": "Change the natural image to a cartoon-style image",
    "validation_steps": 500,
}
EDIT_PRESETS: dict[str, dict[str, Any]] = {
    "cartoonization": _CARTOONIZATION
    | {"method": "loca", "loca_scale": 1.0, "learning_rate": 1e-4, "location_lr": 1e-4, "learning_steps": 1200},
    "cartoonization-fourierft": _CARTOONIZATION | {"method": "fourierft", "loca_scale": 64.0, "learning_rate": 1e-3},
}
"""The paper's Table 11. Crop, flip and dropout, which it does not give, are those of diffusers' run on the same images."""
