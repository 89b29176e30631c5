"""The runs of a study of classifiers: done in worker processes, written down, and never done twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from classifier_study.arms import Arm
from classifier_study.settings import Study
from loca_vision.recipes.classification.cached_features import Kept
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe, resolve
from loca_vision.recipes.classification.train import train
from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.training.stepper import Diverged
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.strict_json import read_json

RUNS, LOG = "runs.json", "log.txt"
_MEASURES = ("trained_parameters", "adapter_bytes", "validation_accuracy", "test_accuracy", "seconds_per_step")
_KEPT: Kept = {}  # features that earlier runs of a worker have computed

Run = dict[str, Any]


class Runs:
    """What has been run, and workers for what has not.

    Args:
        study: whose folder holds the record.
        planned: how many runs there are to be, at least.

    Raises:
        ValueError: the record is not one of a study.
    """

    def __init__(self, study: Study, planned: int) -> None:
        self.study, self.file = study, study.output_dir / RUNS
        self._there: dict[str, Run] = read_json(self.file) if self.file.exists() else {}
        if not all(isinstance(run, dict) and run.keys() >= {"flags", *_MEASURES} for run in self._there.values()):
            raise ValueError(f"{self.file}: it is not the record of a study")
        self._lock = Lock()
        self._bar = tqdm(total=planned, initial=len(self._there), desc="runs", dynamic_ncols=True)
        threads = max(1, (os.cpu_count() or 1) // study.jobs)
        self._workers = ProcessPoolExecutor(study.jobs, get_context("spawn"), torch.set_num_threads, (threads,))

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._bar.close()

    def finished(self, arm: Arm, rate: float, seed: int) -> Run:
        """What came out of a run, which is started, or goes on, where it has not finished.

        Raises:
            ValueError: it failed, or the one that is recorded had other settings.
        """
        name = f"{arm.name}/rate-{rate:.2g}-seed-{seed}"
        flags = [*arm.flags, arm.tuned, f"{rate:.6g}"]
        if name not in self._there:
            folder = self.study.output_dir / name
            words = [*self.study.flags, *flags, "--seed", str(seed), "--output_dir", str(folder), "--resume"]
            try:
                found = self._workers.submit(trained, words, folder).result()
            except (ValueError, OSError) as error:
                raise ValueError(f"{folder / LOG}: the run failed: {error}") from None
            self._record(name, {"arm": arm.name, "rate": rate, "seed": seed, "flags": flags, **found})
        if self._there[name]["flags"] != flags:
            raise ValueError(f"{self.file}: {name} was run with {self._there[name]['flags']}, not {flags}")
        return self._there[name]

    def _record(self, name: str, run: Run) -> None:
        with self._lock:
            self._there[name] = run
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(self._there.items()))
            write_atomically(self.file, f"{{\n{lines}\n}}\n".encode())
            self._bar.total = max(self._bar.total, len(self._there))
            self._bar.update()


def trained(words: list[str], folder: Path) -> Mapping[str, Any]:
    """A run of train.py in this process, told in a log in its folder. One that diverges is as bad as can be."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (folder / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        parsed = parse(Recipe, words, prog="train.py", presets=PRESETS)
        recipe = resolve(parsed.settings, parsed.given)
        try:
            metrics = train(recipe, _KEPT)
        except Diverged as error:
            print(error)
            metrics = dict.fromkeys(_MEASURES, 0.0)
    for checkpoint in folder.glob("checkpoint-*"):
        _remove(checkpoint)
    return {name: metrics[name] for name in _MEASURES} | {"seconds": time.perf_counter() - began}


def _remove(checkpoint: Path) -> None:
    """Of a finished run: full training has some hundred megabytes in each."""
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
