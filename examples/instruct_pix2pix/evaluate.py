"""Edit photographs with an InstructPix2Pix model and its adapters, and measure the edits.

    python examples/instruct_pix2pix/evaluate.py --pretrained_model_name_or_path timbrooks/instruct-pix2pix \
        --adapter cartoon --other cartoon-lora --photographs photos --prompt "Change the natural image to a cartoon-style image"
    python examples/instruct_pix2pix/evaluate.py --pretrained_model_name_or_path timbrooks/instruct-pix2pix \
        --adapter cartoon --pairs pairs --split test --output_dir evaluation

It writes evaluation.json, contact_sheet.png and edits/. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.settings.console import guarded

PROG = "evaluate.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    return guarded(PROG, lambda: _main(sys.argv[1:] if arguments is None else list(arguments)), extra="edit")


def _main(arguments: list[str]) -> None:
    from loca_vision.recipes.editing.evaluation.evaluate import evaluate
    from loca_vision.recipes.editing.evaluation.settings import EditEvaluation

    parsed = parse(EditEvaluation, arguments, prog=PROG, presets={})
    evaluate(parsed.settings, parsed.given)


if __name__ == "__main__":
    sys.exit(main())
