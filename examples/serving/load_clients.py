"""Clients that request classifications for a given time, and retry if a server may not have answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_AGAIN = {500, 502, 503, 504}  # a replica died or was busy; classifying twice does no harm
_PATIENCE = 60.0  # seconds of retries
_PAUSE = 0.2  # seconds between retries, if the server names none


@dataclass(frozen=True)
class Asking:
    """The server and the requests to send to it.

    Args:
        address: the address of the server.
        names: the names of the adapters.
        bodies: the image files.
    """

    address: str
    names: Sequence[str]
    bodies: Sequence[bytes]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request: its answer, or None if every try failed."""

    name: str
    image: int
    answer: Any
    seconds: float
    retries: int


class Asks:
    """Clients of one server.

    Args:
        seed: the seed for choosing adapters and images.
    """

    def __init__(self, asking: Asking, seed: int) -> None:
        self.asking, self.random = asking, random.Random(seed)

    async def for_seconds(self, seconds: float, clients: int) -> list[Outcome]:
        """Send requests for some seconds: each client sends the next one after its answer. Waits for the last answers."""
        import aiohttp

        end = time.monotonic() + seconds
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE)) as session:
            found = await asyncio.gather(*(self._client(session, end) for _ in range(clients)))
        return [outcome for one in found for outcome in one]

    async def _client(self, session: Any, end: float) -> list[Outcome]:
        found = []
        while time.monotonic() < end:
            name = self.random.choice(self.asking.names)
            found.append(await self._ask(session, name, self.random.randrange(len(self.asking.bodies))))
        return found

    async def _ask(self, session: Any, name: str, image: int) -> Outcome:
        started, retries = time.monotonic(), 0
        while True:
            answer, pause = await self._try(session, name, image)
            taken = time.monotonic() - started
            if answer is not None or taken > _PATIENCE:
                return Outcome(name, image, answer, taken, retries)
            retries += 1
            await asyncio.sleep(pause)

    async def _try(self, session: Any, name: str, image: int) -> tuple[Any, float]:
        """Send one request and return its answer, or None and the seconds to wait.

        Raises:
            RuntimeError: the server refused the request in a way that a retry cannot change.
        """
        import aiohttp

        address = f"{self.asking.address}/classify/{name}?top_k=100"
        try:
            async with session.post(address, data=self.asking.bodies[image]) as reply:
                if reply.status == 200:
                    return await reply.json(), 0.0
                if reply.status not in _AGAIN:
                    raise RuntimeError(f"{address}: {reply.status} {(await reply.text())[:300]}")
                return None, float(reply.headers.get("Retry-After", _PAUSE))
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return None, _PAUSE
