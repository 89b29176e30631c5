"""The help of a dataclass of settings: what matters first, groups, every setting once, lines that are not too long."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe
from loca_vision.recipes.editing.evaluation.settings import EditEvaluation
from loca_vision.recipes.editing.presets import EDIT_PRESETS
from loca_vision.recipes.editing.recipe import EditRecipe
from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.settings.fields import field_texts, groups_of
from loca_vision.recipes.settings.plugins import Imports

tyro = pytest.importorskip("tyro")


@dataclass(frozen=True)
class Data:
    """What to read.

    More about it.
    """

    root: Path
    """Where it lies,
    on two lines."""
    parts: tuple[Literal["train", "test"], ...] = ("train",)
    """Which."""


@dataclass(frozen=True)
class Steps:
    """How long."""

    steps: int = 100
    """How many."""
    rate: Annotated[float | None, tyro.conf.arg(help_behavior_hint=lambda text: f"(default: {text} of loca)")] = None
    resume: bool = False
    """Go on."""
    check: bool = True
    """Look first."""


@dataclass(frozen=True)
class Run(Steps, Data):
    """Train something.

    None stands for nothing.
    """

    FIRST: ClassVar[tuple[str, ...]] = ("root", "steps")

    steps: int = 7
    imports: Imports = ()
    """A module."""
    preset: str | None = None
    config: Path | None = None
    """A file."""


def shown(capsys: pytest.CaptureFixture[str], cls: type, *words: str, presets: object = None) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(cls, words, prog="train", presets=presets or {})
    assert stop.value.code == 0
    return capsys.readouterr().out


SHORT = """usage: train --root ROOT [settings]

Train something.

What matters first:
  --root PATH             Where it lies, on two lines. (required)
  --steps INT             How many. (default: 7)

All settings:
  What to read    root, parts
  How long        steps, rate, resume, check
  Other settings  import, preset, config

train --help-all shows every setting.
"""
LONG = """usage: train --root ROOT [settings]

Train something.

None stands for nothing.

What to read:
  --root PATH             Where it lies, on two lines. (required)
  --parts {train,test} ...  Which. (default: train)

How long:
  --steps INT             How many. (default: 7)
  --rate FLOAT            (default: None of loca)
  --resume                Go on.
  --check, --no_check     Look first. (default: True)

Other settings:
  --import MODULE         A module.
  --preset TEXT
  --config PATH           A file.
"""


def test_the_short_and_the_long_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert shown(capsys, Run, "--help") == shown(capsys, Run, "--steps", "many", "-h") == SHORT
    assert shown(capsys, Run, "--help-all") == shown(capsys, Run, "--help_all", "--help") == LONG


def test_defaults_are_those_of_the_preset_and_of_the_file(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("root: photos\nresume: true\n")
    words = ("--preset", "short", "--config", str(tmp_path / "run.yaml"), "--help-all")
    said = shown(capsys, Run, *words, presets={"short": {"steps": 3}})
    assert "How many. (default: 3)" in said and "(default: photos)" in said and "--resume, --no_resume" in said
    assert said.startswith("usage: train [settings]\n")


def test_what_the_class_says_of_its_help_is_no_setting(tmp_path):
    (tmp_path / "run.yaml").write_text("FIRST: [root]\n")
    with pytest.raises(ValueError, match="'FIRST' is not a setting"):
        parse(Run, ["--root", "photos", "--config", str(tmp_path / "run.yaml")], prog="train", presets={})


def test_groups_are_the_classes_that_declare_a_field_first():
    found = {group.title: [field.name for field in group.fields] for group in groups_of(Run)}
    own = ["imports", "preset", "config"]
    assert found == {"What to read": ["root", "parts"], "How long": ["steps", "rate", "resume", "check"], "Other settings": own}
    assert [group.title for group in groups_of(Data)] == ["Settings"]
    assert {field.default for group in groups_of(Run) for field in group.fields if field.name == "steps"} == {7}


def test_texts_of_fields_come_from_all_classes():
    assert field_texts(Run) == {
        "root": "Where it lies, on two lines.",
        "parts": "Which.",
        "steps": "How many.",
        "resume": "Go on.",
        "check": "Look first.",
        "imports": "A module.",
        "config": "A file.",
    }
    assert field_texts(dataclasses.make_dataclass("Made", ["a"])) == {}  # its source is nowhere


RECIPES = {"classification": (Recipe, PRESETS), "editing": (EditRecipe, EDIT_PRESETS), "evaluation": (EditEvaluation, {})}


def entries(said: str) -> dict[str, list[str]]:
    """By flag, the lines of its entry; a flag that is there twice fails."""
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        if flag := re.match(r"  --(\w+)", line):
            assert flag[1] not in found
            found[flag[1]] = last = []
        elif not line.startswith("      "):
            last = []
        last.append(line)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_is_there_once_on_lines_that_fit(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    cls, presets = RECIPES[name]
    said = shown(capsys, cls, "--help-all", presets=presets)
    assert all(len(line) <= 100 for line in said.splitlines())
    found, texts = entries(said), field_texts(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    assert list(found) == ["import" if name == "imports" else name for name in names] and texts.keys() == set(names)
    for name, lines in zip(names, found.values(), strict=True):
        assert texts[name].replace(" ", "") in "".join("".join(lines).split())
        assert len(lines) <= 2 or name == "method", lines  # which names every method


@pytest.mark.parametrize("name", RECIPES)
def test_what_matters_first(name, capsys):
    cls, presets = RECIPES[name]
    said, first = shown(capsys, cls, "--help", presets=presets), getattr(cls, "FIRST", None)
    assert list(entries(said)) == list(first or entries(shown(capsys, cls, "--help-all", presets=presets)))
    assert all(group.title in said for group in groups_of(cls)) and ("train --help-all shows every setting" in said) == bool(
        first
    )


def test_the_ten_of_a_classifier_and_their_methods(capsys):
    said = " ".join(shown(capsys, Recipe, "--help", presets=PRESETS).split())
    assert len(Recipe.FIRST) == 10
    assert "Coefficients of each projection. (default: 3000 of loca, sdctft, fourierft, waveft, shira)" in said


@pytest.mark.parametrize("columns", ["1", "20", "60", "300"])
def test_terminals_of_any_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert "".join(shown(capsys, Run, "--help-all").split()) == "".join(LONG.split())
    assert "--root PATH" in " ".join(shown(capsys, Run, "--help").split())
