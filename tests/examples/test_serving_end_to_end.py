"""The server as a process of its own, with Ray Serve on the loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support.serving import MODEL, alone, encoded, photo, shares_of, write_folder

SCRIPT = Path(__file__).parents[2] / "examples" / "serving" / "serve.py"
MARK = "LOCA_TEST_SERVER"
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: python -m pip install -e '.[serve]'")


def asked(address, body=None):
    """Status and body of a reply."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=body), timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def left(mark):
    """The processes that have the mark in their environment, which is that of the server's processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process.name, (process / "cmdline").read_bytes()[:80]))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_folder(folder)
    return folder


@pytest.fixture
def server(folder, tmp_path):
    """The process and its address; in the end all that it started is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, str(SCRIPT), "--adapters", str(folder), "--port", str(port), "--batch_wait", "0.3"]
    line += [word for name, value in MODEL.items() for word in (f"--{name}", str(value))]
    mark, log = uuid.uuid4().hex, tmp_path / "log.txt"
    with log.open("wb") as file:
        environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        ended = threading.Timer(120, process.kill)
        ended.start()
        while b"Ctrl-C" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield process, f"http://127.0.0.1:{port}", mark
    finally:
        ended.cancel()
        process.kill()
        process.wait()
        for identity, _ in left(mark):
            os.kill(int(identity), signal.SIGKILL)


def test_a_server_answers_refuses_counts_and_ends(server, folder):
    process, address, mark = server
    images = {name: photo(seed) for seed, name in enumerate([*(f"shop-{index}" for index in range(4)), "broken", "shop-9"])}
    asks = [(f"{address}/classify/{name}?top_k=100", encoded(image)) for name, image in images.items()]
    asks += [(f"{address}/classify/shop-1", b"no image"), (f"{address}/classify/shop-1", bytes(21 * 2**20))]
    asks += [(f"{address}/classify/..%2F..%2Fetc%2Fpasswd", b"x")]
    with ThreadPoolExecutor(len(asks)) as threads:
        found = list(threads.map(lambda one: asked(*one), asks))
    assert [status for status, _ in found] == [200, 200, 200, 200, 422, 404, 415, 413, 404]
    assert all(list(json.loads(body)) == ["error"] for status, body in found if status != 200)
    for (name, image), (_, body) in zip(list(images.items())[:4], found, strict=False):
        torch.testing.assert_close(shares_of(body), alone(folder, name, image), rtol=0, atol=1e-5)

    assert asked(f"{address}/healthz") == (200, b'{"status": "ok"}\n')
    assert "shop-3" in json.loads(asked(f"{address}/adapters")[1])["adapters"]
    _wait_for_count(f"{address}/metrics", 1, "ray_loca_requests_total{", 'status="413"')
    _wait_for_count(f"{address}/metrics", 4, "ray_loca_loads_total{")
    _wait_for_count(f"{address}/metrics", 5, "ray_loca_batched_total{")
    _wait_for_count(f"{address}/metrics", None, "ray_loca_held_bytes{")

    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    deadline = time.monotonic() + 10
    while left(mark) and time.monotonic() < deadline:  # Ray's own take a moment
        time.sleep(0.2)
    assert left(mark) == []


def _wait_for_count(address, value, *words):
    """Until a line of the metrics, which Ray gathers every few seconds, has this value, or if None one above 0."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = asked(address)[1].decode()
        found = [float(line.split()[-1]) for line in text.splitlines() if all(word in line for word in words)]
        if any(one > 0 if value is None else one == value for one in found):
            return
        time.sleep(0.3)
    pytest.fail(text)
