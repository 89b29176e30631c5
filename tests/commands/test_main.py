"""The command `loca-vision`: its list of commands, those that train, and their modules."""

import dataclasses
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

import loca_vision
from loca_vision.commands import command_table
from loca_vision.commands.command_table import COMMANDS, GROUPS, Command
from loca_vision.commands.main import main
from support import pipelines as tiny
from support.edit_training import COLUMNS
from support.edit_training import LOCA as EDIT_LOCA
from support.photographs import scene
from support.scripts import DIGITS, LOCA

HERE = Path(loca_vision.__file__).parent / "commands"


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_the_table_and_the_modules_agree():
    assert len(COMMANDS) == sum(map(len, GROUPS.values()))
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"loca_vision.{command.module}")
        if command.settings:
            assert dataclasses.is_dataclass(getattr(module, command.settings)) and callable(getattr(module, command.run)), name
        else:
            assert callable(module.main) and not command.run, name
    started = {file.stem.replace("_", "-") for file in HERE.glob("train_*.py")}
    assert started == {name for name in COMMANDS if name.startswith("train-")}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_of_commands(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert sum(line.startswith(f"  {name} ") and line.endswith(f"  {command.about}") for line in said.splitlines()) == 1
    assert all(f"\n{title}:\n" in said for title in GROUPS) and all(len(line) <= 100 for line in said.splitlines())


def test_the_list_imports_no_command():
    code = "import sys; from loca_vision.commands.main import main; main([]); main(['demoo']); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(said.splitlines()[-1].split())
    assert "loca_vision.commands.main" in loaded
    assert not loaded & {"tyro", "timm", "accelerate", "yaml", *(f"loca_vision.{each.module}" for each in COMMANDS.values())}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: loca-vision {name} ")


@pytest.mark.parametrize(("word", "near"), [("train-clasifier", "train-classifier"), ("train_edit", "train-edit")])
def test_a_misspelt_command(word, near, capsys):
    assert main([word, "--help"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"loca-vision: {word}: there is no such command; perhaps {near}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("name", ["train-classifier", "report", "predict"])
def test_a_missing_package_is_one_line_with_the_extra(name, capsys, monkeypatch):
    gone = f"loca_vision.{COMMANDS[name].module}"
    monkeypatch.setitem(sys.modules, gone, None)
    assert main([name, "--help"]) == 2
    prog = "loca-vision" if COMMANDS[name].settings else f"loca-vision {name}"
    assert capsys.readouterr().err == f"{prog}: {gone} is missing: python -m pip install 'loca-vision[train]'\n"


def test_the_exit_status_is_that_of_the_command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "odd", Command("", "commands.command_table"))
    monkeypatch.setattr(command_table, "main", lambda words, prog: len(words), raising=False)
    assert main(["odd", "a", "b", "c"]) == 3 and main(["odd"]) == 0


def test_a_classifier_from_training_to_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train-classifier", *DIGITS, *LOCA, "--epochs", "1", "--output_dir", "run"]) == 0
    accuracy = 100 * json.loads((tmp_path / "run" / "metrics.json").read_text())["test_accuracy"]
    assert main(["evaluate", "run"]) == 0
    assert f"run: {accuracy:.2f} % of 40 test images" in capsys.readouterr().out
    assert main(["report", "run", "--no_paper"]) == 0
    assert f"| {accuracy:.2f} |" in capsys.readouterr().out
    assert main(["train-classifier", *DIGITS, *LOCA, "--output_dir", "run"]) == 2
    assert capsys.readouterr().err.startswith("loca-vision train-classifier: output_dir='run': a run is in there")


def test_an_edit_from_training_to_the_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ("--pretrained_model_name_or_path", "base", "--resolution", "16")
    tiny.small(tiny.instruct_pix2pix()).save_pretrained("base")
    Path("pairs").mkdir()
    for name in ("before", "after"):
        scene(32).save(f"pairs/{name}.png")
    row = {f"{name}_file_name": f"{name}.png" for name in ("before", "after")} | {"edit_prompt": "make it red"}
    Path("pairs/metadata.jsonl").write_text(json.dumps(row))
    short = ("--train_batch_size", "1", "--max_train_steps", "1", "--lr_warmup_steps", "0", "--report_to", "none")
    assert main(["train-edit", *base, *COLUMNS, *EDIT_LOCA, *short, "--train_data_dir", "pairs", "--output_dir", "run"]) == 0
    quick = ("--num_inference_steps", "1", "--scales", "1", "--no_lpips", "--clip_model", "None", "--output_dir", "edits")
    photographs = ("--photographs", "pairs", "--prompt", "make it red")
    assert main(["evaluate-edit", *base, "--adapter", "run", *photographs, *quick]) == 0
    assert json.loads(Path("edits/evaluation.json").read_text()) and "psnr" in capsys.readouterr().out
    assert main(["train-edit", *base, *COLUMNS, "--train_data_dir", "pairs", "--output_dir", "run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("loca-vision train-edit: output_dir='run': a run is in there")


@pytest.mark.parametrize("name", ["train-classifier", "train-edit"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_modules_run_as_the_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["module", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"loca_vision.commands.{name.replace('-', '_')}", run_name="__main__")
    assert not stop.value.code and capsys.readouterr().out.startswith(f"usage: loca-vision {name} ")
