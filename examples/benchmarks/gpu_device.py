"""Describe the card, driver and clocks of a run, without changing any of them."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

ASKED = (
    "name",
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)


def described() -> dict[str, Any]:
    """Return what torch and nvidia-smi report, or that the device is the CPU."""
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    card = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "card": card.name,
        "memory GB": round(card.total_memory / 1e9, 1),
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "float32 products": torch.get_float32_matmul_precision(),
        "convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "nvidia-smi": clocks(),
    }


def clocks() -> dict[str, str] | str:
    """Return what nvidia-smi reports now, or why it is not available."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not there"
    query = [program, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return dict(zip(ASKED, (value.strip() for value in said.split(",")), strict=False))
