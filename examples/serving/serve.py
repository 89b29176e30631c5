"""Serve one model with many adapters over HTTP with Ray Serve, batching requests for different adapters together.

    python examples/serving/serve.py --model vit_base_patch16_224.augreg_in21k --adapters customers --replicas 2
    python examples/serving/serve.py --pipeline timbrooks/instruct-pix2pix --adapters styles --gpus_per_replica 1

Then run `curl --data-binary @photo.jpg http://127.0.0.1:8000/classify/NAME`. SIGINT and SIGTERM stop the server.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loca_vision.recipes.settings.console import guarded, usage_in_one_line

if TYPE_CHECKING:
    from serving_settings import Settings

PROG = "serve.py"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve according to the command line until a signal stops the server, and return the exit status."""
    return guarded(PROG, lambda: _serve(_parse(arguments)), extra="serve")


def _parse(arguments: Sequence[str] | None) -> Settings:
    import tyro

    from serving_settings import Settings

    with usage_in_one_line(PROG):
        return tyro.cli(Settings, prog=PROG, args=arguments, use_underscores=True)


def _serve(settings: Settings) -> None:
    import ray.serve  # noqa: F401  # said to be missing before anything is done

    from deployment import check_port, engine_of, start, stop

    with stopping():
        settings.check_folder()
        check_port(settings.host, settings.port)
        names = engine_of(settings).shelf.store.names()  # finds errors before a replica fails with them
        try:
            start(settings)
            listen()  # Ray has replaced the signal handlers
            print(f"http://{settings.host}:{settings.port}: {len(names)} adapters, Ctrl-C to stop", flush=True)
            while True:
                signal.pause()
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # so that a second Ctrl-C leaves no processes behind
            stop()


@contextmanager
def stopping() -> Iterator[None]:
    """Provide a context that SIGINT and SIGTERM end quietly."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    listen()
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen() -> None:
    """Make both signals raise KeyboardInterrupt."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
