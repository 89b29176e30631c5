"""Copies of this process, in which everything is imported already: a new process takes seconds for its imports."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def fork(function: Callable[[], int], log: Path) -> int:
    """Run a function in a copy of this process, and write what it prints to the log; returns the process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a runner of tests that has threads
        child = os.fork()
    if child:
        return child
    status = 70
    try:
        with log.open("a", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            try:
                status = function()
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def joined(child: int) -> int:
    """The exit status of a fork, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
