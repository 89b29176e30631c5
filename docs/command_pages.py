"""The `--help` of every command as text, for the command line reference."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "inspect", "convert", "extract", "merge", "evaluate")
SCRIPTS = (
    "image_classification/train.py",
    "image_classification/evaluate.py",
    "image_classification/report.py",
    "image_classification/study.py",
    "instruct_pix2pix/build_pairs.py",
    "instruct_pix2pix/train.py",
    "instruct_pix2pix/evaluate.py",
)


def write(folder: Path) -> None:
    """Write one text file a command into the folder, which git ignores."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        _help([sys.executable, "-m", "loca_vision.commands.main", command], folder / f"{command}.txt")
    for script in SCRIPTS:
        _help(
            [sys.executable, str(ROOT / "examples" / script)], folder / (script.replace("/", "-").removesuffix(".py") + ".txt")
        )


def _help(command: list[str], file: Path) -> None:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, env=environment)
    file.write_text(done.stdout)
