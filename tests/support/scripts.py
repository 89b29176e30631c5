"""The example scripts as modules, run in this process or in forks of it with settings that take about a second."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
import time
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from loca_vision.storage.safetensors_file import write_safetensors
from support.forks import fork, joined
from support.timm_models import _fill

EXAMPLES = Path(__file__).parents[2] / "examples" / "image_classification"
MODEL = ("--model", "test_vit", "--weights", "none", "--image_size", "32")
DIGITS = ("--dataset", "digits", *MODEL, "--batch_size", "16", "--train_images", "64")
DIGITS += ("--validation_images", "20", "--test_images", "40", "--epochs", "2")
LOCA = ("--method", "loca", "--n_components", "100", "--lr", "2e-2", "--coefficient_steps", "2", "--location_steps", "2")
LOCA += ("--learning_steps", "7", "--location_lr", "1e-2")


@cache
def script(name: str) -> ModuleType:
    """A script by its path in `examples/`; those of image classification by name alone."""
    file = (EXAMPLES.parent if "/" in name else EXAMPLES) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name.replace('/', '_')}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(name: str, *arguments: Any) -> int:
    """A script's exit status, as in a process of its own: accelerate keeps its state in the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return script(name).main([str(argument) for argument in arguments])


def trained(out: Path, *arguments: Any) -> dict[str, Any]:
    """Run train.py on the digits and return its metrics; if a setting is given twice, the last one counts."""
    assert main("train", *DIGITS, "--output_dir", out, *arguments) == 0
    return json.loads((out / "metrics.json").read_text())


def write_weights(file: Path) -> Path:
    """Write weights of the model, large enough that gradients are far above rounding."""
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("test_vit", num_classes=0)
    _fill(model)
    write_safetensors(file, {name: tensor.clone() for name, tensor in model.state_dict().items()}, {})
    return file


def weights(out: Path) -> bytes:
    (file,) = out.glob("*.safetensors")
    return file.read_bytes()


def killed(out: Path, checkpoint: int, delay: float, *arguments: Any, command: tuple[Any, ...] = ("train", *DIGITS)) -> None:
    """Train until that checkpoint exists and `delay` seconds longer, then kill the process."""
    child = fork(lambda: main(*command, "--output_dir", out, *arguments), out.parent / "log.txt")
    started = time.monotonic()
    while not (out / f"checkpoint-{checkpoint}").exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < started + 60
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert joined(child) == -signal.SIGKILL, (out.parent / "log.txt").read_text()


def together(log: Path, *arguments: Any, count: int = 2, name: str = "train") -> list[int]:
    """Run a script in several processes as `torchrun --nproc_per_node 2` does, on the CPU with gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return main(name, *arguments)

    children = [fork(lambda rank=rank: process(rank), log) for rank in range(count)]
    return [joined(child) for child in children]
