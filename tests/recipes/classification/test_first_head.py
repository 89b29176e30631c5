"""`--head`: a run begins with the head of a linear probe, and what is refused."""

import json

import pytest

from loca_vision.storage.safetensors_file import open_safetensors
from support.scripts import DIGITS, LOCA, main, trained, write_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ("--weights", write_weights(tmp_path_factory.mktemp("fit") / "weights.safetensors"))


@pytest.fixture(scope="module")
def probe(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "probe"
    return folder, trained(folder, "--method", "lp", *base)


def test_a_run_begins_with_the_head_of_the_probe(probe, base, tmp_path):
    """With rates of next to nothing it is the probe."""
    folder, metrics = probe
    still = (*LOCA, "--head", folder, "--lr", "1e-12", "--head_lr", "1e-12", "--learning_steps", "0")
    begun = trained(tmp_path / "begun", *still, *base)
    assert begun["test_accuracy"] == metrics["test_accuracy"] and begun["config"]["head"] == str(folder)
    new = trained(tmp_path / "new", *LOCA, "--learning_steps", "0", *base)
    assert begun["curves"]["loss"][0] < 0.9 * new["curves"]["loss"][0]


def test_the_gradient_chooses_by_that_head(probe, base, tmp_path):
    chosen = (*LOCA, *base, "--location_init", "gradient", "--location_batches", "2", "--location_rule", "sampled")
    chosen += ("--learning_steps", "0")
    cells = []  # other ones, where another head asks for other changes
    for name, more in (("new", ()), ("probe", ("--head", probe[0]))):
        trained(tmp_path / name, *chosen, *more)
        with open_safetensors(tmp_path / name / "pytorch_loca_weights.safetensors") as file:
            cells.append({key: set(value.tolist()) for key, value in file.tensors().items() if key.endswith("locations")})
    assert cells[0].keys() == cells[1].keys() and all(cells[0][name] != cells[1][name] for name in cells[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: None, "there is no such file; a run that has finished writes it"),
        (lambda folder: {"classes": ["one"]}, "its classes are ['one']: expected ["),
        (lambda folder: {"config": {"method": "full"}}, "it was trained by method full: expected a run of --method lp"),
    ],
    ids=["no run", "classes", "full"],
)
def test_what_is_refused(change, sentence, probe, tmp_path, capsys):
    folder, metrics = probe
    other = tmp_path / "other"
    other.mkdir()
    changed = change(folder)
    if changed is not None:
        (other / "metrics.json").write_text(json.dumps(metrics | changed))
    assert main("train", *DIGITS, *LOCA, "--head", other, "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert sentence in said and f"head='{other}'" in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_the_head_of_another_model_is_refused(probe, tmp_path, capsys):
    folder, _ = probe
    flags = ("--model", "test_vit2", "--head", folder, "--output_dir", tmp_path / "out")
    assert main("train", *DIGITS, *LOCA, *flags) == 2
    said = capsys.readouterr().err
    assert "head=" in said and "test_vit" in said and said.count("\n") == 1
