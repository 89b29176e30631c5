"""The scripts that damage files and kill processes, with few of each."""

from __future__ import annotations

import sys

import pytest

import kill_saves
import mutate_files


def test_killed_saves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kill_saves.py", "--kills", "2", "--longest", "0.05"])
    assert kill_saves.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.endswith("neither 0") for line in lines)


def test_damaged_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mutate_files.py", "--count", "20", "--seed", "1000"])
    assert mutate_files.main() == 0
    assert capsys.readouterr().out.startswith("20 damaged files: ")


def test_a_loader_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def careless(model: object, file: object) -> None:
        raise KeyError("shapes")

    monkeypatch.setattr(mutate_files, "load_adapter", careless)
    monkeypatch.setattr(sys, "argv", ["mutate_files.py", "--count", "3"])
    assert mutate_files.main() == 1
    assert "Mutation(0): KeyError" in capsys.readouterr().err
