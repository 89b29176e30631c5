"""`loca-vision predict`: the same answers as the model of the run, in three formats; what is missing is named."""

import csv
import io
import json
import shutil

import pytest
import torch

from loca_vision import load_adapter
from loca_vision.commands.main import main as command
from loca_vision.data.images import open_image
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.recipes.classification.task import view_of
from support.image_folders import save, write_folder
from support.scripts import MODEL, main

FILE = "pytorch_loca_weights.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_folder(root / "photos", train=12, test=4)
    flags = (*MODEL, "--n_components", 100, "--workers", 0, "--epochs", 6, "--batch_size", 8, "--lr", "2e-2")
    assert main("train", "--dataset", "folder", "--root", root / "photos", *flags, "--output_dir", root / "out") == 0
    return root


def predicted(capsys, *arguments):
    capsys.readouterr()
    assert command(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr()


def test_the_answers_are_those_of_the_model(run, capsys):
    out, photos = run / "out", run / "photos" / "test"
    rows = json.loads(predicted(capsys, out, photos, "--format", "json", "--top_k", 3).out)
    model = build_model(ModelSpec("test_vit", 3, 32, "none"))
    load_adapter(model, out)
    view = view_of("test_vit", "none", 32)
    assert [row["file"] for row in rows] == sorted(map(str, photos.rglob("*.png")))
    for row in rows:
        with torch.inference_mode():
            shares = model(view.plain(open_image(row["file"]))[None]).softmax(1)[0]
        answers = {entry["class"]: entry["probability"] for entry in row["classes"]}
        assert answers == pytest.approx(dict(zip(("blue", "green", "red"), shares.tolist(), strict=True)), abs=1e-5)
        assert sum(answers.values()) == pytest.approx(1) and list(answers.values()) == sorted(answers.values(), reverse=True)
    right = sum(f"/{row['classes'][0]['class']}/" in row["file"] for row in rows) / len(rows)
    assert right == json.loads((out / "metrics.json").read_text())["test_accuracy"]


def test_formats(run, tmp_path, capsys):
    image = run / "photos" / "test" / "red" / "0.png"
    table = predicted(capsys, run / "out", image).out.splitlines()
    assert table[0].split() == ["file", "class", "probability"] and table[1].split()[0] == str(image)
    assert table[1].endswith(" %") and len(table) == 2
    rows = list(csv.reader(io.StringIO(predicted(capsys, run / "out", image, image, "--format", "csv", "--top_k", 2).out)))
    assert rows[0] == ["file", "class 1", "probability 1", "class 2", "probability 2"] and rows[1] == rows[2]
    assert predicted(capsys, run / "out", image, "--output", tmp_path / "answer.txt").out == ""
    assert (tmp_path / "answer.txt").read_text().splitlines() == table


def test_a_folder_is_searched_and_what_is_no_image_is_named(run, tmp_path, capsys):
    save(tmp_path / "deep" / "er" / "1.png", 0, 0)
    (tmp_path / "notes.txt").write_text("")
    said = predicted(capsys, run / "out", tmp_path)
    assert str(tmp_path / "deep" / "er" / "1.png") in said.out and "1 files and folders are not read: notes.txt" in said.err


def test_an_adapter_without_its_run(run, tmp_path, capsys):
    image = run / "photos" / "test" / "red" / "0.png"
    shutil.copy(run / "out" / FILE, tmp_path / FILE)
    expected = predicted(capsys, run / "out", image).out
    given = ("--model", "test_vit", "--weights", "none", "--image_size", 32)
    for place in (tmp_path, tmp_path / FILE):
        assert predicted(capsys, place, image, *given, "--classes", "blue", "green", "red").out == expected
        assert command(["predict", str(place), str(image)]) == 2
        assert "config.yaml: there is no such file, which a run writes next to its adapter; give --model NAME" in (
            capsys.readouterr().err
        )
        assert command(["predict", str(place), str(image), *map(str, given)]) == 2
        assert "metrics.json: there is no such file" in capsys.readouterr().err


def test_mistakes(run, tmp_path, capsys):
    image = run / "photos" / "test" / "red" / "0.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (run / "out" / "some").mkdir(exist_ok=True)
    for arguments, sentence in {
        (run / "out", "missing.png"): "missing.png: there is no such image or folder",
        (run / "out", tmp_path / "broken.png"): "broken.png: it cannot be read as an image",
        (run / "out", tmp_path / "empty"): "empty: there is no image in this folder",
        (run / "out", image, "--top_k", 4): "top_k=4: expected a whole number from 1 to 3",
        (run / "out", image, "--top_k", 0): "top_k=0",
        (run / "nowhere", image): "nowhere: there is no such folder",
        (run / "out",): "images",
    }.items():
        capsys.readouterr()
        assert command(["predict", *map(str, arguments), "--output", str(tmp_path / "answer")]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
        assert not (tmp_path / "answer").exists()
