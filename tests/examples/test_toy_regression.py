"""The toy regression runs from the command line and reports what happened."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "toy_regression.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """The exit status of the script."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_only_learned_locations_move_and_the_teachers_cells_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--seeds", 2, "--steps", 200, "--output", tmp_path) == 0
    report = json.loads((tmp_path / "toy_regression.json").read_text())
    runs = {method: [r for r in report["runs"] if r["method"] == method] for method in report["shares"]}
    assert [len(students) for students in runs.values()] == [2, 2, 2]
    assert sum(r["cell_changes"] for r in runs["learned locations"]) > 0
    for student in runs["random cells"] + runs["teacher's cells"]:
        assert student["cell_changes"] == 0
        assert student["first_cells"] == student["last_cells"]
    for learned, fixed in zip(runs["learned locations"], runs["random cells"], strict=True):
        assert learned["first_cells"] == fixed["first_cells"]
    assert report["shares"]["teacher's cells"]["recovered"] == 1
    assert report["settings"]["steps"] == 200
    assert report["settings"]["learning_steps"] == 160
    assert report["torch"]
    assert "learned locations" in capsys.readouterr().out
    assert (tmp_path / "toy_regression.png").read_bytes().startswith(b"\x89PNG")


def test_a_bad_value_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--seeds", 0, "--output", tmp_path / "new") == 2
    assert capsys.readouterr().err == "seeds=0: expected a whole number from 1 up\n"
    assert not (tmp_path / "new").exists()
