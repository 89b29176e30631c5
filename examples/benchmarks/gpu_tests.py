"""Run the tests marked `device` on the GPU, in a separate process that is killed when its time is up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from gpu_session import ERROR, LEFT_OUT, Found, Session
from workloads import device_here

ROOT = Path(__file__).resolve().parents[2]
# Print a line for each test, so that those before a kill are known. Other packages warn of pytest's workers and deprecations.
OPTIONS = ("-p", "no:benchmark", "-W", "ignore::DeprecationWarning", "-vv", "--tb=short", "--continue-on-collection-errors")
CLOSING, ERRORS = 25, 80  # lines
USAGE, NONE_FOUND = 4, 5  # exit statuses of pytest: the mark is unknown, among others, and no test has it
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b (tests/\S+)|(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")


def part(session: Session, found: Found, seconds: float) -> None:
    """Record test outcomes and the names of failed tests, including those that ended before a kill."""
    command = [sys.executable, "-m", "pytest", "-m", "device", "-n", "8", *OPTIONS]
    if session.dry:
        command[6:] = ["0", *OPTIONS, "tests/test_structure.py"]
    status, output = limited(command, min(seconds, session.budget.left))
    outcomes = outcomes_in(output)
    found |= {
        "command": " ".join(["python", *command[1:]]),
        "status": status,
        "outcomes": dict(Counter(outcomes.values())),
        "failed": sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")),
        "errors": [line for line in output.splitlines() if line.startswith("E  ")][:ERRORS],
        "closing lines": output.splitlines()[-CLOSING:],
    }
    if status == NONE_FOUND or (status == USAGE and "Unknown marker" in output):
        found[LEFT_OUT] = "no test is marked device"
    elif status is None:
        found[ERROR] = f"killed after {seconds:.0f} s"
    elif status:
        found[ERROR] = f"pytest ended with status {status}; {len(found['failed'])} tests failed"


def limited(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a command and return its exit status, or None if it was killed at the limit, and its output."""
    environment = os.environ | {"LOCA_TEST_DEVICE": device_here().type, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # including its workers
                process.wait()
        output.seek(0)
        return status, output.read()


def outcomes_in(output: str) -> dict[str, str]:
    """Return the outcome of each test from the output of `pytest -vv`, with or without workers."""
    pairs = ((match[2] or match[3], match[1] or match[4]) for match in _OUTCOME.finditer(output))
    return {name: outcome for name, outcome in pairs if name and outcome}
