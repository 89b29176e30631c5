"""`loca-vision evaluate-edit`: edits of photographs by a pipeline and its adapters, and how good they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.settings.console import guarded


def main(arguments: Sequence[str] | None = None, *, prog: str = "loca-vision evaluate-edit") -> int:
    """Edit and measure as the command line says; return the exit status."""
    return guarded(prog, lambda: _main(sys.argv[1:] if arguments is None else list(arguments), prog), extra="edit")


def _main(arguments: list[str], prog: str) -> None:
    from loca_vision.recipes.editing.evaluation.evaluate import evaluate
    from loca_vision.recipes.editing.evaluation.settings import EditEvaluation

    parsed = parse(EditEvaluation, arguments, prog=prog, presets={})
    evaluate(parsed.settings, parsed.given)
