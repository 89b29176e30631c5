"""The example with transformers' Trainer: what it says of its checkpoints holds, and would be noticed if it did not."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers  # here, where its log goes to the stream of all tests
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from loca_vision.model import base_checkpoint
from support import transformers_models as hf
from support.image_folders import write_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_trainer.py"
SHORT = ("--images", 96, "--epochs", 3, "--n_components", 40)


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit status, what is printed, and what is printed as an error."""

    def now(*arguments):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        return end.value.code or 0, *capsys.readouterr()

    return now


def test_the_controls_hold(run, tmp_path):
    status, said, _ = run("--output_dir", tmp_path, *SHORT, "--controls")
    assert status == 0 and said.count("holds: ") == 3 and "does not" not in said
    losses = [float(loss) for loss in re.search(r"each epoch: (.*)", said)[1].split(", ")]
    assert len(set(losses)) == 3
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ScheduleCallback"]["attributes"]["step"] == 6
    assert (tmp_path / "pytorch_loca_weights.safetensors").exists()


def test_a_checkpoint_of_the_base_alone_is_noticed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(base_checkpoint, "learns", lambda model: False)
    with pytest.raises(RuntimeError, match="this does not hold: the model at the end evaluates as the best epoch"):
        run("--output_dir", tmp_path, *SHORT, "--controls")


def test_an_interrupted_run_goes_on(run, tmp_path):
    for part in ("whole", "part"):
        assert run("--output_dir", tmp_path / part, *SHORT)[0] == 0
    for checkpoint in (6, 9):
        shutil.rmtree(tmp_path / "part" / f"checkpoint-{checkpoint}")
    (tmp_path / "part" / "model.safetensors").unlink()
    status, said, _ = run("--output_dir", tmp_path / "part", *SHORT, "--resume")
    assert status == 0 and len(re.search(r"each epoch: (.*)", said)[1].split(", ")) == 3
    whole, part = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[key], part[key]) for key in whole)


def test_a_model_and_images_of_ones_own(run, tmp_path, monkeypatch):
    write_folder(tmp_path / "photos")
    hf.tiny("deit").save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--root", tmp_path / "photos", "--output_dir", tmp_path / "out")
    status, said, _ = run(*arguments, "--epochs", 2, "--batch_size", 4, "--n_components", 40, "--controls")
    assert status == 0 and said.count("holds: ") == 3
    assert "blue" in json.loads((tmp_path / "out" / "config.json").read_text())["label2id"]


def test_a_folder_that_is_not_there(run, tmp_path):
    status, _, said = run("--output_dir", tmp_path / "out", "--root", tmp_path / "nowhere")
    assert status == 2 and len(said.splitlines()) == 1 and "nowhere" in said
