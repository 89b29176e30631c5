"""The gradients of a run's first batches."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch

from loca_vision import adapters, remove
from loca_vision.data.sampling import EpochSampler, loader
from loca_vision.recipes.classification.cached_features import Kept, with_features
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe, resolve
from loca_vision.recipes.classification.task import build, splits_of, task_of
from loca_vision.recipes.classification.trained_weights import load_trained
from loca_vision.recipes.settings.command_line import parse
from location_study.gradient_spectra import GradientSpectrum, gradient_spectra
from location_study.settings import RuleStudy

_KEPT: Kept = {}  # cached features for the lowest adapted block, which are the same for all seeds


def spectra_of_run(study: RuleStudy, seed: int, probe: Path | None) -> dict[str, GradientSpectrum]:
    """Return the gradient spectra of the first batches of a run with this seed, in float32.

    The head is read from `probe`. Without it, the random head of a new run is used, and the gradients adapt the model to that
    random head.
    """
    words = [*study.flags, *study.adapter_flags, "--method", "loca", "--n_components", "1", "--seed", str(seed)]
    parsed = parse(Recipe, words, prog="location_rules.py", presets=PRESETS)
    recipe = resolve(parsed.settings, parsed.given)
    splits = splits_of(recipe)
    task = task_of(recipe, seed, splits)
    model = build(task, recipe)
    projections = [*adapters(model, "default")]
    trained = model
    if recipe.cache_features:
        trained, task = with_features(model, task, recipe, device=torch.device("cpu"), computing=nullcontext(), kept=_KEPT)
    remove(model)
    if probe is not None:
        load_trained(model, probe)
    sampler = EpochSampler(len(splits.train), batch_size=study.batch_size, seed=seed)
    batches = islice(loader(task.train, sampler, workers=0), study.location_batches)
    return gradient_spectra(trained.eval(), batches, projections)
