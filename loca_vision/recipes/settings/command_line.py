"""Settings of a script: one frozen dataclass as documentation, command line, presets and YAML file.

Its fields are int, float, bool, str, Path, Literal, `tuple[X, ...]` of these, or `X | None`; the text under each is its help.
The field `config: Path | None = None` is required, and `preset: str | None = None` if there are presets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from loca_vision.messages import nearest
from loca_vision.recipes.settings.console import usage_in_one_line
from loca_vision.recipes.settings.help import asks_for_help, help_text
from loca_vision.recipes.settings.plugins import import_modules
from loca_vision.recipes.settings.yaml_file import read_settings, write_settings


class Settings(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


S = TypeVar("S", bound=Settings)
_FIELDS = {"import": "imports"}  # for a flag whose name no field can have


@dataclass(frozen=True)
class Parsed(Generic[S]):
    """Settings, and the names of the fields that the user has set, by a flag or in a file."""

    settings: S
    given: frozenset[str]


def parse(
    cls: type[S],
    arguments: Sequence[str],
    *,
    prog: str,
    presets: Mapping[str, Mapping[str, Any]],
    importing: bool = True,
) -> Parsed[S]:
    """Parse a command line: flags override the file of `--config`, which overrides `--preset`, which overrides the defaults.

    The file may name the preset. `config` is None in the result, since the other fields contain what the file says.

    Args:
        importing: import the modules of `--import`, and those in the file. Pass False for a file that is not the user's own.

    Raises:
        ValueError: a flag, value, key or preset is wrong; the error is one sentence with the place, the rule and the nearest
            names.
        FileNotFoundError: there is no such file.
        SystemExit: with 0, after `--help` or `--help-all`.
    """
    import tyro

    flags = dict(_flags(cls, arguments))
    values = _defaults(cls, tyro.MISSING)
    path = flags.get("config") or "None"
    file = {} if path == "None" else read_settings(cls, Path(path))
    if importing:
        import_modules((*file.get("imports", ()), *_following(arguments, "--import")))
    preset = flags.get("preset") or file.get("preset", values.get("preset"))
    if preset not in (None, "None"):
        values |= _preset(cls, preset, presets)
    if asks_for_help(arguments):
        print(help_text(cls, values | file, arguments, prog=prog))
        raise SystemExit(0)
    given = {name for name, value in file.items() if not _same(value, values[name])} | flags.keys()
    with usage_in_one_line(prog):
        settings = tyro.cli(cls, prog=prog, args=list(arguments), default=_draft(cls, values | file), use_underscores=True)
    return Parsed(dataclasses.replace(settings, config=None), frozenset(given))


def as_json_dict(settings: Settings) -> dict[str, Any]:
    """Return every field as JSON has it: paths as texts, tuples as lists."""
    return {field.name: _as_json(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def as_yaml(settings: Settings) -> str:
    """Return every field except `config` as the text of a file from which `--config` makes equal settings."""
    return write_settings({name: value for name, value in as_json_dict(settings).items() if name != "config"})


def _as_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flags(cls: type[Settings], arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the fields that a command line names, as tyro reads it, with the word that follows; of duplicates, the last."""
    names = {field.name for field in dataclasses.fields(cls)}
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = _FIELDS.get(flag, flag.replace("-", "_"))
            name = name if name in names else name.removeprefix("no_")
            if name in names:
                yield name, value if equals else following


def _following(arguments: Sequence[str], flag: str) -> Iterator[str]:
    """Yield every value of a flag that may be repeated."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word.startswith(f"{flag}="):
            yield word.removeprefix(f"{flag}=")
        elif word == flag and following is not None:
            yield following


def _defaults(cls: type[Settings], missing: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        values[field.name] = missing if made is dataclasses.MISSING else made
    return values


def _preset(cls: type[Settings], name: str, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"preset={name!r}: {_known(presets)}{nearest(name, presets)}")
    unknown = presets[name].keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"preset={name!r}: it sets {min(unknown)!r}, which {cls.__name__} does not have")
    return dict(presets[name])


def _known(presets: Mapping[str, Any]) -> str:
    return f"the presets are {', '.join(sorted(presets))}" if presets else "there are no presets"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _draft(cls: type[S], values: Mapping[str, Any]) -> S:
    """Return what tyro takes defaults from, made without the class's checks because required fields are missing here."""
    draft = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(draft, name, value)
    return draft
