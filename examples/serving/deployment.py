"""The service on Ray Serve: replicas that share one HTTP port."""

from __future__ import annotations

import logging
import os
import socket
import urllib.request
from typing import Any

from serving_settings import Settings

APPLICATION = "loca"
DEPLOYMENT = "images"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_PERIOD = 2  # seconds between checks of a replica
_PREFIX = "ray_loca_"  # of our metrics in Ray's agent
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_metrics_report_interval_ms": str(2000 * _PERIOD),  # a gauge not set for twice as long is dropped
}


class Replica:
    """One process with a model and a store.

    Args:
        settings: the settings of the server.
        agent: the address where Ray publishes the metrics of all replicas.
    """

    def __init__(self, settings: Settings, agent: str) -> None:
        import torch
        from ray import serve

        from service import Service

        torch.set_num_threads(settings.threads)
        batching = serve.batch(max_batch_size=settings.batch_size, batch_wait_timeout_s=settings.batch_wait)
        self.service = Service(engine_of(settings), settings, RayCounts(agent), batching)

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import Response

        from service import Call

        told = request.headers.get("content-length", "")
        length = int(told) if told.isascii() and told.isdigit() else None
        path, query = request.scope["path"], request.query_params.multi_items()
        reply = await self.service.reply(Call(request.method, path, query, length, request.stream()))
        return Response(reply.body, reply.status, {**reply.headers, "Content-Type": reply.kind})

    async def check_health(self) -> None:
        """Check the replica. Serve calls this every _PERIOD seconds and replaces a replica in which it raises an error."""
        self.service.count_held()
        self.service.check_health()


class RayCounts:
    """The counts of a replica, which Ray collects."""

    def __init__(self, agent: str) -> None:
        from ray.serve import metrics

        self.agent = agent
        sizes = [1, 2, 4, 8, 16, 32, 64]
        self._requests = metrics.Counter("loca_requests", description="Requests answered.", tag_keys=("status",))
        self._refusals = metrics.Counter("loca_refusals", description="Requests refused.", tag_keys=("status",))
        self._sizes = metrics.Histogram("loca_batch_size", description="Requests computed together.", boundaries=sizes)
        self._batched = metrics.Counter("loca_batched", description="Requests computed in batches.")
        self._held = metrics.Gauge("loca_held_bytes", description="Bytes of adapters that are held.")
        self._loaded = metrics.Counter("loca_loads", description="Adapters loaded.")

    def request(self, status: int) -> None:
        self._requests.inc(tags={"status": str(status)})
        if status >= 400:
            self._refusals.inc(tags={"status": str(status)})

    def batch(self, size: int) -> None:
        self._sizes.observe(size)
        self._batched.inc(size)  # Ray computes a histogram's sum only from its buckets

    def loaded(self, adapters: int) -> None:
        if adapters:
            self._loaded.inc(adapters)

    def held(self, held_bytes: int) -> None:
        self._held.set(held_bytes)

    def text(self) -> str:
        """Return the counts of all replicas, at most some seconds old."""
        with urllib.request.urlopen(f"http://{self.agent}/metrics", timeout=10) as answer:
            return ours(answer.read().decode())


def ours(text: str) -> str:
    """Keep only the server's own metrics from Ray's."""
    kept = [line for line in text.splitlines() if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(_PREFIX)]
    return "".join(f"{line}\n" for line in kept)


def engine_of(settings: Settings) -> Any:
    """Return the engine that answers the server's requests.

    Raises:
        ValueError, OSError: the model or pipeline is not available.
    """
    if settings.model is not None:
        from classifying import Classifier

        return Classifier(settings)
    from editing_images import Editor

    return Editor(settings)


def check_port(host: str, port: int) -> None:
    """Check that the server can listen at this address.

    Raises:
        OSError: nothing can listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise OSError(f"host={host!r}, port={port}: nothing can listen there ({error.strerror or error})") from error


def start(settings: Settings) -> None:
    """Start Ray and the replicas, and return when all of them answer.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        RuntimeError: a replica fails to start.
    """
    os.environ.update(_ENVIRONMENT)  # before Ray is imported
    import ray
    from ray import serve

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(
        address="local",  # never join an existing cluster
        include_dashboard=settings.dashboard,
        dashboard_host="127.0.0.1",
        object_store_memory=100 * 2**20,  # no image goes through it
        log_to_driver=True,  # print the replicas' logs to stderr here
        logging_level=logging.ERROR,
    )
    (node,) = ray.nodes()
    agent = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    patience = 2 * settings.timeout + 30  # Serve's own timeout, which must never come before the service's
    listening = {"host": settings.host, "port": settings.port, "request_timeout_s": patience}
    serve.start(http_options=listening, logging_config=_QUIET)
    serve.run(deployment(settings).bind(settings, agent), name=APPLICATION, route_prefix="/")


def deployment(settings: Settings) -> Any:
    """Return the deployment of replicas. The service refuses excess requests itself; Serve's higher limits stop floods."""
    from ray import serve

    return serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=settings.replicas,
        max_ongoing_requests=4 * settings.most_waiting + 64,
        max_queued_requests=2 * settings.most_waiting,
        health_check_period_s=_PERIOD,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=10,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": 0, "num_gpus": settings.gpus_per_replica},
    )


def stop() -> None:
    """Stop everything that `start` started, after current requests are answered."""
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.delete(APPLICATION)
        ray.shutdown()
