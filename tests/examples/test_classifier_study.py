"""study.py of image classification: what it compares, that it tunes on validation, goes on, and says what came out."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scipy import stats

from classifier_study import run as study_run
from classifier_study.arms import arms
from classifier_study.settings import Study
from loca_vision.recipes.classification import recorded_runs
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe, resolve
from loca_vision.recipes.classification.study_report import Point, draw_study, paired_difference, study_text
from loca_vision.recipes.settings.command_line import parse
from support.scripts import main

BEST = {"lp": 3e-2, "loca-3072": 5e-3, "loca-3072-fixed": 5e-3, "lora-3072": 5e-3}


def named(study):
    return {arm.name: arm for arm in arms(study)}


def flag(arm, name):
    return arm.flags[arm.flags.index(f"--{name}") + 1]


def test_what_is_compared():
    every = named(Study("digits", methods=("loca", "sdctft", "lora", "selora"), budgets=(10, 1000, 3072)))
    assert list(every) == [
        "lp", "full", "loca-10", "loca-fixed-10", "loca-1000", "loca-fixed-1000", "loca-3072", "loca-fixed-3072",
        "sdctft-10", "sdctft-1000", "sdctft-3072", "lora-768", "lora-3072", "selora-768", "selora-3072",
    ]  # fmt: skip
    assert flag(every["loca-10"], "n_components") == "10" and flag(every["lora-3072"], "r") == "4"
    assert flag(every["loca-fixed-10"], "learning_steps") == "0" != flag(every["loca-10"], "learning_steps")
    assert flag(every["selora-768"], "r") == "2"


def test_ranks_and_rates():
    every = named(Study("digits", methods=("lora", "waveft"), budgets=(3072, 30), ranks=(1, 16)))
    assert list(every)[2:] == ["lora-768", "lora-12288", "waveft-3072", "waveft-30"]
    longer = [b / a for a, b in zip(every["waveft-3072"].rates, every["waveft-30"].rates, strict=True)]
    assert longer == pytest.approx([math.sqrt(3072 / 30)] * 3, rel=0.05)
    assert every["lora-768"].rates == every["lora-12288"].rates


def test_images_may_move():
    one, other = (Study("folder", root=Path(place), layers=("blocks.1?",)) for place in ("here", "there"))
    assert one.about == other.about == json.loads(json.dumps(one.about))


def test_layers_and_features():
    study = Study("digits", methods=("loca",), layers=("blocks.1?",), cache_features=True, adapter_dtype="float16")
    every = named(study)
    assert "--cache_features" in every["lp"].flags and "--cache_features" not in every["full"].flags
    words = [*study.flags, *every["loca-3072"].flags, "--augment", "none"]
    recipe = parse(Recipe, words, prog="train.py", presets=PRESETS).settings
    assert (recipe.layers, recipe.cache_features, recipe.adapter_dtype) == (("blocks.1?",), True, "float16")


@pytest.fixture
def made_up(monkeypatch):
    """Runs that are made up; what they get must be what train.py takes."""
    started = []

    def trained(words, folder):
        parsed = parse(Recipe, words, prog="train.py", presets=PRESETS)
        recipe = resolve(parsed.settings, parsed.given)
        name, rate = folder.parent.name, recipe.head_lr if recipe.method == "lp" else recipe.lr
        started.append(f"{name}/{folder.name}")
        if rate > 0.2:
            raise ValueError("it is odd")
        measures = {"trained_parameters": 0 if name == "lp" else 3072 * 24, "adapter_bytes": 9, "seconds_per_step": 0.1}
        accuracy = {"validation_accuracy": 0.9 - abs(rate - BEST.get(name, 5e-3)), "test_accuracy": 0.5 + recipe.seed / 100}
        return {**measures, **accuracy, "seconds": 3.0}

    monkeypatch.setattr(recorded_runs, "trained", trained)
    monkeypatch.setattr(recorded_runs, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(study_run, "arms", lambda study: [arm for arm in arms(study) if arm.name != "full"])
    return started


def test_a_study_tunes_on_validation_and_goes_on(made_up, tmp_path, capsys):
    flags = ("--dataset", "digits", "--budgets", 3072, "--output_dir", tmp_path / "study")
    assert main("study", *flags, "--methods", "lora") == 0
    # The best rate of the probe is the last one of its grid, beyond which one more is tried; once.
    lp = ["rate-0.003-seed-0", "rate-0.01-seed-0", "rate-0.03-seed-0", "rate-0.09-seed-0"]
    lora = ["rate-0.0005-seed-0", "rate-0.0015-seed-0", "rate-0.005-seed-0", "rate-0.017-seed-0"]
    assert sorted(made_up) == sorted(
        [f"lp/{name}" for name in (*lp, "rate-0.03-seed-1", "rate-0.03-seed-2")]
        + [f"lora-3072/{name}" for name in (*lora, "rate-0.005-seed-1", "rate-0.005-seed-2")]
    )
    assert "2 methods and budgets, at least 10 runs of about 3 s: 0.0 h" in capsys.readouterr().out
    text = (tmp_path / "study" / "study.md").read_text()
    assert "| lp | 0 | 0.03 |" in text and "| lora | 73,728 | 0.005 |" in text
    assert "50.0 / 51.0 / 52.0 | 51.00 ± 1.00" in text
    assert (tmp_path / "study" / "study.png").stat().st_size > 0
    assert len(json.loads((tmp_path / "study" / "runs.json").read_text())) == 12
    made_up.clear()
    assert main("study", *flags, "--methods", "lora") == 0 and not made_up  # nothing is left to run
    assert main("study", *flags, "--methods", "lora", "loca", "--seeds", 0, 1, 2, 3) == 0  # more methods, and a seed
    assert {name.partition("/")[0] for name in made_up} == {"lp", "lora-3072", "loca-3072", "loca-fixed-3072"}
    assert [name for name in made_up if "lora" in name] == ["lora-3072/rate-0.005-seed-3"]
    text = (tmp_path / "study" / "study.md").read_text()
    assert "less that of lora-3072" in text and "less that of fixed locations of as many numbers" in text
    capsys.readouterr()
    assert main("study", *flags, "--epochs", "5") == 2
    assert "the results there were made with epochs=2, not 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--budgets", 0), "budgets=0: "),
        (("--seeds", 1, 1), "seeds=[1, 1]: expected one or more different values"),
        (("--methods", "lorra"), "lorra"),
        (("--budgets", 1), "log.txt: the run failed: it is odd"),
    ],
    ids=["budget", "seeds", "method", "a run"],
)
def test_a_study_that_cannot_be(flags, said, made_up, tmp_path, capsys):
    assert main("study", "--dataset", "digits", "--output_dir", tmp_path / "study", *flags) == 2
    captured = capsys.readouterr().err.splitlines()[-1]
    assert said in captured and captured.startswith("study.py: ")


def test_without_its_images_a_study_writes_nothing(tmp_path, capsys):
    for script in ("study", "location_rules"):
        out = tmp_path / script
        assert main(script, "--dataset", "folder", "--root", tmp_path / "nowhere", "--output_dir", out) == 2
        assert "nowhere': there is no such folder" in capsys.readouterr().err and not out.exists()


def test_a_record_of_other_flags_is_refused(made_up, tmp_path, capsys):
    flags = ("--dataset", "digits", "--methods", "lora", "--output_dir", tmp_path / "study")
    assert main("study", *flags) == 0
    record = tmp_path / "study" / "runs.json"
    record.write_text(record.read_text().replace('"--r", "4"', '"--r", "5"'))
    assert main("study", *flags) == 2
    assert "was run with" in capsys.readouterr().err
    record.write_text('{"lp/rate-0.003-seed-0": 3}')
    assert main("study", *flags) == 2
    assert "runs.json: it is not the record of a study" in capsys.readouterr().err


def test_a_real_run_and_one_that_diverges(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded_runs, "_KEPT", {})
    words = ["--dataset", "digits", "--model", "test_vit", "--weights", "none", "--image_size", "32", "--train_images", "32"]
    words += ["--epochs", "1", "--batch_size", "16", "--test_images", "20", "--workers", "0", "--cache_features"]
    words += ["--layers", "blocks.[45]", "--n_components", "20"]
    found = [recorded_runs.trained([*words, "--output_dir", str(tmp_path / out)], tmp_path / out) for out in ("a", "b")]
    measured = [{**one, "seconds": 0, "seconds_per_step": 0} for one in found]
    assert measured[0] == measured[1] and measured[0]["trained_parameters"] == 20 * 4  # the second on kept features
    assert len(recorded_runs._KEPT) == 1 and not [*(tmp_path / "a").glob("checkpoint-*")]
    worse = recorded_runs.trained([*words, "--lr", "1e30", "--output_dir", str(tmp_path / "c")], tmp_path / "c")
    assert worse["validation_accuracy"] == 0 and "training has diverged" in (tmp_path / "c" / "log.txt").read_text()


def test_intervals_are_scipys():
    draws = random.Random(0)
    one, other = ([draws.random() for _ in range(5)] for _ in range(2))
    mean, half = paired_difference(one, other)
    wanted = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((wanted.low, wanted.high))


def test_one_seed_has_no_differences(tmp_path):
    points = [Point("lora-3072", 5, 1e-3, {1e-3: 0.5}, (0.5,), 0.1, 9), Point("lp", 0, 1e-3, {1e-3: 0.4}, (0.4,), 0.1, 5)]
    assert "less that of" not in study_text(points, [0], "lora")
    draw_study(tmp_path / "study.png", "one", points)
    assert (tmp_path / "study.png").stat().st_size > 0


def test_pictures_have_the_methods_titles():
    names = ("loca-30", "loca-fixed-768", "lora", "waveft-300", "sampled-1-300", "kronecker-8")
    titles = [Point(name, 5, 1e-3, {}, (0.5,), 0.1, 9).title for name in names]
    assert titles == ["LoCA", "LoCA, fixed locations", "LoRA", "WaveFT", "sampled-1", "kronecker"]
