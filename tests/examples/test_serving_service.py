"""The server without its network: routes, limits, batches, counts, and errors as JSON."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import torch

from classifying import Classifier
from service import Service
from support.serving import Tally, alone, call, encoded, gathering, photo, replies, settings, shares_of, write_folder

LARGE = {"top_k": "100"}.items()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_folder(folder)
    return folder


@pytest.fixture
def serve(folder):
    """Makes a service, whose batches are of so many requests, and its counts."""

    def make(together=1, **more):
        tally, wanted = Tally(together), settings(folder, **more)
        return Service(Classifier(wanted), wanted, tally, gathering(tally)), tally

    return make


def asks(name, seed=1):
    return call(f"/classify/{name}", encoded(photo(seed)), query=list(LARGE))


def sentence(reply):
    assert reply.kind == "application/json"
    content = json.loads(reply.body)
    assert list(content) == ["error"] and "\n" not in content["error"]
    return content["error"]


def test_requests_of_different_adapters_share_a_batch_and_nothing_else(serve, folder):
    service, tally = serve(together=5)
    names = ["shop-0", "shop-1", "shop-2", "shop-3", "shop-1"]
    found = replies(service, *(asks(name, seed) for seed, name in enumerate(names)))
    assert tally.batches == [5] and [reply.status for reply in found] == [200] * 5
    for seed, (name, reply) in enumerate(zip(names, found, strict=True)):
        torch.testing.assert_close(shares_of(reply.body), alone(folder, name, photo(seed)), rtol=0, atol=1e-5)


def test_bad_requests_never_reach_the_model_nor_their_neighbours(serve, folder):
    service, tally = serve(most_bytes=20_000, most_pixels=10_000)
    bad = [
        (call("/classify/shop-0", b"x" * 20_001), 413),
        (call("/classify/shop-0", b"x" * 20_001, told=False), 413),
        (call("/classify/shop-0", encoded(photo(1, (101, 100)))), 413),
        (call("/classify/shop-0", b"no image"), 415),
        (call("/classify/shop-0"), 400),
        (call("/classify/shop-9", encoded(photo(1))), 404),
        (call("/classify/../adapters/shop-0", encoded(photo(1))), 404),
        (call("/classify/shop-0", encoded(photo(1)), query=[("top_k", "0")]), 400),
        (call("/classify/shop-0", encoded(photo(1)), query=[("topk", "1")]), 400),
        (call("/classify/shop-0", method="GET"), 405),
        (call("/adapters", method="DELETE"), 405),
        (call("/classify"), 404),
        (call("/edit/shop-0", encoded(photo(1))), 404),
    ]
    good = asks("shop-2", 5)
    *refused, answered = replies(service, *(request for request, _ in bad), good)
    assert tally.batches == [1]
    assert [reply.status for reply in refused] == [status for _, status in bad]
    assert all(sentence(reply) for reply in refused)
    torch.testing.assert_close(shares_of(answered.body), alone(folder, "shop-2", photo(5)), rtol=0, atol=1e-5)
    assert sorted(tally.statuses) == sorted([200, *(status for _, status in bad)])


def test_a_broken_adapter_is_one_requests_matter(serve):
    service, tally = serve(together=2)
    broken, good = replies(service, asks("broken"), asks("shop-1"))
    assert (broken.status, good.status, tally.batches) == (422, 200, [2])
    assert "broken.safetensors" in sentence(broken)
    service.count_held()
    assert tally.loads == 1 and tally.held_bytes == service.engine.shelf.store.held_bytes > 0
    tally.together = 1
    replies(service, asks("shop-1"))
    replies(service, asks("shop-2"))
    assert tally.loads == 2


def test_more_requests_than_may_wait_are_told_to_come_again(serve):
    service, tally = serve(together=3, most_waiting=3)
    found = replies(service, *(asks("shop-1") for _ in range(5)))
    assert sorted(reply.status for reply in found) == [200, 200, 200, 503, 503]
    late = next(reply for reply in found if reply.status == 503)
    assert late.headers == {"Retry-After": "1"} and "waiting" in sentence(late)
    tally.together = 1
    assert replies(service, asks("shop-1"))[0].status == 200  # their places are free again


def test_answers_and_bodies_that_do_not_come_in_time_are_refused(serve):
    service, _ = serve(timeout=0.2)

    async def never():
        await asyncio.sleep(30)
        yield b""

    slow = call("/classify/shop-1")
    object.__setattr__(slow, "body", never())
    release = threading.Event()
    service.engine.answers = lambda asked: [release.wait(10) and None] * len(asked)
    started = time.monotonic()

    async def both():
        found = await asyncio.gather(service.reply(slow), service.reply(asks("shop-1")))
        release.set()
        return found

    body, answer = asyncio.run(both())
    assert (body.status, answer.status) == (408, 503) and answer.headers["Retry-After"]
    assert "in time" in sentence(body) and "in time" in sentence(answer) and time.monotonic() - started < 10


def test_a_fault_of_the_server_is_logged_and_told_without_its_details(serve, caplog):
    service, _ = serve()

    def fails(asked):
        raise KeyError("secret")

    service.engine.answers = fails
    (reply,) = replies(service, asks("shop-1"))
    assert reply.status == 500 and "secret" not in sentence(reply) and "secret" in caplog.text


def test_a_failure_of_one_request_inside_a_batch_is_its_own(serve, monkeypatch, caplog):
    service, _ = serve(together=3)
    together = Classifier._together

    def fails(engine, asked):
        if any(one.adapter == "shop-1" for one in asked):
            raise RuntimeError("secret")
        return together(engine, asked)

    monkeypatch.setattr(Classifier, "_together", fails)
    assert [reply.status for reply in replies(service, asks("shop-0"), asks("shop-1"), asks("shop-2"))] == [200, 500, 200]
    assert "secret" in caplog.text


def test_names_health_and_metrics(serve):
    service, _ = serve()
    names, health, metrics = replies(service, *(call(path, method="GET") for path in ("/adapters", "/healthz", "/metrics")))
    assert json.loads(names.body) == {"adapters": ["broken", "shop-0", "shop-1", "shop-2", "shop-3"]}
    assert json.loads(health.body) == {"status": "ok"}
    assert metrics.body == b"requests 1\n" and metrics.kind.startswith("text/plain; version=0.0.4")


def test_a_batch_that_does_not_end_is_no_health(serve):
    service, _ = serve(timeout=1)
    service.check_health()
    service._since = time.monotonic() - 9
    service.check_health()
    service._since = time.monotonic() - 11
    with pytest.raises(RuntimeError, match="longer than 10 seconds"):
        service.check_health()
    (reply,) = replies(service, call("/healthz", method="GET"))
    assert reply.status == 503 and "longer" in sentence(reply)
