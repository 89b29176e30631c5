"""The command `loca-vision`: it lists the commands, or runs the one that the first word names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from loca_vision.commands.command_table import COMMANDS, GROUPS, Command
from loca_vision.messages import nearest
from loca_vision.recipes.settings.console import guarded, usage_in_one_line

PROG = "loca-vision"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    name, *words = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    command = COMMANDS.get(name)
    if command is None:
        return guarded(PROG, lambda: _without_command(name), extra="demo")
    if command.settings:
        return guarded(PROG, lambda: _run(command, f"{PROG} {name}", words), extra=command.extra)
    return guarded(f"{PROG} {name}", lambda: _run_main(command, f"{PROG} {name}", words), extra=command.extra)


def list_of_commands() -> str:
    """Return what `loca-vision --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND [settings]", "", "Adapters (LoCA, LoRA and others) for timm and diffusers."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name.ljust(width)}  {command.about}" for name, command in commands.items())]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help shows the settings of a command."])


def _without_command(word: str) -> None:
    if word not in ("-h", "--help"):
        raise ValueError(f"{word}: there is no such command{nearest(word, COMMANDS) or f'; see {PROG} --help'}")
    print(list_of_commands())


def _run(command: Command, prog: str, words: Sequence[str]) -> None:
    """Parse the settings with tyro, and run the command."""
    import tyro

    module = import_module(f"loca_vision.{command.module}")
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    with usage_in_one_line(PROG):
        settings = tyro.cli(getattr(module, command.settings), prog=prog, args=words, config=config)
    said = getattr(module, command.run)(settings)
    if isinstance(said, str):
        print(said)


def _run_main(command: Command, prog: str, words: Sequence[str]) -> None:
    """Exit with the status of a command that reads its words itself."""
    raise SystemExit(import_module(f"loca_vision.{command.module}").main(words, prog=prog))


if __name__ == "__main__":
    sys.exit(main())
