"""Test a classifier that train.py trained: `python examples/image_classification/evaluate.py --adapter runs/classifier`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from loca_vision.recipes.classification.evaluate import Evaluate, evaluate
from loca_vision.recipes.settings.console import guarded, usage_in_one_line

PROG = "evaluate.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate according to the command line and return the exit status."""

    def command() -> None:
        with usage_in_one_line(PROG):
            wanted = tyro.cli(Evaluate, prog=PROG, args=arguments, use_underscores=True)
        evaluate(wanted)

    return guarded(PROG, command, extra="train")


if __name__ == "__main__":
    sys.exit(main())
