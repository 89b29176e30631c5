"""`loca-vision train-classifier` in several processes: `accelerate launch -m loca_vision.commands.train_classifier`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loca_vision.commands import main as commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    return commands.main(["train-classifier", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
