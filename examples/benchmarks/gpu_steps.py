"""Training steps on a GPU: the seconds of every contender in turns, its peak memory and its launches, by workload."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from contenders import FLOOR
from gpu_contenders import Made, compiled, eager
from gpu_launches import launches
from gpu_session import Found, Session, tidy
from gpu_turns import in_rounds, steps_of_a_turn
from gpu_workloads import COMPILED, JOBS, job
from rounds import seconds_of
from steps import Step, check
from workloads import Job, Workload, device_here, workload

SECONDS_OF_ROUNDS = 20.0  # at most, of one workload
BASE, CONTENDER = 12.0, 4.0  # seconds to make the first one, as far as is known before
TO_COMPILE = {"vit": 45.0, "unet": 120.0}
FEW = 3  # contenders in a dry run, after the first workload


def part(session: Session, found: Found, names: Sequence[str]) -> None:
    """Eager steps of the named jobs; of each model LoCA's loss is checked once, before anything is timed."""
    checked: set[str] = set()
    for name in [known for known in JOBS if known in names]:
        one = job(name, dry=session.dry)

        def work(own: Found, one: Job = one) -> None:
            if one.workload not in checked:
                checked.add(one.workload)
                session.attempt(own, "check", BASE, lambda into: into.update(losses=check(replace(one, batch_size=1))))
                tidy()
            made = eager(one)
            if session.dry and len(found) > 1:
                made = dict(list(made.items())[:FEW])
            measured(session, own, one, made, CONTENDER)

        session.attempt(found, name, BASE, work)
        tidy()
        session.write()


def compiled_part(session: Session, found: Found, names: Sequence[str]) -> None:
    """Steps of compiled models."""
    backend = "eager" if session.dry else "inductor"
    for name in [known for known in COMPILED if known in names][: 1 if session.dry else None]:
        one = job(name, dry=session.dry)

        def work(own: Found, one: Job = one) -> None:
            measured(session, own, one, compiled(one, backend=backend), TO_COMPILE[one.workload])

        session.attempt(found, name, BASE, work)
        torch.compiler.reset()
        tidy()
        session.write()


def measured(session: Session, found: Found, one: Job, made: Mapping[str, Made], seconds: float) -> None:
    """Make each contender while there is time for it, then let all of them take turns; `found` gets a row for each."""
    rows: Found = found.setdefault("methods", {})
    found["settings"] = {"workload": one.workload, "batch_size": one.batch_size, "autocast": one.autocast, "rank": one.rank}
    steps = _made(session, rows, workload(one), made, seconds)
    found["steps a turn"] = count = steps_of_a_turn(min((rows[name]["warm"] for name in steps), default=1.0))
    end = session.budget.left - (2.0 if session.dry else SECONDS_OF_ROUNDS)
    rounds = in_rounds(steps, session.rounds, count, _going(session, end), lambda name, turn: session.guarded(rows[name], turn))
    for name, own in rounds.items():
        rows[name] |= own


def _made(session: Session, rows: Found, work: Workload, made: Mapping[str, Made], seconds: float) -> dict[str, Step]:
    """Those contenders for which there is time, the first of them the floor; `seconds` is what one is expected to take."""
    base, steps = _allocated(work), dict[str, Step]()
    for name, make in made.items():

        def first(row: Found, name: str = name, make: Made = make) -> None:
            steps[name] = _first(session, make, work, base, row)

        started = time.monotonic()
        begun = session.attempt(rows, name, seconds, first)
        taken = time.monotonic() - started
        if begun:  # what adapters add to the floor is not known yet
            seconds = 2 * taken if name == FLOOR else max(seconds, 1.2 * taken)
        session.write()
    return steps


def _going(session: Session, end: float) -> Callable[[], bool]:
    return lambda: session.budget.left > max(end, 0.0)


def _first(session: Session, make: Made, work: Workload, base: int, row: Found) -> Step:
    """A contender that has been made and warmed up, and what one of its steps takes besides time."""
    others = _allocated(work) - base  # which the contenders before it hold
    on_gpu = device_here().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = make(work)
    row["first step"] = seconds_of(step)
    if on_gpu:  # what was never asked for before is built otherwise than later
        row["peak MB of the first step"] = (torch.cuda.max_memory_allocated() - others) / 1e6
    row["warm"] = seconds_of(step)
    row["trained"] = sum(tensor.numel() for tensor in step.trained)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row["peak MB"] = (torch.cuda.max_memory_allocated() - others) / 1e6
    if on_gpu or work.head:  # counting the operators of a UNet takes long, and they mean nothing here
        launched: Found = row.setdefault("launches", {})
        session.guarded(launched, lambda: launched.update(launches(step)))
    return step


def _allocated(work: Workload) -> int:
    work.inputs.grad = None
    return torch.cuda.memory_allocated() if device_here().type == "cuda" else 0
