"""`--location_init gradient` of a classifier: what the first steps are spent on, runs that go on, and what is refused."""

import json

import pytest
import torch

from loca_vision.storage.safetensors_file import open_safetensors
from support.scripts import DIGITS, LOCA, killed, main, together, trained, weights, write_weights

CHOSEN = (*LOCA, "--location_init", "gradient", "--location_batches", "2", "--learning_steps", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ("--weights", write_weights(tmp_path_factory.mktemp("fit") / "weights.safetensors"))


def tensors(out):
    with open_safetensors(out / "pytorch_loca_weights.safetensors") as file:
        return file.tensors(), json.loads(file.metadata["loca_adapter_metadata"])


def test_the_first_steps_choose_and_the_rest_train(base, tmp_path):
    """Of eight steps two; rates fall over the other six."""
    metrics = trained(tmp_path / "out", *CHOSEN, *base)
    curves = metrics["curves"]
    assert len(curves["loss"]) == 8 and curves["phase"] == [None] * 2 + ["coefficients"] * 6
    assert curves["lr"] == pytest.approx([0, 0, *(2e-2 * (6 - step) / 6 for step in range(6))])
    held, about = tensors(tmp_path / "out")
    at_random, _ = tensors_of_random(base, tmp_path)
    assert about["config"]["location_init"] == "gradient"
    for name, cells in held.items():
        if name.endswith("locations"):
            assert not torch.equal(cells, at_random[name]) and len(cells.unique()) == 100
    assert main("evaluate", "--adapter", tmp_path / "out") == 0


def test_cells_may_be_drawn_instead(base, tmp_path):
    """By the same gradients, other cells than the largest, and the same ones for the same seed."""
    largest, sampled, again = tmp_path / "largest", tmp_path / "sampled", tmp_path / "again"
    trained(largest, *CHOSEN, *base)
    for out in (sampled, again):
        trained(out, *CHOSEN, *base, "--location_rule", "sampled")
    (one, _), (other, _) = tensors(largest), tensors(sampled)
    names = [name for name in one if name.endswith("locations")]
    assert names and all(not torch.equal(one[name], other[name]) for name in names)
    assert weights(sampled) == weights(again)


def tensors_of_random(base, tmp_path):
    trained(tmp_path / "random", *LOCA, "--learning_steps", "0", "--epochs", "1", *base)
    return tensors(tmp_path / "random")


def test_a_killed_run_goes_on_to_the_same_bits(base, tmp_path):
    """Killed after its choice and a step of training; the choice is not made again."""
    whole, out = trained(tmp_path / "whole", *CHOSEN, *base), tmp_path / "out"
    killed(out, 3, 0.0, *CHOSEN, *base, "--checkpoint_steps", "1")
    again = trained(out, *CHOSEN, *base, "--checkpoint_steps", "1", "--resume")
    assert again["curves"] == whole["curves"] and weights(out) == weights(tmp_path / "whole")


def test_two_processes_are_one(base, tmp_path):
    one = trained(tmp_path / "one", *CHOSEN, *base)
    log, out = tmp_path / "log.txt", tmp_path / "two"
    assert together(log, *DIGITS, *CHOSEN, *base, "--output_dir", out) == [0, 0], log.read_text()
    assert json.loads((out / "metrics.json").read_text())["curves"]["loss"] == pytest.approx(one["curves"]["loss"], abs=1e-4)
    (mine, _), (theirs, _) = tensors(out), tensors(tmp_path / "one")
    for name, cells in mine.items():
        if name.endswith("locations"):
            assert len(set(cells.tolist()) & set(theirs[name].tolist())) >= 98  # of a hundred; equal ones may change places


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--location_batches", "2"), "--location_batches: say --location_init gradient too"),
        (("--location_rule", "sampled"), "--location_rule: say --location_init gradient too"),
        (
            ("--location_init", "gradient", "--location_batches", "4"),
            "location_batches=4: an epoch has 4 steps; choose by fewer",
        ),
        (("--location_init", "gradient", "--location_batches", "0"), "location_batches=0"),
        (("--method", "lora", "--location_init", "gradient"), "--location_init is a setting of loca; the method is lora"),
        (("--location_init", "grid"), "location_init"),
    ],
)
def test_what_is_refused(flags, sentence, tmp_path, capsys):
    assert main("train", *DIGITS, "--output_dir", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.json").exists()
