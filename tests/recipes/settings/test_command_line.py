"""Settings from defaults, preset, file and flags: precedence, strictness, and writing them back to a file."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from loca_vision.recipes.settings.command_line import as_json_dict, as_yaml, parse
from support.time_limit import within

tyro = pytest.importorskip("tyro")
yaml = pytest.importorskip("yaml")


@dataclass(frozen=True)
class Run:
    """Train something."""

    model: str
    """The name of a model."""
    preset: str | None = None
    """A name of settings."""
    config: Path | None = None
    """A file of settings."""
    steps: int = 100
    """How many."""
    learning_rate: float = 1e-3
    resume: bool = False
    half: bool = True
    output: Path = Path("out")
    root: Path | None = None
    limit: int | None = None
    rate: float | None = None
    prompt: str | None = None
    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ()
    mode: Literal["no", "fp16", "bf16"] = "no"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: a whole number from 1 up")


PRESETS: dict[str, dict[str, Any]] = {
    "vit": {"steps": 7, "sizes": (3,), "mode": "bf16"},
    "vitamin": {"model": "v"},
    "wrong": {"x": 1},
}


def settings(*arguments: str, presets: dict[str, dict[str, Any]] = PRESETS) -> Any:
    return parse(Run, arguments, prog="train", presets=presets)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / "run.yaml")

    return write


def test_flags_win_over_the_file_over_the_preset_over_the_defaults(file: Any) -> None:
    path = file("model: from the file\nsteps: 8\nmode: fp16\n")
    found = settings("--config", path, "--preset", "vit", "--mode", "no")
    wanted = Run(model="from the file", preset="vit", steps=8, sizes=(3,), mode="no")
    assert found.settings == wanted
    assert found.given == {"config", "preset", "model", "steps", "mode"}


def test_a_file_names_the_preset_and_a_flag_wins_over_that_too(file: Any) -> None:
    path = file("preset: vit\nmodel: m\n")
    assert settings(f"--config={path}").settings == Run(model="m", preset="vit", steps=7, sizes=(3,), mode="bf16")
    assert settings("--config", path, "--preset", "vitamin").settings == Run(model="m", preset="vitamin")
    assert settings("--config", path, "--preset", "None").settings == Run(model="m")


def test_what_a_preset_or_a_file_sets_is_not_required_as_a_flag(file: Any) -> None:
    assert settings("--preset", "vitamin").settings.model == "v"
    assert settings("--config", file("model: m")).settings.model == "m"
    with pytest.raises(ValueError, match="Missing from train: --model STR"):
        settings()


@pytest.mark.parametrize(
    "words",
    [
        ["--learning-rate", "0.5"],
        ["--learning_rate", "0.5"],
        ["--learning-rate=0.5"],
        ["--learning_rate", "9", "--learning-rate=0.5"],
    ],
)
def test_underscores_and_hyphens(words: list[str]) -> None:
    found = settings("--model", "m", *words)
    assert found.settings.learning_rate == 0.5 and found.given == {"model", "learning_rate"}


def test_switches_lists_and_none_on_the_command_line() -> None:
    found = settings("--model", "m", "--resume", "--no-half", "--sizes", "4", "5", "--names", "--limit", "None")
    assert found.settings == Run(model="m", resume=True, half=False, sizes=(4, 5))
    assert found.given == {"model", "resume", "half", "sizes", "names", "limit"}
    assert settings("--model=--steps").given == {"model"}


def test_what_a_file_repeats_is_not_given(file: Any) -> None:
    """Else the file that `as_yaml` writes would set everything, and contradict itself."""
    path = file("model: m\npreset: vit\nsteps: 7\nlearning_rate: 0.001\nlimit: null\nhalf: true\nsizes: [3, 4]\n")
    assert settings("--config", path).given == {"config", "model", "preset", "sizes"}
    assert settings("--config", path, "--steps", "7").given == {"config", "model", "preset", "sizes", "steps"}


def test_help_shows_docstrings_and_leaves_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        settings("--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Train something." in printed and "How many. (default: 100)" in printed and "--learning_rate FLOAT" in printed


# What a file says


ACCEPTED = {
    "prompt: yes": ("prompt", "yes"),
    "prompt: No": ("prompt", "No"),
    "prompt: 2024-01-01": ("prompt", "2024-01-01"),
    "prompt: '17'": ("prompt", "17"),
    'prompt: "a\\tb"': ("prompt", "a\tb"),
    "prompt: |\n  two\n  lines\n": ("prompt", "two\nlines\n"),
    "prompt: a b # comment": ("prompt", "a b"),
    "prompt: ''": ("prompt", ""),
    "prompt: ~": ("prompt", None),
    "mode: no": ("mode", "no"),
    "learning_rate: 1e-3": ("learning_rate", 1e-3),
    "learning_rate: 1E+3": ("learning_rate", 1e3),
    "learning_rate: 5": ("learning_rate", 5.0),
    "learning_rate: -.5": ("learning_rate", -0.5),
    "learning_rate: .inf": ("learning_rate", float("inf")),
    "rate: null": ("rate", None),
    "rate: 1": ("rate", 1.0),
    "limit: -3": ("limit", -3),
    "steps: +7": ("steps", 7),
    "resume: True": ("resume", True),
    "half: false": ("half", False),
    "output: /a b/c": ("output", Path("/a b/c")),
    "root: rel": ("root", Path("rel")),
    "sizes: [3, 4]": ("sizes", (3, 4)),
    "sizes: []": ("sizes", ()),
    "names:\n- yes\n- 'no'\n": ("names", ("yes", "no")),
    "{steps: 4}": ("steps", 4),
}


@pytest.mark.parametrize(("text", "wanted"), ACCEPTED.items(), ids=ACCEPTED)
def test_values_that_are_read(text: str, wanted: tuple[str, Any], file: Any) -> None:
    value = getattr(settings("--model", "m", "--config", file(text)).settings, wanted[0])
    assert value == wanted[1] and type(value) is type(wanted[1])


REFUSED = {
    "stepz: 3": "line 1: 'stepz' is not a setting; perhaps steps",
    "model: m\nqqq: 3": "line 2: 'qqq' is not a setting; there are half, ",
    "config: other.yaml": "'config' is not a setting",
    "1: 2": "'1' is not a setting",
    "steps: 3\nhalf: true\nsteps: 4": "line 3: 'steps' comes twice",
    "steps: 3.0": "steps=3.0: expected a whole number",
    "steps: 010": "steps=010: expected a whole number",
    "steps: 1_000": "steps=1_000: expected a whole number",
    "steps: true": "steps=true: expected a whole number",
    "steps: '3'": "steps='3': expected a whole number",
    "steps:": "steps=: expected a whole number",
    "steps: [3]": "steps=a list: expected a whole number",
    "steps: {a: 3}": "steps=a table: expected a whole number",
    "limit: many": "limit=many: expected a whole number or null",
    "learning_rate: fast": "learning_rate=fast: expected a number",
    "learning_rate: 1e999": "learning_rate=1e999: expected a number",
    "learning_rate: true": "expected a number",
    "learning_rate: '1e-3'": "expected a number",
    "learning_rate: " + "1" * 5000: "expected a number",
    "resume: yes": "resume=yes: expected true or false",
    "resume: 1": "resume=1: expected true or false",
    "model: 3": "model=3: expected a text; a text that looks like something else stands in quotes",
    "model: true": "expected a text; a text",
    "model: null": "expected a text; a text",
    "output: 1.5": "expected a path; a text",
    "mode: fp61": "mode=fp61: expected one of no, fp16, bf16; perhaps fp16",
    "mode: false": "expected one of no, fp16, bf16",
    "sizes: 3": "sizes=3: expected a list, each of it a whole number",
    "sizes: [3, x]": "sizes=a list: expected a list, each of it a whole number",
    "sizes: [3, [4]]": "settings are not nested",
    "names: [3]": "each of it a text",
    "preset: vitt": "preset='vitt': the presets are vit, vitamin, wrong; perhaps vit",
    "preset: 3": "expected a text or null",
    "model: !!python/object/apply:os.system [ls]": "tags, here 'tag:yaml.org,2002:python/object/apply:os.system', are not read",
    "model: !!str 3": "tags, here",
    "model: ! x": "tags, here",
    "model: &a x": "anchors and aliases, here 'a', are not read",
    "names: &a [x]\nmodel: *a": "anchors and aliases",
    "<<: {steps: 3}": "'<<' is not a setting",
    "model: m\n---\nmodel: n": "line 2: a second document begins",
    "- model": "it is not a table of settings",
    "model": "it is not a table of settings",
    "? [a]\n: b": "expected the name of a setting as the key",
    "x" * 900 + ": 3": "is not a setting",
    "model: &" + "x" * 900 + " y": "anchors and aliases",
    "model: !" + "x" * 900 + " y": "tags, here",
    "model: [": "it is not YAML",
    "model: 'x": "it is not YAML",
    "model: @x": "line 1: it is not YAML",
    "\tmodel: x": "line 1: it is not YAML",
    "model: \x00": "it is not YAML",
    "%YAML 3.0\n---\nmodel: x": "it is not YAML",
    "[" * 100_000: "settings are not nested",
    "{a: " * 100_000: "settings are not nested",
    "x" * (2**20 + 1): "it has more than 1048576 bytes",
    b"model: \xff": "byte 7 is not UTF-8",
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.items(), ids=lambda text: repr(text)[:30])
def test_what_is_refused_in_one_sentence(text: str | bytes, sentence: str, file: Any) -> None:
    path = file(text)
    with within(10), pytest.raises(ValueError) as caught:
        settings("--model", "m", "--config", path)
    said = str(caught.value)
    assert sentence in said and said.isprintable() and len(said) < 600
    assert said.startswith((path, "preset="))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff", "\ufeffmodel: m"])
def test_files_that_say_nothing(text: str, file: Any) -> None:
    assert settings("--model", "m", "--config", file(text)).settings == Run(model="m")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: there is no such file"):
        settings("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="it is not a regular file"):
        settings("--config", str(tmp_path))
    with pytest.raises(ValueError, match="a path holds no NUL"):
        settings("--config", "a\0b")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stepz", "3"], "Unrecognized options: --stepz, 3; perhaps --steps"),
        (["--steps", "many"], "Error parsing --steps: expected a whole number, got 'many'"),
        (["--steps", "1.5"], "Error parsing --steps: expected a whole number, got '1.5'"),
        (["--limit", "x"], "Error parsing --limit: expected a whole number, got 'x'"),
        (["--learning_rate", "x"], "Error parsing --learning_rate: expected a number, got 'x'"),
        (["--rate", "x"], "Error parsing --rate: expected a number, got 'x'"),
        (["--mode", "fp61"], "('no', 'fp16', 'bf16'); perhaps fp16"),
        (["stray"], "Unrecognized options: stray"),
        (["--config"], "Missing value for argument '--config'"),
        (["--preset", "resnet"], "preset='resnet': the presets are vit, vitamin, wrong"),
        (["--preset", "wrong"], "preset='wrong': it sets 'x', which Run does not have"),
        (["--steps", "0"], "steps=0: a whole number from 1 up"),
    ],
)
def test_bad_command_lines(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings("--model", "m", *words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_preset_of_a_recipe_without_presets() -> None:
    with pytest.raises(ValueError, match="there are no presets"):
        settings("--preset", "vit", presets={})


# The way back


WORDS = [
    "yes",
    "No",
    "null",
    "~",
    "",
    "true",
    "1e-3",
    "0o17",
    "017",
    "1:30",
    ".inf",
    "=",
    "<<",
    "- a",
    "a: b",
    "#",
    "'",
    '"',
    "2024-01-01",
]
WORDS += [
    "\\",
    "%a",
    "a\nb",
    " a ",
    "\x85",
    "\u2028",
    "\x07",
    "\ufeff",
    "\udc80",
    "é",
    "😀",
    "-",
    "---",
    "None",
    "a" * 300 + " b" * 300,
]


def _text(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(WORDS)
    return "".join(draw.choice(string.printable + "äß\u3000\x00\x1b😀") for _ in range(draw.randrange(20)))


def _number(draw: random.Random) -> float:
    return draw.choice(
        [0.0, -0.0, 1e-3, 1e300, 5e-324, float("inf"), 3.0, draw.random(), draw.gauss(0, 1) * 10 ** draw.randrange(-30, 30)]
    )


def _run(draw: random.Random) -> Run:
    return Run(
        model=_text(draw),
        preset=draw.choice([None, "vit", "vitamin"]),
        steps=draw.choice([1, 2**63, draw.randrange(1, 10**9)]),
        learning_rate=_number(draw),
        resume=draw.random() < 0.5,
        half=draw.random() < 0.5,
        output=Path(_text(draw).replace("\0", "")),
        root=draw.choice([None, Path(_text(draw).replace("\0", ""))]),
        limit=draw.choice([None, -draw.randrange(10**20)]),
        rate=draw.choice([None, _number(draw)]),
        prompt=draw.choice([None, _text(draw)]),
        sizes=tuple(draw.randrange(-5, 5) for _ in range(draw.randrange(4))),
        names=tuple(_text(draw) for _ in range(draw.randrange(4))),
        mode=draw.choice(["no", "fp16", "bf16"]),
    )


def test_settings_come_back_from_their_file(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(100):
        run = _run(draw)
        (tmp_path / "run.yaml").write_text(as_yaml(run), encoding="utf-8")
        found = settings("--config", str(tmp_path / "run.yaml")).settings
        assert found == run, as_yaml(run)
        assert all(type(getattr(found, f.name)) is type(getattr(run, f.name)) for f in fields(run))
        assert as_yaml(found) == as_yaml(replace(run, config=Path("x")))


def test_any_yaml_reader_reads_ordinary_settings_alike() -> None:
    text = as_yaml(Run(model="vit_base.16", prompt="yes", names=("1e-3",)))
    read = yaml.safe_load(text)
    assert read["prompt"] == "yes" and read["names"] == ["1e-3"] and read["learning_rate"] == 1e-3
    assert "model: vit_base.16\n" in text and "config" not in read


def test_as_json() -> None:
    run = Run(model="m", root=Path("a/b"), names=("x",), limit=3)
    read = json.loads(json.dumps(as_json_dict(run)))
    assert read == as_json_dict(run)
    assert (
        read["root"] == str(Path("a/b")) and read["names"] == ["x"] and read["config"] is None and len(read) == len(fields(Run))
    )
