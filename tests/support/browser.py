"""A headless Chromium for tests of pages, by Playwright, and what its pages ask of other machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
_QUIET += ("disable-component-update", "disable-sync")


def chromium() -> str | None:
    """The path of a Chromium of the system: LOCA_TEST_CHROMIUM, or one on the path; None where there is none."""
    named = os.environ.get("LOCA_TEST_CHROMIUM")
    return named or next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@contextmanager
def browser() -> Iterator[Any]:
    """A browser; the test is skipped where Playwright or a Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    if path is None:
        pytest.skip("there is no chromium on the path; name one with LOCA_TEST_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in _QUIET])
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of `loca-vision app` in a process of its own, with a folder to work in; it is ended afterwards."""
    command = [sys.executable, "-m", "loca_vision.commands.main", "app", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), process.communicate()[1]
        yield line.split()[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def requests_elsewhere(page: Any, address: str) -> list[str]:
    """A list that fills with the addresses that the page asks anything of, apart from the one it came from."""
    found: list[str] = []

    def see(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            found.append(request.url)

    page.on("request", see)
    return found
