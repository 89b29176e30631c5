"""The command `loca-vision`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from loca_vision.recipes.settings.console import guarded, usage_in_one_line


@dataclass(frozen=True)
class Inspect:
    """Say what is in an adapter file or a LoRA, projection by projection."""

    file: Path
    """The adapter, or the folder it is in."""
    base: Path | None = None
    """The weights it is for, where only their sizes tell what a file means (FourierFT of peft)."""
    picture: Path | None = None
    """A PNG for the cosine spectra of the updates."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return guarded("loca-vision", lambda: _run(_parse(given)), extra="demo")


def _parse(arguments: list[str]) -> Any:
    """The settings of the command asked for."""
    import tyro

    from loca_vision.commands.app.command import App
    from loca_vision.commands.combine import Combine
    from loca_vision.commands.convert import Convert, Extract
    from loca_vision.commands.demo import Demo
    from loca_vision.commands.merge import Merge
    from loca_vision.recipes.classification.evaluate import Evaluate
    from loca_vision.recipes.classification.predict import Predict

    commands = (
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Extract, tyro.conf.subcommand("extract")]
        | Annotated[Merge, tyro.conf.subcommand("merge")]
        | Annotated[Combine, tyro.conf.subcommand("combine")]
        | Annotated[App, tyro.conf.subcommand("app")]
    )
    with usage_in_one_line("loca-vision"):
        return tyro.cli(
            commands, prog="loca-vision", args=arguments, config=(tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
        )


def _run(command: Any) -> None:
    from loca_vision.commands import combine, demo, merge
    from loca_vision.commands import convert as exchange_commands
    from loca_vision.commands.app import command as app
    from loca_vision.recipes.classification import evaluate, predict

    run: dict[type[Any], Callable[[Any], object]] = {
        Inspect: _inspect,
        demo.Demo: demo.run,
        evaluate.Evaluate: evaluate.evaluate,
        predict.Predict: predict.predict,
        exchange_commands.Convert: lambda wanted: print(exchange_commands.convert(wanted)),
        exchange_commands.Extract: lambda wanted: print(exchange_commands.extract(wanted)),
        combine.Combine: lambda wanted: print(combine.combine(wanted)),
        merge.Merge: lambda wanted: print(merge.merged(wanted)),
        app.App: app.run,
    }
    run[type(command)](command)


def _inspect(command: Inspect) -> None:
    from loca_vision.commands.inspect_file import contents_of, describe

    said = describe(command.file, command.base)
    if command.picture is not None:  # before a word is printed, whose reader may go away, as `head` does
        from loca_vision.commands.spectrum_picture import draw_spectra

        draw_spectra(
            command.picture,
            f"Cosine spectra of the updates in {command.file.name}",
            contents_of(command.file, command.base).layers(),
        )
    print(said)


if __name__ == "__main__":
    sys.exit(main())
