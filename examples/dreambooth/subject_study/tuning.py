"""Choose a learning rate for each adapter: the same factors on its method's rate for all, with a separate seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from loca_vision.recipes.reports.metrics import read_metrics
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.strict_json import read_json
from subject_study.arms import Arm, Training
from subject_study.measures import Studio, measured
from subject_study.report import Result, table


def best_rates(training: Training, studio: Studio, arms: Sequence[Arm], factors: Sequence[float]) -> dict[str, float]:
    """Return, by the name of each adapter, the rate with the largest likeness; the lowest one in a tie.

    Adapters and noise use the seed after that of the study. Results in the folder tuning/ are not computed again; all of them
    are listed in tuning.md.

    Raises:
        ValueError: training failed.
    """
    if len(factors) == 1:
        return {arm.name: arm.rate * factors[0] for arm in arms}
    found: dict[str, list[Result]] = {arm.name: [] for arm in arms}
    other = replace(studio, seed=studio.seed + 1)
    for factor in sorted(factors):
        candidates = [replace(arm, rate=arm.rate * factor) for arm in arms]
        folders = training.adapters(candidates, f"tuning/{factor:g}", training.seed + 1)
        for arm, folder in zip(candidates, folders, strict=True):
            file = folder / "measured.json"
            if not file.exists():
                write_atomically(file, (json.dumps(measured(other, arm.task, folder), indent=1) + "\n").encode())
            metrics = read_metrics(folder)
            found[arm.name].append(Result(arm, read_json(file), metrics["trained_parameters"], metrics["adapter_bytes"]))
    tables = [
        table(task, [one for arm in arms if arm.task == task for one in found[arm.name]]) for task in ("subject", "style")
    ]
    write_atomically(training.folder / "tuning.md", "\n".join(tables).encode())
    best = {name: max(results, key=lambda one: one.measured["likeness"]) for name, results in found.items()}
    return {name: one.arm.rate for name, one in best.items() if one.arm is not None}
