"""The commands of examples/paper at tiny sizes, to the end and again, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import critical_correlation
import theorems
import update_statistics

THEOREMS = ["--sizes", "24", "36", "--ranks", "2", "4", "--trials", "3"]
CRITICAL = ["--size", "60", "--ranks", "4", "8", "--rho_step", "0.1", "--trials", "3", "--null_trials", "20"]
UPDATES = ["--rank", "2", "--epsilon", "0.4", "--distributions", "2", "--gaussians", "3"]


def report_of(folder, name):
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) <= 300_000
    report = json.loads((folder / f"{name}.json").read_text())
    assert report["settings"]["seed"] == 0
    assert report["environment"]["torch"]
    assert report["minutes"] >= 0
    return report


def weights(generator):
    """A tiny transformer block's, in which a projection of 8 x 8 is too small to tell anything."""
    shapes = {"blocks.10.fc1": (40, 20), "blocks.2.attn.qkv": (60, 20), "blocks.2.attn.proj": (20, 20), "head": (8, 8)}
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def files(tmp_path):
    """Weights before and after: all matrices changed by noise, but proj, which stayed."""
    generator = torch.Generator().manual_seed(0)
    before = weights(generator)
    after = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    after["blocks.2.attn.proj.weight"] = before["blocks.2.attn.proj.weight"].clone()
    save_file(before, tmp_path / "base.safetensors")
    save_file(after, tmp_path / "trained.safetensors")
    return [str(tmp_path / "base.safetensors"), str(tmp_path / "trained.safetensors")]


def test_theorems(tmp_path, capsys):
    assert theorems.main([*THEOREMS, "--output", str(tmp_path)]) == 0
    report = report_of(tmp_path, "theorems")
    assert report["parts"]["24"]["ranks"] == [2, 4, 8, 12, 16]
    errors = report["parts"]["36"]["errors"]
    for place in range(3):  # up to K / 3
        means = [errors[method]["mean"][place] for method in theorems.METHODS]
        assert means[0] > means[1] > means[2] > means[3]
    assert report["verdicts"]["order_broken_at"] == [f"K={k}, r={r}" for k, r in ((24, 12), (24, 16), (36, 18), (36, 24))]
    assert "F3: DFT parts < F2: DFT cells up to r / K = 0.421" in capsys.readouterr().out


def test_critical_correlation(tmp_path, capsys):
    assert critical_correlation.main([*CRITICAL, "--output", str(tmp_path)]) == 0
    summary = report_of(tmp_path, "critical_correlation")["summary"]
    for row in summary["uniform"]["ranks"]:
        assert row["critical_rho"] is None
        assert max(row["ratio"]) < 1
    low, high = summary["random"]["ranks"]
    assert low["critical_rho"] < high["critical_rho"]
    for row in (low, high):
        assert row["critical_rho"] == pytest.approx(row["integral"], abs=0.04)
        assert row["test_statistic"] > summary["test_critical_value"]
    assert "uniform: the DCT loses less at every rho" in capsys.readouterr().out


def test_update_statistics_of_noise(files, tmp_path, capsys):
    assert update_statistics.main([*files, *UPDATES, "--output", str(tmp_path / "out")]) == 0
    report = report_of(tmp_path / "out", "update_statistics")
    assert list(report["parts"]) == ["blocks.2.attn.q", "blocks.2.attn.k", "blocks.2.attn.v", "blocks.10.fc1"]
    assert report["parts"]["blocks.2.attn.q"]["shape"] == [20, 20]
    assert list(report["summary"]) == ["q", "k", "v", "fc1", "all"]
    assert report["summary"]["all"]["matrices"] == 4
    assert report["summary"]["all"]["normality_accepted"] == 4
    assert report["summary"]["all"]["dct_better"] == 4
    assert str(tmp_path) not in json.dumps(report)
    assert "MP law" in capsys.readouterr().out


def test_an_update_of_low_rank_is_told_from_noise(files, tmp_path):
    generator = torch.Generator().manual_seed(1)
    before = weights(generator)
    after = {
        name: value + torch.randn(len(value), 2, generator=generator) @ torch.randn(2, value.shape[1], generator=generator)
        for name, value in before.items()
    }
    save_file(before, files[0])
    save_file(after, files[1])
    assert update_statistics.main([*files, *UPDATES, "--output", str(tmp_path / "out")]) == 0
    everything = report_of(tmp_path / "out", "update_statistics")["summary"]["all"]
    assert everything["matrices"] == 5
    assert everything["law_accepted"] == everything["dct_better"] == 0
    assert everything["errors_rank"] < 1e-6 < everything["errors_dct"]
    assert everything["dct_better_shuffled"] == 5


def test_what_is_finished_is_not_computed_again(tmp_path, monkeypatch):
    interrupted, measure = ["36"], theorems.measure

    def until_interrupted(size, settings):
        if str(size) in interrupted:
            raise KeyboardInterrupt
        return measure(size, settings)

    monkeypatch.setattr(theorems, "measure", until_interrupted)
    assert theorems.main([*THEOREMS, "--output", str(tmp_path / "one")]) == 130
    interrupted[:] = ["24"]
    assert theorems.main([*THEOREMS, "--output", str(tmp_path / "one")]) == 0
    interrupted[:] = []
    assert theorems.main([*THEOREMS, "--output", str(tmp_path / "two")]) == 0
    one, two = (report_of(tmp_path / name, "theorems") for name in ("one", "two"))
    assert one["parts"] == two["parts"]


def test_a_report_of_other_settings_is_refused(tmp_path, capsys):
    assert theorems.main([*THEOREMS, "--output", str(tmp_path)]) == 0
    before = (tmp_path / "theorems.json").read_bytes()
    assert theorems.main([*THEOREMS, "--seed", "1", "--output", str(tmp_path)]) == 2
    assert "theorems.json: it was made with seed=0, not 1; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "theorems.json").read_bytes() == before
    (tmp_path / "theorems.json").write_text("[]")
    assert theorems.main([*THEOREMS, "--output", str(tmp_path)]) == 2
    assert "it is not a report of this script" in capsys.readouterr().err


def test_another_training_is_not_taken_for_the_first(files, tmp_path, capsys):
    command = [*files, *UPDATES, "--output", str(tmp_path / "out")]
    assert update_statistics.main(command) == 0
    save_file(weights(torch.Generator().manual_seed(5)), files[1])
    assert update_statistics.main(command) == 2
    assert "it was made with trained=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "words", "sentence"),
    [
        (theorems.main, ["--sizes", "8"], "sizes=8: expected a whole number from 12 up"),
        (theorems.main, ["--sizes", "40", "--ranks", "31"], "ranks=31: expected a whole number from 1 to 30"),
        (theorems.main, ["--trials", "1"], "trials=1: expected a whole number from 2 up"),
        (theorems.main, ["--seed", "-1"], "seed=-1: expected"),
        (critical_correlation.main, ["--rho_step", "0"], "rho_step=0.0: expected a number from 0.001 to 0.5"),
        (critical_correlation.main, ["--ranks", "101"], "ranks=101: expected a whole number from 1 to 100"),
        (critical_correlation.main, ["--size", "many"], "size: expected a whole number, got 'many'"),
    ],
)
def test_bad_settings(main, words, sentence, tmp_path, capsys):
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--epsilon", "0.05"], "update_statistics.py: epsilon=0.05: 400 normal numbers already differ"),
        (["--epsilon", "1.5"], "epsilon=1.5: expected a number between 0 and 1"),
        (["--rank", "11", "--epsilon", "0.4"], "update_statistics.py: rank=11: expected a whole number from 1 to 10"),
        (["--layers", "decoder.*"], "they share no matrix of at least 16 x 16 whose name fits decoder.*"),
        (["--layers", "*proj*"], "all matrices that they share are the same"),
    ],
)
def test_bad_settings_for_updates(words, sentence, files, tmp_path, capsys):
    assert update_statistics.main([*files, *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_files(files, tmp_path, capsys):
    broken = weights(torch.Generator().manual_seed(0))
    broken["blocks.10.fc1.weight"][3, 4] = float("nan")
    save_file(broken, files[1])
    out = ["--output", str(tmp_path / "out")]
    assert update_statistics.main([*files, *out]) == 2
    assert "update_statistics.py: blocks.10.fc1: it has entries that are not finite" in capsys.readouterr().err
    assert update_statistics.main([files[0], str(tmp_path / "none.safetensors"), *out]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
