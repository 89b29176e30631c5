"""The rooms of the library: imports go one way, and the light rooms need torch and safetensors only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loca_vision

PACKAGE = Path(loca_vision.__file__).parent

# Each room may import those before it, and nothing after it.
ROOMS = (
    ("version", "checks", "messages", "offload", "storage", "functional"),
    ("methods",),
    ("layers",),
    ("model",),
    ("formats",),
    ("pipeline",),
    ("serving",),
    ("data",),
    ("recipes",),
    ("commands",),
)
FACES = {"dct", "paths", "datasets", "diffusers", "vit"}
LIGHT = {"torch", "safetensors", "loca_vision"}
HEAVY = ("data", "recipes", "commands", *FACES)  # the rooms that need more than torch
LAZY = {"pywt", "huggingface_hub", "transformers"}  # imported by light rooms only where a function needs them


def imported(file):
    """The modules a file imports, at the top or anywhere."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module == "loca_vision" else [node.module])


def room(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_is_in_a_room():
    assert {room(file) for file in PACKAGE.rglob("*.py")} == {"__init__", *FACES}.union(*ROOMS)


def test_imports_go_one_way():
    for height, rooms in enumerate(ROOMS):
        below = {name for lower in ROOMS[: height + 1] for name in lower}
        for name in rooms:
            for file in [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else (PACKAGE / name).rglob("*.py"):
                mine = {m.split(".")[1] for m in imported(file) if m.startswith("loca_vision.")}
                assert mine <= below, f"{file.relative_to(PACKAGE)} imports {mine - below}"


def test_the_core_needs_torch_and_safetensors_only():
    for file in PACKAGE.rglob("*.py"):
        if room(file) not in HEAVY:
            outside = {m.split(".")[0] for m in imported(file)} - LIGHT - LAZY - set(sys.stdlib_module_names)
            assert not outside, f"{file.relative_to(PACKAGE)} imports {outside}"


@pytest.fixture(scope="module")
def loaded():
    """The modules that a fresh process has after `import torch`, and those that `import loca_vision` adds."""
    code = "import sys, torch; there = set(sys.modules); import loca_vision; print(*there); print(*(set(sys.modules) - there))"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return [set(line.split()) for line in lines]


def test_importing_the_library_pulls_nothing_heavy(loaded):
    assert not {name.split(".")[0] for names in loaded for name in names} & {
        "timm",
        "torchvision",
        "diffusers",
        "transformers",
        "accelerate",
        "matplotlib",
        "sklearn",
        "tyro",
        "yaml",
    }


def test_importing_the_library_does_not_import_the_compiler(loaded):
    """Which takes a second, and which `import torch` leaves alone."""
    _, added = loaded
    assert "loca_vision.layers.adapted_attention" in added and "torch._dynamo" not in added
