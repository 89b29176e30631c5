"""The compared methods: every kind of this library, peft's LoRA and FourierFT, and the floor.

The floor is the cost that no adapter of inner layers can avoid: forward and backward through the frozen model, with a gradient
at its input and its head. peft adapts a fused qkv as one matrix; this library adapts its projections. peft is imported only
when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from loca_vision import AdapterConfig, FourierFTConfig, LoCAConfig, LoRAConfig, SDCTFTConfig, SeLoRAConfig, adapters, inject
from workloads import Job, Workload

FLOOR, LOCA, LOCATIONS = "floor", "LoCA, coefficients", "LoCA, locations"
Method = Callable[[Workload], nn.Module]


def methods(job: Job, only: tuple[str, ...] = ()) -> dict[str, Method]:
    """Return the methods by their names in tables; each one makes an adapted model for a workload.

    Args:
        job: a settled job.
        only: the names to return, in addition to the floor; by default all.

    Raises:
        ValueError: `only` contains an unknown name.
    """
    count, rank = int(job.n_components or 0), job.rank
    found: dict[str, Method] = {
        FLOOR: _frozen,
        LOCA: partial(_loca, count=count, phase="coefficients"),
        LOCATIONS: partial(_loca, count=count, phase="locations"),
        "sDCTFT": partial(_of_kind, kind=SDCTFTConfig, n_components=count),
        f"FourierFT n={count}": partial(_of_kind, kind=FourierFTConfig, n_components=count),
        f"LoRA r={rank}": partial(_of_kind, kind=LoRAConfig, r=rank, alpha=rank),
        f"DoRA r={rank}": partial(_of_kind, kind=LoRAConfig, r=rank, alpha=rank, use_dora=True),
        f"SeLoRA r={rank}": partial(_of_kind, kind=SeLoRAConfig, r=rank, alpha=rank),
        peft_lora(job): partial(_of_peft, kind="LoraConfig", r=rank, lora_alpha=rank),
        f"FourierFT n={count}, peft": partial(
            _of_peft, kind="FourierFTConfig", n_frequency=count, scaling=300.0, init_weights=True
        ),
    }
    for name in only:
        if name not in found:
            raise ValueError(f"only={name!r}: the methods are {', '.join(found)}")
    return {name: adapt for name, adapt in found.items() if not only or name in (FLOOR, *only)}


def peft_lora(job: Job) -> str:
    return f"LoRA r={job.rank}, peft"


def _frozen(workload: Workload) -> nn.Module:
    model: nn.Module = workload.model()
    if workload.head:
        model.get_submodule(workload.head).requires_grad_(True)
    return model


def _loca(workload: Workload, count: int, phase: str) -> nn.Module:
    """Use nonzero coefficients, which change the model's output: with zeros, locations would not move and errors not show."""
    model = _of_kind(workload, LoCAConfig, n_components=count)
    torch.manual_seed(1)
    for spectrum in adapters(model).values():
        nn.init.normal_(spectrum.coefficients, std=0.3)
        spectrum.coefficients.requires_grad_(phase == "coefficients")
        spectrum.locations.requires_grad_(phase == "locations")
    return model


def _of_kind(workload: Workload, kind: Callable[..., AdapterConfig], **settings: Any) -> nn.Module:
    model: nn.Module = workload.model()
    inject(model, kind(**settings, targets=workload.targets))
    return model


def _of_peft(workload: Workload, kind: str, **settings: Any) -> nn.Module:
    import peft

    head = [workload.head] if workload.head else None
    config = getattr(peft, kind)(target_modules=list(workload.layers), modules_to_save=head, **settings)
    adapted: nn.Module = peft.get_peft_model(workload.model(), config)
    return adapted


def is_of_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def projections(model: nn.Module) -> int:
    """Return how many weights of an adapted model have updates; 0 for the floor."""
    if is_of_peft(model):
        import peft

        return sum(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())
    try:
        return len(adapters(model))
    except ValueError:  # nothing is injected
        return 0
