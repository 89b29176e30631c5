"""The toy regression runs from the command line and reports what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "toy_regression.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_only_learned_locations_move_and_the_teachers_cells_suffice(tmp_path: Path) -> None:
    finished = run("--seeds", 2, "--steps", 200, "--output", tmp_path)
    assert finished.returncode == 0, finished.stderr
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
    assert "learned locations" in finished.stdout
    assert (tmp_path / "toy_regression.png").read_bytes().startswith(b"\x89PNG")


def test_a_bad_value_is_one_line_and_status_2(tmp_path: Path) -> None:
    finished = run("--seeds", 0, "--output", tmp_path / "new")
    assert finished.returncode == 2
    assert finished.stderr == "seeds=0: it is a whole number from 1 up\n"
    assert not (tmp_path / "new").exists()
