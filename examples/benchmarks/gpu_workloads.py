"""The jobs of a GPU run, the most important first, and their tiny replacements for a dry run."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from workloads import Job, settled

Name = Literal[
    "vit-bf16-128", "sd15-bf16-8", "vit-bf16-32", "vit-fp32-32", "sd15-bf16-2", "sdxl-bf16-1", "sd15-fp32-2", "vit-fp32-128"
]
_MODELS = {
    "vit": Job(),
    "sd15": Job(workload="unet", size=64),
    "sdxl": Job(workload="sdxl", size=128),
}
TITLES = {"vit": "ViT-B/16", "sd15": "SD 1.5", "sdxl": "SDXL"}


def job(name: str, *, dry: bool = False) -> Job:
    """Return a settled job by its name: model, precision and batch size."""
    model, precision, batch = name.split("-")
    chosen = settled(replace(_MODELS[model], batch_size=int(batch), autocast="bfloat16" if precision == "bf16" else "none"))
    if dry:
        narrow = (32, 32, 32, 32)
        return replace(chosen, model="test_vit", widths=narrow, size=16, batch_size=1, n_components=100, rank=4)
    return chosen


def title(name: str) -> str:
    model, precision, batch = name.split("-")
    return f"{TITLES[model]}, {precision}, batch {batch}"


JOBS: tuple[Name, ...] = get_args(Name)
COMPILED: tuple[Name, ...] = ("vit-bf16-128", "sd15-bf16-2", "vit-bf16-32", "sd15-bf16-8")
MIXED: tuple[Name, ...] = ("vit-bf16-32", "vit-fp32-32")
INFERENCE: tuple[Name, ...] = ("vit-bf16-32", "sd15-bf16-2", "vit-fp32-32", "sd15-fp32-2")
