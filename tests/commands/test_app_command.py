"""`loca-vision app`: a mistake is one line and status 2, before anything is served."""

import importlib.util

import pytest

from loca_vision.commands.app import command
from loca_vision.commands.main import main


def told(capsys, *arguments):
    assert main(["app", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("loca-vision: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected an adapter, as in: loca-vision app loca-demo"),
        (("a", "b"), "expected one adapter, got 2; several go with --pipeline"),
        (("a", "--port", "0"), "port=0: expected a whole number from 1 to 65535"),
        (("a", "--port", "65536"), "port=65536"),
        (("a", "--pipeline", "b", "--model", "c"), "--model: it is for classifiers"),
        (("a", "--no-such"), "Unrecognized options: --no-such"),
    ],
)
def test_wrong_settings(capsys, arguments, said):
    assert said in told(capsys, *arguments)


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"), [("gradio", ("a",), "app"), ("diffusers", ("a", "--pipeline", "b"), "diffusers")]
)
def test_a_missing_extra_is_named(capsys, monkeypatch, missing, arguments, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert f"{missing} is missing: python -m pip install 'loca-vision[{extra}]'" in told(capsys, *arguments)


def test_names_of_adapters(tmp_path):
    given = ("a/ink", "b/ink", "warm.safetensors", "a/cartoon/pytorch_loca_weights.safetensors", "user/my adapter")
    assert command.names_of(given) == dict(zip(("ink", "ink-2", "warm", "cartoon", "my_adapter"), given, strict=True))
    assert list(command.names_of((".",))) == [command.names_of([str(tmp_path.cwd())]).popitem()[0]]
