"""The scripts of examples/benchmarks on tiny models: what they measure, what they refuse, and the tables made of it."""

import json
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import tyro
from diffusers import UNet2DConditionModel

import contenders
import inference
import layers
import paths as path_costs
import pipeline_adapters
import rounds
import scaling
import steps
import table_rows
import tables
import training_step
import workloads
from loca_vision import remove
from workloads import Job

ROOT = Path(__file__).parents[2]
TINY = ["--model", "test_vit", "--batch_size", "2", "--n_components", "200", "--rank", "4"]
NARROW = ["--widths", "32", "32", "32", "32", "--size", "16", "--batch_size", "1", "--n_components", "200", "--rank", "4"]
ONCE = ["--rounds", "1", "--threads", "1"]
JOB = Job(model="test_vit", batch_size=2, n_components=200, rank=4)
HEAD, PROJECTIONS = 64 * 10 + 10, 12


@pytest.fixture
def shallow(monkeypatch):
    """A UNet of two blocks down and up instead of four, whose 32 projections are adapted as the 128 are."""
    blocks = {
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    }
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 64, "cross_attention_dim": 768}
    for module in (workloads, pipeline_adapters):
        monkeypatch.setattr(module, "unet", lambda widths: UNet2DConditionModel(**blocks).requires_grad_(False))


def result(main, file, *arguments):
    assert main([*arguments, "--output", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_step_of_every_method_on_a_vit(tmp_path, capsys):
    found = result(training_step.main, tmp_path / "step.json", *TINY, *ONCE, "--operators")
    names = list(contenders.methods(JOB))
    assert [list(found[part]) for part in ("seconds", "trained", "operators")] == [names] * 3
    assert all(len(own) == 1 and own[0] > 0 for own in found["seconds"].values())
    assert found["trained"]["floor"] == HEAD
    assert found["trained"]["LoCA, coefficients"] == found["trained"]["FourierFT n=200"] == HEAD + PROJECTIONS * 200
    assert found["trained"]["LoCA, locations"] == HEAD + PROJECTIONS * 400
    assert found["trained"]["LoRA r=4"] == HEAD + PROJECTIONS * 4 * (64 + 64)
    assert found["trained"]["LoRA r=4, peft"] == HEAD + PROJECTIONS // 2 * 4 * (64 + 3 * 64)
    assert found["operators"]["LoRA r=4"]["projections"] == PROJECTIONS
    assert found["operators"]["LoRA r=4, peft"]["projections"] == PROJECTIONS // 2
    assert "for each" not in found["operators"]["floor"]
    assert found["losses"]["merged"] == pytest.approx(found["losses"]["training"], rel=1e-4)
    assert {"torch", "peft", "processor", "threads"} <= set(found["environment"])
    assert str(tmp_path) not in json.dumps(found)  # whose folder it is, is nobody's business
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[1:]] == names


def test_the_command_in_the_file_says_the_settings(tmp_path):
    only = ["--only", "LoRA r=4", "LoCA, locations"]
    found = result(training_step.main, tmp_path / "step.json", *TINY, *ONCE, *only)
    words = shlex.split(found["command"])
    assert words[:2] == ["python", "examples/benchmarks/training_step.py"]
    again = tyro.cli(training_step.Settings, args=words[2:], use_underscores=True)
    assert again.output == Path("step.json")
    said = json.loads(json.dumps(rounds.report("training_step.py", again)))
    assert said["settings"] == found["settings"]


def test_a_step_of_the_unet_in_half_precision(tmp_path, shallow):
    only = ["--only", "LoCA, locations", "LoRA r=4, peft", "FourierFT n=200, peft"]
    found = result(
        training_step.main, tmp_path / "unet.json", "--workload", "unet", *NARROW, *ONCE, *only, "--autocast", "bfloat16"
    )
    assert list(found["seconds"]) == ["floor", *only[1:]]
    assert found["trained"]["floor"] == 0
    assert found["trained"]["LoCA, locations"] == 32 * 400
    assert found["trained"]["FourierFT n=200, peft"] == 32 * 200
    assert found["settings"]["autocast"] == "bfloat16"


def test_autocast_computes_in_half_precision():
    seen = []
    work = workloads.workload(Job(model="test_vit", batch_size=1, autocast="bfloat16"))
    work.base.blocks[0].attn.register_forward_hook(lambda module, given, answer: seen.append(answer.dtype))
    work.loss(work.base)
    assert seen == [torch.bfloat16]


def test_what_is_open_is_settled_by_the_workload():
    assert workloads.settled(Job()) == Job(batch_size=8, n_components=3000)
    assert workloads.settled(Job(workload="unet")) == Job(workload="unet", batch_size=2, n_components=1000)
    assert workloads.settled(Job(batch_size=32)).batch_size == 32


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (training_step.main, ["--batch_size", "0"], "batch_size=0: whole numbers from 1 up"),
        (
            training_step.main,
            ["--widths", "32", "32", "32", "40"],
            "widths=(32, 32, 32, 40): multiples of 32",
        ),
        (training_step.main, ["--only", "LoRA"], "only='LoRA': the methods are floor, "),
        (inference.main, ["--loads", "0"], "loads=0: whole numbers from 1 up"),
        (pipeline_adapters.main, ["--dtype", "int8"], "dtype=int8: expected float32, float16 or bfloat16"),
        (scaling.main, ["--widths", "0"], "widths=(0,): whole numbers from 1 up"),
        (path_costs.main, ["--device", "cuda"], "device='cuda': expected a GPU that torch can use, got none"),
        (path_costs.main, ["--sizes", "12"], "sizes: '12' is not a pair of whole numbers"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(main, arguments, said, capsys):
    assert main(arguments) == 2
    heard = capsys.readouterr().err
    assert ".py: " in heard and f": {said}" in heard and heard.count("\n") == 1


def test_methods_share_the_tensors_of_the_base_but_not_its_head():
    work = workloads.workload(JOB)
    base = dict(work.base.named_parameters())
    for name, tensor in work.model().named_parameters():
        assert (tensor is base[name]) != name.startswith("head.")
    for adapt in contenders.methods(JOB).values():
        before = {name: tensor.clone() for name, tensor in base.items()}
        steps.Step(adapt(work), work)()
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())
    assert not any(tensor.requires_grad for tensor in base.values())


def test_every_step_trains_what_it_says():
    work = workloads.workload(JOB)
    for name, adapt in contenders.methods(JOB).items():
        step = steps.Step(adapt(work), work)
        before = [tensor.detach().clone() for tensor in step.trained]
        step()
        assert any(not torch.equal(old, new) for old, new in zip(before, step.trained, strict=True)), name
        assert work.inputs.grad is not None and work.inputs.grad.abs().sum() > 0


def test_operators_are_counted_alike_twice():
    work = workloads.workload(JOB)
    counts = {}
    for name, adapt in contenders.methods(JOB, ("LoCA, coefficients", "LoRA r=4")).items():
        step = steps.Step(adapt(work), work)
        counts[name] = steps.operators(step)
        assert steps.operators(step) == counts[name]
    assert counts["floor"] < min(counts["LoCA, coefficients"], counts["LoRA r=4"])


def test_operators_that_compute_are_counted_and_no_others():
    """x W^T, its two gradients and the sum; the sum's own gradient is a view of a one, which is made."""
    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    step = Mock(gradients=lambda: (x @ weight.t()).view(-1).sum().backward())
    assert steps.operators(step) == 5


def test_the_check_finds_a_merge_that_does_not_merge(monkeypatch):
    steps.check(JOB)
    monkeypatch.setattr(steps, "remove", lambda model, merge: remove(model))
    with pytest.raises(RuntimeError, match=r"while training and .* by merged"):
        steps.check(JOB)


def test_the_check_refuses_to_be_vacuous(monkeypatch):
    monkeypatch.setattr(contenders, "adapters", lambda model: {})  # whose coefficients stay zero
    with pytest.raises(RuntimeError, match="too little"):
        steps.check(JOB)


@pytest.mark.parametrize("wrong", [1.001, 0.999, float("nan")])
def test_the_check_compares_every_path(wrong):
    right = {"training": 1.0, "kept weights": 1.00009, "merged": 1.0, "base": 1.1}
    steps._compare(right)
    for path in ("kept weights", "merged"):
        with pytest.raises(RuntimeError, match=path):
            steps._compare(right | {path: wrong})


def test_nothing_is_timed_after_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "remove", lambda model, merge: remove(model))
    with pytest.raises(RuntimeError):
        training_step.main([*TINY, *ONCE, "--output", str(tmp_path / "step.json")])
    assert not any(tmp_path.iterdir())


def test_memory_is_that_of_a_process_of_its_own():
    held = torch.ones(250_000_000)  # a gigabyte of this process, which is nothing to the other
    (peak,) = steps.all_peaks(JOB, ["floor"], 1).values()
    assert 100 < peak < steps._resident_peak() - held.nbytes / 2e6


def test_methods_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = rounds.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_is_the_median_of_the_rounds_own():
    assert rounds.ratio([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == 2.0


def test_inference_and_files(tmp_path):
    found = result(inference.main, tmp_path / "inference.json", *TINY, *ONCE, "--loads", "1")
    figures = found["figures"]
    assert list(figures) == ["base", "LoCA", "LoRA r=4", "LoRA r=4, peft"]
    assert figures["base"]["MB held"] == 0
    assert figures["LoCA"]["MB held"] > 6 * 64 * 3 * 64 * 4 / 1e6  # the built weights of six blocks
    numbers = {name: 4 * count for name, count in {"LoCA": 12 * 200 * 2, "LoRA r=4": 12 * 4 * 128}.items()}
    for name, least in numbers.items():
        assert least + 4 * HEAD < figures[name]["file bytes"] < least + 4 * HEAD + 20_000


def test_a_loaded_adapter_must_answer_as_the_saved_one(monkeypatch):
    monkeypatch.setattr(inference, "load_adapter", lambda model, folder: None)
    with pytest.raises(RuntimeError, match=r"as trained and .* as loaded"):
        inference.main([*TINY, *ONCE])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_of_a_pipeline(tmp_path, shallow):
    found = result(pipeline_adapters.main, tmp_path / "pipeline.json", *NARROW, *ONCE)
    assert list(found["figures"]) == ["base", "LoCA", "LoRA r=4", "LoCA, low memory"]
    assert found["figures"]["LoCA"]["MB held"] > found["figures"]["LoCA, low memory"]["MB held"] > 0
    assert table_rows.rows(found)[0][-2:] == ["MB held", "file bytes"]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.0, 1.05, 1.04], "everywhere"),
        ([1.06, 2.0, 1.051], "nowhere"),
        ([1.0, 1.05, 1.06], "up to 300"),
        ([1.0, 1.06, 1.06], "up to 100"),
        ([2.0, 1.06, 1.01], "from 1000 on"),
        ([2.0, 1.0, 1.01], "from 300 on"),
        ([1.0, 1.2, 1.0], "at 100, 1000"),
        ([1.2, 1.0, 1.2], "at 300"),
    ],
)
def test_where_a_method_is_free(ratios, said):
    assert scaling.within([100, 300, 1000], ratios) == said


def test_free_is_against_the_floor_and_against_lora():
    seconds = {"floor": [1.0], "LoCA, coefficients": [1.2], "LoCA, locations": [1.3], "LoRA": [1.2], "FourierFT, peft": [3.0]}
    slower = seconds | {"LoCA, coefficients": [1.0]}
    found = scaling.free("components", {layers.Point(10, 8, 4): seconds, layers.Point(20, 8, 4): slower})
    assert found["LoCA, coefficients"] == {"ratios": [1.2, 1.0], "floor": "from 20 on", "LoRA": "everywhere"}
    assert found["FourierFT, peft"]["LoRA"] == "nowhere"
    assert "floor" not in found


@pytest.mark.parametrize("model", ["linear", "block"])
def test_scaling_and_drawing_again(model, tmp_path, monkeypatch, capsys):
    sweeps = ["--components", "10", "50", "100000", "--widths", "64", "--tokens", "8", "16", "--usual", "20", "64", "12"]
    assert scaling.main([*sweeps, "--rounds", "1", "--rank", "4", "--model", model, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["components"] for point in found["sweeps"]["components"]] == [10, 50]  # 64 x 64 has no room for more
    assert set(found["free"]) == {"components", "width", "tokens"}
    assert len(table_rows.rows(found)) == 1 + 3 * 4
    pictures = {file.name: file.read_bytes() for file in tmp_path.glob("*.png")}
    assert set(pictures) == {"components.png", "width.png", "tokens.png"}
    for name in pictures:
        (tmp_path / name).unlink()
    monkeypatch.setattr(scaling, "seconds_at", None)
    assert scaling.main(["--output", str(tmp_path), "--redraw"]) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.png")} == pictures
    capsys.readouterr()
    assert scaling.main(["--output", str(tmp_path / "none"), "--redraw"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_both_ways_to_a_gradient(tmp_path):
    one = ["--sizes", "16x16", "--tokens", "8", "--components", "4", "--projections", "1", "--repeats", "1"]
    found = result(path_costs.main, tmp_path / "paths.json", *one)
    assert [case["case"]["phase"] for case in found["cases"]] == ["coefficients", "locations"]
    assert set(found["costs"]) >= {"product", "transform", "dot"}


def made_up(**more):
    seconds = {"floor": [1.0, 2.0, 4.0], "LoCA, coefficients": [1.1, 2.2, 4.4], "LoRA r=4, peft": [1.5, 3.0, 6.0]}
    machine = {
        "processor": "Abacus",
        "gpu": None,
        "threads": 1,
        "torch": "2.0",
        "timm": "1.0",
        "diffusers": None,
        "peft": "0.1",
    }
    settings = {"rank": 4, "rounds": 3}
    trained = {"floor": 10, "LoCA, coefficients": 1234, "LoRA r=4, peft": 5678}
    about = {"benchmark": "training_step", "command": "python step.py", "settings": settings, "environment": machine}
    return about | {"trained": trained, "seconds": seconds} | more


def test_a_table_says_how_it_was_made():
    assert tables.markdown(made_up()).splitlines() == [
        "`python step.py` (Abacus, 1 thread, torch 2.0, timm 1.0, peft 0.1; medians of 3 rounds):",
        "",
        "| method | trained numbers | seconds a step | of the floor |",
        "| --- | --- | --- | --- |",
        "| floor | 10 | 2.000 | 1.00 |",
        "| LoCA, coefficients | 1,234 | 2.200 | 1.10 |",
        "| LoRA r=4, peft | 5,678 | 3.000 | 1.50 |",
    ]


def test_memory_and_operators_are_columns_where_they_were_measured():
    peaks = {"floor": 1000.0, "LoCA, coefficients": 1500.0, "LoRA r=4, peft": 2000.0}
    each = {"floor": {}, "LoCA, coefficients": {"for each": 12.34}, "LoRA r=4, peft": {"for each": 5.0}}
    header, floor, loca, _ = table_rows.rows(made_up(**{"peak MB": peaks, "operators": each}))
    assert header[4:] == ["peak MB", "of peft's LoRA", "operators a projection"]
    assert floor[4:] == ["1,000", "0.50", "-"]
    assert loca[4:] == ["1,500", "0.75", "12.3"]
    del peaks["LoRA r=4, peft"]
    without = made_up(**{"peak MB": peaks})
    without["seconds"].pop("LoRA r=4, peft")
    assert table_rows.rows(without)[0][4:] == ["peak MB"]


def test_all_training_steps_are_one_table():
    other = made_up(
        command="python examples/benchmarks/training_step.py --batch_size 3 --only floor 'LoRA r=9' --memory --rounds 2"
    )
    other["seconds"] = {"floor": [1.0], "LoRA r=9": [1.25], "LoRA r=9, peft": [1.5], "DoRA r=9": [2.0]}
    assert tables.all_steps([made_up(), {"benchmark": "inference"}, other]).splitlines() == [
        "| step | threads | floor, s | LoCA, coefficients | LoCA, locations | LoRA | LoRA, peft | FourierFT, peft |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `step.py` | 1 | 2.00 | 1.10 | - | - | 1.50 | - |",
        "| `training_step.py --batch_size 3` | 1 | 1.00 | - | - | 1.25 | 1.50 | - |",
    ]
    assert not tables.all_steps([])


def test_tables_are_written_between_the_marks(tmp_path, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    empty = f"above\n\n{tables.EVERY}\n{tables.END}\n\nbetween\n\n{tables.STEPS}\n{tables.END}\n\nbelow\n"
    page.write_text(empty)
    command = ["--results", str(results), "--write", str(page)]
    assert tables.main(command) == 0
    assert page.read_text() == empty
    (results / "b.json").write_text(json.dumps(made_up(command="python second")))
    (results / "a.json").write_text(json.dumps(made_up(command="python first")))
    (results / "c.json").write_text(json.dumps({"benchmark": "paths"}))  # which has no table
    for _ in range(2):  # again, on what is there
        assert tables.main(command) == 0
        text = page.read_text()
        assert text.startswith(f"above\n\n{tables.EVERY}\n\n`python first` (")
        assert f"|\n\n{tables.END}\n\nbetween\n\n{tables.STEPS}\n\n| step |" in text
        assert text.endswith(f"|\n\n{tables.END}\n\nbelow\n")
        assert text.count("`python second` (") == 1 and text.count("| `second` |") == 1
    (results / "d.json").write_text("{}")
    assert tables.main(command) == 2
    assert "d.json: no report of a benchmark" in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        tables.STEPS,
        f"{tables.END}\n{tables.EVERY}",
        f"{tables.EVERY}{tables.END}" * 2,
        f"{tables.EVERY}{tables.STEPS}{tables.END}",
    ],
)
def test_a_page_without_the_marks_is_left_alone(text, tmp_path, capsys):
    (page := tmp_path / "page.md").write_text(text)
    assert tables.main(["--results", str(tmp_path), "--write", str(page)]) == 2
    error = capsys.readouterr().err
    assert "expected one of the marks" in error or "expected the mark" in error
    assert page.read_text() == text


def test_the_pages_agree_with_the_results():
    folder = ROOT / "examples" / "benchmarks" / "results"
    for page in (ROOT / "docs" / "guides" / "memory_and_speed.md", folder / "README.md"):
        text = page.read_text()
        assert tables.filled(text, tables.reports_in(folder)) == text
