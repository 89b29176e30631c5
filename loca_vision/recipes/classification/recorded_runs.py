"""Runs of `train` for a study: done in worker processes, recorded, and never done twice; and rates tuned with them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

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
_MOST = 4  # rates tried beyond the ends of a grid
_KEPT: Kept = {}  # features computed by a worker's earlier runs

Run = dict[str, Any]


class Runs:
    """The record of finished runs, and workers for the others.

    Args:
        folder: the folder for the record, and for a folder of each run.
        flags: the flags of train.py that all runs have in common.
        planned: how many runs there will be, at least.
        jobs: runs at a time, each with its share of this process's threads.

    Raises:
        ValueError: the record is not one of a study.
    """

    def __init__(self, folder: Path, flags: Sequence[str], planned: int, jobs: int = 1) -> None:
        self.folder, self.flags, self.file = folder, list(flags), folder / RUNS
        self._there: dict[str, Run] = read_json(self.file) if self.file.exists() else {}
        if not all(isinstance(run, dict) and run.keys() >= {"flags", *_MEASURES} for run in self._there.values()):
            raise ValueError(f"{self.file}: it is not the record of a study")
        self._lock = Lock()
        self._bar = tqdm(total=max(planned, len(self._there)), initial=len(self._there), desc="runs", dynamic_ncols=True)
        threads = max(1, torch.get_num_threads() // jobs)
        self._workers = ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker, (threads,))

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._bar.close()

    def finished(self, name: str, flags: Sequence[str], seed: int, **about: Any) -> Run:
        """Return the result of a run, which is started or continued if it has not finished.

        Args:
            name: the run's name in the record and of its folder.
            flags: flags of train.py, in addition to those of all runs.
            about: further entries for the record.

        Raises:
            ValueError: the run failed, or the recorded one had other settings.
        """
        flags = list(flags)
        if name not in self._there:
            folder = self.folder / name
            words = [*self.flags, *flags, "--seed", str(seed), "--output_dir", str(folder), "--resume"]
            try:
                found = self._workers.submit(trained, words, folder).result()
            except (ValueError, OSError) as error:
                raise ValueError(f"{folder / LOG}: the run failed: {error}") from None
            self._record(name, {**about, "seed": seed, "flags": flags, **found})
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


def begin_worker(threads: int) -> None:
    """Prepare a worker before its first run: set its threads, and make it end with the study, however that ends.

    A worker that outlived a killed study would continue in folders in which the study, when started again, has begun anew.
    """
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        # A study's pictures are small. At ten tokens the gradient of torch's fused attention takes 18 ms in bfloat16 on a
        # processor, a third of a step of ViT-S, and that of its plain attention 2 ms.
        torch.backends.cuda.enable_flash_sdp(False)
    Thread(target=_end_with_the_study, daemon=True).start()


def _end_with_the_study() -> None:
    study = parent_process()
    assert study is not None
    study.join()
    os._exit(1)


def trained(words: list[str], folder: Path) -> Mapping[str, Any]:
    """Run train.py in this process, with a log in the run's folder. A run that diverges counts as the worst possible."""
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
    """Remove a checkpoint of a finished run: in full training each has some hundred megabytes."""
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()


def tune(rates: Sequence[float], attempt: Callable[[float], Run]) -> tuple[float, dict[float, Run]]:
    """Try every rate of a grid, and rates beyond its end as long as the best one is at an end.

    Args:
        rates: two or more, in ascending order.
        attempt: rate -> the result of a run with it.

    Returns:
        The rate with the best validation accuracy, among equally good ones the smallest; and the runs by their rates.
    """
    tried = {rate: attempt(rate) for rate in rates}
    for _ in range(_MOST):
        best, known = _best(tried), sorted(tried)
        if best not in (known[0], known[-1]):
            break
        inwards = known[1] if best == known[0] else known[-2]
        further = float(f"{best**2 / inwards:.2g}")
        tried[further] = attempt(further)
    return _best(tried), tried


def _best(tried: Mapping[float, Run]) -> float:
    return max(sorted(tried), key=lambda rate: float(tried[rate]["validation_accuracy"]))
