"""The command `loca-vision`. A user's mistake is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

USAGE, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Inspect:
    """Say what is in an adapter file, projection by projection."""

    file: Path
    """The adapter, or the folder it is in."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        command = _parse(sys.argv[1:] if arguments is None else list(arguments))
        if isinstance(command, int):
            return command
        _run(command)
    except ModuleNotFoundError as error:
        print(f"loca-vision: {error.name} is missing: python -m pip install 'loca-vision[demo]'", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # as when the reader, `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        print(f"loca-vision: {_sentence(error)}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("\nloca-vision: interrupted; every file that is there is whole", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parse(arguments: list[str]) -> Any:
    """The settings of the command asked for, or an exit status."""
    import tyro

    from loca_vision.demo import Demo

    commands = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    said = StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(commands, prog="loca-vision", args=arguments, config=(tyro.conf.PositionalRequiredArgs,))
    except SystemExit as stop:
        if stop.code:
            print(f"loca-vision: {_one_line(said.getvalue())}", file=sys.stderr)
        return int(stop.code or 0)


def _one_line(box: str) -> str:
    """The sentence in the box that tyro draws: under the title, up to the next rule; in ASCII where the terminal is."""
    message: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │|╭╮╰╯+")
        if not text.strip("─-"):
            if message:
                break
            continue
        message.append(text)
    return " ".join(" ".join(message).split()) or "see loca-vision --help"


def _sentence(error: Exception) -> str:
    """The error on one line; of one that a worker process passes on with its traceback, the end."""
    lines = str(error).strip().splitlines()
    return lines[-1] if "Original Traceback" in str(error) else " ".join(" ".join(lines).split())


def _run(command: Any) -> None:
    if isinstance(command, Inspect):
        from loca_vision.inspection import describe

        print(describe(command.file))
    else:
        from loca_vision.demo import run

        run(command)


if __name__ == "__main__":
    sys.exit(main())
