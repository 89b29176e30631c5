"""The loop: accumulation, recomputed activations, clipping, precisions, rates and the choice of an epoch."""

import json

import pytest
import timm
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from torch import nn

from loca_vision import adapters, load_adapter
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.recipes.classification.run import Run
from loca_vision.recipes.training import stepper
from loca_vision.storage.safetensors_file import open_safetensors
from support.scripts import DIGITS, LOCA, main, trained, weights, write_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights with sizeable gradients, and a run from them to compare with."""
    root = tmp_path_factory.mktemp("fit")
    flags = (*LOCA, "--weights", write_weights(root / "weights.safetensors"), "--augment", "crop")
    return root / "plain", flags, trained(root / "plain", *flags)


def same(one, other):
    name = "pytorch_loca_weights.safetensors"
    with open_safetensors(one / name) as mine, open_safetensors(other / name) as theirs:
        torch.testing.assert_close(mine.tensors(), theirs.tensors(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", [("--accumulate", "4"), ("--checkpointing",)], ids=" ".join)
def test_what_changes_nothing_but_memory(flag, base, tmp_path):
    plain, flags, metrics = base
    found = trained(tmp_path / "out", *flags, *flag)
    assert found["curves"]["loss"] == pytest.approx(metrics["curves"]["loss"], abs=1e-5)
    assert found["curves"]["phase"] == metrics["curves"]["phase"]
    assert found["test_accuracy"] == metrics["test_accuracy"]
    same(plain, tmp_path / "out")


def test_it_goes_in_parts(base, tmp_path, monkeypatch):
    """As many passes of a quarter of the batch, and as many steps."""
    _, flags, _ = base
    sizes = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: sizes.append(len(given[0])) if type(module).__name__ == "VisionTransformer" else None
    )
    try:
        trained(tmp_path / "out", *flags, "--accumulate", "4", "--epochs", "1")
    finally:
        hook.remove()
    assert sizes == [1] + [4] * 16 + [20, 40]  # a trial, four steps, validation and test


def test_phases_and_rates_are_as_documented(base, tmp_path):
    """B_a = B_l = 2, B_s = 7; up over the warm-up, then down in a line that would be zero at the step after the last."""
    _, flags, metrics = base
    assert " ".join(phase[0] for phase in metrics["curves"]["phase"]) == "c c l l c c l c"
    assert metrics["curves"]["lr"] == pytest.approx([2e-2 * (8 - step) / 8 for step in range(8)])
    warm = trained(tmp_path / "warm", *flags, "--warmup_steps", "3")
    shares = [1 / 4, 2 / 4, 3 / 4, 5 / 5, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    assert warm["curves"]["lr"] == pytest.approx([2e-2 * share for share in shares])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_tested_is_what_the_file_says(dtype, base, tmp_path, monkeypatch):
    """Rounded, and with the head that was trained."""
    _, flags, _ = base
    tested, matrix = [], Run.matrix

    def looked(run, images):
        tested.append({name: update.delta().detach() for name, update in adapters(run.model).items()})
        tested.append(run.model.head.weight.detach().clone())
        return matrix(run, images)

    monkeypatch.setattr(Run, "matrix", looked)
    trained(tmp_path / "out", *flags, "--adapter_dtype", dtype, "--train_images", "32", "--epochs", "1")
    *_, before, _, deltas, head = tested
    fresh = timm.create_model("test_vit", num_classes=10, img_size=32)
    load_adapter(fresh, tmp_path / "out")
    assert torch.equal(fresh.head.weight, head)
    for name, update in adapters(fresh).items():
        torch.testing.assert_close(deltas[name], update.delta().detach(), rtol=0, atol=1e-6)
        assert not torch.equal(deltas[name], before[name])


def test_clipping_clips(base, tmp_path, norms):
    _, flags, _ = base
    trained(tmp_path / "plain", *flags)
    free = norms[:]
    norms.clear()
    limit = 0.5 * min(free)
    trained(tmp_path / "clipped", *flags, "--clip", limit, "--accumulate", "2")
    assert norms == pytest.approx([limit] * 8, rel=1e-4)


@pytest.mark.parametrize("method", [LOCA, ("--method", "lp", "--cache_features")], ids=["loca", "lp-cached"])
def test_bf16(method, tmp_path):
    """Trained numbers stay float32, and evaluation computes as the run did."""
    out = tmp_path / "out"
    metrics = trained(out, *method, "--precision", "bf16", "--train_images", "240")
    assert metrics["curves"]["loss"][-1] < metrics["curves"]["loss"][0]
    assert main("evaluate", "--adapter", out) == 0
    assert json.loads((out / "evaluation.json").read_text())["test_accuracy"] == metrics["test_accuracy"]
    with open_safetensors(next(out.glob("*.safetensors"))) as file:
        assert {entry.dtype for entry in file.entries.values()} <= {"F32", "I32"}


def test_a_packed_adapter(base, tmp_path):
    """It is evaluated, and a run with another dtype than the finished one is another run."""
    plain, flags, metrics = base
    found, out = trained(tmp_path / "out", *flags, "--adapter_dtype", "int8"), tmp_path / "out"
    assert found["curves"]["loss"] == metrics["curves"]["loss"] and found["adapter_bytes"] < metrics["adapter_bytes"]
    name = "pytorch_loca_weights.safetensors"
    with open_adapter(plain / name) as mine, open_adapter(out / name) as theirs:
        wanted, tensors = mine.tensors(), theirs.tensors()
    for key, value in tensors.items():
        torch.testing.assert_close(
            value.sort().values, wanted[key].sort().values, rtol=0, atol=float(wanted[key].abs().max()) / 200
        )
    assert main("evaluate", "--adapter", out) == 0
    accuracy = json.loads((out / "evaluation.json").read_text())["test_accuracy"]
    assert accuracy == pytest.approx(metrics["test_accuracy"], abs=0.05)
    assert main("train", *flags, "--output_dir", out, "--resume") == 2


def accuracies(monkeypatch, values):
    """Let validations find these, one after the other, and the test the last one."""
    left = iter(values)
    monkeypatch.setattr("loca_vision.recipes.classification.run.accuracy_of", lambda matrix: next(left))


def test_the_best_epoch_is_kept_and_a_run_without_a_better_one_stops(tmp_path, monkeypatch):
    flags = ("--method", "lp", "--epochs", "6", "--early_stop", "2", "--keep_checkpoints", "9")
    accuracies(monkeypatch, [0.1, 0.3, 0.3, 0.2, 0.9])
    out = tmp_path / "out"
    metrics = trained(out, *flags)
    assert (metrics["best_epoch"], metrics["steps"], metrics["validation_accuracy"]) == (2, 16, 0.3)
    assert [epoch["validation_accuracy"] for epoch in metrics["curves"]["epochs"]] == [0.1, 0.3, 0.3, 0.2]
    with open_safetensors(out / "trained_weights.safetensors") as saved:
        kept = saved.tensors()["head.weight"]
    for step, best in ((8, True), (16, False)):
        with open_safetensors(out / f"checkpoint-{step}" / "state.safetensors") as state:
            assert torch.equal(state.tensors()["model.head.weight"], kept) == best

    whole = weights(out)
    (out / "metrics.json").unlink()
    monkeypatch.undo()
    found = trained(out, *flags, "--resume")  # stopped early, it is not trained on
    assert (found["steps"], weights(out)) == (16, whole)


def test_a_loss_that_is_none_ends_the_run(tmp_path, capsys):
    assert (
        main("train", *DIGITS, "--method", "full", "--lr", "1e30", "--head_lr", "1e30", "--output_dir", tmp_path / "out") == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert "training has diverged; try smaller learning rates" in said
    assert not (tmp_path / "out" / "metrics.json").exists()


# Trackers and the hub


class Tracker:
    """What accelerate asks of one; it remembers."""

    name, requires_logging_directory, main_process_only = "tensorboard", True, True
    made = None

    def __init__(self, run_name, logging_dir, **_):
        self.place, self.logged, self.finished = f"{logging_dir}/{run_name}", [], False
        Tracker.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_curves_go_to_the_tracker(tmp_path, monkeypatch):
    """TensorBoard need not be installed for that: a folder of events for each seed."""
    for module in (tracking, stepper):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(Tracker, "made", [])
    out = tmp_path / "out"
    trained(out, *LOCA, "--seeds", "1", "2", "--report_to", "tensorboard")
    assert [tracker.place for tracker in Tracker.made] == [f"{out}/seed-{seed}/loca-vision" for seed in (1, 2)]
    for tracker, seed in zip(Tracker.made, (1, 2), strict=True):
        metrics = json.loads((out / f"seed-{seed}" / "metrics.json").read_text())
        assert [(s, v["loss"]) for s, v in tracker.logged if "loss" in v] == list(enumerate(metrics["curves"]["loss"], 1))
        assert [s for s, v in tracker.logged if "validation_accuracy" in v] == [4, 8]
        assert tracker.logged[-1] == (8, {"test_accuracy": metrics["test_accuracy"]})
        assert tracker.finished and tracker.config["dataset"] == "digits"


def test_a_tracker_that_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loca_vision.recipes.training.stepper.get_available_trackers", list)
    for name, sentence in (("tensorboard", "it is not installed"), ("all", "no tracker is installed")):
        assert main("train", *DIGITS, "--report_to", name, "--output_dir", tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
