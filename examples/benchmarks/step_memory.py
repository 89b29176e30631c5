"""Calculate the bytes and floating-point operations of a training step with LoCA. Nothing is measured or allocated.

The real configuration of each base is traced with tensors that have shapes but no memory (FakeTensorMode), so that tracing a
step of a multi-gigabyte model takes seconds on any machine. These count: frozen weights in bfloat16; the adapted weights
W + Delta W, which are built in every step; 16 bytes for each trained number (itself, its gradient and AdamW's two moments, in
float32); and every other tensor that is alive at the same time, whether it is kept for the backward pass or used within an
operation. These do not count: a device's context and fragmentation, a kernel's own workspace, text encoders and the
autoencoder. Norms are in bfloat16, as under a CPU's autocast; a GPU's autocast computes and keeps some in float32.

    python examples/benchmarks/step_memory.py
    python examples/benchmarks/step_memory.py --bases sdxl --batch_size 4
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from loca_vision import LoCAConfig
from rounds import check_positive, run
from step_memory_bases import Base, Name, bases
from step_memory_trace import BYTES_OF_A_TRAINED_NUMBER, Step, traced
from tables import grid

SCRIPT = "step_memory.py"
SMALL = ((32, 32, 32, 32), (2, 1, 1))
HEADS = [
    "base, pixels", "checkpointing", "trained numbers", "weights, GB", "built, GB", "trained, GB", "kept, GB", "peak, GB",
    "sum, GB", "forward, TFLOP", "backward, TFLOP", "LoCA adds",
]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Calculate what a training step with LoCA takes on bases of diffusers, and print a table"""

    bases: tuple[Name, ...] = ("sd15", "sdxl", "klein")
    """Base models: Stable Diffusion 1.5 at 512 pixels, SDXL at 1024, FLUX.2 klein 4B at 512."""
    batch_size: int = 1
    """Images per step."""
    resolution: int | None = None
    """Pixels per side for all bases; by default each base's own."""
    n_components: int = 3000
    """Components per projection."""
    targets: tuple[Literal["q", "k", "v", "out", "fc1", "fc2"], ...] = ("q", "k", "v", "out")
    """Adapted projections."""
    dry_run: bool = False
    """Small bases of the same structure, to try the script."""


def cells(step: Step) -> list[str]:
    """Return a row of the table: GB (10^9 bytes), and 10^12 operations."""
    sizes = (step.weights, step.built, BYTES_OF_A_TRAINED_NUMBER * step.trained, step.kept, step.peak, step.total)
    return [
        f"{step.title}, {step.resolution}",
        "yes" if step.checkpointing else "no",
        f"{step.trained:,}",
        *(f"{size / 1e9:.2f}" for size in sizes),
        f"{step.forward / 1e12:.2f}",
        f"{step.backward / 1e12:.2f}",
        f"{100 * step.added / (step.forward + step.backward):.0f} %",
    ]


def table(wanted: Settings, known: Mapping[Name, Base]) -> str:
    """Return a Markdown table of each base without and with checkpointing."""
    config = LoCAConfig(n_components=wanted.n_components, targets=wanted.targets)
    trace = partial(traced, config=config, batch_size=wanted.batch_size, resolution=wanted.resolution)
    steps = (trace(known[name], checkpointing=again) for name in wanted.bases for again in (False, True))
    return grid([HEADS, *map(cells, steps)])


def work(wanted: Settings) -> None:
    """Print the table.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive(wanted, "batch_size", "n_components")
    if wanted.resolution is not None and (wanted.resolution < 128 or wanted.resolution % 64):
        raise ValueError(f"resolution={wanted.resolution}: expected a multiple of 64 from 128 up")
    print(table(wanted, bases(*SMALL) if wanted.dry_run else bases()))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
