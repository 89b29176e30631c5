"""The whole study: arms, runs, the table and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from classifier_study.arms import Arm, arms
from classifier_study.settings import Study
from loca_vision.recipes.classification.recorded_runs import Run, Runs, tune
from loca_vision.recipes.classification.study_report import Point, draw_study, study_text
from loca_vision.recipes.settings.console import run_command
from loca_vision.recipes.settings.plugins import import_modules
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim

PROG = "study.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    return run_command(PROG, Study, run, arguments, extra="train")


def run(study: Study) -> list[Point]:
    """Run every arm, then write the table and the picture.

    Raises:
        ValueError: a setting is out of range or differs from the one the folder was started with, or a run failed.
    """
    import_modules(study.imports)
    study.check()
    chosen = arms(study)
    claim(study.output_dir, "settings.json", study.about, "results")
    planned = sum(len(arm.rates) + len(study.seeds) - 1 for arm in chosen)
    with Runs(study.output_dir, study.flags, planned, study.jobs) as runs, ThreadPoolExecutor(study.jobs) as each:
        _say_how_long(runs, study, chosen, planned)
        points = list(each.map(lambda arm: compared(runs, arm, study.seeds), chosen))
    text = study_text(points, study.seeds, study.against)
    write_atomically(study.output_dir / "study.md", text.encode())
    draw_study(study.output_dir / "study.png", f"{study.title or study.dataset}, {study.image_size} pixels", points)
    print(text)
    return points


def _say_how_long(runs: Runs, study: Study, chosen: Sequence[Arm], planned: int) -> None:
    """Print an estimate of the duration from the first run of the last arm, an adapter's. That run is part of the study."""
    arm = chosen[-1]
    seconds = _finished(runs, arm, arm.rates[0], study.seeds[0])["seconds"]
    hours = planned * seconds / study.jobs / 3600
    print(f"{len(chosen)} methods and budgets, at least {planned} runs of about {seconds:.0f} s: {hours:.1f} h from nothing")


def compared(runs: Runs, arm: Arm, seeds: Sequence[int]) -> Point:
    """Tune the rate with the first seed, then run the other seeds at the best rate."""
    best, tried = tune(arm.rates, lambda rate: _finished(runs, arm, rate, seeds[0]))
    found = [tried[best], *(_finished(runs, arm, best, seed) for seed in seeds[1:])]
    validation = {rate: one["validation_accuracy"] for rate, one in tried.items()}
    return Point.of(arm.name, best, validation, found)


def _finished(runs: Runs, arm: Arm, rate: float, seed: int) -> Run:
    flags = [*arm.flags, arm.tuned, f"{rate:.6g}"]
    return runs.finished(f"{arm.name}/rate-{rate:.2g}-seed-{seed}", flags, seed, arm=arm.name, rate=rate)
