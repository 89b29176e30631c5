"""Tiny image classifiers of transformers, and data for its Trainer."""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
VISION = SIZES | {"image_size": 32, "patch_size": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", VISION),
    "deit": ("DeiT", VISION),
    "beit": ("Beit", VISION),
    "dinov2": ("Dinov2", VISION),
    "dinov2_reg": ("Dinov2WithRegisters", VISION),
    "data2vec": ("Data2VecVision", VISION),
    "siglip": ("Siglip", {"vision_config": VISION}),
    "siglip2": ("Siglip2", {"vision_config": SIZES | {"patch_size": 8, "num_patches": 16}}),
    "clip": ("CLIP", {"vision_config": VISION}),
    "swin": ("Swin", WINDOWS),
    "swinv2": ("Swinv2", WINDOWS),
    "pvt": (
        "Pvt",
        {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1]}
        | {"hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2]}
        | {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    ),
}


@cache
def _made(family: str) -> nn.Module:
    import transformers

    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(sizes), num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return model.eval()


def tiny(family: str = "vit") -> Any:
    """A tiny image classifier of 3 classes in evaluation mode: a fresh copy, the same at every call."""
    return copy.deepcopy(_made(family))


@cache
def pictures(number: int = 4) -> Tensor:
    """(number, 3, 32, 32)."""
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """(4, 3), in evaluation mode."""
    answer: Tensor = model.eval()(**given(model)).logits
    return answer


def given(model: nn.Module) -> dict[str, Tensor]:
    """What a call takes: of Siglip 2, which has pictures of any size, the patches one by one."""
    if not type(model).__name__.startswith("Siglip2"):
        return {"pixel_values": pictures()}
    patches = pictures().unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(4, 16, 192)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(4, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 4),
    }


class Pictures(Dataset[dict[str, Tensor]]):
    """24 pictures of three classes."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": pictures(24)[index], "labels": torch.tensor(index % 3)}


def trainer(model: nn.Module, folder: Any, optimizer: torch.optim.Optimizer | None = None, **settings: Any) -> Any:
    """A Trainer on the CPU that evaluates and saves at the end of each of three epochs, without a word."""
    import transformers

    callbacks = settings.pop("callbacks", [])
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    usual = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "save_strategy": "epoch", "eval_strategy": "epoch"}
    arguments = transformers.TrainingArguments(str(folder), **(quiet | usual | settings))
    made = transformers.Trainer(
        model,
        arguments,
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


class Heard(logging.Handler):
    """What a logger says, transformers' included, which do not pass it on to the root."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.logger = logging.getLogger(name)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        self.logger.addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
