"""The ablation of examples/paper: what it runs, what it reads from adapters, its tests of patterns, and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from scipy.spatial.distance import cdist
from scipy.stats import ttest_rel

import ablation
import location_patterns
from ablation_settings import Settings, fixed, learned, still
from loca_vision import LoCAConfig, inject, save_adapter
from loca_vision.recipes.classification import recorded_runs
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe, adapter_config, resolve
from loca_vision.recipes.reports.metrics import write_metrics
from loca_vision.recipes.settings.command_line import parse
from location_moves import Moves, read_moves, travelled

TINY = ("--dataset", "digits", "--model", "test_vit", "--weights", "none", "--layers", "blocks.[45]", "--image_size", "32")
TINY += ("--train_images", "160", "--validation_images", "20", "--test_images", "20", "--batch_size", "4", "--epochs", "1")
TINY += ("--precision", "float32", "--n_components", "15")
FEW = ("--seeds", "0", "1", "--alphas", "2", "--more_learning_steps", "20", "--simulations", "19")


def spectra(model):
    return [module for module in model.modules() if hasattr(module, "locations")]


@pytest.fixture
def random():
    return np.random.default_rng(0)


def moves_of(start, end, shape=(100, 80), coefficients=None):
    start, end = np.array(start), np.array(end)
    return Moves("layer", shape, start, end, np.ones(len(start)) if coefficients is None else coefficients)


# What locations did


def test_moves_are_read_from_the_file_alone(tmp_path):
    model = timm.create_model("test_vit", num_classes=4)
    inject(model, LoCAConfig(n_components=12, seed=3))
    own = spectra(model)
    starts = [spectrum.cells.numpy() for spectrum in own]
    rows = own[0].shape[0]
    with torch.no_grad():
        own[0].locations[2, 0] = 0.0 if starts[0][2, 0] > 20 else 1.0
        own[1].coefficients.copy_(torch.arange(12.0))
    ends = [spectrum.cells.numpy() for spectrum in own]
    save_adapter(model, tmp_path / "adapter.safetensors")
    found = read_moves(tmp_path / "adapter.safetensors")
    assert len(found) == len(own)
    for moves, start, end in zip(found, starts, ends, strict=True):
        assert (moves.start == start).all()
        assert (moves.end == end).all()
    assert found[1].coefficients.tolist() == list(range(12))
    moved = travelled([found])
    assert moved["moved"] == [pytest.approx(1 / (12 * len(own)), abs=1e-4)]
    assert moved["largest_distance"] == max(starts[0][2, 0], rows - 1 - starts[0][2, 0])
    assert moved["stopped_at_border"] == pytest.approx(1 / (12 * len(own)), abs=1e-4)


def test_other_adapters_have_no_start_that_is_known(tmp_path):
    model = timm.create_model("test_vit", num_classes=4)
    inject(model, LoCAConfig(n_components=3, location_init="gradient"))
    with torch.no_grad():
        for spectrum in spectra(model):
            spectrum.locations.zero_()
    save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="adapter of LoCA whose locations began uniformly"):
        read_moves(tmp_path / "adapter.safetensors")


# Patterns


def test_neighbours_by_brute_force(random):
    cells = random.integers(0, 30, (40, 2))
    distances = cdist(cells, cells)
    np.fill_diagonal(distances, np.inf)
    assert location_patterns.neighbour_distances(cells) == pytest.approx(distances.min(1))


def test_random_directions_keep_lengths_and_stay_inside(random):
    start = random.integers(0, (100, 80), (500, 2))
    end = np.clip(start + random.integers(-30, 31, (500, 2)), 0, (99, 79))
    moves = moves_of(start, end)
    for _ in range(5):
        cells = location_patterns.in_random_directions(moves, random)
        assert (cells >= 0).all()
        assert (cells <= (99, 79)).all()
        inside = ((start >= 30) & (start < (70, 50))).all(1)
        assert (np.abs(cells - start)[inside] == np.abs(end - start)[inside]).all()
    middles = np.mean([location_patterns.in_random_directions(moves, random)[inside] for _ in range(400)], 0)
    assert np.abs(middles - start[inside]).max() < 6  # no direction is preferred


def test_uniform_cells_in_random_directions_stay_uniform(random):
    cells = random.integers(0, (100, 80), (100_000, 2))
    moves = moves_of(cells, cells + 25)  # the length counts, not where it leads
    counts = np.bincount(location_patterns.in_random_directions(moves, random)[:, 0], minlength=100)
    assert np.abs(counts / 1000 - 1).max() < 0.15


def test_a_pattern_is_told_from_none(random):
    """Moves to lower frequencies, together, with large coefficients at low frequencies; and moves that have none of it."""
    start = random.integers(20, (80, 60), (150, 2))
    signs = random.choice((-1, 1), (150, 2))
    drifted, wandered = moves_of(start, start - 9), moves_of(start, start + 9 * signs)
    found = location_patterns.patterns([[drifted]], 199, 0)
    assert found["frequency"]["observed"] < found["frequency"]["by_chance"]
    assert found["frequency"]["p_value"] == 0.005
    assert location_patterns.patterns([[wandered]], 199, 0)["frequency"]["p_value"] > 0.05
    centre = np.array([50, 40])
    gathered = moves_of(start, np.where(start > centre, start - 9, start + 9))
    found = location_patterns.patterns([[gathered]], 199, 0)
    assert found["neighbours"]["observed"] < found["neighbours"]["by_chance"]
    assert found["neighbours"]["p_value"] == 0.005
    smooth = moves_of(start, start, coefficients=1 / (1 + start.sum(1)) ** 2)
    assert location_patterns.patterns([[smooth]], 199, 0)["energy"]["p_value"] == 0.005
    assert location_patterns.patterns([[wandered]], 199, 0)["energy"]["p_value"] == 1  # all coefficients are equal


def test_what_a_border_stopped_is_left_out(random):
    start = random.integers(20, (80, 60), (50, 2))
    end = start.copy()
    end[:25] = 0
    found = location_patterns.patterns([[moves_of(start, end)]], 19, 0)
    assert found["frequency"]["observed"] == found["frequency"]["by_chance"]


def test_p_values_are_uniform_under_chance(random):
    values = [location_patterns.p_value(random.normal(), random.normal(size=99)) for _ in range(400)]
    assert np.quantile(values, (0.1, 0.5)) == pytest.approx((0.1, 0.5), abs=0.07)
    assert min(values) >= 0.01


# Runs


@pytest.mark.parametrize("variant", [fixed(Settings()), still(Settings()), learned(Settings(), 1e-3)])
def test_flags_are_those_of_the_trainer(variant):
    words = [*Settings().flags, *variant.flags]
    recipe = parse(Recipe, words, prog="train.py", presets=PRESETS).settings
    assert (recipe.location_lr, recipe.learning_steps) == (variant.location_lr, variant.learning_steps)
    assert recipe.cache_features
    assert recipe.layers == ("blocks.[6-9]", "blocks.1?")


def test_every_run_pairs_with_its_seed(tmp_path):
    """LoCA and the schedule that stands still take the same steps until locations move; alpha is a factor of the rate."""
    common = [*Settings().flags, *TINY, "--lr", "0.1", "--location_lr", "0.05"]

    def losses(name, *flags):
        words = [*common, *flags, "--output_dir", str(tmp_path / name)]
        recorded_runs.trained(words, tmp_path / name)
        return np.array(json.loads((tmp_path / name / "metrics.json").read_text())["curves"]["loss"])

    loca, paused = losses("loca", "--learning_steps", "30"), losses("still", "--learning_steps", "30", "--location_lr", "0")
    assert (loca[:11] == paused[:11]).all()
    assert (loca[12:30] != paused[12:30]).any()
    (file,) = (tmp_path / "still").glob("*.safetensors")
    assert travelled([read_moves(file)])["largest_distance"] == 0
    (file,) = (tmp_path / "loca").glob("*.safetensors")
    assert travelled([read_moves(file)])["largest_distance"] > 3
    doubled = losses("alpha", "--learning_steps", "30", "--location_lr", "0", "--scale", "2", "--lr", "0.05")
    assert doubled == pytest.approx(paused, rel=1e-3)


@pytest.fixture
def made_up(monkeypatch):
    """Runs that are made up, with adapters that moved as far as their rate says."""
    started = []

    def trained(words, folder):
        parsed = parse(Recipe, words, prog="train.py", presets=PRESETS)
        recipe = resolve(parsed.settings, parsed.given)
        started.append(f"{folder.parent.name}/{folder.name}")
        model = timm.create_model("test_vit", num_classes=4)
        inject(model, adapter_config(recipe, recipe.seed))
        moves = recipe.learning_steps != 0
        for spectrum in spectra(model):
            spectrum.locations.data.add_(20 * recipe.location_lr * moves).clamp_(0, 1)
            spectrum.coefficients.data.normal_()
        save_adapter(model, folder / "adapter.safetensors")
        losses = [2.0 - 0.01 * step - (recipe.location_lr if step > 10 and moves else 0) for step in range(40)]
        write_metrics(folder, {"config": {}, "adapter_file": "adapter.safetensors", "curves": {"loss": losses}})
        measures = {"trained_parameters": 60, "adapter_bytes": 9, "seconds_per_step": 0.1, "seconds": 3.0}
        gain = (0.01 + 0.002 * recipe.seed) * (recipe.location_lr == 1e-3) * moves
        accuracy = 0.6 - abs(recipe.lr - 0.015) + gain
        return measures | {"validation_accuracy": accuracy, "test_accuracy": accuracy - 0.1}

    monkeypatch.setattr(recorded_runs, "trained", trained)
    monkeypatch.setattr(recorded_runs, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    return started


def test_the_whole_ablation(made_up, tmp_path, capsys):
    command = [*TINY, *FEW, "--output", str(tmp_path / "out")]
    assert ablation.main(command) == 0
    assert len(made_up) == len(set(made_up)) == 12 * 2 + 2 * 2
    tuning = ["rate-0.005-seed-0", "rate-0.015-seed-0", "rate-0.045-seed-0"]
    assert made_up[:4] == [*(f"V1/{name}" for name in tuning), "V1/rate-0.015-seed-1"]
    report = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert list(report["variants"]) == [
        "V1", "LoCA 0.0001", "LoCA 0.001", "LoCA 0.01", "still", "V2", "V2 still", "V3", "V4", "V5", "alpha 2", "B_s 20",
    ]  # fmt: skip
    assert report["loca"] == "LoCA 0.001"  # by validation
    best = report["variants"]["LoCA 0.001"]
    interval = ttest_rel(best["test"], report["variants"]["V1"]["test"]).confidence_interval(0.95)
    assert best["test_less_v1"] == pytest.approx([1.1, interval.low, interval.high], abs=2e-3)
    assert best["settings"] == {
        "location_lr": 1e-3, "learning_steps": 30, "together": False, "difference": "central", "alpha": 1.0, "rate": 0.015,
    }  # fmt: skip
    assert report["variants"]["V2"]["settings"]["learning_steps"] is None
    assert report["variants"]["V2 still"]["settings"]["location_lr"] == 0
    assert [report["variants"][name]["settings"]["difference"] for name in ("V4", "V5")] == ["forward", "backward"]
    assert report["variants"]["V1"]["locations"]["moved"] == report["variants"]["still"]["locations"]["moved"] == [0, 0]
    assert report["variants"]["LoCA 0.01"]["locations"]["mean_distance"] > best["locations"]["mean_distance"] > 0
    losses = report["loss_less_still"]["LoCA 0.01"]
    assert losses["windows"] == {"11 to 30": pytest.approx([-0.0095] * 3), "31 to 40": pytest.approx([-0.01] * 3)}
    assert losses["by_step"][:11] == [0] * 11
    assert report["loss_of_still"] == pytest.approx([2.0 - 0.01 * step for step in range(40)])
    assert report["patterns"]["V1"]["frequency"]["p_value"] == 1
    assert str(tmp_path) not in json.dumps(report)
    for name in ("ablation", "locations"):
        picture = (tmp_path / "out" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 300_000
    assert "less still" in capsys.readouterr().out
    made_up.clear()
    before = (tmp_path / "out" / "ablation.json").read_bytes()
    assert ablation.main([*command, "--jobs", "2"]) == 0
    assert not made_up
    assert (tmp_path / "out" / "ablation.json").read_bytes() == before
    assert ablation.main([*command, "--more_learning_steps", "20", "25"]) == 0
    assert {name.partition("/")[0] for name in made_up} == {"B_s-25"}
    assert ablation.main([*command, "--epochs", "3"]) == 2
    assert "the runs there were made with epochs=1, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rates", "0.1"], "rates=[0.1]: expected 2 or more different values"),
        (["--seeds", "0", "0"], "seeds=[0, 0]: expected 2 or more different values"),
        (["--location_rates", "0.1", "0.01"], "location_rates=[0.1, 0.01]: expected them from small to large"),
        (["--alphas", "-1"], "alphas=[-1.0]: expected finite numbers above 0"),
        (["--n_components", "0"], "n_components=0: expected a whole number from 1 up"),
        (["--dataset", "flowers"], "dataset"),
    ],
)
def test_bad_settings(words, sentence, tmp_path, capsys):
    assert ablation.main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
