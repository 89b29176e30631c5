"""Measure an adapter's cost at inference: this library's LoCA and LoRA, active and unfused, and peft's LoRA, on one model.

Every contender has a turn in every round of calls, in one process, on shared random weights. Loading reads a file that also
contains the trained head into a fresh model; the first call afterwards builds the weights that LoCA keeps. Before anything is
timed, LoCA's loss must be the same on three paths, and a loaded model's loss must equal the saved one's.

    python examples/benchmarks/inference.py --batch_size 8 --output inference.json
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contenders import LOCA, is_of_peft, methods, peft_lora
from loca_vision import load_adapter, save_adapter
from rounds import check_positive, in_turns, report, run, seconds_of, write
from steps import TOLERANCE, check
from table_rows import shown
from workloads import Job, Workload, held, settled, workload

SCRIPT = "inference.py"
HALF_TOLERANCE = 1e-2  # of the loss, if sums are rounded to half precision


@dataclass(frozen=True)
class Settings(Job):
    """Time loading adapters and calling models with them."""

    rounds: int = 7
    """Turns of each contender, after a warm-up turn."""
    loads: int = 3
    """How often each adapter is loaded."""
    threads: int | None = None
    """Torch threads; by default torch's own choice."""
    output: Path | None = None
    """JSON file for settings and figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rounds", "loads", "threads")


@torch.inference_mode()
def call(work: Workload, model: nn.Module) -> float:
    return float(work.loss(model))


def saved(work: Workload, model: Any, folder: Path) -> Callable[[], nn.Module]:
    """Write a model's adapter into a folder, and return a function that loads it into a fresh model."""
    fresh: nn.Module = work.model().eval()
    if is_of_peft(model):
        from peft import PeftModel

        model.save_pretrained(folder)

        return lambda: PeftModel.from_pretrained(fresh, folder)
    save_adapter(model, folder)

    def load() -> nn.Module:
        load_adapter(fresh, folder)
        return fresh

    return load


def handled(settings: Settings, work: Workload, name: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with the adapter loaded from its file, and seconds of loading and of the first call afterwards."""
    adapted = methods(settings)[name](work).eval()
    expected = call(work, adapted)
    loads, firsts = [], []
    loaded: list[nn.Module] = []
    for _ in range(settings.loads):
        load = saved(work, adapted, folder)
        loaded.clear()  # one at a time
        loads.append(seconds_of(lambda load=load: loaded.append(load())))  # type: ignore[misc]
        firsts.append(seconds_of(partial(call, work, loaded[0])))
    found, allowed = call(work, loaded[0]), TOLERANCE if settings.autocast == "none" else HALF_TOLERANCE
    if not abs(found - expected) <= allowed * abs(expected):
        raise RuntimeError(f"{name}: the loss is {expected:.6f} as trained and {found:.6f} as loaded")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return loaded[0], {"load": loads, "first call": firsts, "file bytes": size}


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    losses, work = check(settings), workload(settings)
    models: dict[str, nn.Module] = {"base": work.base.eval()}
    figures: dict[str, dict[str, Any]] = {"base": {}}
    for number, name in enumerate((LOCA, f"LoRA r={settings.rank}", peft_lora(settings))):
        shown_as = "LoCA" if name == LOCA else name
        models[shown_as], figures[shown_as] = handled(settings, work, name, folder / str(number))
    for name, own in in_turns({name: partial(call, work, model) for name, model in models.items()}, settings.rounds).items():
        figures[name] |= {"call": own, "MB held": held(models[name], work.base)}
    return {"losses": losses, "figures": figures}


def benchmark(given: Settings) -> None:
    settings = settled(given)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = report(SCRIPT, settings, given, **measure(settings, Path(folder)))
    write(settings.output, found)
    print(shown(found))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
