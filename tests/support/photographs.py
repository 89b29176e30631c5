"""Synthetic photographs, and the script that makes pairs of them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def scene(side=64):
    """A bright disc in front of a sky gradient, with noise as texture."""
    rows, cols = np.mgrid[:side, :side] / side
    sky = np.stack([60 + 60 * rows, 90 + 60 * rows, 190 + 0 * rows], -1)
    disc = (rows - 0.5) ** 2 + (cols - 0.5) ** 2 < 0.09
    sky[disc] = (240, 160, 60)
    return Image.fromarray((sky + np.random.default_rng(0).normal(0, 6, sky.shape)).clip(0, 255).astype(np.uint8))


SCRIPT = Path(__file__).parents[2] / "examples" / "instruct_pix2pix" / "build_pairs.py"


def script():
    spec = importlib.util.spec_from_file_location("build_pairs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_pairs"] = module
    spec.loader.exec_module(module)
    return module


def photograph(path, number, side=48, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = scene(side).rotate(17 * number)
    image.save(path, **options)
    return path
