"""The help of a settings dataclass: the settings that matter first, or all of them in groups, with a line or two each.

The dataclass may name those that matter first, as `FIRST: ClassVar[tuple[str, ...]]`; without it `--help` shows all.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import TextWrapper
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from loca_vision.recipes.settings.fields import Group, field_texts, first_line, groups_of

_SHORT, _ALL = ("-h", "--help"), ("--help-all", "--help_all")
_COLUMN = 26  # where the texts begin
_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return any(word in (*_SHORT, *_ALL) for word in arguments)


def help_text(cls: type[Any], values: Mapping[str, Any], arguments: Sequence[str], *, prog: str) -> str:
    """Return what `--help` or `--help-all` prints, depending on which of them is in the arguments.

    Args:
        values: the defaults by field, after presets and files; `tyro.MISSING` if there is none.
    """
    width = shutil.get_terminal_size().columns
    settings, groups = SettingsHelp(cls, values), groups_of(cls)
    first: tuple[str, ...] = getattr(cls, "FIRST", ())
    parts = [_usage(settings, prog, width), _filled(f"{first_line(cls)}.", width)]
    if not first or any(word in _ALL for word in arguments):
        parts += [_filled(more, width) for more in _paragraphs(cls)]
        parts += ["\n".join([f"{group.title}:", *_entries(settings, group.fields, width)]) for group in groups]
        return "\n\n".join(parts)
    named = {field.name: field for field in dataclasses.fields(cls)}
    parts.append("\n".join(["What matters first:", *_entries(settings, [named[name] for name in first], width)]))
    parts.append("\n".join(["All settings:", *_contents(settings, groups, width)]))
    return "\n\n".join([*parts, f"{prog} --help-all shows every setting."])


class SettingsHelp:
    """The pieces of help about each field of a dataclass."""

    def __init__(self, cls: type[Any], values: Mapping[str, Any]) -> None:
        self.fields, self.values = dataclasses.fields(cls), values
        self._texts, self._types = field_texts(cls), get_type_hints(cls, include_extras=True)

    def required(self) -> list[str]:
        """The flags that must be given, each with a word for its value."""
        names = [field.name for field in self.fields if self.values[field.name] is tyro.MISSING]
        return [f"{self.flag(name)} {name.upper()}" for name in names]

    def flag(self, name: str) -> str:
        """Return the flag as users type it."""
        return f"--{self._about(name, 'name') or name}"

    def shown(self, name: str) -> str:
        """Return the flag and what follows it."""
        kind = self._kind(name)
        if kind is bool:
            return self.flag(name) if self.values[name] is False else f"--{name}, --no_{name}"
        return f"{self.flag(name)} {self._about(name, 'metavar') or _metavar(kind)}"

    def text(self, name: str) -> str:
        """Return the description of the setting, and its default."""
        default = self._default(name)
        return " ".join(part for part in (self._texts.get(name, ""), default) if part)

    def _default(self, name: str) -> str:
        value, hint = self.values[name], self._about(name, "help_behavior_hint")
        if value is tyro.MISSING:
            return "(required)"
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if callable(hint):
            return str(hint(text))
        return "" if value is None or value is False or text == "" else f"(default: {text})"

    def _about(self, name: str, what: str) -> Any:
        """Return an attribute of a field's `tyro.conf.arg`."""
        said = (getattr(each, what, None) for each in getattr(self._types[name], "__metadata__", ()))
        return next((each for each in said if each is not None), None)

    def _kind(self, name: str) -> Any:
        kind = self._types[name]
        return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _metavar(kind: Any) -> str:
    """Return the words for a type, without mentioning that a setting may be None."""
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join(_metavar(one) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    return _NAMES.get(kind, "VALUE")


# Layout


def _usage(settings: SettingsHelp, prog: str, width: int) -> str:
    words = " ".join(["usage:", prog, *settings.required(), "[settings]"])
    return "\n".join(_wrapped(words, width, "", "    "))


def _paragraphs(cls: type[Any]) -> list[str]:
    """Return the paragraphs of the docstring after its first line."""
    return [" ".join(text.split()) for text in inspect.cleandoc(cls.__doc__ or "").split("\n\n")[1:]]


def _entries(settings: SettingsHelp, fields: Sequence[dataclasses.Field[Any]], width: int) -> list[str]:
    return [line for field in fields for line in _entry(settings.shown(field.name), settings.text(field.name), width)]


def _entry(flag: str, text: str, width: int) -> list[str]:
    """Return the text beside the flag, in a column if that takes at most two lines."""
    beside = _wrapped(text, width, f"  {flag}  ".ljust(_COLUMN), " " * _COLUMN)
    if len(beside) <= 2 and all(len(line) <= width for line in beside):
        return beside
    if len(flag) + 2 > width:  # a flag with many choices
        flag = flag.replace(",", ", ")
    return _wrapped(f"{flag}  {text}", width, "  ", " " * 6)


def _contents(settings: SettingsHelp, groups: Sequence[Group], width: int) -> list[str]:
    """Return a line for each group: its title, and as many of its settings as there is room for."""
    longest = max(len(group.title) for group in groups)
    lines = []
    for group in groups:
        names = [settings.flag(field.name).removeprefix("--") for field in group.fields]
        lines.append(f"  {group.title.ljust(longest)}  {_listed(names, width - longest - 4)}")
    return lines


def _listed(names: Sequence[str], room: int) -> str:
    """Return all names or, if they are too long, the first of them and how many more there are."""
    text, count = ", ".join(names), len(names)
    while len(text) > room and count > 1:
        count -= 1
        text = f"{', '.join(names[:count])}, and {len(names) - count} more"
    return text


def _filled(text: str, width: int) -> str:
    return "\n".join(_wrapped(text, width, "", ""))


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    wrapper = TextWrapper(width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [first.rstrip()]
