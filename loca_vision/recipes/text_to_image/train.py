"""The trainer of subjects, styles and concepts as a command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loca_vision.recipes.diffusion.train import train
from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.settings.console import guarded
from loca_vision.recipes.text_to_image.recipe import ImageRecipe, resolve
from loca_vision.recipes.text_to_image.task import ImageTask


def main(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    """Train as the command line says; return the exit status."""
    return guarded(prog, lambda: _main(sys.argv[1:] if arguments is None else list(arguments), prog), extra="edit")


def _main(arguments: list[str], prog: str) -> None:
    parsed = parse(ImageRecipe, arguments, prog=prog, presets={})
    train(resolve(parsed.settings, parsed.given), ImageTask)
