"""examples/instruct_pix2pix/train.py: runs that must give the same numbers."""

import json
import random
import re
import sys
import time
from datetime import timedelta

import pytest
import torch

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.recipes.diffusion import train as training
from loca_vision.recipes.editing import task
from support import pipelines as tiny
from support.edit_training import ADAPTER, LOCA, METHODS, SMOOTH, TRAIN, tensors, trained, weights
from support.scripts import killed, main, together

forks = pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="no fork there, or none with CUDA")


def test_caching_changes_nothing(whole, flags, tmp_path):
    out, metrics = whole
    found = trained(tmp_path / "out", *flags, *LOCA, *SMOOTH, "--no-cache_latents")
    assert found["curves"] == metrics["curves"] and weights(tmp_path / "out") == weights(out)
    assert not (tmp_path / "out" / "latents").exists() and (out / "latents").exists()


def test_its_settings_make_the_same_run(whole, tmp_path):
    out, _ = whole
    assert main(TRAIN, "--config", out / "config.yaml", "--output_dir", tmp_path / "again") == 0
    assert weights(tmp_path / "again") == weights(out)
    before = (out / "config.yaml").read_text()
    assert main(TRAIN, "--config", out / "config.yaml", "--resume_from_checkpoint", "latest") == 0  # nothing is left to do
    assert (out / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "more",
    [
        ("--train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        ("--train_batch_size", "1", "--gradient_accumulation_steps", "4"),
        ("--gradient_checkpointing",),
        ("--dataloader_num_workers", "1"),
    ],
    ids=" ".join,
)
def test_what_changes_nothing_but_memory_and_time(more, whole, flags, tmp_path):
    """One optimiser step of so many pairs, however it is cut: the same draws and the same mean."""
    out, metrics = whole
    found = trained(tmp_path / "out", *flags, *LOCA, *SMOOTH, *more)
    assert found["batch_size"] == 4
    assert found["curves"]["loss"] == pytest.approx(metrics["curves"]["loss"], rel=1e-5)
    mine, theirs = tensors(tmp_path / "out" / ADAPTER), tensors(out / ADAPTER)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_runs_go_on_to_the_same_bits(flags, tmp_path, capsys):
    """With random crops, averages, a rate that falls, and worker processes; killed twice."""
    hard = ("--random_flip", "--use_ema", "--lr_scheduler", "cosine", "--dataloader_num_workers", "1")
    hard += ("--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    chance, out = random.Random(1), tmp_path / "out"
    metrics = trained(tmp_path / "whole", *flags, *LOCA, *hard)
    for moment, resume in ((2, ()), (4, ("--resume_from_checkpoint", "latest"))):
        killed(out, moment, chance.random() * 0.05, *LOCA, *hard, *resume, command=(TRAIN, *flags))
        assert not (out / "metrics.json").exists()
    found = trained(out, *flags, *LOCA, *hard, "--resume_from_checkpoint", "latest")
    assert re.search(r"going on after step \d of 6", capsys.readouterr().out)
    assert weights(out) == weights(tmp_path / "whole") and found["curves"] == metrics["curves"]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


@pytest.mark.parametrize("place", ["draw_loss", "write_metrics", "end_trackers"])
def test_interrupted_behind_the_last_step(place, whole, flags, tmp_path, monkeypatch, capsys):
    """Between the last checkpoint, the adapter and the metrics, and when all is there."""
    out, metrics = whole

    def interrupt(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, place, interrupt)
        assert main(TRAIN, *flags, *LOCA, *SMOOTH, "--output_dir", tmp_path / "out") == 130
    assert "interrupted; every file that is there is whole" in capsys.readouterr().err
    found = trained(tmp_path / "out", *flags, *LOCA, *SMOOTH, "--resume_from_checkpoint", "latest")
    assert found["curves"] == metrics["curves"] and weights(tmp_path / "out") == weights(out)


def test_a_run_is_made_longer(flags, tmp_path):
    """Where the rates do not depend on the length; from a checkpoint that is named, in another folder."""
    trained(tmp_path / "whole", *flags, *LOCA)
    trained(tmp_path / "half", *flags, *LOCA, "--max_train_steps", "3")
    again = ("--resume_from_checkpoint", tmp_path / "half" / "checkpoint-3")
    trained(tmp_path / "more", *flags, *LOCA, *again)
    trained(tmp_path / "half", *flags, *LOCA, "--resume_from_checkpoint", "latest")
    assert weights(tmp_path / "more") == weights(tmp_path / "half") == weights(tmp_path / "whole")


def test_a_run_goes_on_with_its_batches_cut_otherwise(whole, flags, tmp_path, capsys):
    """As on fewer processes, or after one ran out of memory; diffusers' scripts name a checkpoint of the output folder so."""
    out, metrics = whole
    trained(tmp_path / "out", *flags, *LOCA, *SMOOTH, "--max_train_steps", "3")
    smaller = ("--train_batch_size", "2", "--gradient_checkpointing", "--resume_from_checkpoint", "checkpoint-3")
    assert main(TRAIN, *flags, *LOCA, *SMOOTH, *smaller, "--output_dir", tmp_path / "out") == 2
    assert "the finished run there took 4 pairs a step, not 2" in capsys.readouterr().err
    found = trained(tmp_path / "out", *flags, *LOCA, *SMOOTH, *smaller, "--gradient_accumulation_steps", "2")
    assert found["curves"]["loss"] == pytest.approx(metrics["curves"]["loss"], rel=1e-5)
    torch.testing.assert_close(tensors(tmp_path / "out" / ADAPTER), tensors(out / ADAPTER), rtol=1e-3, atol=1e-5)


@forks
@pytest.mark.parametrize("method", ["loca", "lora"])
def test_two_processes_are_one(method, flags, tmp_path, pictures):
    """Half of the pairs of each step each; the cache is filled by the first, which draws, too, while the other waits."""
    more = (*flags, "--method", method, *METHODS[method], *SMOOTH, "--use_ema")
    more += ("--gradient_accumulation_steps", "2", "--validation_steps", "4", "--num_validation_images", "1")
    metrics = trained(tmp_path / "one", *more, "--train_batch_size", "2")
    log, out = tmp_path / "log.txt", tmp_path / "two"
    assert together(log, *more, "--train_batch_size", "1", "--output_dir", out, name=TRAIN) == [0, 0], log.read_text()
    found = json.loads((out / "metrics.json").read_text())
    assert (found["processes"], found["batch_size"]) == (2, 4)
    assert found["curves"]["loss"] == pytest.approx(metrics["curves"]["loss"], rel=1e-4)
    mine, theirs = tensors(out / ADAPTER), tensors(tmp_path / "one" / ADAPTER)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_processes_have_time_to_wait(tmp_path):
    """For the one that encodes thousands of pairs, hours in full size; torch's limit is 10 minutes on GPUs."""
    accelerator = training.accelerator_for(precision="no", report_to="none", folder=tmp_path, moving=True)
    assert accelerator.init_handler.timeout > timedelta(hours=24)


def test_what_accelerate_is_configured_for_changes_no_loss(tmp_path, monkeypatch):
    """Losses are shared out among the parts of a step here: accelerate would do so once more. Cut models are not trained."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    settings = {"precision": "no", "report_to": "none", "folder": tmp_path, "moving": True}
    assert training.accelerator_for(**settings).gradient_accumulation_steps == 1
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="configured for DEEPSPEED"):
        training.accelerator_for(**settings)


def test_the_time_of_a_step_is_without_pictures(flags, tmp_path, monkeypatch, pictures):
    """And without checkpoints; by a clock that goes on an hour for each sheet."""
    shifted, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + shifted[0])
    drawn = task.Validation.sheet

    def slow(validation):
        shifted[0] += 3600
        return drawn(validation)

    monkeypatch.setattr(task.Validation, "sheet", slow)
    metrics = trained(tmp_path / "out", *flags, *LOCA, "--validation_steps", "2")
    assert shifted == [3 * 3600] and 0 < metrics["seconds_per_step"] < 60


def test_other_pipelines_are_refused_before_anything_is_encoded(flags, tmp_path, capsys):
    """A UNet of other texts than the pipeline's encoder gives loads all the same."""
    pipe = tiny.stable_diffusion()
    pipe.unet = tiny.unet(cross_attention_dim=16)
    pipe.save_pretrained(tmp_path / "base")
    asked = ("--pretrained_model_name_or_path", tmp_path / "base", "--train_conv_in", "--center_crop")
    assert main(TRAIN, *flags, *LOCA, *asked, "--output_dir", tmp_path / "out") == 2
    assert "its UNet takes more than texts of width 24, which its text encoders give" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_seed_is_drawn_where_none_is_given(flags, tmp_path):
    """And a run that goes on has it, too."""
    at = flags.index("--seed")
    loose = (*flags[:at], *flags[at + 2 :], *LOCA)
    seeds = [trained(tmp_path / name, *loose, "--max_train_steps", "2")["config"]["seed"] for name in ("one", "two")]
    assert seeds[0] != seeds[1]
    found = trained(tmp_path / "one", *loose, "--resume_from_checkpoint", "latest")
    assert found["config"]["seed"] == seeds[0] and found["steps"] == 6
    assert f"seed: {seeds[0]}\n" in (tmp_path / "one" / "config.yaml").read_text()
