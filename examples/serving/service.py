"""The handling of requests, independent of their transport: routes, limits, batches, errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from adapter_shelf import AdapterShelf
from image_bodies import ImageLimits, too_many_bytes
from loca_vision.messages import one_line
from refusals import Refusal, Reply
from request_options import Options
from serving_settings import Settings

_LOG = logging.getLogger(__name__)
_DECODING = 2  # images decoded at a time, each of which may take most_pixels times 3 bytes
_HUNG = 10  # times the timeout: a batch that takes longer is considered hung
_READ_OUT = 4  # times most_bytes: how much of a body is read and dropped, since a client sees no refusal while it sends
Result = TypeVar("Result")
One = Callable[[Any], Awaitable[Reply]]
Many = Callable[[list[Any]], Coroutine[Any, Any, list[Reply]]]


@dataclass(frozen=True)
class Call:
    """A request.

    Args:
        path: the decoded path.
        query: the names and values of the options.
        length: the length of the body, if the client stated it.
        body: the body, in pieces.
    """

    method: str
    path: str
    query: Sequence[tuple[str, str]]
    length: int | None
    body: AsyncIterator[bytes]


class Engine(Protocol):
    """An engine that answers batches of requests of one kind."""

    route: str
    shelf: AdapterShelf
    limits: ImageLimits

    def asked(self, adapter: str, body: bytes, options: Options) -> Any: ...
    def answers(self, asked: Sequence[Any]) -> list[Reply | Exception]: ...


class Counts(Protocol):
    """Counters of the service's events."""

    def request(self, status: int) -> None: ...
    def batch(self, size: int) -> None: ...
    def loaded(self, adapters: int) -> None: ...
    def held(self, held_bytes: int) -> None: ...
    def text(self) -> str:
        """Return all counts in Prometheus's format; this may take a while."""


class Service:
    """Answers requests with an engine.

    Args:
        batching: turns a function of a batch into a function of a single request.
    """

    def __init__(self, engine: Engine, settings: Settings, counts: Counts, batching: Callable[[Many], One]) -> None:
        self.engine, self.settings, self.counts = engine, settings, counts
        self._batched = batching(self.answer_batch)
        self._decoding = ThreadPoolExecutor(_DECODING, "decode")
        self._computing = ThreadPoolExecutor(1, "model")  # only one thread calls the model
        self._waiting = 0
        self._since: float | None = None  # when the current batch began

    async def reply(self, call: Call) -> Reply:
        """Answer any request; a failure also gets a reply."""
        try:
            reply = await self._routed(call)
        except Refusal as refusal:
            reply = refusal.reply()
        except Exception:
            reply = _failure()
        self.counts.request(reply.status)
        return reply

    def check_health(self) -> None:
        """Check that the current batch is not hung.

        Raises:
            RuntimeError: a batch takes too long.
        """
        since, longest = self._since, _HUNG * self.settings.timeout
        if since is not None and time.monotonic() - since > longest:
            raise RuntimeError(f"a batch takes longer than {longest:g} seconds")

    def count_held(self) -> None:
        """Report how many bytes of adapters are held; gauges expire if they are not reported again."""
        self.counts.held(self.engine.shelf.store.held_bytes)

    async def answer_batch(self, asked: list[Any]) -> list[Reply]:
        """Return the reply to each request in a batch."""
        self.counts.batch(len(asked))
        return await asyncio.get_running_loop().run_in_executor(self._computing, self._computed, asked)

    def _computed(self, asked: list[Any]) -> list[Reply]:
        self._since = time.monotonic()
        before = self.engine.shelf.loads
        try:
            return [_reply_of(answer) for answer in self.engine.answers(asked)]
        finally:
            self._since = None
            self.counts.loaded(self.engine.shelf.loads - before)

    async def _routed(self, call: Call) -> Reply:
        parts = call.path.removeprefix("/").split("/", 1)
        if parts[0] == self.engine.route and len(parts) == 2:
            _check_method(call, "POST")
            return await self._answered(parts[1], call)
        plain = {"healthz": self._health, "metrics": self._metrics, "adapters": self._names}.get(call.path.removeprefix("/"))
        if plain is None:
            routes = f"/{self.engine.route}/NAME, /adapters, /healthz and /metrics"
            raise Refusal(404, f"there is nothing at {one_line(repr(call.path), 120)}: expected {routes}")
        _check_method(call, "GET")
        return await plain()

    async def _answered(self, adapter: str, call: Call) -> Reply:
        options = Options(call.query)
        if self._waiting >= self.settings.most_waiting:
            raise Refusal(503, f"{self._waiting} requests are waiting already: come again", again=1)
        self._waiting += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._decoding, self.engine.shelf.check_name, adapter)
            body = await self._in_time(self._body(call), Refusal(408, "the image did not arrive in time"))
            return await self._in_time(
                self._computed_for(adapter, body, options), Refusal(503, "there was no answer in time", again=1)
            )
        finally:
            self._waiting -= 1

    async def _in_time(self, work: Coroutine[Any, Any, Result], late: Refusal) -> Result:
        try:
            return await asyncio.wait_for(work, self.settings.timeout)
        except (TimeoutError, asyncio.TimeoutError):  # one and the same from Python 3.11 on
            raise late from None

    async def _body(self, call: Call) -> bytes:
        most, found, length = self.engine.limits.most_bytes, bytearray(), 0
        if call.length is not None and call.length > _READ_OUT * most:
            raise too_many_bytes(self.engine.limits)
        async for piece in call.body:
            length += len(piece)
            if length <= most:
                found += piece
            elif length > _READ_OUT * most:
                break
        if length > most:
            raise too_many_bytes(self.engine.limits)
        return bytes(found)

    async def _computed_for(self, adapter: str, body: bytes, options: Options) -> Reply:
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self._decoding, self.engine.asked, adapter, body, options)
        return await self._batched(asked)

    async def _health(self) -> Reply:
        try:
            self.check_health()
        except RuntimeError as error:
            raise Refusal(503, str(error), again=1) from None
        return Reply.of_json({"status": "ok"})

    async def _names(self) -> Reply:
        names = await asyncio.get_running_loop().run_in_executor(None, self.engine.shelf.store.names)
        return Reply.of_json({"adapters": names})

    async def _metrics(self) -> Reply:
        text = await asyncio.get_running_loop().run_in_executor(None, self.counts.text)
        return Reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")


def _check_method(call: Call, wanted: str) -> None:
    if call.method != wanted:
        raise Refusal(405, f"expected {wanted}, got {one_line(call.method, 20)}")


def _reply_of(answer: Reply | Exception) -> Reply:
    if isinstance(answer, Reply):
        return answer
    return answer.reply() if isinstance(answer, Refusal) else _failure(answer)


def _failure(error: Exception | None = None) -> Reply:
    """Log an error of the server in full, and return a reply without its details."""
    _LOG.error("a request failed", exc_info=error or True)
    return Reply.of_json({"error": "the server failed at this request; its log says why"}, 500)
