"""The demo command on a tiny model: what it writes, what it reports, and what remains after an interruption."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from loca_vision import active_adapters, load_adapter
from loca_vision.commands import demo
from loca_vision.commands.demo import Demo, run
from loca_vision.commands.main import main
from loca_vision.recipes.classification.accuracy import accuracy_of, confusion
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.recipes.training.fine_tune import fine_tune

TINY = {"model": "test_vit", "weights": "none", "image_size": 32, "batch_size": 4, "n_components": 20}
FLAGS = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture
def photos(tmp_path):
    """Two classes that differ in colour."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        for channel, name in enumerate(("red", "green")):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (24, 30, 3), np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_of_images_from_start_to_end(photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--dataset", "folder", "--root", str(photos), "--output", str(out), "--steps", "12", "--learning-steps", "11"]
    assert main(["demo", *FLAGS, *flags]) == 0
    printed = capsys.readouterr().out
    assert "linear probe" in printed and "LoCA" in printed and "differ by 0" in printed

    metrics = json.loads((out / "metrics.json").read_text())
    probe, loca = metrics["methods"]
    assert (probe["trained_parameters"], loca["trained_parameters"]) == (0, 20 * 2 * 6)
    assert probe["head_parameters"] == loca["head_parameters"] == 64 * 2 + 2
    assert 0.5 <= loca["test_accuracy"] <= 1
    assert [step["number"] for step in loca["curve"]] == list(range(1, 13))
    assert [step["phase"] for step in loca["curve"]] == ["coefficients"] * 10 + ["locations"] + ["coefficients"]
    assert metrics["adapter_bytes"] == (out / "pytorch_loca_weights.safetensors").stat().st_size
    for name in ("curves.png", "spectrum.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 200

    model = build_model(ModelSpec("test_vit", 2, 32, "none", 0))
    load_adapter(model, out)
    assert active_adapters(model) == {"default": 1.0}


def test_the_same_seed_gives_the_same_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "difference_after_reload", lambda *given: 0.0)  # by another process, as in the test above
    files = []
    for name in ("a", "b"):
        run(Demo(output=tmp_path / name, steps=2, max_test_images=16, **TINY))
        files.append((tmp_path / name / "pytorch_loca_weights.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process there")
def test_an_interruption_leaves_nothing_half_done(photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "loca_vision.commands.main", "demo", *FLAGS, "--steps", "100000", "--output", str(out)]
    process = subprocess.Popen(
        [*command, "--dataset", "folder", "--root", str(photos)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell ignores for what it runs behind
    )
    started = time.monotonic()
    while time.monotonic() - started < 60:  # until the bar moves
        if "it/s" in process.stderr.readline(200):
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "loca-vision: interrupted; every file that is there is whole"
    assert "Traceback" not in said
    assert list(out.iterdir()) == []


def test_the_loop_takes_the_steps_it_is_asked_for():
    """Linear decay to zero, whole batches only, every image once an epoch."""
    data = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.long))
    seen = []
    model = torch.nn.Linear(1, 2)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten().tolist()))
    groups = [{"params": list(model.parameters()), "lr": 1.0}]
    steps = list(fine_tune(model, data, groups, steps=7, batch_size=4, seed=0))
    assert [step.lr for step in steps] == pytest.approx([1 - i / 7 for i in range(7)])
    assert [len(batch) for batch in seen] == [4] * 7
    assert len(set(seen[0] + seen[1])) == 8 and seen[0] != seen[2]
    model.weight.data.zero_()
    model.bias.data.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy_of(confusion(model, data, 2)) == 1.0
