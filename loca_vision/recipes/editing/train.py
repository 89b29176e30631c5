"""The trainer of edits as a command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loca_vision.recipes.diffusion.train import train
from loca_vision.recipes.editing.presets import EDIT_PRESETS
from loca_vision.recipes.editing.recipe import EditRecipe, resolve
from loca_vision.recipes.editing.task import EditTask
from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.settings.console import guarded


def main(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    """Train as the command line says; return the exit status."""
    return guarded(prog, lambda: _main(sys.argv[1:] if arguments is None else list(arguments), prog), extra="edit")


def _main(arguments: list[str], prog: str) -> None:
    parsed = parse(EditRecipe, arguments, prog=prog, presets=EDIT_PRESETS)
    train(resolve(parsed.settings, parsed.given), EditTask)
