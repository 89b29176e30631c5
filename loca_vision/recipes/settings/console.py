"""What every command shares: a user's mistake is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TypeVar

from loca_vision.messages import nearest

Settings = TypeVar("Settings")

USAGE, INTERRUPTED = 2, 130
_PLAINER = (  # phrases of tyro and Python about a value, and the same in plain words
    (r"invalid literal for int\(\) with base 10: ", "expected a whole number, got "),
    (r"could not convert string to float: ", "expected a number, got "),
    (r"no type matching \{None\}\|INT could be instantiated from \[(.*)\]\.", r"expected a whole number, got \1"),
    (r"no type matching \{None\}\|FLOAT could be instantiated from \[(.*)\]\.", r"expected a number, got \1"),
)


def guarded(prog: str, function: Callable[[], object], *, extra: str) -> int:
    """Run a command and return its exit status: 0, 2 after a user's mistake, 130 if interrupted, 1 if nobody reads its output.

    Args:
        prog: the command's name, which begins every line about it.
        function: the command. An error of a kind that users can cause (ValueError, TypeError, OSError, or a missing module) is
            reported in one line; any other is a bug in the program and propagates with its traceback.
        extra: the extra that installs a missing module, as in `pip install 'loca-vision[EXTRA]'`, if the error does not say.
    """
    try:
        function()
    except ModuleNotFoundError as error:
        own = str(error) if "pip install" in str(error) else None  # the error knows better what installs it
        return _told(prog, own or f"{error.name or error} is missing: python -m pip install 'loca-vision[{extra}]'")
    except BrokenPipeError:  # for example, `head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        return _told(prog, _sentence(error))
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; every file that is there is whole", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python itself would print it
            return _told(prog, stop.code)
        return stop.code or 0
    return 0


def run_command(
    prog: str, kind: type[Settings], work: Callable[[Settings], object], arguments: Sequence[str] | None, *, extra: str
) -> int:
    """Run a whole command and return its exit status, as in `guarded`: settings from the command line, then the work.

    Args:
        kind: the settings dataclass, whose docstring is the beginning of `--help`.
        arguments: the command line's arguments; None for those of this process.
    """

    def command() -> None:
        import tyro

        with usage_in_one_line(prog):
            settings = tyro.cli(kind, prog=prog, args=arguments, description=kind.__doc__, use_underscores=True)
        work(settings)

    return guarded(prog, command, extra=extra)


@contextmanager
def usage_in_one_line(prog: str) -> Iterator[None]:
    """Parse a command line with tyro inside; a request for help still exits with SystemExit(0).

    Raises:
        ValueError: bad usage; the error is the sentence that tyro puts in a box, with what is nearest to a misspelt option or
            choice.
    """
    said = StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code:
            box = said.getvalue()
            raise ValueError(_with_nearest(_unboxed(box), box) or f"see {prog} --help") from None
        raise


def _told(prog: str, sentence: str) -> int:
    print(f"{prog}: {sentence}", file=sys.stderr)
    return USAGE


def _unboxed(box: str) -> str:
    """Return the sentence in tyro's box, in plain words: the text below the title, up to the next rule; the box is drawn in
    ASCII if the terminal is."""
    message: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │|╭╮╰╯+")
        if not text.strip("─-"):
            if message:
                break
            continue
        message.append(text)
    sentence = " ".join(" ".join(message).split())
    for said, plainer in _PLAINER:
        sentence = re.sub(said, plainer, sentence)
    return sentence


def _with_nearest(sentence: str, box: str) -> str:
    """Add similar names to a sentence about a misspelt option or choice; return any other as it is."""
    close = ""
    if sentence.startswith("Unrecognized options:"):
        # tyro lists similar ones below: with four blanks before an option, and eight before what it does
        options = re.findall(r"^[│| ] {5}(--[\w-]+)", box, re.M)
        close = f"; perhaps {' or '.join(dict.fromkeys(options))}" if options else ""
    elif choice := re.match(r"invalid choice '(.*?)' for .*Expected one of \((.*)\)", sentence):
        close = nearest(choice[1], re.findall(r"'(.*?)'", choice[2]))
    return f"{sentence.rstrip('.')}{close}" if close else sentence


def _sentence(error: Exception) -> str:
    """Return the error on one line; if a worker process passes it on with its traceback, only the end."""
    lines = str(error).strip().splitlines()
    return lines[-1] if "Original Traceback" in str(error) else " ".join(" ".join(lines).split())
