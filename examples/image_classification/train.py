"""Fine-tune an image classifier with LoCA, or with a method beside it, and test it.

    python examples/image_classification/train.py --dataset folder --root photos --output_dir mine
    accelerate launch examples/image_classification/train.py --dataset oxford_pets --root data --preset vit-base-loca-3000

It writes the adapter, metrics.json, curves.png, config.yaml and checkpoints; evaluate.py and report.py read them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from loca_vision.atomic import write_atomically
from loca_vision.classification import build, counts, task_of, trained_tensors, with_features
from loca_vision.console import guarded
from loca_vision.environment import environment
from loca_vision.evaluation import accuracy_of
from loca_vision.fit import Run, accelerator_for, peak_memory
from loca_vision.hub import push
from loca_vision.plots import draw_run
from loca_vision.presets import PRESETS
from loca_vision.recipe import Recipe, adapter_config, differences, settled
from loca_vision.run_report import METRICS, read_metrics, save_trained, summary, write_metrics
from loca_vision.settings import as_json_dict, as_yaml, parse

PROG = "train.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and test as the command line says; returns the exit status."""
    return guarded(PROG, lambda: _main(sys.argv[1:] if arguments is None else list(arguments)), extra="train")


def _main(arguments: list[str]) -> None:
    parsed = parse(Recipe, arguments, prog=PROG, presets=PRESETS)
    train(settled(parsed.settings, parsed.given))


def train(recipe: Recipe) -> dict[str, Any]:
    """Every seed of a recipe; returns the metrics of the run, or of several their summary."""
    accelerator = accelerator_for(recipe)
    _claim(recipe, accelerator)
    if not recipe.seeds:
        return _one(recipe, recipe.output_dir, accelerator)
    runs = []
    for seed in recipe.seeds:
        one = replace(recipe, seed=seed, seeds=(), output_dir=recipe.output_dir / f"seed-{seed}")
        runs.append(_one(one, one.output_dir, accelerator))
    metrics = {"config": as_json_dict(recipe), **summary(runs)}
    if accelerator.is_main_process:
        write_metrics(recipe.output_dir, metrics)
        print(f"{recipe.method}: {100 * metrics['test_accuracy']:.2f} % over seeds {', '.join(map(str, recipe.seeds))}")
    return metrics


def _claim(recipe: Recipe, accelerator: Accelerator) -> None:
    """Make the output folder this run's own; what another left there is gone on with on request, never written over."""
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r}: a file is in the place of that folder")
    there = [*folder.glob(METRICS), *folder.glob("checkpoint-*"), *folder.glob("seed-*")]
    if there and not recipe.resume:
        raise ValueError(f"output_dir={str(folder)!r}: a run is in there ({there[0].name}); say --resume, or choose another")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", as_yaml(replace(recipe, resume=False)).encode())


def _one(recipe: Recipe, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Train with one seed, test the best epoch, write everything down."""
    if (folder / METRICS).exists():  # with --resume: this seed is done
        return _finished(recipe, folder)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", as_yaml(replace(recipe, resume=False)).encode())
    accelerator.wait_for_everyone()
    set_seed(recipe.seed)
    task = task_of(recipe, recipe.seed)
    model = build(task, recipe)
    numbers = counts(model, recipe)
    trained, task = with_features(model, task) if recipe.cache_features else (model, task)
    run = Run(task, trained, recipe, folder, accelerator)
    if recipe.resume and run.resume() and accelerator.is_main_process:
        print(f"{folder}: going on after step {run.progress.step} of {run.total}")
    if recipe.report_to != "none":
        accelerator.init_trackers("loca-vision", config={k: str(v) for k, v in as_json_dict(recipe).items()})
    progress = run.train()
    accuracy = accuracy_of(run.matrix(task.test))
    accelerator.log({"test_accuracy": accuracy}, step=progress.step)
    metrics = numbers | _measured(run) | {"test_accuracy": accuracy}
    if accelerator.is_main_process:
        saved = save_trained(model, folder, trained_tensors(model, run.groups), adapter=adapter_config(recipe, 0) is not None)
        metrics |= {"adapter_file": saved.name, "adapter_bytes": saved.stat().st_size}
        draw_run(folder / "curves.png", f"{recipe.dataset}, {recipe.method}", progress.curve, progress.epochs)
        metrics = {"config": as_json_dict(recipe), "seed": recipe.seed, "licence": task.splits.licence, **metrics}
        metrics |= {"classes": list(task.splits.classes), "environment": environment(), "curves": _curves(run)}
        write_metrics(folder, metrics)
        print(f"{folder}: {100 * accuracy:.2f} % of {len(task.splits.test)} test images, {saved.stat().st_size:,} bytes")
        if recipe.push_to_hub:
            print(push(folder, metrics, recipe.hub_model_id, private=recipe.hub_private))
    accelerator.end_training()
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    return metrics


def _finished(recipe: Recipe, folder: Path) -> dict[str, Any]:
    metrics = read_metrics(folder)
    for difference in differences(recipe, metrics["config"], as_json_dict(recipe)):
        raise ValueError(f"{folder}: the finished run there has other settings: {difference}")
    return metrics


def _measured(run: Run) -> dict[str, Any]:
    progress = run.progress
    assert progress.best_epoch is not None
    return {
        "protocol": run.task.splits.protocol,
        "validation_accuracy": progress.epochs[progress.best_epoch]["validation_accuracy"],
        "best_epoch": progress.best_epoch + 1,
        "steps": progress.step,
        "seconds_per_step": progress.seconds / progress.step,
        "waiting_for_images_per_step": progress.waiting / progress.step,
        "peak_memory_bytes": peak_memory(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "device": str(run.accelerator.device),
    }


def _curves(run: Run) -> dict[str, Any]:
    return {**run.progress.curve, "epochs": run.progress.epochs}


if __name__ == "__main__":
    sys.exit(main())
