"""A run knows its images: other classes or files are refused, a part for testing is enough, broken images are found first."""

import json
import shutil

import pytest
import torch

from loca_vision.recipes.classification.accuracy import balanced_accuracy_of
from support.image_folders import save, write_folder
from support.scripts import MODEL, main

FLAGS = (*MODEL, "--n_components", 30, "--workers", 0, "--epochs", 1, "--batch_size", 8)


def train(root, out, *more):
    return main("train", "--dataset", "folder", "--root", root, *FLAGS, "--output_dir", out, *more)


@pytest.fixture
def photos(tmp_path):
    write_folder(tmp_path / "photos", train=6, test=3)
    return tmp_path / "photos"


def rename(root):
    for part in ("train", "test"):
        (root / part / "blue").rename(root / part / "violet")


def add(root):
    for part in ("train", "test"):
        save(root / part / "yellow" / "1.png", 0, 0)


def remove(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "red")


CHANGES = {
    "a class renamed": (rename, "the classes differ: 'blue' missing and 'violet' new"),
    "a class added": (add, "the classes differ: 'yellow' new"),
    "a class removed": (remove, "the classes differ: 'red' missing"),
    "an image added": (lambda root: save(root / "train/red/z.png", 0, 0), "train has 7 images of 'red', before it had 6"),
    "an image gone": (lambda root: (root / "test/red/0.png").unlink(), "test has 2 images of 'red', before it had 3"),
    "other pixels": (lambda root: save(root / "train/red/0.png", 0, 0, (9, 9)), "train has other images of 'red' than before"),
    "another name": (lambda root: (root / "train/red/0.png").rename(root / "train/red/a.png"), "(names or sizes of files)"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_goes_on_with_its_own_images_only(case, photos, tmp_path, capsys):
    change, sentence = CHANGES[case]
    out = tmp_path / "out"
    assert train(photos, out) == 0
    change(photos)
    for finished in (True, False):
        if not finished:
            (out / "metrics.json").unlink()
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        capsys.readouterr()
        assert train(photos, out, "--resume") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "the run there began with other images: " in said and sentence in said
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def evaluated(out, root, capsys):
    capsys.readouterr()
    assert main("evaluate", "--adapter", out, "--root", root) == 0
    return json.loads((out / "evaluation.json").read_text()), capsys.readouterr().out


def test_evaluation_takes_the_classes_of_the_model(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(photos, out) == 0
    accuracy = json.loads((out / "metrics.json").read_text())["test_accuracy"]
    # A part for testing is enough, wherever it lies.
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(photos / "test", tmp_path / "elsewhere" / "Test")
    result, said = evaluated(out, tmp_path / "elsewhere", capsys)
    assert result["test_accuracy"] == accuracy and "these are not" not in said
    # Other images of the same classes are said to be others.
    save(tmp_path / "elsewhere/Test/red/z.png", 0, 0)
    assert (
        "these are not the test images of the run: test has 4 images of 'red'"
        in evaluated(out, tmp_path / "elsewhere", capsys)[1]
    )
    # Other classes are refused, and nothing is written.
    for change, sentence in ((rename, "got 'blue' missing and 'violet' new"), (add, "'yellow' new"), (remove, "'red' missing")):
        root = tmp_path / change.__name__
        shutil.copytree(photos, root)
        change(root)
        (out / "evaluation.json").unlink(missing_ok=True)
        assert main("evaluate", "--adapter", out, "--root", root) == 2
        said = capsys.readouterr().err
        assert "the images must have the classes that the model learned" in said and sentence in said and said.count("\n") == 1
        assert not (out / "evaluation.json").exists()


def test_classes_that_the_run_has_in_another_order(photos, tmp_path, capsys):
    """The indices of the model count, not the order of the folders."""
    out = tmp_path / "out"
    assert train(photos, out, "--epochs", 4) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    before, _ = evaluated(out, photos, capsys)
    names = {"blue": "c", "green": "a", "red": "b"}
    for part in ("train", "test"):
        for name, other in names.items():
            (photos / part / name).rename(photos / part / other)
    (out / "metrics.json").write_text(json.dumps(metrics | {"classes": [names[name] for name in metrics["classes"]]}))
    after, _ = evaluated(out, photos, capsys)
    assert after["confusion"] == before["confusion"]
    assert [row["class"] for row in after["classes"]] == ["c", "a", "b"]


def test_images_drawn_for_testing_are_never_drawn_from_others(tmp_path, capsys):
    """Of classes alone a tenth is drawn: of other images it would have some that were trained on."""
    write_folder(tmp_path / "flat", flat=10)
    out = tmp_path / "out"
    assert train(tmp_path / "flat", out) == 0
    assert evaluated(out, tmp_path / "flat", capsys)[0]["confusion"]
    save(tmp_path / "flat/red/z.png", 0, 0)
    assert main("evaluate", "--adapter", out) == 2
    assert "may have been trained on; put the folders of the classes into a folder test/" in capsys.readouterr().err


def test_a_run_without_its_record_of_classes(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(photos, out) == 0
    (out / "metrics.json").unlink()
    assert main("evaluate", "--adapter", out) == 2
    assert "metrics.json: there is no such file" in capsys.readouterr().err


# Before the first step


def test_broken_images_are_found_before_the_first_step(photos, tmp_path, capsys):
    (photos / "train/red/0.png").write_bytes(b"no image")
    whole = (photos / "test/blue/0.png").read_bytes()
    (photos / "test/blue/0.png").write_bytes(whole[: len(whole) // 2])
    assert train(photos, tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 27 images cannot be read: " in said
    assert "red/0.png: it cannot be read as an image" in said and "blue/0.png: it cannot be read as an image" in said
    assert not (tmp_path / "out").exists()


def test_what_was_understood_is_said(photos, tmp_path, capsys):
    (photos / "train" / "red" / "notes.txt").write_text("")
    assert train(photos, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "images: 16 for training, 2 for validation (1/10 of 18, drawn by the seed), 9 for testing" in said
    assert "classes: blue (" in said and "files that are not images of a class: train/red/notes.txt" in said


# Small and uneven sets


def test_a_few_images_at_the_usual_batch_size(photos, tmp_path):
    flags = (*MODEL, "--n_components", 30, "--workers", 0, "--epochs", 1)
    assert main("train", "--dataset", "folder", "--root", photos, *flags, "--output_dir", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["config"]["batch_size"], metrics["steps"]) == (16, 1)
    again = ("--config", tmp_path / "out" / "config.yaml", "--resume")
    assert main("train", *again) == 0


def test_balanced_accuracy_is_the_mean_over_classes():
    matrix = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])
    assert balanced_accuracy_of(matrix) == pytest.approx((0.8 + 0.5) / 2)
    assert balanced_accuracy_of(torch.zeros(2, 2, dtype=torch.int64)) == 0


def test_smoothing_mixup_and_weights(photos, tmp_path, capsys):
    for name in ("1", "2", "3", "4"):
        (photos / f"train/red/{name}.png").unlink()
    losses = {}
    changes = {"smoothing": ("--label_smoothing", 0.2), "mixup": ("--mixup", 0.4), "weights": ("--class_weights", "balanced")}
    for name, flags in {"plain": (), **changes}.items():
        assert train(photos, tmp_path / name, *flags) == 0
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["curves"]["loss"]
    assert len({tuple(values) for values in losses.values()}) == 4
    balanced = json.loads((tmp_path / "weights" / "metrics.json").read_text())["balanced_accuracy"]
    capsys.readouterr()
    assert main("report", tmp_path / "weights", "--measure", "balanced_accuracy", "--format", "csv") == 0
    said = capsys.readouterr().out
    assert f"{100 * balanced:.2f}" in said and "paper" not in said
    assert train(photos, tmp_path / "bad", "--label_smoothing", 1) == 2
    assert train(photos, tmp_path / "bad", "--mixup", -1) == 2
    assert train(photos, tmp_path / "bad", "--method", "lp", "--cache_features", "--mixup", 1, "--n_components", 3) == 2
    assert not (tmp_path / "bad").exists()
