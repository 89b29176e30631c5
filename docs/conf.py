"""The Sphinx settings of the documentation: `sphinx-build -W -b html docs OUTPUT`. Nothing is fetched from the network."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

project = "loca-vision"
author = "the authors of loca-vision"
copyright = "the authors of loca-vision, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "loca-vision"
exclude_patterns = ["_build"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True


class CommandHelp(Directive):
    """`{command-help} demo`: what `loca-vision demo --help` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from loca_vision.commands.main import main

        text = io.StringIO()
        os.environ["COLUMNS"] = "100"
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([self.arguments[0], "--help"])
        return [nodes.literal_block(text.getvalue(), text.getvalue(), language="text")]


class SettingsTable(Directive):
    """`{settings-table} module`: the flags of a command in groups, from the dataclass of settings in that module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        own = (value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__)
        of_a_command = [c for c in own if dataclasses.is_dataclass(c) and "config" in {f.name for f in dataclasses.fields(c)}]
        return list(_groups(max(of_a_command, key=lambda cls: len(dataclasses.fields(cls)))))


def _groups(cls: type[Any]) -> Iterator[nodes.Node]:
    """A table for each group of settings, below its title where there are several."""
    from loca_vision.recipes.settings.fields import groups_of

    groups = groups_of(cls)
    for group in groups:
        if len(groups) > 1:
            yield nodes.paragraph("", "", nodes.strong(group.title, group.title))
        yield _table(("flag", "default", "meaning"), list(_rows(cls, group.fields)))


def _rows(cls: type[Any], fields: Sequence[dataclasses.Field[Any]]) -> Iterator[tuple[str, str, str]]:
    """Flag, default and text of each field."""
    from loca_vision.recipes.settings.fields import field_texts
    from loca_vision.recipes.settings.help import SettingsHelp

    help_of, texts = SettingsHelp(cls, {}), field_texts(cls)
    for field in fields:
        default = "required" if field.default is dataclasses.MISSING else str(field.default)
        if isinstance(field.default, tuple):
            default = " ".join(map(str, field.default)) or "()"
        yield help_of.flag(field.name), default, texts.get(field.name, "")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", _row(head, literal=False))
    group += nodes.tbody("", *(_row(row, literal=True) for row in rows))
    return nodes.table("", group)


def _row(cells: tuple[str, ...], *, literal: bool) -> nodes.row:
    """A row whose cells, all but the last, are code where `literal` is set."""
    entries = []
    for number, cell in enumerate(cells):
        code = literal and number < len(cells) - 1
        content = nodes.literal(cell, cell) if code else nodes.Text(cell)
        entries.append(nodes.entry("", nodes.paragraph("", "", content)))
    return nodes.row("", *entries)


def _escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The bars of `|x|` in docstrings are absolute values, not substitutions of reStructuredText."""
    lines[:] = [re.sub(r"\|(\S[^|`]*)\|", r"\\|\1\\|", line) for line in lines]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", _escape_bars)
    app.add_directive("settings-table", SettingsTable)
    return {"parallel_read_safe": True}
