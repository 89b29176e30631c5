"""The command lines of the server and of its load test, as far as they go without Ray."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import deployment
import load_test
import serve
from load_clients import Outcome
from load_model import Oracle, write_adapters
from serving_settings import Settings
from support.serving import MODEL, settings

LINE = [word for name, value in MODEL.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def ray(monkeypatch):
    """A package that is there, and starts nothing."""
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(deployment, "start", lambda settings: pytest.fail("started"))
    monkeypatch.setattr(deployment, "stop", lambda: None)


def refused(capsys, *arguments):
    assert serve.main([str(word) for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapters", "missing"], "adapters='missing': there is no such folder"),
        (["--adapters", ".", "--port", "70000"], "port=70000: expected a whole number from 1 to 65535"),
        (["--adapters", ".", "--replicas", "0"], "replicas=0"),
        (["--adapters", ".", "--most_pixels", "90000000"], "most_pixels=90000000: expected a whole number from 1 to 80000000"),
        (["--adapters", ".", "--timeout", "nan"], "timeout=nan: expected a number of seconds from 0.1 to 3600"),
        (["--adapters", ".", "--gpus_per_replica", "1.5"], "gpus_per_replica=1.5"),
        (["--adapters", ".", "--pipeline", "base"], "either --model or --pipeline, got both"),
        (["--adapters", ".", "--model", "vit_tinny"], "vit_tiny"),
        (["--adapters", ".", "--host", "no.such.host.invalid"], "nothing can listen there"),
        (["--adapters", ".", "--sport", "1"], "--sport"),
        ([], "--adapters"),
    ],
)
def test_a_mistake_is_one_line(ray, capsys, arguments, words):
    assert words in refused(capsys, *LINE, *arguments)


def test_neither_model_nor_pipeline_is_one_line(ray, capsys):
    assert "got neither" in refused(capsys, "--adapters", ".")


def test_a_port_in_use_is_one_line(ray, capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port={port}: nothing can listen there" in refused(capsys, *LINE, "--adapters", tmp_path, "--port", port)
    deployment.check_port("127.0.0.1", port)


def test_a_missing_ray_is_one_line_with_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert "loca-vision[serve]" in refused(capsys, *LINE, "--adapters", tmp_path)


def test_help_needs_no_ray(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert serve.main(["--help"]) == 0 and "--most_waiting" in capsys.readouterr().out


def test_ctrl_c_while_it_starts_ends_it_quietly(ray, monkeypatch, tmp_path):
    stopped = []

    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(deployment, "check_port", lambda host, port: None)
    monkeypatch.setattr(deployment, "start", interrupted)
    monkeypatch.setattr(deployment, "stop", lambda: stopped.append(True))
    assert serve.main([*LINE, "--adapters", str(tmp_path)]) == 0 and stopped


def test_of_rays_metrics_only_the_servers_are_shown():
    text = (
        '# HELP ray_loca_loads_total Adapters.\n# TYPE ray_loca_loads_total counter\nray_loca_loads_total{a="b"} 2.0\n'
        "# HELP ray_serve_x Other.\nray_serve_x 1.0\npython_gc 3\n"
    )
    assert deployment.ours(text).splitlines() == text.splitlines()[:3]


# The load test


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("customers")
    wanted = settings(folder)
    return Oracle(wanted, write_adapters(folder, wanted, 6, 20))


def answer(oracle, name, image):
    shares = oracle.shares[name][image].tolist()
    return {"adapter": name, "classes": [{"class": str(index), "probability": one} for index, one in enumerate(shares)]}


def test_an_answer_by_another_adapter_or_to_another_image_is_noticed(oracle):
    own = Outcome("customer-0", 1, answer(oracle, "customer-0", 1), 0.1, 0)
    assert oracle.agrees(own)
    assert not oracle.agrees(replace(own, image=2))
    assert not oracle.agrees(replace(own, answer=answer(oracle, "customer-1", 1)))
    same_size = answer(oracle, "customer-5", 1) | {"adapter": "customer-0"}
    assert len(same_size["classes"]) == len(own.answer["classes"]) and not oracle.agrees(replace(own, answer=same_size))


def test_lost_and_wrong_requests_are_counted(oracle):
    own = Outcome("customer-0", 1, answer(oracle, "customer-0", 1), 0.1, 2)
    outcomes = [own, replace(own, image=2), replace(own, answer=None)]
    found = load_test.figures(outcomes, 2.0, oracle)
    assert found | {"p50_ms": 0, "p95_ms": 0, "p99_ms": 0} == {
        "requests": 3, "per_second": 1.0, "p50_ms": 0, "p95_ms": 0, "p99_ms": 0, "retries": 6, "lost": 1, "wrong": 1,
    }  # fmt: skip
    assert found["p50_ms"] == 100.0


@pytest.mark.parametrize(("lost", "wrong", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_the_load_test_fails_where_a_request_had_not_its_own_answer(monkeypatch, lost, wrong, status):
    row = load_test.Row(1, 1, False, 9, 9.0, 1.0, 1.0, 1.0, 0, lost, wrong)
    monkeypatch.setattr(load_test, "run", lambda wanted: [row])
    assert load_test.main([]) == status


def test_settings_are_checked_when_they_are_made(tmp_path):
    with pytest.raises(ValueError, match="it is for --model"):
        Settings(tmp_path, pipeline="base", weights="hub")


def test_the_page_shows_the_figures_of_the_file():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "guides" / "serving.md").read_text()
    rows = json.loads((root / "examples" / "serving" / "results" / "load_test.json").read_text())["rows"]
    assert len(rows) == page.split("## Figures")[1].count("\n| ") - 1
    for row in (load_test.Row(**row) for row in rows):
        times = [f"{time:.0f} ms" for time in (row.p50_ms, row.p95_ms, row.p99_ms)]
        cells = [
            row.adapters,
            row.replicas,
            "yes" if row.killed else "no",
            row.per_second,
            *times,
            row.retries,
            row.lost,
            row.wrong,
        ]
        assert f"| {' | '.join(map(str, cells))} |\n" in page
