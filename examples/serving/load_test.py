"""Load-test the server on this machine and check every answer: 1 and 100 adapters, one and two replicas, one of them killed.

    python examples/serving/load_test.py --output load_test.json

It makes a model with random weights and adapters for it, starts the server, sends requests from a number of clients, and
compares each answer with what the adapter computes alone. Clients retry if a server may not have answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load_clients import Asking, Asks, Outcome
from load_model import Oracle, write_adapters
from loca_vision.checks import check_count
from loca_vision.messages import aligned
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.settings.console import guarded, usage_in_one_line
from loca_vision.storage.atomic_file import write_atomically
from serving_settings import Settings

PROG = "load_test.py"
_PATIENCE = 90.0  # seconds until a killed replica must be replaced


@dataclass(frozen=True)
class LoadTest:
    """Send requests to a server on this machine as fast as it answers, and check its answers."""

    model: str = "vit_tiny_patch16_224"
    """Model from timm; its weights are random."""
    image_size: int = 96
    """Pixels per side."""
    n_components: int = 1000
    """Components per projection."""
    adapters: tuple[int, ...] = (1, 100)
    """Numbers of adapters to request; each number is measured in turn."""
    replicas: tuple[int, ...] = (1, 2)
    """Numbers of replicas; each number is measured in turn, and one replica is killed in its last measurement."""
    clients: int = 16
    """Concurrent requests."""
    seconds: float = 6.0
    """Seconds per measurement."""
    port: int = 8321
    """Port to listen on, on the loopback interface."""
    output: Path | None = None
    """File for the results."""


@dataclass(frozen=True)
class Row:
    """One measurement; latencies are measured by the client and include retries."""

    adapters: int
    replicas: int
    killed: bool
    requests: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    retries: int
    lost: int
    wrong: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load test and return 0 if every request got the right answer."""
    failed: list[Row] = []

    def command() -> None:
        import tyro

        with usage_in_one_line(PROG):
            wanted = tyro.cli(LoadTest, prog=PROG, args=arguments, use_underscores=True)
        failed.extend(row for row in run(wanted) if row.lost or row.wrong)

    return guarded(PROG, command, extra="serve") or (1 if failed else 0)


def run(wanted: LoadTest) -> list[Row]:
    """Run all measurements, print them and write them.

    Raises:
        ValueError: a setting is out of range.
    """
    for name in ("clients", "n_components", "image_size"):
        check_count(name, getattr(wanted, name))
    for count in (*wanted.adapters, *wanted.replicas):
        check_count("adapters and replicas", count)
    with tempfile.TemporaryDirectory(prefix="load-test-") as place:
        folder = Path(place)
        settings = [_settings(wanted, folder, count) for count in wanted.replicas]
        names = write_adapters(folder, settings[0], max(wanted.adapters), wanted.n_components)
        oracle = Oracle(settings[0], names)
        rows = [row for one in settings for row in _measured(wanted, one, oracle)]
    print(_table(rows))
    if wanted.output is not None:
        write_atomically(wanted.output, _record(wanted, rows))
    return rows


def _settings(wanted: LoadTest, folder: Path, replicas: int) -> Settings:
    return Settings(folder, wanted.model, weights="none", image_size=wanted.image_size, port=wanted.port, replicas=replicas)


def _measured(wanted: LoadTest, settings: Settings, oracle: Oracle) -> list[Row]:
    from deployment import check_port, start, stop

    check_port(settings.host, settings.port)
    try:
        start(settings)
        rows = [_row(wanted, settings, oracle, count, killing=False) for count in wanted.adapters]
        return [*rows, _row(wanted, settings, oracle, wanted.adapters[-1], killing=True)]
    finally:
        stop()


def _row(wanted: LoadTest, settings: Settings, oracle: Oracle, adapters: int, *, killing: bool) -> Row:
    asking = Asking(f"http://{settings.host}:{settings.port}", oracle.names[:adapters], oracle.bodies)
    asyncio.run(Asks(asking, seed=1).for_seconds(1.0, wanted.clients))  # connections, caches
    killer = threading.Timer(wanted.seconds / 2, kill_a_replica)
    if killing:
        killer.start()
    started = time.monotonic()
    outcomes = asyncio.run(Asks(asking, seed=2).for_seconds(wanted.seconds, wanted.clients))
    took = time.monotonic() - started
    if killing:
        killer.join()
        _wait_for(settings.replicas)
    return Row(adapters, settings.replicas, killing, **figures(outcomes, took, oracle))


def figures(outcomes: Sequence[Outcome], took: float, oracle: Oracle) -> dict[str, Any]:
    """Return the numbers of a row from the outcomes of requests that took `took` seconds in total."""
    answered = [one for one in outcomes if one.answer is not None]
    times = [one.seconds * 1000 for one in answered]
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return {
        "requests": len(outcomes),
        "per_second": round(len(answered) / took, 1),
        **{f"p{percent}_ms": round(cuts[percent - 1], 1) for percent in (50, 95, 99)},
        "retries": sum(one.retries for one in outcomes),
        "lost": len(outcomes) - len(answered),
        "wrong": sum(not oracle.agrees(one) for one in answered),
    }


def kill_a_replica() -> None:
    """End a replica's process abruptly, as in a crash."""
    import ray

    replicas = [one for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].startswith("SERVE_REPLICA")]
    ray.kill(ray.get_actor(replicas[0]["name"], namespace=replicas[0]["namespace"]))


def _wait_for(replicas: int) -> None:
    """Wait until Serve has replaced the killed replica.

    Raises:
        RuntimeError: Serve did not replace it in time.
    """
    from ray import serve

    from deployment import APPLICATION, DEPLOYMENT

    started = time.monotonic()
    while time.monotonic() - started < _PATIENCE:
        states = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].replica_states
        if states.get("RUNNING", 0) == replicas and sum(states.values()) == replicas:
            return
        time.sleep(0.5)
    raise RuntimeError(f"a killed replica was not back after {_PATIENCE:g} seconds")


def _record(wanted: LoadTest, rows: Sequence[Row]) -> bytes:
    settings = {name: value for name, value in asdict(wanted).items() if name != "output"}
    about = {"machine": environment() | {"cpus": os.cpu_count()}, "settings": settings, "rows": list(map(asdict, rows))}
    return (json.dumps(about, indent=1) + "\n").encode()


def _table(rows: Sequence[Row]) -> str:
    cells: list[Sequence[Any]] = [list(asdict(rows[0]))] + [list(asdict(row).values()) for row in rows]
    return aligned([[str(cell) for cell in line] for line in cells], str.rjust)


if __name__ == "__main__":
    sys.exit(main())
