"""Training steps on a GPU: seconds of every contender in turns, peak memory and launches, by workload."""

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

SECONDS_OF_ROUNDS = 20.0  # at most, per workload
BASE, CONTENDER = 12.0, 4.0  # first estimates of the seconds to make the base and one contender
TO_COMPILE = {"vit": 45.0, "unet": 120.0}
FEW = 3  # contenders in a dry run, after the first workload


def part(session: Session, found: Found, names: Sequence[str]) -> None:
    """Time eager steps of the named jobs; LoCA's loss is checked once for each model, before anything is timed."""
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
    """Time steps of compiled models."""
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
    """Make each contender while time is left, then let all of them take turns; `found` gets a row for each."""
    rows: Found = found.setdefault("methods", {})
    found["settings"] = {"workload": one.workload, "batch_size": one.batch_size, "autocast": one.autocast, "rank": one.rank}
    steps = _made(session, rows, workload(one), made, seconds)
    found["steps a turn"] = count = steps_of_a_turn(min((rows[name]["warm"] for name in steps), default=1.0))
    end = session.budget.left - (2.0 if session.dry else SECONDS_OF_ROUNDS)
    rounds = in_rounds(steps, session.rounds, count, _going(session, end), lambda name, turn: session.guarded(rows[name], turn))
    for name, own in rounds.items():
        rows[name] |= own


def _made(session: Session, rows: Found, work: Workload, made: Mapping[str, Made], seconds: float) -> dict[str, Step]:
    """Make the contenders that there is time for, the floor first; `seconds` is the expected time for one."""
    base, steps = _allocated(work), dict[str, Step]()
    for name, make in made.items():

        def first(row: Found, name: str = name, make: Made = make) -> None:
            steps[name] = _first(session, make, work, base, row)

        started = time.monotonic()
        begun = session.attempt(rows, name, seconds, first)
        taken = time.monotonic() - started
        if begun:  # after the floor, the cost of adapters is not known yet
            seconds = 2 * taken if name == FLOOR else max(seconds, 1.2 * taken)
        session.write()
    return steps


def _going(session: Session, end: float) -> Callable[[], bool]:
    return lambda: session.budget.left > max(end, 0.0)


def _first(session: Session, make: Made, work: Workload, base: int, row: Found) -> Step:
    """Make and warm up a contender, and record everything about its step except its timed rounds in `row`."""
    others = _allocated(work) - base  # held by earlier contenders
    on_gpu = device_here().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = make(work)
    row["first step"] = seconds_of(step)
    if on_gpu:  # a first step builds things differently from later ones
        row["peak MB of the first step"] = (torch.cuda.max_memory_allocated() - others) / 1e6
    row["warm"] = seconds_of(step)
    row["trained"] = sum(tensor.numel() for tensor in step.trained)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row["peak MB"] = (torch.cuda.max_memory_allocated() - others) / 1e6
    if on_gpu or work.head:  # counting a UNet's operators on a CPU is slow and meaningless
        launched: Found = row.setdefault("launches", {})
        session.guarded(launched, lambda: launched.update(launches(step)))
    return step


def _allocated(work: Workload) -> int:
    work.inputs.grad = None
    return torch.cuda.memory_allocated() if device_here().type == "cuda" else 0
