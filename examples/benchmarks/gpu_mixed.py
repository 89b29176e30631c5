"""Time batches on a GPU in which every sample has its own adapter, compared with peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from gpu_session import Found, Session, tidy
from gpu_workloads import MIXED, job
from mixed_batch import Settings, measure

SECONDS = 25.0  # for 64 adapters, their checks, and the calls


def part(session: Session, found: Found, names: Sequence[str]) -> None:
    """Measure those of the named jobs that are part of the mixed-batch benchmark."""
    for name in [known for known in MIXED if known in names][: 1 if session.dry else None]:
        one = asdict(job(name, dry=session.dry))
        settings = Settings(**one | {"batch_size": 2 if session.dry else one["batch_size"]}, rounds=session.rounds)
        session.attempt(found, name, SECONDS, lambda own, settings=settings: own.update(measure(settings)))  # type: ignore[misc]
        tidy()
        session.write()
