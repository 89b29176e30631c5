"""One line and an exit status for a user's mistake, a traceback for a fault of the program."""

import subprocess
import sys
from pathlib import Path

import pytest

from loca_vision.recipes.settings.console import guarded, usage_in_one_line

ROOT = Path(__file__).parents[3]
INSTALL = "python -m pip install 'loca-vision[train]'"


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("a=3: it\n  is odd"), 2, "train: a=3: it is odd\n"),
        (TypeError("no text"), 2, "train: no text\n"),
        (FileNotFoundError("x: there is no such file"), 2, "train: x: there is no such file\n"),
        (ModuleNotFoundError("No module", name="yaml"), 2, f"train: yaml is missing: {INSTALL}\n"),
        (ModuleNotFoundError("yaml is gone"), 2, f"train: yaml is gone is missing: {INSTALL}\n"),
        (ModuleNotFoundError("a: python -m pip install b", name="a"), 2, "train: a: python -m pip install b\n"),
        (KeyboardInterrupt(), 130, "\ntrain: interrupted; every file that is there is whole\n"),
        (SystemExit(), 0, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("stopped"), 2, "train: stopped\n"),
        (ValueError("Caught it.\nOriginal Traceback:\n  ...\nValueError: the end"), 2, "train: ValueError: the end\n"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_a_user_can_cause(error, status, said, capsys):
    assert guarded("train", raising(error), extra="train") == status
    assert capsys.readouterr() == ("", said)


def test_success_and_faults_of_the_program():
    assert guarded("train", lambda: "anything", extra="train") == 0
    with pytest.raises(KeyError):
        guarded("train", raising(KeyError("a")), extra="train")


def test_the_reader_of_the_output_goes_away():
    code = "from loca_vision.recipes.settings.console import guarded\n"
    code += "def write():\n    while True:\n        print('x' * 1000, flush=True)\n"
    code += "raise SystemExit(guarded('train', write, extra='train'))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1
    process.stderr.close()


def test_the_sentence_in_the_box():
    box = "╭─ Title ───╮\n│ it is     │\n│ wrong     │\n│ ───────── │\n│ see --help │\n╰───────────╯\n"
    for text, sentence in ((box, "it is wrong"), ("", "see train --help"), ("+- Title -+\n| wrong |\n+---------+\n", "wrong")):
        with pytest.raises(ValueError, match=f"^{sentence}$"), usage_in_one_line("train"):
            print(text, file=sys.stderr)
            sys.exit(2)
    with pytest.raises(SystemExit), usage_in_one_line("train"):
        sys.exit(0)


UNKNOWN = """╭─ Unrecognized options ─────────────────────────╮
│ Unrecognized options: --step, 3                │
│ ────────────────────────────────────────────── │
│ Perhaps you meant:                             │
│     --steps INT                                │
│         --no option, but what it does          │
│     --half, --no_half                          │
│ ────────────────────────────────────────────── │
│ For full helptext, run train --help            │
╰────────────────────────────────────────────────╯
"""
CHOICE = """+- Invalid choice ---------------------------------+
| invalid choice '{}' for argument '--mode'.       |
| Expected one of ('no', 'bf16',                   |
| 'fp16').                                         |
| ------------------------------------------------ |
| For full helptext, run train --help              |
+--------------------------------------------------+
"""


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        (UNKNOWN, "Unrecognized options: --step, 3; perhaps --steps or --half"),
        (UNKNOWN.replace("│", " "), "Unrecognized options: --step, 3; perhaps --steps or --half"),
        (
            CHOICE.format("fp61"),
            "invalid choice 'fp61' for argument '--mode'. Expected one of ('no', 'bf16', 'fp16'); perhaps fp16",
        ),
        (CHOICE.format("qqq"), "invalid choice 'qqq' for argument '--mode'. Expected one of ('no', 'bf16', 'fp16')."),
    ],
)
def test_what_looks_like_a_misspelt_word_is_named(box, sentence):
    with pytest.raises(ValueError) as caught, usage_in_one_line("train"):
        print(box, file=sys.stderr)
        sys.exit(2)
    assert str(caught.value) == sentence
