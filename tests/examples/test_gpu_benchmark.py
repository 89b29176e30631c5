"""examples/benchmarks/gpu.py without a GPU: what it writes and when, what it leaves out, and that no failure ends it."""

import json
import sys
from pathlib import Path

import pytest
import torch

import gpu
import gpu_contenders
import gpu_inference
import gpu_launches
import gpu_mixed
import gpu_pictures
import gpu_report
import gpu_steps
import gpu_study
import gpu_tests
import gpu_turns
import gpu_workloads
import paths
import steps
import workloads
from gpu_session import Budget, Session, failures

JOB = gpu_workloads.job("vit-fp32-32", dry=True)
LOCA, LORA = "LoCA, coefficients", "LoRA r=4, peft"


def dry(output: Path, *arguments: str) -> dict:
    assert gpu.main(["--dry_run", "--output", str(output), "--minutes", "1", *arguments]) == 0
    return json.loads((output / "gpu.json").read_text())


@pytest.fixture
def session():
    return Session(Budget(100), lambda: None, True, 2)


def test_a_dry_run_measures_everything_there_is_on_a_gpu(tmp_path, capsys, monkeypatch):
    some = ("floor", LOCA, f"{LOCA}, whole", LORA, "FourierFT n=100")
    made = gpu_contenders.eager(JOB)
    assert set(some) < set(made)
    monkeypatch.setattr(gpu_steps, "eager", lambda job: {name: made[name] for name in some})
    found = dry(tmp_path, "--parts", "steps", "costs", "study", "--workloads", "vit-fp32-32")
    said = capsys.readouterr().out
    assert found["dry_run"] and said.startswith("Dry run on the CPU: figures mean nothing.")
    methods = found["parts"]["steps"]["vit-fp32-32"]["methods"]
    assert list(methods) == list(some)
    for row in methods.values():
        assert row["seconds"][0] >= row["forward and backward"][0] > 0
        assert row["launches"]["operators"] > 0
    assert found["parts"]["steps"]["vit-fp32-32"]["check"]["losses"]["merged"] > 0
    assert found["parts"]["costs"]["line"].startswith('COSTS["cpu"] = Costs(product=')
    assert "give --study_data" in found["parts"]["study"]["left out"]
    page = (tmp_path / "README.md").read_text()
    assert "| LoCA, coefficients |" in page and "![steps](steps.png)" in page and "Dry run on the CPU" in page
    assert found["pages"] == {"steps": None, "launches": None}
    assert str(tmp_path) not in json.dumps(found)
    assert "Training step, ViT-B/16, fp32, batch 32" in said


def test_what_was_found_is_written_after_each_part_and_a_failure_ends_nothing(tmp_path, monkeypatch, capsys):
    seen = []

    def failing(session, found, settings):
        found["kept"] = 1
        raise RuntimeError("something\nbroke")

    def looking(session, found, settings):
        seen.append(json.loads((tmp_path / "gpu.json").read_text())["parts"])

    monkeypatch.setitem(gpu.PARTS, "steps", failing)
    monkeypatch.setitem(gpu.PARTS, "costs", looking)
    found = dry(tmp_path, "--parts", "steps", "costs")
    assert seen == [{"steps": found["parts"]["steps"]}]
    assert found["parts"]["steps"]["kept"] == 1
    assert found["parts"]["steps"]["error"] == "RuntimeError: something broke"
    assert found["parts"]["steps"]["traceback"][-1] == "broke"
    assert any('File "examples/test_gpu_benchmark.py", line' in line for line in found["parts"]["steps"]["traceback"])
    assert str(Path(__file__).parents[2]) not in json.dumps(found)
    assert "error" not in found["parts"]["costs"]
    said = capsys.readouterr().out
    assert "\nsteps: failed: RuntimeError: something broke\n" in said and "Not done:\n" in said
    assert "* steps: failed: RuntimeError: something broke" in (tmp_path / "README.md").read_text()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "gpu_costs", None)
    found = dry(tmp_path, "--parts", "steps", "costs", "--workloads", "sd15-bf16-2")
    assert found["parts"]["steps"]["sd15-bf16-2"]["left out"] == "diffusers is missing"
    assert found["parts"]["costs"]["left out"] == "gpu_costs is missing"


def test_contenders_for_whom_there_is_no_time_are_listed(session):
    now = [0.0]
    session.budget = Budget(10, lambda: now[0])

    def late(work):
        now[0] = 11.0
        return steps.Step(work.model(), work)

    found = {}
    gpu_steps.measured(session, found, JOB, {"floor": late, "second": late}, 4.0)
    assert found["methods"]["second"] == {"left out": "no time: expected 0 s, 0 s were left"}
    assert "seconds" in found["methods"]["floor"]
    assert [name for name, _ in failures(found)] == ["methods, second"]


def test_work_is_left_out_before_it_begins(session):
    session.dry, found = False, {}
    assert not session.attempt(found, "long", 101.0, lambda own: pytest.fail("it was begun"))
    assert found["long"]["left out"].startswith("no time: expected 101 s, ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "nonsense"], "nonsense"),
        (["--workloads", "vit-bf16-7"], "vit-bf16-7"),
        (["--minutes", "0"], "minutes=0.0: expected a number above 0"),
        (["--rounds", "0"], "rounds=0: whole numbers from 1 up"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, said, capsys, tmp_path):
    assert gpu.main([*arguments, "--output", str(tmp_path)]) == 2
    heard = capsys.readouterr().err
    assert heard.startswith("gpu.py: ") and said in heard and heard.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_inference_and_verbs(session):
    found = {}
    gpu_inference.part(session, found, ["vit-fp32-32"])
    assert not list(failures(found))
    figures = found["vit-fp32-32"]["figures"]
    assert list(figures) == ["base", "LoCA", LORA, "LoRA r=4"]
    for name in ("LoCA", LORA, "LoRA r=4"):
        assert {"load", "first call", "call", "switch", "merge", "file bytes", "MB held"} <= set(figures[name])
    header, base, *_ = gpu_report.inference_rows(found["vit-fp32-32"])
    assert header[:3] == ["method", "call, ms", "of the base's"] and base[2] == "1.000"


def test_mixed_batches(session):
    found = {}
    gpu_mixed.part(session, found, ["vit-fp32-32"])
    assert not list(failures(found))
    names = [f"{kind}, {count} different" for count in (1, 4, 32) for kind in ("LoCA", "LoRA r=4, peft")]
    assert list(found["vit-fp32-32"]["figures"]) == ["base", *names]
    assert len(gpu_report.inference_rows(found["vit-fp32-32"])) == 8


def test_compiled_steps(session, monkeypatch):
    made = gpu_contenders.compiled(JOB, backend="eager")
    assert list(made) == ["floor", LOCA, LORA]
    monkeypatch.setattr(gpu_steps, "COMPILED", ("vit-fp32-32",))
    monkeypatch.setattr(gpu_steps, "compiled", lambda job, backend: {"floor": made["floor"]})
    found = {}
    gpu_steps.compiled_part(session, found, ["vit-fp32-32"])
    assert not list(failures(found))
    assert found["vit-fp32-32"]["methods"]["floor"]["seconds"]


def test_a_forced_way_is_used(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_contenders.cost_model, "using", lambda way: seen.append(way) or torch.no_grad())
    with pytest.raises(RuntimeError):  # there is no gradient in such a context, but it was entered
        gpu_contenders.eager(JOB)[f"{LOCA}, whole"](workloads.workload(JOB)).gradients()
    assert seen == ["whole"]


def test_a_contender_that_fails_in_its_turn_is_out(session):
    class Failing:
        def gradients(self):
            raise RuntimeError("out of memory")

    class Passing:
        def gradients(self):
            pass

        update = gradients

    rows = {"a": {}, "b": {}}
    both = {"a": Failing(), "b": Passing()}
    found = gpu_turns.in_rounds(both, 3, 2, lambda: True, lambda name, turn: session.guarded(rows[name], turn))
    assert list(found) == ["b"] and len(found["b"]["seconds"]) == 3
    assert rows == {"a": rows["a"], "b": {}} and rows["a"]["error"] == "RuntimeError: out of memory"


@pytest.mark.parametrize(("seconds", "count"), [(1e-5, 10), (0.15, 3), (0.5, 1)])
def test_quick_steps_are_taken_several_at_a_time(seconds, count):
    assert gpu_turns.steps_of_a_turn(seconds) == count


def test_kernels_and_copies_are_counted_apart():
    events = [
        ("gemm", 3000.0),
        ("gemm", 1000.0),
        ("Memcpy DtoD (Device -> Device)", 500.0),
        ("Memset (Device)", 1.0),
        ("add", 2.0),
    ]
    found = gpu_launches.counted(events)
    assert (found["kernels"], found["copies"], found["busy ms"]) == (3, 2, 4.503)
    assert found["longest"][0] == ["gemm", 2, 4.0]


def test_outcomes_of_tests_with_and_without_workers():
    output = (
        "[gw1] [ 10%] PASSED tests/a.py::one \ntests/b.py::two FAILED [ 20%]\nFAILED tests/b.py::two - no\nERROR tests/c.py\n"
    )
    assert gpu_tests.outcomes_in(output) == {"tests/a.py::one": "PASSED", "tests/b.py::two": "FAILED", "tests/c.py": "ERROR"}


def test_tests_that_take_too_long_are_killed():
    status, output = gpu_tests.limited([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1)
    assert status is None and output == "begun\n"


def test_what_came_of_the_tests_is_told(session, monkeypatch):
    lines = "tests/a.py::one PASSED\ntests/a.py::two FAILED\n"
    monkeypatch.setattr(gpu_tests, "limited", lambda command, seconds: (1, lines))
    found = {}
    gpu_tests.part(session, found, 5)
    assert found["outcomes"] == {"PASSED": 1, "FAILED": 1} and found["failed"] == ["tests/a.py::two"]
    assert found["error"] == "pytest ended with status 1; 1 tests failed"
    monkeypatch.setattr(gpu_tests, "limited", lambda command, seconds: (None, lines))
    gpu_tests.part(session, found := {}, 5)
    assert found["error"] == "killed after 5 s" and found["failed"]
    monkeypatch.setattr(
        gpu_tests, "limited", lambda command, seconds: (4, "ERROR: Unknown marker(s) in '-m' expression: device.")
    )
    gpu_tests.part(session, found := {}, 5)
    assert found["left out"] == "no test is marked device"


def test_finished_runs_of_the_study_count_when_it_was_killed(session, monkeypatch, tmp_path):
    def killed(command, seconds):
        run = Path(command[command.index("--output_dir") + 1]) / "loca-73728" / "rate-0.05-seed-0"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps({"test_accuracy": 0.9}))
        return None, ""

    monkeypatch.setattr(gpu_study, "limited", killed)
    found = {}
    gpu_study.part(session, found, tmp_path)
    assert found["status"] is None
    assert found["runs"][0]["method"] == "loca-73728" and found["runs"][0]["test_accuracy"] == 0.9


def made_up() -> dict:
    """Of a GPU, with all that a page can say."""

    def row(seconds: list[float], kernels: int) -> dict:
        launches = {"kernels": kernels, "copies": 3, "busy ms": 9.5}
        times = {"seconds": seconds, "forward and backward": seconds, "first step": 0.5}
        return {"trained": 5, "peak MB": 1000.0, "launches": launches, **times}

    methods = {
        "floor": row([0.01, 0.02, 0.03], 1000),
        LOCA: row([0.011, 0.022, 0.033], 1500),
        LORA: row([0.012, 0.024, 0.036], 1250),
        "FourierFT n=9, peft": {"error": "RuntimeError: no"},
    }
    own = {"settings": {"rank": 4}, "methods": methods}
    tests = {"outcomes": {"PASSED": 3}, "status": 0, "failed": []}
    device = {"device": "cuda", "card": "Abacus", "memory GB": 80.0, "nvidia-smi": {"driver_version": "1.2"}}
    parts = {"tests": tests, "steps": {name: own for name in gpu_workloads.JOBS}, "costs": {"line": "COSTS"}}
    about = {"command": "python gpu.py", "date": "2026-01-01", "dry_run": False, "environment": {"torch": "2.0"}}
    return about | {"device": device, "parts": parts}


def test_pages_and_pictures(tmp_path):
    found = made_up()
    found["pages"] = gpu_report.written(tmp_path, found)
    page = (tmp_path / "README.md").read_text()
    assert "Abacus, 80.0 GB, driver 1.2, torch 2.0, 2026-01-01" in page and "Dry run" not in page
    assert (
        "| LoCA, coefficients | 22.00 | 16.50 to 27.50 | 1.100 | 0.917 | 22.00 | 1,000 | 1,500 | 3 | 9.50 | 5 | 0.50 |" in page
    )
    assert "FourierFT n=9, peft: failed: RuntimeError: no" in page and "* Tests on the device: status 0; 3 passed" in page
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "steps.png", "launches.png"}
    assert all(file.stat().st_size < 150_000 for file in tmp_path.glob("*.png"))


def test_a_page_needs_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pictures, "drawn", lambda folder, found: 1 / 0)
    assert gpu_report.written(tmp_path, made_up()) == {"pictures": "ZeroDivisionError: division by zero"}
    assert ".png" not in (tmp_path / "README.md").read_text()


def test_costs_fit_without_a_way_that_fails():
    settings = paths.Settings(sizes=("16x16",), tokens=(8,), components=(4,), projections=(1,), repeats=1)
    (case, *_) = paths.cases(settings)
    one = paths.timed(case, settings)
    less = paths.Timed(
        case, {way: taken for way, taken in one.seconds.items() if way != "applied"}, "applied", {"applied": "no"}
    )
    assert less.loss == float("inf") and "failed" in paths.line(less, [*paths.WAYS, paths.TOGETHER])
    assert paths.as_json(less)["loss"] is None and paths.as_json(less)["failed"] == {"applied": "no"}
    assert "failed" not in paths.as_json(one)
    assert paths.fitted([less]).product >= 0
    assert paths._failing({"whole": lambda: None, "sampled": lambda: [][0:1].sort(key=1) or 1 + "a"}).keys() == {"sampled"}
