"""Seconds of one training step: every kind of adapter beside peft's LoRA and FourierFT, on one model, in one process.

Every method takes a turn in every round, so that a machine whose speed drifts is unfair to none; the table gives medians, and
the median of the ratios to the floor. The floor is what no adapter of inner layers can save: forward and backward through the
frozen model, with a gradient at its input and at the head. peft adapts the fused qkv as one matrix; this library its query
and value. With one thread the seconds are the processor's own, so that other work on the machine disturbs them less.

    python examples/benchmarks/training_step.py --batch_size 8 --output step.json
    python examples/benchmarks/training_step.py --batch_size 8 --only "floor" "LoRA r=16" "LoRA r=16, peft"
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import peft
import timm
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from loca_vision import (
    AdapterConfig,
    FourierFTConfig,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    SeLoRAConfig,
    adapters,
    inject,
)


@dataclass(frozen=True)
class Settings:
    """Time one training step of each method."""

    model: str = "vit_base_patch16_224"
    """A timm model with fused qkv layers; its weights are random, which costs the same."""
    batch_size: int = 8
    """Images a step."""
    rounds: int = 7
    """Turns of each method, after one that does not count."""
    n_components: int = 3000
    """Of LoCA, sDCTFT and FourierFT for each projection, and of peft's FourierFT for each qkv."""
    rank: int = 16
    """r of LoRA and SeLoRA."""
    only: tuple[str, ...] = ()
    """Some of the methods, by the names they have in the table, beside the floor; all by default."""
    threads: int | None = None
    """Of torch; its own choice by default."""
    output: Path | None = None
    """JSON file for settings and seconds."""

    def __post_init__(self) -> None:
        for field in ("batch_size", "rounds", "n_components", "rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: it is a whole number from 1 up")


def frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def loca(model: nn.Module, settings: Settings, phase: str) -> nn.Module:
    inject(model, LoCAConfig(n_components=settings.n_components))
    for spectrum in adapters(model).values():
        nn.init.normal_(spectrum.coefficients, std=1e-3)
        spectrum.coefficients.requires_grad_(phase == "coefficients")
        spectrum.locations.requires_grad_(phase == "locations")
    return model


def of_kind(model: nn.Module, config: AdapterConfig) -> nn.Module:
    inject(model, config)
    return model


def of_peft(model: nn.Module, config: Any) -> nn.Module:
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def methods(settings: Settings) -> dict[str, Callable[[nn.Module], nn.Module]]:
    whole = {"target_modules": ["qkv"], "modules_to_save": ["head"]}
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, **whole)
    fourier = peft.FourierFTConfig(n_frequency=settings.n_components, scaling=300.0, init_weights=True, **whole)
    count, rank = settings.n_components, settings.rank
    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "floor": frozen,
        "LoCA, coefficients": partial(loca, settings=settings, phase="coefficients"),
        "LoCA, locations": partial(loca, settings=settings, phase="locations"),
        "sDCTFT": partial(of_kind, config=SDCTFTConfig(n_components=count)),
        f"FourierFT n={count}": partial(of_kind, config=FourierFTConfig(n_components=count)),
        f"LoRA r={rank}": partial(of_kind, config=LoRAConfig(r=rank, alpha=rank)),
        f"DoRA r={rank}": partial(of_kind, config=LoRAConfig(r=rank, alpha=rank, use_dora=True)),
        f"SeLoRA r={rank}": partial(of_kind, config=SeLoRAConfig(r=rank, alpha=rank)),
        f"LoRA r={rank}, peft": partial(of_peft, config=lora),
        f"FourierFT n={count}, peft": partial(of_peft, config=fourier),
    }
    for name in settings.only:
        if name not in found:
            raise ValueError(f"only={name!r}: the methods are {', '.join(found)}")
    return {name: adapt for name, adapt in found.items() if not settings.only or name in ("floor", *settings.only)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Seconds of forward, backward and update. The images ask for a gradient, so that none stops halfway."""
    clock = time.process_time if torch.get_num_threads() == 1 and not images.is_cuda else time.perf_counter
    started = clock()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def measure(settings: Settings) -> dict[str, list[float]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(settings.batch_size, 3, 224, 224, device=device, requires_grad=True)
    labels = torch.arange(settings.batch_size, device=device) % 10
    runs = {}
    for name, adapt in methods(settings).items():
        torch.manual_seed(0)
        model = adapt(timm.create_model(settings.model, num_classes=10)).to(device).train()
        runs[name] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counted in tqdm([False] + [True] * settings.rounds, unit="round", disable=None):
        for name, (model, optimizer) in runs.items():
            taken = step(model, optimizer, images, labels)
            seconds[name] += [taken] * counted
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    floor = seconds["floor"]
    lines = [f"{'':24}{'seconds':>10}{'/ floor':>10}"]
    for name, own in seconds.items():
        ratio = median(mine / least for mine, least in zip(own, floor, strict=True))
        lines.append(f"{name:24}{median(own):10.3f}{ratio:10.3f}")
    return "\n".join(lines)


def main() -> int:
    try:
        settings = tyro.cli(partial(Settings), description=Settings.__doc__, use_underscores=True)
        methods(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if settings.threads:
        torch.set_num_threads(settings.threads)
    seconds = measure(settings)
    if settings.output:
        about = {"torch": torch.__version__, "peft": peft.__version__, "threads": torch.get_num_threads()}
        fields = asdict(settings) | {"output": str(settings.output)}
        settings.output.write_text(json.dumps({"settings": fields, **about, "seconds": seconds}, indent=1) + "\n")
    print(table(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
