"""A method is one file: nothing else in the library names it, and methods of other packages are found."""

import ast
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import loca_vision
from loca_vision.methods import registry
from loca_vision.methods.by_name import setting_fields, title_of
from loca_vision.methods.registry import KINDS, config_class, method_names

PACKAGE = Path(loca_vision.__file__).parent
NAMES = {"loca", "sdctft", "fourierft", "lora", "selora", "waveft", "shira"}
ALLOWED = {
    "recipes/classification/presets.py": {"loca", "fourierft", "lora"},  # the paper's Table 9
    "recipes/editing/presets.py": {"loca", "fourierft"},  # the paper's Table 11
    "layers/adapted_linear.py": {"loca"},  # a submodule's name, of every method's updates
    "layers/adapted_attention.py": {"loca"},  # likewise
    "layers/model_walk.py": {"loca"},  # likewise
    "commands/convert.py": {"loca", "lora"},  # forms of files, between which it converts
    "commands/convert_report.py": {"loca", "lora"},  # likewise
    "commands/combine.py": {"loca"},  # likewise
    "commands/app/mixture.py": {"loca"},  # likewise
}


def texts(file):
    return {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}


def test_no_other_file_names_a_method():
    found = {file.relative_to(PACKAGE).as_posix(): texts(file) & NAMES for file in PACKAGE.rglob("*.py")}
    found = {name: names for name, names in found.items() if names and not name.startswith("methods/")}
    assert found == ALLOWED


def test_a_file_of_methods_names_its_own_alone():
    for config in (KINDS[name] for name in NAMES):
        file = PACKAGE / "methods" / f"{config.method}.py"
        assert texts(file) & NAMES == {config.method} and config.__module__ == f"loca_vision.methods.{config.method}"


def test_methods_are_named_in_one_order():
    names = ["loca", "sdctft", "fourierft", "lora", "selora", "waveft", "shira"]
    assert list(KINDS)[:7] == names == list(method_names())[:7]
    titles = ["LoCA", "sDCTFT", "FourierFT", "LoRA", "SeLoRA", "WaveFT", "SHiRA", "mine"]
    assert [title_of(name) for name in (*names, "mine")] == titles
    assert list(setting_fields(KINDS["lora"])) == ["r", "alpha", "use_dora"]


MODULE = """
from dataclasses import dataclass
from loca_vision import KINDS, AdapterConfig, kind

@kind
@dataclass(frozen=True)
class Config(AdapterConfig):
    method = "installed"
    targets: tuple[str, ...] = ("q",)
    seed: int = 0
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Entry points of a package that defines a method, of one that is broken, and of one that defines another."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "installed_method.py").write_text(MODULE)
    (tmp_path / "broken_method.py").write_text("1 / 0\n")
    modules = {"installed": "installed_method", "broken": "broken_method", "absent": "installed_method"}
    points = [EntryPoint(name, module, registry.GROUP) for name, module in modules.items()]
    monkeypatch.setattr(
        registry, "entry_points", lambda group, name=None: [p for p in points if p.group == group and name in (None, p.name)]
    )
    yield
    KINDS.pop("installed", None)


def test_an_installed_method_is_imported_when_it_is_named(installed):
    assert method_names()[-3:] == ("installed", "broken", "absent") and "installed" not in KINDS
    assert config_class("installed") is KINDS["installed"]
    for name, sentence in {
        "broken": "method='broken': broken_method, installed for it, fails with ZeroDivisionError: division by zero",
        "absent": "method='absent': installed_method, installed for it, defines no such method",
        "lora2": "method='lora2': it is unknown here; perhaps lora or selora or loca; there are .*--import names the module",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            config_class(name)
