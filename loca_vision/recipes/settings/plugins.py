"""Modules that define methods, imported because a user names them on a command line or in a settings file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import tyro

Imports = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import", metavar="MODULE")]
"""The type of the field `imports`, whose flag is `--import`."""


def import_modules(modules: Iterable[str]) -> None:
    """Import each module once: a name that Python finds, or the path of a .py file.

    Raises:
        ValueError: it cannot be imported, for any reason; the error is one sentence.
    """
    for module in dict.fromkeys(modules):
        try:
            _file(Path(module).expanduser()) if module.endswith(".py") else importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(f"--import {module}: it cannot be imported: {_reason(error)}") from error


def _file(path: Path) -> None:
    """Import a file under a unique name, so that it does not hide another module with the file's name."""
    path = path.resolve()
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it ends the program; what a script does belongs below `if __name__ == '__main__'`"
    return f"{error}" if isinstance(error, (FileNotFoundError, ModuleNotFoundError)) else f"{type(error).__name__}: {error}"
