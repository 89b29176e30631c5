"""Processes that are killed at every moment of their work in turn, however fast the machine is."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from support.forks import fork, joined

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


def die_at_each_moment(work: Callable[[], object]) -> Iterator[int]:
    """Do the work in a child process that is killed before its first call on a file, then in one killed before its second...

    Yields the number of the moment after each death, and ends when a child outlives its work. Call it in a process of its own,
    for a child of a test runner would go on as one.
    """
    moment = 0
    while True:
        child = os.fork()
        if not child:
            _die_at(moment)
            work()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        yield moment
        moment += 1


def _die_at(count: int) -> None:
    def watch(event: str, arguments: object) -> None:
        nonlocal count
        if event in CALLS:
            count -= 1
            if count < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run_script(code: str, *arguments: object) -> str:
    """Run Python code in a copy of this process and return what it prints."""

    def run() -> int:
        sys.argv = ["", *map(str, arguments)]
        exec(code, {"__name__": "__main__"})
        return 0

    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        status = joined(fork(run, log))
        assert status == 0, log.read_text()
        return log.read_text()
