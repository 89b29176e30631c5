"""The settings of the paper's image classification (LoCA, Table 9), as differences from a recipe's defaults."""

from __future__ import annotations

from typing import Any

# The paper gives neither epochs nor resolution nor augmentation; 10 epochs at the model's 224 pixels are FourierFT's.
_COMMON: dict[str, Any] = {"epochs": 10, "batch_size": 128, "weight_decay": 5e-5, "targets": ("q", "v")}
_MODELS = {
    "vit-base": {"model": "vit_base_patch16_224.augreg_in21k", "head_lr": 1e-2},
    "vit-large": {"model": "vit_large_patch16_224.augreg_in21k", "head_lr": 1e-3},
}
_LOCA = {"method": "loca", "lr": 5e-2, "location_lr": 1e-4, "learning_steps": 120}
_FOURIERFT = {"method": "fourierft", "scale": 300.0, "lr": 5e-2}
_METHODS: dict[str, dict[str, Any]] = {
    "loca-3000": _LOCA | {"n_components": 3000, "scale": 1.0},
    "loca-10000": _LOCA | {"n_components": 10000, "scale": 0.5},
    "fourierft-3000": _FOURIERFT | {"n_components": 3000},
    "fourierft-10000": _FOURIERFT | {"n_components": 10000},
    "lora": {"method": "lora", "r": 16, "alpha": 16.0, "lr": 5e-3},
    "lp": {"method": "lp"},
    "full": {"method": "full"},
}

PRESETS: dict[str, dict[str, Any]] = {
    f"{size}-{name}": _COMMON | about | method for size, about in _MODELS.items() for name, method in _METHODS.items()
}
"""By name: `vit-base-loca-3000`, `vit-large-lora`, ..."""
