"""A training run, from its settings to the files that it writes."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from loca_vision.pipeline.save import save_pipeline_adapter
from loca_vision.recipes.diffusion.checks import batch_of, differences
from loca_vision.recipes.diffusion.models import NAME
from loca_vision.recipes.diffusion.resuming import (
    check_same_samples,
    check_same_settings,
    checkpoint_of,
    saved_settings,
    settings_in,
)
from loca_vision.recipes.diffusion.run import Run
from loca_vision.recipes.diffusion.settings import METHODS, Recipe
from loca_vision.recipes.diffusion.task import Task
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.reports.hub_upload import push
from loca_vision.recipes.reports.metrics import METRICS, read_metrics, write_metrics
from loca_vision.recipes.reports.plots import draw_loss
from loca_vision.recipes.settings.adapter_dtype import dtype_of
from loca_vision.recipes.settings.command_line import as_yaml
from loca_vision.recipes.training.stepper import accelerator_for, end_trackers, peak_memory
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.run_checkpoint import read_checkpoint

R = TypeVar("R", bound=Recipe)


def train(recipe: Recipe, kind: type[Task]) -> dict[str, Any]:
    """Train and write all results; in the main process, return the metrics.

    Args:
        recipe: a settled recipe.
        kind: the task to train for.
    """
    accelerator = accelerator_for(
        precision=recipe.mixed_precision,
        report_to=recipe.report_to,
        folder=recipe.output_dir,
        moving=METHODS.moves_locations(recipe.method),
    )
    _check_folder(recipe)
    accelerator.wait_for_everyone()  # before the first of the processes writes
    recipe = _with_seed(recipe)
    metrics = _finished(recipe, kind, accelerator)
    if metrics is None:
        if (path := checkpoint_of(recipe)) is not None:  # checked before models are loaded and images encoded
            check_same_settings(path, read_checkpoint(path)[1], recipe)
        torch.backends.cuda.matmul.allow_tf32 = recipe.allow_tf32
        set_seed(recipe.seed or 0)
        metrics = _trained(Run(kind(recipe, accelerator), accelerator))
    if recipe.push_to_hub and accelerator.is_main_process:
        print(_pushed(recipe, kind, metrics))
    accelerator.end_training()
    return metrics


def _check_folder(recipe: Recipe) -> None:
    """Refuse to overwrite a run in the output folder, which can only be continued on request."""
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r}: a file is in the place of that folder")
    path = checkpoint_of(recipe)
    there = [*folder.glob("checkpoint-*"), *folder.glob(METRICS)]
    if there and not recipe.resume_from_checkpoint:
        raise ValueError(
            f"output_dir={str(folder)!r}: a run is in there ({there[0].name}); say --resume_from_checkpoint latest, "
            "or choose another folder"
        )
    if there and path is not None and path.parent.resolve() != folder.resolve():
        raise ValueError(
            f"output_dir={str(folder)!r}: a run is in there ({there[0].name}), and {path} is of another one; choose another "
            "folder, or go on with what is there: --resume_from_checkpoint latest"
        )


def _with_seed(recipe: R) -> R:
    """Set the seed to the given one, that of the checkpoint to continue from, or a new one, the same in all processes."""
    if recipe.seed is not None:
        return recipe
    path = checkpoint_of(recipe)
    before = settings_in(path, read_checkpoint(path)[1], recipe)["seed"] if path else None
    (seed,) = broadcast_object_list([secrets.randbelow(2**31) if before is None else before])
    return replace(recipe, seed=seed)


def _finished(recipe: Recipe, kind: type[Task], accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the metrics of the run in the output folder, if it is this run and finished."""
    if not (recipe.output_dir / METRICS).exists():
        return None
    metrics, now = read_metrics(recipe.output_dir), saved_settings(recipe)
    for difference in differences(recipe, metrics["config"], now):
        raise ValueError(f"{recipe.output_dir}: the finished run there has other settings: {difference}")
    batch = batch_of(recipe, accelerator.num_processes)
    if batch != metrics["batch_size"]:
        raise ValueError(
            f"{recipe.output_dir}: the finished run there took {metrics['batch_size']} {kind.noun} a step, not {batch}"
        )
    if kind.files_key in metrics:
        check_same_samples(recipe.output_dir, metrics[kind.files_key], kind.digests_of(recipe), kind.noun)
    if all(metrics["config"][name] == now[name] for name in ("max_train_steps", "num_train_epochs", "adapter_dtype")):
        if accelerator.is_main_process:
            print(f"{recipe.output_dir}: finished, after step {metrics['steps']}")
        return metrics
    if checkpoint_of(recipe) is None:
        raise ValueError(f"{recipe.output_dir}: the finished run there left no whole checkpoint to go on from")
    return None


def _trained(run: Run) -> dict[str, Any]:
    """Train from the first step, or from a checkpoint, to the last; return the metrics after saving the adapter."""
    recipe, accelerator, folder = run.recipe, run.accelerator, run.recipe.output_dir
    numbers = run.models.counts()
    if recipe.resume_from_checkpoint:
        found = run.resume()
        if accelerator.is_main_process:
            after = f"going on after step {run.progress.step}" if found else "no whole checkpoint is there; from the first step"
            print(f"{folder}: {after} of {run.total}")
    _begin(run.task, accelerator)
    run.train()
    run.draw()
    metrics: dict[str, Any] = {}
    if accelerator.is_main_process:
        metrics = _written(run, numbers)
    end_trackers(accelerator)
    return metrics


def _begin(task: Task, accelerator: Accelerator) -> None:
    """Write the settings, now that nothing more can be refused, and open the trackers."""
    recipe = task.recipe
    if accelerator.is_main_process:
        kept = replace(recipe, resume_from_checkpoint=None, hub_token=None)
        write_atomically(recipe.output_dir / "config.yaml", as_yaml(kept).encode())
    if recipe.report_to != "none":
        accelerator.project_configuration.logging_dir = str(recipe.output_dir / recipe.logging_dir)
        settings = {name: str(value) for name, value in saved_settings(recipe).items()}
        wandb = {"dir": str(recipe.output_dir)}
        accelerator.init_trackers(task.tracker, config=settings, init_kwargs={"wandb": wandb})


def _written(run: Run, numbers: dict[str, int]) -> dict[str, Any]:
    """Write adapter, picture and, last, the metrics, which mark the run as finished."""
    recipe, folder, progress = run.recipe, run.recipe.output_dir, run.progress
    with run.averaged():
        saved = save_pipeline_adapter(run.models.pipe, folder, NAME, dtype=dtype_of(recipe.adapter_dtype))
    draw_loss(folder / "loss.png", f"{recipe.method}, {numbers['trained_parameters']:,} numbers", progress.curve)
    picture = f"validation-{progress.step}.png"
    metrics: dict[str, Any] = {
        "config": saved_settings(recipe),
        **numbers,
        "steps": progress.step,
        "batch_size": run.sampler.batch_size,
        run.task.files_key: run.task.digests,
        **run.task.facts(),
        "seconds_per_step": progress.seconds / progress.step,
        "waiting_for_data_per_step": progress.waiting / progress.step,
        "peak_memory_bytes": peak_memory(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "device": str(run.accelerator.device),
        "mixed_precision": run.accelerator.mixed_precision,
        "adapter_file": saved.name,
        "adapter_bytes": saved.stat().st_size,
        "validation_picture": picture if run.task.has_pictures else None,
        "environment": environment(),
        "curves": progress.curve,
    }
    write_metrics(folder, metrics)
    print(f"{folder}: {progress.step} steps, {numbers['trained_parameters']:,} numbers, {metrics['adapter_bytes']:,} bytes")
    return metrics


def _pushed(recipe: Recipe, kind: type[Task], metrics: dict[str, Any]) -> str:
    files = [metrics["adapter_file"], METRICS, "config.yaml", "loss.png", metrics["validation_picture"]]
    return push(
        recipe.output_dir,
        [file for file in files if file],
        lambda name: kind.card(metrics, name),
        recipe.hub_model_id,
        message=f"Upload an adapter of {recipe.WHAT}",
        private=recipe.hub_private,
        token=recipe.hub_token,
    )
