"""The whole study: gradients once per seed, cells by each rule, runs, the table and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from classifier_study.arms import Arm, rates_of
from classifier_study.run import compared
from loca_vision import LoCAConfig
from loca_vision.recipes.classification.recorded_runs import Runs
from loca_vision.recipes.classification.study_report import Point, draw_study, study_text
from loca_vision.recipes.classification.trained_weights import TRAINED
from loca_vision.recipes.settings.console import run_command
from loca_vision.recipes.settings.plugins import import_modules
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim
from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors
from location_study.chosen_cells import ChosenCellsConfig
from location_study.first_batches import spectra_of_run
from location_study.informed_cells import InformedCellsConfig
from location_study.rules import RULES, chosen, energy_share
from location_study.settings import RuleStudy

PROG = "location_rules.py"
PLUGINS = (ChosenCellsConfig.__module__, InformedCellsConfig.__module__)
_ENERGY = "energy_share"  # in the header of a file of cells
PROBE = ("--method", "lp", "--cache_features", "--head_lr", "0.01")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    return run_command(PROG, RuleStudy, run, arguments, extra="train")


def run(study: RuleStudy) -> list[Point]:
    """Run every rule at every budget, then write the table and the picture.

    Raises:
        ValueError: a setting is out of range or differs from the one the folder was started with, or a run failed.
    """
    study.check()
    import_modules(study.imports)
    claim(study.output_dir, "settings.json", study.about, "results")
    cells = study.output_dir / "cells"
    _choose(study, cells)
    arms = [_arm(study, rule, budget) for budget in study.budgets for rule in study.rules]
    planned = sum(len(arm.rates) + len(study.seeds) - 1 for arm in arms)
    flags = [*study.flags, *(f"--import={module}" for module in PLUGINS), "--set", f"folder={cells}"]
    with Runs(study.output_dir, flags, planned, study.jobs) as runs, ThreadPoolExecutor(study.jobs) as each:
        points = list(each.map(lambda arm: compared(runs, arm, study.seeds), arms))
    text = _text(study, points, cells)
    write_atomically(study.output_dir / "study.md", text.encode())
    draw_study(study.output_dir / "study.png", f"{study.title or study.dataset}, {study.image_size} pixels", points)
    print(text)
    return points


def _arm(study: RuleStudy, rule: str, budget: int) -> Arm:
    steps = study.epochs * (study.train_images // study.batch_size)
    flags = [*RULES[rule].flags(budget, steps), *study.adapter_flags, "--set", f"rule={_name(rule, budget)}"]
    flags += ["--head_lr", f"{LoCAConfig.head_lr:g}"]
    return Arm(_name(rule, budget), rates_of(LoCAConfig, {"n_components": budget}), tuple(flags))


def _name(rule: str, budget: int) -> str:
    return f"{rule}-{budget}"


# Cells


def _choose(study: RuleStudy, cells: Path) -> None:
    """Write the cells of every rule and budget for each seed, with their share of the gradient's energy."""
    wanted = [(rule, budget) for budget in study.budgets for rule in study.rules]
    missing = {
        seed: [(rule, budget) for rule, budget in wanted if not _file(cells, rule, budget, seed).exists()]
        for seed in study.seeds
    }
    seeds = [seed for seed in study.seeds if missing[seed]]
    probes = _probes(study, seeds) if study.head == "probe" else {}
    for seed in tqdm(seeds, desc="gradients", disable=None):
        spectra = spectra_of_run(study, seed, probes.get(seed))
        for rule, budget in missing[seed]:
            found = chosen(RULES[rule], spectra, budget, seed)
            write_safetensors(_file(cells, rule, budget, seed), found, {_ENERGY: repr(energy_share(spectra, found))})


def _probes(study: RuleStudy, seeds: Sequence[int]) -> dict[int, Path]:
    """Train a linear probe for each seed and return the files of their heads by seed."""
    folder = study.output_dir / "probes"
    with Runs(folder, study.flags, len(study.seeds), study.jobs) as probes:
        for seed in seeds:
            probes.finished(f"seed-{seed}", PROBE, seed)
    return {seed: folder / f"seed-{seed}" / TRAINED for seed in seeds}


def _file(cells: Path, rule: str, budget: int, seed: int) -> Path:
    return cells / _name(rule, budget) / f"seed-{seed}.safetensors"


# Results


def _text(study: RuleStudy, points: Sequence[Point], cells: Path) -> str:
    """Return Markdown: accuracies and differences for each budget, then what the rules chose."""
    parts = []
    for number, budget in enumerate(study.budgets):
        own = points[number * len(study.rules) : (number + 1) * len(study.rules)]
        parts.append(f"{budget} components a projection\n\n{study_text(own, study.seeds, study.against)}")
    lines = ["| rule | takes | the gradient's energy in its cells |", "|---|---|---|"]
    for rule in study.rules:
        shares = [f"{budget}: {100 * _mean_share(study, cells, rule, budget):.2f} %" for budget in study.budgets]
        lines.append(f"| {rule} | {RULES[rule].about} | {', '.join(shares)} |")
    return "\n".join([*parts, *lines]) + "\n"


def _mean_share(study: RuleStudy, cells: Path, rule: str, budget: int) -> float:
    return statistics.fmean(_share(_file(cells, rule, budget, seed)) for seed in study.seeds)


def _share(file: Path) -> float:
    with open_safetensors(file) as opened:
        return float(opened.metadata[_ENERGY])
