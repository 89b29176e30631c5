"""What do learned locations contribute? LoCA against the variants of Table 5, with Figures 2 and 4 and Appendix N.

The study runs train.py on real images. V1 has fixed random locations; V2 alternates for the whole run; V3 updates coefficients
and locations together; V4 and V5 use the forward and the backward difference. "still" and "V2 still" have the schedules of LoCA
and of V2 with locations that do not move, which isolates the effect of pausing the coefficients. The coefficients' rates are
tuned for V1 and for LoCA on validation with the first seed. LoCA is then run with all seeds at each of `location_rates`, and
the one with the best mean validation accuracy represents LoCA from then on: in V2 to V5, and with other values of alpha and B_s
(Figure 4). All of these use LoCA's rate of the coefficients.

Differences are paired by seed, with Student's 95 % intervals: test accuracies against V1 and against "still", and training
losses (Figure 2) against "still", which has the same batches and head. The saved adapters show what happened to the locations:
how many moved, how far, and whether they formed a pattern (Appendix N, location_patterns.py).

A run takes half a minute on one quiet core, and there are 79 runs. Runs that are already in runs.json are not repeated.

    python examples/paper/ablation.py --root photos --output ablation --jobs 2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from ablation_pictures import draw_ablation, draw_moves
from ablation_settings import FIXED, STILL, WHOLE, Settings, Variant, figure_4, fixed, learned, still, table_5
from common import run, write_report
from loca_vision.messages import aligned
from loca_vision.recipes.classification.recorded_runs import Run, Runs, tune
from loca_vision.recipes.classification.study_report import paired_difference
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.reports.metrics import read_metrics
from loca_vision.storage.output_folder import claim
from location_moves import Moves, read_moves, travelled
from location_patterns import patterns

SCRIPT = "ablation.py"
CYCLE = 30  # steps per alternation: 10 of coefficients, 20 of locations
_AGAINST = {"test_less_v1": FIXED, "test_less_still": STILL}


class Ablation:
    """All variants, run with all seeds."""

    def __init__(self, settings: Settings, runs: Runs) -> None:
        self.settings, self.runs = settings, runs
        self.results: dict[str, tuple[Variant, float, list[Run]]] = {}
        self.tried: dict[str, dict[float, float]] = {}

    def run(self, variant: Variant, rate: float, seed: int) -> Run:
        flags = [*variant.flags, "--lr", f"{rate:g}"]
        return self.runs.finished(_folder(variant, rate, seed), flags, seed, variant=variant.name, rate=rate)

    def tuned(self, variant: Variant) -> float:
        """Return the coefficients' best rate on validation, with the first seed."""
        best, tried = tune(self.settings.rates, lambda rate: self.run(variant, rate, self.settings.seeds[0]))
        self.tried[variant.name] = {rate: found["validation_accuracy"] for rate, found in sorted(tried.items())}
        return best

    def with_all_seeds(self, variants: Sequence[Variant], rate: float) -> None:
        with ThreadPoolExecutor(self.settings.jobs) as each:
            asked = [
                (variant, [each.submit(self.run, variant, rate, seed) for seed in self.settings.seeds]) for variant in variants
            ]
            for variant, futures in asked:
                self.results[variant.name] = variant, rate, [future.result() for future in futures]

    def everything(self) -> Variant:
        """Run everything and return the LoCA that is best on validation; in a tie, the one with the smallest location rate."""
        settings = self.settings
        locas = [learned(settings, rate) for rate in settings.location_rates]
        self.with_all_seeds([fixed(settings)], self.tuned(fixed(settings)))
        rate = self.tuned(locas[0])
        self.with_all_seeds([*locas, still(settings)], rate)
        best = max(locas, key=lambda loca: np.mean(self.values(loca.name, "validation_accuracy")))
        self.with_all_seeds([*table_5(best), *figure_4(settings, best)], rate)
        return best

    def values(self, name: str, measure: str) -> list[float]:
        """Return a measure by seed."""
        return [found[measure] for found in self.results[name][2]]

    def moves(self, name: str) -> list[list[Moves]]:
        """Return the moves of every projection, by seed."""
        return [read_moves(self.settings.output / folder / adapter) for folder, adapter in self._saved(name, "adapter_file")]

    def losses(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the training losses (seeds, steps)."""
        return np.array([curves["loss"] for _, curves in self._saved(name, "curves")])

    def _saved(self, name: str, part: str) -> list[tuple[str, Any]]:
        variant, rate, _ = self.results[name]
        folders = [_folder(variant, rate, seed) for seed in self.settings.seeds]
        return [(folder, read_metrics(self.settings.output / folder)[part]) for folder in folders]


def _folder(variant: Variant, rate: float, seed: int) -> str:
    return f"{variant.name.replace(' ', '-')}/rate-{rate:.2g}-seed-{seed}"


def difference(ours: Sequence[float], others: Sequence[float], digits: int) -> list[float]:
    """Return the mean difference, paired by seed, and both ends of its 95 % interval."""
    mean, half = paired_difference(ours, others)
    return [round(mean, digits), round(mean - half, digits), round(mean + half, digits)]


def described(ablation: Ablation, name: str) -> dict[str, Any]:
    """Return one variant's results: accuracies by seed in percent, differences in points, and the moves of its locations."""
    variant, rate, _ = ablation.results[name]
    test = [100 * value for value in ablation.values(name, "test_accuracy")]
    others = {key: [100 * value for value in ablation.values(other, "test_accuracy")] for key, other in _AGAINST.items()}
    return {
        "settings": {key: value for key, value in vars(variant).items() if key != "name"} | {"rate": rate},
        "validation": [round(100 * value, 2) for value in ablation.values(name, "validation_accuracy")],
        "test": [round(value, 3) for value in test],
        **{key: difference(test, values, 3) for key, values in others.items()},
        "locations": travelled(ablation.moves(name)),
    }


def of_all_differences(ablation: Ablation, best: Variant) -> dict[str, list[float]]:
    """Compare the average of LoCA, V4 and V5 for each seed: they differ only in a detail, and averaging reduces the noise."""
    names = (best.name, "V4", "V5")
    ours = (100 * np.mean([ablation.values(name, "test_accuracy") for name in names], 0)).tolist()
    others = {key: [100 * value for value in ablation.values(name, "test_accuracy")] for key, name in _AGAINST.items()}
    return {key: difference(ours, values, 3) for key, values in others.items()}


def loss_differences(ablation: Ablation, name: str) -> dict[str, Any]:
    """Return the training loss minus that of "still" with the same seed, by step and by window with intervals (Figure 2).

    The windows are the first phase of the locations, the rest of the first half of the steps, and the second half.
    """
    ours, others = ablation.losses(name), ablation.losses(STILL)
    steps = ours.shape[1]
    ends = [min(end, steps) for end in (10, CYCLE, max(CYCLE, steps // 2), steps)]
    windows = {f"{begin + 1} to {end}": slice(begin, end) for begin, end in pairwise(ends) if begin < end}
    return {
        "windows": {w: difference(ours[:, at].mean(1), others[:, at].mean(1), 5) for w, at in windows.items()},
        "by_step": (ours - others).mean(0).round(5).tolist(),
    }


def reported(ablation: Ablation, best: Variant) -> dict[str, Any]:
    """Return all results, for JSON."""
    settings = ablation.settings
    locas = [learned(settings, rate).name for rate in settings.location_rates]
    seconds = [found["seconds"] for _, _, runs in ablation.results.values() for found in runs]
    return {
        "script": SCRIPT,
        "settings": settings.about,
        "environment": environment(),
        "runs": len(seconds),
        "minutes": round(sum(seconds) / 60, 1),
        "validation_by_rate": ablation.tried,
        "loca": best.name,
        "variants": {name: described(ablation, name) for name in ablation.results},
        "loca_v4_and_v5": of_all_differences(ablation, best),
        "loss_of_still": ablation.losses(STILL).mean(0).round(4).tolist(),
        "loss_less_still": {name: loss_differences(ablation, name) for name in (*locas, WHOLE)},
        "patterns": {
            name: patterns(ablation.moves(name), settings.simulations, settings.seeds[0]) for name in (FIXED, *locas, WHOLE)
        },
    }


def table(report: dict[str, Any]) -> str:
    rows = [["", "rate", "test", "less V1", "95 %", "less still", "95 %", "moved", "mean", "largest"]]
    for name, own in report["variants"].items():
        cells = [name, f"{own['settings']['rate']:g}", f"{np.mean(own['test']):.2f}"]
        for mean, low, high in (own["test_less_v1"], own["test_less_still"]):
            cells += [f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        moved = own["locations"]
        cells += [f"{np.mean(moved['moved']):.3f}", f"{moved['mean_distance']:.2f}", str(moved["largest_distance"])]
        rows.append(cells)
    text = aligned(rows, str.rjust)
    for name, found in report["patterns"].items():
        tests = ", ".join(
            f"{test} {own['observed']:.4g} (by chance {own['by_chance']:.4g}, p = {own['p_value']:.3f})"
            for test, own in found.items()
        )
        text += f"\n{name}: {tests}"
    return text


def reproduce(settings: Settings) -> None:
    claim(settings.output, "settings.json", settings.about_runs, "runs")
    variants = 7 + len(settings.location_rates) + len(settings.alphas) + len(settings.more_learning_steps)
    planned = variants * len(settings.seeds) + 2 * (len(settings.rates) - 1)
    with Runs(settings.output, settings.flags, planned, settings.jobs) as runs:
        ablation = Ablation(settings, runs)
        best = ablation.everything()
    report = reported(ablation, best)
    write_report(settings.output / "ablation.json", report)
    draw_ablation(report, settings.output / "ablation.png")
    farthest = learned(settings, settings.location_rates[-1]).name
    draw_moves(farthest, ablation.moves(farthest)[0], settings.output / "locations.png")
    print(table(report))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
