"""The command `loca-vision`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from loca_vision.console import guarded, usage_in_one_line


@dataclass(frozen=True)
class Inspect:
    """Say what is in an adapter file, projection by projection."""

    file: Path
    """The adapter, or the folder it is in."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return guarded("loca-vision", lambda: _run(_parse(given)), extra="demo")


def _parse(arguments: list[str]) -> Any:
    """The settings of the command asked for."""
    import tyro

    from loca_vision.demo import Demo

    commands = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    with usage_in_one_line("loca-vision"):
        return tyro.cli(commands, prog="loca-vision", args=arguments, config=(tyro.conf.PositionalRequiredArgs,))


def _run(command: Any) -> None:
    if isinstance(command, Inspect):
        from loca_vision.inspection import describe

        print(describe(command.file))
    else:
        from loca_vision.demo import run

        run(command)


if __name__ == "__main__":
    sys.exit(main())
