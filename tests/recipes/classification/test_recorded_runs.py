"""Workers of a study."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

from loca_vision.recipes.classification import recorded_runs
from support.forks import fork


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    reader, writer = os.pipe()

    def worker():
        recorded_runs.begin_worker(1)
        os.write(writer, f"{os.getpid()}\n".encode())
        time.sleep(60)

    def study():
        multiprocessing.get_context("fork").Process(target=worker).start()
        time.sleep(60)

    killed = fork(study, tmp_path / "log.txt")
    pid = int(os.read(reader, 20))
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the worker went on")


def _runs(pid):
    """Also of an orphan that is dead and that nobody waits for, this is False."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
