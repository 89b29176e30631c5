"""Kill processes at random moments while they save, and check that they leave the old file or the new one, never half of one.

There are three kinds of saving: an adapter over another, checkpoints of a training run, and the conversion of an adapter to
LoRA. A child saves two known states alternately; the parent kills it (SIGKILL) after a random time and reads the file.

    python examples/hardening/kill_saves.py --kills 50
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
import tyro
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from loca_vision import LoCAConfig, adapters, inject, save_adapter
from loca_vision.commands.main import main as loca_vision_command
from loca_vision.pipeline.save import save_pipeline_adapter
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from mutate_files import tiny


@dataclass
class Settings:
    """Kill processes while they save."""

    kills: int = 50
    """Number of kills for each kind of saving."""
    seed: int = 0
    """Seed of the random moments."""
    longest: float = 0.2
    """Latest moment of a kill in seconds; three times the duration of a save, if that is longer."""


class Saver:
    """One kind of saving: it saves one of two states, and finds which of them is in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, turn: int) -> None:
        raise NotImplementedError

    def read(self) -> int | None:
        """Return the state in the folder, 0 or 1, or None for anything else."""
        raise NotImplementedError


class AdapterSaver(Saver):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = [_adapted(seed) for seed in (0, 1)]
        self.expected = [save_adapter(model, folder / f"state-{i}").read_bytes() for i, model in enumerate(self.models)]

    def save(self, turn: int) -> None:
        save_adapter(self.models[turn], self.folder / "adapter")

    def read(self) -> int | None:
        file = next((self.folder / "adapter").glob("pytorch_loca_weights.safetensors"))
        return _which(self.expected, file.read_bytes())


class CheckpointSaver(Saver):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        generator = torch.Generator().manual_seed(0)
        self.states = [torch.randn(200_000, generator=generator) for _ in range(2)]

    def save(self, turn: int) -> None:
        newest = latest_checkpoint(self.folder / "run")
        step = 1 if newest is None else int(newest.name.rpartition("-")[2]) + 1
        write_checkpoint(self.folder / "run", step, {"state": self.states[turn]}, {"turn": turn}, keep=2)

    def read(self) -> int | None:
        newest = latest_checkpoint(self.folder / "run")
        if newest is None:
            return None
        tensors, state = read_checkpoint(newest)
        return state["turn"] if torch.equal(tensors["state"], self.states[state["turn"]]) else None


class ExportSaver(Saver):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for i in range(2):
            pipe = SimpleNamespace(components={"unet": _adapted(i, _unet())})
            save_pipeline_adapter(pipe, folder / f"source-{i}")
            self._convert(i, folder / f"state-{i}")
        self.expected = [_tensors(folder / f"state-{i}") for i in range(2)]

    def _convert(self, turn: int, file: Path) -> None:
        command = ["convert", str(self.folder / f"source-{turn}"), str(file), "--to", "lora", "--rank", "4", "--overwrite"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert not loca_vision_command(command)

    def save(self, turn: int) -> None:
        self._convert(turn, self.folder / "lora")

    def read(self) -> int | None:
        now = _tensors(self.folder / "lora")
        same = [now.keys() == e.keys() and all(torch.equal(now[key], e[key]) for key in e) for e in self.expected]
        return same.index(True) if any(same) else None


SAVERS: dict[str, Callable[[Path], Saver]] = {
    "adapter files": AdapterSaver,
    "checkpoints": CheckpointSaver,
    "exports": ExportSaver,
}


def kill_while_saving(saver: Saver, seconds: float) -> None:
    """Let a child save both states alternately, and kill it `seconds` after its first save."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        saver.save(1)
        os.write(writer, b"1")
        for turn in itertools.cycle((0, 1)):
            saver.save(turn)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)  # a forked child has only the thread that forked
    moments, failed = random.Random(settings.seed), 0
    for kind, make in SAVERS.items():
        with tempfile.TemporaryDirectory() as folder:
            saver, found = make(Path(folder)), [0, 0]
            start = time.perf_counter()
            saver.save(0)
            longest = max(settings.longest, 3 * (time.perf_counter() - start))
            for _ in tqdm(range(settings.kills), desc=kind, disable=None):
                kill_while_saving(saver, moments.uniform(0, longest))
                state = saver.read()
                if state is None:
                    failed += 1
                else:
                    found[state] += 1
            saver.save(0)  # saving must still work
            assert saver.read() == 0
        neither = settings.kills - sum(found)
        print(f"{kind}: {settings.kills} kills left the one state {found[0]} times, the other {found[1]}, neither {neither}")
    return 1 if failed else 0


def _adapted(seed: int, model: nn.Module | None = None) -> nn.Module:
    """Inject random coefficients into a model, by default a tiny vision transformer."""
    model = tiny() if model is None else model
    inject(model, LoCAConfig(n_components=200, seed=seed))
    for update in adapters(model).values():
        torch.nn.init.normal_(update.coefficients)
    return model


def _unet() -> nn.Module:
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 24}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model: nn.Module = UNet2DConditionModel(sample_size=8, layers_per_block=1, **sizes, **blocks)
    return model


def _which(states: list[bytes], found: bytes) -> int | None:
    return states.index(found) if found in states else None


def _tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "pytorch_loca_weights.safetensors")


if __name__ == "__main__":
    sys.exit(main())
