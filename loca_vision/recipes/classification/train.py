"""Training runs of image classifiers, from the command line to the files that they write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from loca_vision.data.check_images import check_images
from loca_vision.data.description import described
from loca_vision.data.images import ImageSplits
from loca_vision.data.same_images import check_same_images, images_in
from loca_vision.formats.save_load import load_adapter
from loca_vision.model.remove import remove
from loca_vision.recipes.classification.accuracy import accuracy_of, balanced_accuracy_of
from loca_vision.recipes.classification.cached_features import Kept, with_features
from loca_vision.recipes.classification.model_card import classifier_card
from loca_vision.recipes.classification.models import check_model_name
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe, adapter_config, differences, resolve, with_batch_size
from loca_vision.recipes.classification.recipe_groups import METHODS
from loca_vision.recipes.classification.run import Run
from loca_vision.recipes.classification.task import build, counts, splits_of, task_of
from loca_vision.recipes.classification.trained_weights import save_trained
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.reports.hub_upload import push
from loca_vision.recipes.reports.metrics import METRICS, read_metrics, summary, write_metrics
from loca_vision.recipes.reports.plots import draw_run
from loca_vision.recipes.settings.adapter_dtype import dtype_of
from loca_vision.recipes.settings.command_line import as_json_dict, as_yaml, parse
from loca_vision.recipes.settings.console import guarded
from loca_vision.recipes.training.stepper import accelerator_for, end_trackers, peak_memory
from loca_vision.recipes.training.trained_tensors import trained_tensors
from loca_vision.storage.atomic_file import write_atomically


def main(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    """Train and test as the command line says; return the exit status."""
    return guarded(prog, lambda: _main(sys.argv[1:] if arguments is None else list(arguments), prog), extra="train")


def _main(arguments: list[str], prog: str) -> None:
    parsed = parse(Recipe, arguments, prog=prog, presets=PRESETS)
    train(resolve(parsed.settings, parsed.given))


def train(recipe: Recipe, kept: Kept | None = None) -> dict[str, Any]:
    """Train with every seed of a recipe; in the main process, return the run's metrics or, for several seeds, a summary.

    Args:
        kept: features computed by earlier runs of this process; with `cache_features`, more are added.
    """
    accelerator = accelerator_for(
        precision="no" if recipe.precision == "float32" else recipe.precision,
        report_to=recipe.report_to,
        folder=recipe.output_dir,
        moving=METHODS.moves_locations(recipe.method),
    )
    _check_folder(recipe)
    accelerator.wait_for_everyone()  # before the first of the processes writes
    splits = _images(recipe, accelerator)
    recipe = with_batch_size(recipe, len(splits.train), accelerator.num_processes)
    kept = {} if kept is None else kept
    several = bool(recipe.seeds)
    metrics = _several(recipe, splits, accelerator, kept) if several else _one(recipe, recipe, splits, accelerator, kept)
    if recipe.push_to_hub and accelerator.is_main_process:
        print(_pushed(recipe, metrics))
    accelerator.end_training()
    return metrics


def _images(recipe: Recipe, accelerator: Accelerator) -> ImageSplits:
    """Return the images of the run, after reporting what was understood and reading each of them once."""
    check_model_name(recipe.model)  # before the images are read, which takes a while
    splits = splits_of(recipe)
    if accelerator.is_main_process:
        print(described(splits))
        if recipe.check_images:
            check_images((splits.train, splits.validation, splits.test))
    accelerator.wait_for_everyone()
    return splits


def _pushed(recipe: Recipe, metrics: dict[str, Any]) -> str:
    return push(
        recipe.output_dir,
        [metrics["adapter_file"], METRICS, "config.yaml", "curves.png"],
        lambda name: classifier_card(metrics, name),
        recipe.hub_model_id,
        message="Upload a fine-tuned classifier",
        private=recipe.hub_private,
    )


def _several(recipe: Recipe, splits: ImageSplits, accelerator: Accelerator, kept: Kept) -> dict[str, Any]:
    """Do a run for each seed in its own folder, and return their mean."""
    runs = []
    for seed in recipe.seeds:
        one = replace(recipe, seed=seed, seeds=(), output_dir=recipe.output_dir / f"seed-{seed}")
        runs.append(_one(one, recipe, splits, accelerator, kept))
    if not accelerator.is_main_process:
        return {}
    metrics = {"config": as_json_dict(recipe), **summary(runs)}
    write_metrics(recipe.output_dir, metrics)
    print(f"{recipe.method}: {100 * metrics['test_accuracy']:.2f} % over seeds {', '.join(map(str, recipe.seeds))}")
    return metrics


def _check_folder(recipe: Recipe) -> None:
    """Refuse to overwrite a run in the output folder, which can only be continued on request."""
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r}: a file is in the place of that folder")
    single, several = [*folder.glob("checkpoint-*")], [*folder.glob("seed-*")]
    if (folder / METRICS).exists():
        (single if "seed" in read_metrics(folder) else several).append(folder / METRICS)
    there = single + several
    if there and not recipe.resume:
        raise ValueError(f"output_dir={str(folder)!r}: a run is in there ({there[0].name}); say --resume, or choose another")
    if single if recipe.seeds else several:
        kind = "a single run" if recipe.seeds else "a run of several --seeds"
        raise ValueError(f"output_dir={str(folder)!r}: {kind} is in there; choose another folder")


def _one(recipe: Recipe, whole: Recipe, splits: ImageSplits, accelerator: Accelerator, kept: Kept) -> dict[str, Any]:
    """Train with one seed, test the best epoch, and write all results. `whole` is what the user asked for."""
    folder = recipe.output_dir
    if (folder / METRICS).exists():  # with --resume: this seed is finished
        return _finished(recipe, splits, folder)
    set_seed(recipe.seed)
    task = task_of(recipe, recipe.seed, splits)
    model = build(task, recipe)
    numbers = counts(model, recipe)
    trained = model
    if recipe.cache_features:
        device, computing = accelerator.device, accelerator.autocast()
        trained, task = with_features(model, task, recipe, device=device, computing=computing, kept=kept)
    run = Run(task, trained, recipe, folder, accelerator)
    if recipe.resume and run.resume() and accelerator.is_main_process:
        print(f"{folder}: going on after step {run.progress.step} of {run.total}")
    _begin(recipe, whole, accelerator)
    run.train()
    saved = _saved(run, model)
    matrix = run.matrix(task.test)
    metrics = numbers | _measured(run) | {"test_accuracy": accuracy_of(matrix)}
    metrics |= {"balanced_accuracy": balanced_accuracy_of(matrix)}
    accelerator.log({"test_accuracy": metrics["test_accuracy"]}, step=run.progress.step)
    if accelerator.is_main_process:
        metrics = _written(run, saved, metrics)
    end_trackers(accelerator)
    return metrics


def _begin(recipe: Recipe, whole: Recipe, accelerator: Accelerator) -> None:
    """Write the settings, now that nothing more can be refused, and open the trackers."""
    if accelerator.is_main_process:
        for each in (whole, recipe):
            write_atomically(each.output_dir / "config.yaml", as_yaml(replace(each, resume=False)).encode())
    if recipe.report_to != "none":
        accelerator.project_configuration.logging_dir = str(recipe.output_dir)
        settings = {name: str(value) for name, value in as_json_dict(recipe).items()}
        accelerator.init_trackers("loca-vision", config=settings, init_kwargs={"wandb": {"dir": str(recipe.output_dir)}})


def _saved(run: Run, model: nn.Module) -> Path:
    """Save what was trained. If the file rounds it, load the rounded values into the model, since these are to be tested."""
    adapter, dtype = adapter_config(run.recipe, 0) is not None, dtype_of(run.recipe.adapter_dtype)
    rounds, writes = adapter and dtype != torch.float32, run.accelerator.is_main_process
    with TemporaryDirectory() as elsewhere:
        saved = folder = run.folder if writes else Path(elsewhere)
        if writes or rounds:
            saved = save_trained(model, folder, trained_tensors(model, run.groups), adapter=adapter, dtype=dtype)
        if rounds:
            remove(model)
            load_adapter(model, saved)
    return saved


def _written(run: Run, saved: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write a picture and, last, the metrics, which mark the run as finished."""
    recipe, folder, splits, progress = run.recipe, run.folder, run.task.splits, run.progress
    draw_run(folder / "curves.png", f"{recipe.dataset}, {recipe.method}", progress.curve, progress.epochs)
    metrics = {"config": as_json_dict(recipe), "seed": recipe.seed, "licence": splits.licence, **metrics}
    metrics |= {"adapter_file": saved.name, "adapter_bytes": saved.stat().st_size, "classes": list(splits.classes)}
    metrics |= {"environment": environment(), "curves": {**progress.curve, "epochs": progress.epochs}}
    write_metrics(folder, metrics)
    accuracy = 100 * metrics["test_accuracy"]
    print(f"{folder}: {accuracy:.2f} % of {len(splits.test)} test images, {saved.stat().st_size:,} bytes")
    return metrics


def _finished(recipe: Recipe, splits: ImageSplits, folder: Path) -> dict[str, Any]:
    metrics = read_metrics(folder)
    for difference in differences(recipe, metrics["config"], as_json_dict(recipe)):
        raise ValueError(f"{folder}: the finished run there has other settings: {difference}")
    if "files" in metrics["protocol"]:
        check_same_images(folder, {"classes": metrics["classes"], "files": metrics["protocol"]["files"]}, images_in(splits))
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
