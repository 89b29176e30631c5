"""Every code block of the README and of the documentation runs.

The Python blocks of a page run one after the other in one namespace, over tiny models. The shell lines of all pages run
once each, in the order of the pages, with settings that make them short.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from loca_vision.commands.main import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INDEX = (DOCS / "index.md").read_text()
TREES = re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.DOTALL)
LISTED = [line for tree in TREES for line in tree.splitlines() if not line.startswith(":")]
PAGES = [ROOT / "README.md", DOCS / "index.md", *(DOCS / f"{name}.md" for name in LISTED)]
LANGUAGES = {"python", "bash", "text", "json", "math"}
DIRECTIVES = {"{toctree}", "{include}", "{literalinclude}", "{eval-rst}", "{command-help}", "{settings-table}"}


def blocks_of(page):
    """(language or directive, text) of each fenced block."""
    return re.findall(r"^```([^\s`]*)[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def python_of(page):
    return [block for language, block in blocks_of(page) if language == "python"]


README, ADAPTER = PAGES[0], "pets/pytorch_loca_weights.safetensors"
LINES = {page: [line for language, b in blocks_of(page) if language == "bash" for line in b.splitlines()] for page in PAGES}
COMMANDS = list(dict.fromkeys(line for lines in LINES.values() for line in lines))
INSTALLS = [line for line in COMMANDS if line.startswith("python -m pip install")]

EDITED = "--pretrained_model_name_or_path edit-base --resolution 16"
STUDY = "--photographs photos --methods loca --resolution 16 --channels 8 --base_steps 1 --autoencoder_steps 1 --steps 1 "
STUDY += "--n_components 8 --batch_size 2 --crops 1 --num_inference_steps 1"
CLASSIFIER = "--model test_vit --weights none --image_size 32 --epochs 1 --batch_size 2"
EDIT = f"{EDITED} --n_components 10 --max_train_steps 2 --train_batch_size 1"
IMAGE = "--pretrained_model_name_or_path image-base --resolution 16 --n_components 10 --max_train_steps 2 --train_batch_size 1"
IMAGE += " --num_validation_images 1 --validation_inference_steps 1"
EDITS = f"{EDITED} --clip_model None --no_lpips --num_inference_steps 1"
SUBJECTS = "--methods lora --resolution 16 --channels 8 16 --drawings 64 --base_steps 1 --autoencoder_steps 1 --steps 1 "
SUBJECTS += "--jobs 1 --rate_factors 1 --ranks 1 --class_images 1 --likeness_steps 1 --pictures 1 --batch_size 2 "
SUBJECTS += "--num_inference_steps 1"
SHORT_COMMANDS = {
    "demo": "--model test_vit --weights none --image-size 32 --steps 2 --batch-size 2 --max-test-images 32",
    "train-classifier": CLASSIFIER,
    "train-edit": EDIT,
    "train-image": IMAGE,
    "evaluate-edit": EDITS,
}
SHORT_SCRIPTS = {
    "toy_regression.py": "--seeds 1 --steps 20",
    "scales.py": "--base_steps 2 --steps 2 --n_components 20 --batch_size 4",
    "your_own_update.py": "",
    "paper/theorems.py": "--sizes 24 --ranks 2 --trials 2",
    "paper/critical_correlation.py": "--size 36 --ranks 2 --rho_step 0.25 --trials 2 --null_trials 20",
    "paper/update_statistics.py": "--rank 1 --epsilon 0.5 --distributions 1 --gaussians 1",
    "paper/implementations.py": "--sizes 24 --components 9 --rounds 1",
    "hf_trainer.py": "--images 32 --epochs 2 --n_components 20",
    "benchmarks/tables.py": "",
    "benchmarks/step_memory.py": "--dry_run --bases klein --n_components 20",
    "benchmarks/gpu.py": "--dry_run --threads 1 --parts costs",
    "hardening/mutate_files.py": "--count 5",
    "hardening/kill_saves.py": "--kills 1 --longest 0.01",
    "benchmarks/training_step.py": "--model test_vit --batch_size 2 --n_components 50 --rank 4 --rounds 1 --threads 1",
    "image_classification/train.py": CLASSIFIER,
    "dreambooth/study.py": SUBJECTS,
    "instruct_pix2pix/build_pairs.py": "--size 16 --crops 1",
    "instruct_pix2pix/train.py": EDIT,
    "instruct_pix2pix/evaluate.py": EDITS,
    "instruct_pix2pix/study.py": STUDY,
    "text_to_image/train.py": f"{IMAGE} --num_class_images 2",
}


def test_every_page_is_in_the_index():
    assert {f"{page.relative_to(DOCS).with_suffix('')}" for page in DOCS.rglob("*.md")} == {"index", *LISTED}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_there_are_no_blocks_but_those_that_run_or_show(page):
    assert {language for language, _ in blocks_of(page)} <= LANGUAGES | DIRECTIVES


def test_pictures_are_small():
    for picture in DOCS.rglob("*.png"):
        assert picture.stat().st_size <= 300_000, picture


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.stem)
def test_python_blocks(page, page_folder, page_names):
    before = (page_folder / ADAPTER).read_bytes()
    for block in python_of(page):
        exec(compile(block, str(page.relative_to(ROOT)), "exec"), page_names)
    if page == README:
        assert (page_folder / ADAPTER).read_bytes() != before
        assert page_names["picture"].size == (16, 16)


def test_the_two_commands_are_those_that_ci_runs():
    assert [line.split(" && ")[1] for line in LINES[README] if " && " in line] == ["loca-vision demo", "python -m pytest"]
    assert "grep -E '^python -m pip install" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", INSTALLS)
def test_installed_extras_exist(line):
    named = re.search(r'"\.\[(.+?)\]"', line)[1].split(",")
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(named) <= set(extras)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shell_lines(command_folder, monkeypatch):
    """In this process, which has the libraries loaded already; `accelerate launch` is tested with the trainers."""

    def here(command, **settings):
        """What the demo and study.py start in a process of their own."""
        target, *arguments = command[2:] if command[1] == "-m" else command[1:]
        with redirect_stdout(StringIO()) as printed:
            status = run(monkeypatch, target, arguments)
        return subprocess.CompletedProcess(command, status, stdout=printed.getvalue(), stderr="")

    monkeypatch.setattr(subprocess, "run", here)
    for line in COMMANDS:
        words = shlex.split(line.removeprefix("accelerate launch ").removeprefix("python "))
        if words[0] == "loca-vision":
            if "--model" in words:
                del words[words.index("--model") : words.index("--model") + 2]
            forget_processes()
            few = ["--location_batches", "1"] if "--location_init" in words else []  # of the few steps that there are
            assert main([*words[1:], *SHORT_COMMANDS.get(words[1], "").split(), *few]) == 0, line
        elif words[0] == "-m" and line not in INSTALLS:
            name = words[1].removeprefix("loca_vision.commands.").replace("_", "-")
            assert run(monkeypatch, words[1], [*words[2:], *SHORT_COMMANDS[name].split()]) == 0, line
        elif line not in INSTALLS:
            short = SHORT_SCRIPTS[words[0].removeprefix("examples/")].split()
            assert run(monkeypatch, ROOT / words[0], [*words[1:], *short]) == 0, line
    assert (command_folder / "scales" / "scales.png").stat().st_size > 0


def forget_processes():
    """Accelerate keeps its state in the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(monkeypatch, script, arguments):
    """The exit status of a script, or of a module by its name."""
    forget_processes()
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    try:
        (runpy.run_path if str(script).endswith(".py") else runpy.run_module)(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0
