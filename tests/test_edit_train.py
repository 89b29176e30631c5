"""InstructPix2Pix training, the command: what it writes, the same bits however it is run, and what it refuses."""

import json
import random
import re
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from scripts import killed, main, script, together
from test_cartoon import scene
from torch import nn

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.recipes.editing.recipe import EditRecipe
from loca_vision.storage.run_checkpoint import write_checkpoint
from loca_vision.storage.safetensors_file import open_safetensors

pytest.importorskip("datasets")
forks = pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="no fork there, or none with CUDA")
ADAPTER = "pytorch_loca_weights.safetensors"
TRAIN = "instruct_pix2pix/train"
COLUMNS = ("--original_image_column", "before", "--edited_image_column", "after")
PICTURES = ("--validation_inference_steps", "2", "--num_validation_images", "2", "--validation_scales", "0.5", "1")
LOCA = ("--n_components", "10", "--learning_rate", "2e-2", "--location_lr", "1e-2")
LOCA += ("--coefficient_steps", "2", "--location_steps", "1", "--learning_steps", "5")
SMOOTH = ("--center_crop", "--random_flip", "--adam_epsilon", "1e-4")  # so that Adam makes no step of mere rounding
METHODS = {
    "loca": LOCA,
    "sdctft": ("--n_components", "10", "--learning_rate", "2e-2"),
    "fourierft": ("--n_components", "10", "--learning_rate", "2e-2"),
    "lora": ("--rank", "2", "--learning_rate", "1e-2"),
    "selora": ("--rank", "2", "--learning_rate", "1e-2"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten pairs to train on and three to validate on, of other proportions than square."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, numbers in (("train", range(10)), ("validation", range(10, 13))):
        (folder / split).mkdir()
        rows = []
        for number in numbers:
            image = scene(32).rotate(17 * number).crop((0, 4, 32, 28))
            image.save(folder / split / f"{number}.png")
            ImageOps.invert(image).save(folder / split / f"{number}-after.png")
            names = {"before_file_name": f"{number}.png", "after_file_name": f"{number}-after.png"}
            rows.append({**names, "edit_prompt": ["make it red", "a cartoon of it"][number % 2]})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.instruct_pix2pix().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    """Stable Diffusion, of 4 channels."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(base, data, tmp_path_factory):
    """Six steps of four pairs, without pictures."""
    cache = tmp_path_factory.mktemp("cache")
    return (
        *("--pretrained_model_name_or_path", base, "--train_data_dir", data, *COLUMNS, "--cache_dir", cache),
        *("--resolution", "16", "--train_batch_size", "4", "--max_train_steps", "6", "--lr_warmup_steps", "0"),
        *("--conditioning_dropout_prob", "0.1", "--seed", "3", "--report_to", "none", *PICTURES),
    )


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take most of the time; tests of them ask for the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(script(TRAIN).train.__globals__, "cases_of", lambda recipe: [])


@pytest.fixture
def pictures():
    """Validation pictures are drawn."""


def trained(out, *arguments):
    """The metrics of a run."""
    assert main(TRAIN, "--output_dir", out, *arguments) == 0
    return json.loads((out / "metrics.json").read_text())


def tensors(file):
    with open_safetensors(file) as opened:
        return opened.tensors()


def picture(file):
    with Image.open(file) as opened:
        return np.asarray(opened)


def weights(out):
    return (out / ADAPTER).read_bytes()


def pipeline(base):
    return tiny.quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(base, safety_checker=None))


# What a run writes


def test_a_run(flags, data, base, tmp_path, pictures, capsys):
    """The pictures of a fresh pipeline with the saved adapter are those that training drew, to the last bit."""
    out = tmp_path / "out"
    metrics = trained(out, *flags, *LOCA, "--center_crop", "--checkpointing_steps", "4", "--validation_steps", "3")
    written = {path.name for path in out.iterdir()}
    pictures = {"validation-3.png", "validation-6.png", "loss.png"}
    assert written == {ADAPTER, "metrics.json", "config.yaml", "checkpoint-4", "checkpoint-6", "latents", *pictures}
    assert (metrics["trained_parameters"], metrics["location_parameters"]) == (40 * 10, 2 * 40 * 10)
    assert (metrics["steps"], metrics["batch_size"], metrics["pairs"], metrics["conv_in_parameters"]) == (6, 4, 10, 0)
    assert metrics["adapter_bytes"] == (out / ADAPTER).stat().st_size
    assert [len(metrics["curves"][name]) for name in ("loss", "lr", "phase")] == [6, 6, 6]
    assert "".join(phase[0] for phase in metrics["curves"]["phase"]) == "cclccc"
    assert "400 numbers" in capsys.readouterr().out

    command = script(TRAIN)
    recipe = command.settled(command.parse(EditRecipe, list(map(str, [*flags, *LOCA])), prog="", presets={}).settings, ())
    pipe = pipeline(base)
    pipe.load_loca_weights(out)
    cases = sys.modules["loca_vision.recipes.editing.validation"].cases_of(recipe)
    assert [case.target is not None for case in cases] == [True, True]
    drawn = command.Validation(pipe, cases, command.sampling_of(recipe), recipe.validation_scales, "loca").sheet()
    kept = picture(out / "validation-6.png")
    assert np.array_equal(np.asarray(drawn), kept)
    assert not np.array_equal(picture(out / "validation-3.png"), kept)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_loads(method, flags, base, tmp_path):
    metrics = trained(tmp_path / "out", *flags, "--method", method, *METHODS[method])
    assert metrics["trained_parameters"] > 0
    saved = tensors(tmp_path / "out" / ADAPTER)
    assert any(value.is_floating_point() and value.any() for value in saved.values())
    pipe = pipeline(base)
    pipe.load_loca_weights(tmp_path / "out")
    assert pipe.get_active_loca_adapters() == ["default_0"]


def test_pictures_change_nothing(flags, tmp_path, monkeypatch, pictures):
    trained(tmp_path / "with", *flags, *LOCA, "--use_ema", "--validation_steps", "2")
    monkeypatch.setitem(script(TRAIN).train.__globals__, "cases_of", lambda recipe: [])
    trained(tmp_path / "without", *flags, *LOCA, "--use_ema")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_pictures_of_given_images(flags, data, tmp_path, pictures):
    """Each with so many seeds; the tallest column of the sheet is as wide as there are columns."""
    image = str(data / "train" / "0.png")
    asked = ("--validation_image", image, "--validation_target", str(data / "train" / "0-after.png"))
    asked += ("--validation_prompt", "make it red", "--max_train_steps", "1")
    metrics = trained(tmp_path / "out", *flags, *LOCA, *asked)
    assert metrics["validation_picture"] == "validation-1.png"
    trained(
        tmp_path / "url",
        *flags,
        *LOCA,
        "--val_image_url",
        image,
        "--validation_prompt",
        "make it red",
        "--max_train_steps",
        "1",
    )
    mine, theirs = (picture(tmp_path / name / "validation-1.png").shape for name in ("out", "url"))
    assert mine[1] > theirs[1] and mine[0] == theirs[0]  # one column more: the target


def test_a_data_set_without_a_validation_split_says_so(flags, data, tmp_path, pictures, capsys):
    shutil.copytree(data / "train", tmp_path / "pairs" / "train")
    metrics = trained(tmp_path / "out", *flags, *LOCA, "--train_data_dir", tmp_path / "pairs", "--max_train_steps", "1")
    assert metrics["validation_picture"] is None
    assert "no validation pictures" in capsys.readouterr().out


def test_a_parquet_file_has_no_validation_split(flags, data, tmp_path, pictures, capsys):
    """Its pairs are trained on: as validation pictures they would say that all is well."""
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(data), split="train", cache_dir=str(tmp_path / "cache"))
    rows.to_parquet(str(tmp_path / "pairs.parquet"))
    at = flags.index("--train_data_dir")
    alone = (*flags[:at], *flags[at + 2 :], "--dataset_name", tmp_path / "pairs.parquet", "--max_train_steps", "1")
    metrics = trained(tmp_path / "out", *alone, *LOCA)
    assert (metrics["validation_picture"], metrics["pairs"]) == (None, 10)
    assert "no validation pictures" in capsys.readouterr().out


def test_curves_and_pictures_go_to_tensorboard(flags, tmp_path, pictures):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = trained(tmp_path / "out", *flags, *LOCA, "--report_to", "tensorboard", "--max_train_steps", "2")
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "instruct-pix2pix"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(metrics["curves"]["loss"], rel=1e-6)
    (found,) = events.Images("validation")
    assert (found.step, found.height, found.width) == (2, *picture(tmp_path / "out" / "validation-2.png").shape[:2])


# The same numbers, however


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run in one piece, to compare with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    globals_ = script(TRAIN).train.__globals__
    cases_of, globals_["cases_of"] = globals_["cases_of"], lambda recipe: []
    try:
        return out, trained(out, *flags, *LOCA, *SMOOTH)
    finally:
        globals_["cases_of"] = cases_of


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
        patch.setitem(script(TRAIN).train.__globals__, place, interrupt)
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
    accelerator = script(TRAIN).accelerator_for(precision="no", report_to="none", folder=tmp_path, moving=True)
    assert accelerator.init_handler.timeout > timedelta(hours=24)


def test_what_accelerate_is_configured_for_changes_no_loss(tmp_path, monkeypatch):
    """Losses are shared out among the parts of a step here: accelerate would do so once more. Cut models are not trained."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    settings = {"precision": "no", "report_to": "none", "folder": tmp_path, "moving": True}
    assert script(TRAIN).accelerator_for(**settings).gradient_accumulation_steps == 1
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="configured for DEEPSPEED"):
        script(TRAIN).accelerator_for(**settings)


def test_the_time_of_a_step_is_without_pictures(flags, tmp_path, monkeypatch, pictures):
    """And without checkpoints; by a clock that goes on an hour for each sheet."""
    shifted, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + shifted[0])
    drawn = script(TRAIN).Validation.sheet

    def slow(validation):
        shifted[0] += 3600
        return drawn(validation)

    monkeypatch.setattr(script(TRAIN).Validation, "sheet", slow)
    metrics = trained(tmp_path / "out", *flags, *LOCA, "--validation_steps", "2")
    assert shifted == [3 * 3600] and 0 < metrics["seconds_per_step"] < 60


def test_other_pipelines_are_refused_before_anything_is_encoded(flags, tmp_path, capsys):
    """Stable Diffusion XL loads as this pipeline, without its second text encoder."""
    tiny.stable_diffusion_xl().save_pretrained(tmp_path / "xl")
    asked = ("--pretrained_model_name_or_path", tmp_path / "xl", "--train_conv_in", "--center_crop")
    assert main(TRAIN, *flags, *LOCA, *asked, "--output_dir", tmp_path / "out") == 2
    assert "Stable Diffusion 1 and 2 can be trained so, and XL and others cannot" in capsys.readouterr().err
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


# What the settings do


def test_clipping_clips(flags, tmp_path, norms):
    trained(tmp_path / "free", *flags, *LOCA, "--max_grad_norm", "1e9")
    free = norms[:]
    norms.clear()
    limit = 0.5 * min(free)
    trained(tmp_path / "clipped", *flags, *LOCA, "--max_grad_norm", limit)
    assert norms == pytest.approx([limit] * 6, rel=1e-3)  # torch adds 1e-6 to a norm


def test_averages_are_those_of_diffusers(flags, tmp_path):
    """Of every number that was trained, at every step; locations are the last ones."""
    out = tmp_path / "out"
    trained(out, *flags, *LOCA, "--use_ema", "--ema_decay", "0.2", "--checkpointing_steps", "1")
    steps = [tensors(out / f"checkpoint-{step}" / "state.safetensors") for step in range(1, 7)]
    saved = tensors(out / ADAPTER)
    names = [name for name in steps[0] if name.startswith("model.") and name.endswith(".coefficients")]
    assert len(names) == 40
    own = [nn.Parameter(torch.zeros(10)) for _ in names]
    ema = EMAModel(own, decay=0.2)
    for step in steps:
        for parameter, name in zip(own, names, strict=True):
            parameter.data.copy_(step[name])
        ema.step(own)
    averages = {name: average for name, average in zip(names, ema.shadow_params, strict=True)}
    for name, average in averages.items():
        torch.testing.assert_close(steps[-1][name.replace("model.", "ema.")], average, rtol=1e-5, atol=1e-7)
    kept = torch.cat([value for name, value in sorted(saved.items()) if name.endswith(".coefficients")]).sort().values
    assert torch.equal(kept, torch.cat([steps[-1][name.replace("model.", "ema.")] for name in names]).sort().values)
    assert not torch.equal(kept, torch.cat([steps[-1][name] for name in names]).sort().values)


def test_the_rates(flags, tmp_path):
    """Of diffusers' schedulers, one step at each step of the optimiser."""
    metrics = trained(tmp_path / "out", *flags, *LOCA, "--lr_scheduler", "linear", "--lr_warmup_steps", "2")
    assert metrics["curves"]["lr"] == pytest.approx([2e-2 * share for share in (0, 0.5, 1, 0.75, 0.5, 0.25)])
    scaled = trained(tmp_path / "scaled", *flags, *LOCA, "--scale_lr", "--max_train_steps", "1", "--learning_rate", "1e-3")
    assert scaled["curves"]["lr"] == pytest.approx([4e-3])


def test_a_rate_that_falls_to_a_floor(flags, tmp_path):
    """As torch's own optimiser at one rate has it: the floor is of that rate, not of AdamW's usual one."""
    from diffusers.optimization import get_scheduler

    metrics = trained(tmp_path / "out", *flags, *LOCA, "--learning_rate", "2e-7", "--lr_scheduler", "polynomial")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2e-7)
    scheduler, rates = get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=6), []
    for _ in range(6):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert metrics["curves"]["lr"] == pytest.approx(rates, rel=1e-9)


def test_objectives(flags, tmp_path):
    """Each is another loss, of the same draws."""
    asked = {"plain": (), "v": ("--prediction_type", "v_prediction"), "snr": ("--snr_gamma", "1e-3")}
    losses = {
        name: trained(tmp_path / name, *flags, *LOCA, *more, "--max_train_steps", "1")["curves"]["loss"][0]
        for name, more in asked.items()
    }
    assert len(set(losses.values())) == 3 and losses["snr"] < 0.1 * losses["plain"]


def test_bf16(flags, tmp_path, pictures):
    """Frozen weights are kept in it; what is trained and saved is float32."""
    out = tmp_path / "out"
    metrics = trained(out, *flags, *LOCA, "--mixed_precision", "bf16", "--train_conv_in")
    assert metrics["mixed_precision"] == "bf16" and np.isfinite(metrics["curves"]["loss"]).all()
    with open_safetensors(out / ADAPTER) as file:
        assert {entry.dtype for entry in file.entries.values()} <= {"F32", "I32"}
    state = tensors(out / "checkpoint-6" / "state.safetensors")
    assert {value.dtype for name, value in state.items() if name.startswith("model.")} == {torch.float32}
    assert (out / "validation-6.png").exists()


class Overflowing(torch.amp.GradScaler):
    """What accelerate has for fp16, on the CPU; the second loss is too large."""

    losses = 0

    def scale(self, loss):
        self.losses += 1
        return super().scale(loss * (float("inf") if self.losses == 2 else 1))


def test_steps_that_overflow_are_skipped(flags, tmp_path, monkeypatch):
    """As in fp16 on a GPU: phase and rate stand still, and a run that goes on has the scaler's state, too."""
    globals_ = script(TRAIN).train.__globals__
    made, scalers = globals_["accelerator_for"], []

    def scaling(**settings):
        accelerator = made(**settings)
        accelerator.scaler = Overflowing("cpu", init_scale=2.0, growth_interval=2)
        scalers.append(accelerator.scaler)
        scalers[-1].losses = 3 * (len(scalers) - 1)  # the second run goes on after the third step
        return accelerator

    monkeypatch.setitem(globals_, "accelerator_for", scaling)
    few = ("--checkpointing_steps", "3", "--lr_scheduler", "linear", "--use_ema", "--max_grad_norm", "1e9")
    metrics = trained(tmp_path / "out", *flags, *LOCA, *few)
    assert "".join(phase[0] for phase in metrics["curves"]["phase"]) == "ccclcc"
    assert metrics["curves"]["lr"] == pytest.approx([2e-2 * share / 6 for share in (6, 5, 5, 4, 3, 2)])
    state = tensors(tmp_path / "out" / "checkpoint-6" / "state.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    found = trained(tmp_path / "again", *flags, *LOCA, *few, "--resume_from_checkpoint", "latest")
    assert found["curves"] == metrics["curves"] and weights(tmp_path / "again") == weights(tmp_path / "out")
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_files_of_half_the_size(flags, tmp_path):
    trained(tmp_path / "out", *flags, *LOCA, "--adapter_dtype", "float16")
    with open_safetensors(tmp_path / "out" / ADAPTER) as file:
        assert {entry.dtype for name, entry in file.entries.items() if name.endswith("coefficients")} == {"F16"}


def test_a_base_of_four_channels(flags, plain_base, tmp_path, pictures, capsys):
    """conv_in is widened, trained at its own rate, saved; and a pipeline of the base with the file draws what training drew."""
    asked = (*flags, *LOCA, "--pretrained_model_name_or_path", plain_base)
    assert main(TRAIN, *asked, "--output_dir", tmp_path / "out") == 2
    assert "its UNet takes 4 channels, and sees no image to edit; --train_conv_in widens it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    out = tmp_path / "out"
    metrics = trained(out, *asked, "--train_conv_in", "--conv_in_lr", "1e-2")
    assert metrics["conv_in_parameters"] == 16 * 8 * 9 + 16
    saved, unet = tensors(out / ADAPTER), tiny.unet()
    trained_in = saved["full.unet.conv_in.weight"]
    assert trained_in.shape == (16, 8, 3, 3) and trained_in[:, 4:].any()
    assert (trained_in[:, :4] - unet.conv_in.weight).abs().max() < 0.1
    pipe = pipeline(plain_base)
    pipe.load_loca_weights(out)
    command = script(TRAIN)
    recipe = command.settled(command.parse(EditRecipe, list(map(str, asked)), prog="", presets={}).settings, ())
    cases = sys.modules["loca_vision.recipes.editing.validation"].cases_of(recipe)
    drawn = command.Validation(pipe, cases, command.sampling_of(recipe), recipe.validation_scales, "loca").sheet()
    assert np.array_equal(np.asarray(drawn), picture(out / "validation-6.png"))


# The hub


class Hub:
    """What a run asks of it."""

    def __init__(self, token=None):
        Hub.token = token

    def create_repo(self, name, private, exist_ok):
        Hub.made = (name, private)
        return type("Url", (str,), {"repo_id": f"me/{name}"})(f"https://hub/me/{name}")

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        Hub.files = {path: (folder_path / path).read_bytes() for path in allow_patterns}


def test_upload(flags, data, tmp_path, monkeypatch, pictures, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "cartoon"
    trained(out, *flags, *LOCA, "--push_to_hub", "--hub_private", "--hub_token", "hf_secret")
    assert (Hub.token, Hub.made) == ("hf_secret", ("cartoon", True))
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/cartoon"
    assert set(Hub.files) == {"README.md", ADAPTER, "metrics.json", "config.yaml", "loss.png", "validation-6.png"}
    assert not any(b"hf_secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    _, front, text = Hub.files["README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "diffusers" and "instruct-pix2pix" in about["tags"] and "base_model" not in about
    assert "picture = pipe('make it red', image=photo" in text  # of the data, where no instruction is given
    assert 'pipe.load_loca_weights("me/cartoon")' in text and "validation-6.png" in text and str(data.parent) not in text
    compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")
    home = [str(place).encode() for place in (data.parent, tmp_path)]
    assert not [path for path, content in Hub.files.items() for place in home if place in content]
    shown = yaml.safe_load(Hub.files["config.yaml"])
    assert (shown["output_dir"], shown["train_data_dir"]) == ("cartoon", data.name)
    assert str(data) in (out / "config.yaml").read_text()  # here it is needed


def test_the_code_of_a_card_draws_what_the_picture_shows(flags, base, tmp_path, monkeypatch):
    """Of the very base, with what the adapter was trained to predict, and with the guidance of the picture."""
    from loca_vision.recipes.editing.model_card import edit_card

    metrics = trained(tmp_path / "out", *flags, *LOCA, "--prediction_type", "v_prediction", "--max_train_steps", "1")
    metrics["config"] |= {"pretrained_model_name_or_path": "a/base", "revision": "main", "validation_guidance_scale": 3.0}
    code = edit_card(metrics, "me/adapter").split("```python\n")[1].split("```")[0]
    asked = []
    pipe = pipeline(base)
    pipe.load_loca_weights = lambda name: asked.append(name)
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *one, **more: asked.append(more) or call(self, *one, **more))
    monkeypatch.setattr(
        StableDiffusionInstructPix2PixPipeline, "from_pretrained", lambda name, **more: asked.append((name, more)) or pipe
    )
    monkeypatch.setattr("diffusers.utils.load_image", lambda name: scene(16))
    exec(compile(code, "README.md", "exec"), {})
    assert asked[:2] == [("a/base", {"revision": "main"}), "me/adapter"]
    assert (asked[2]["guidance_scale"], asked[2]["image_guidance_scale"], asked[2]["num_inference_steps"]) == (3.0, 1.5, 2)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_a_base_that_is_gone_is_no_name_on_the_hub(flags, tmp_path):
    from loca_vision.recipes.editing.model_card import edit_card

    metrics = trained(tmp_path / "out", *flags, *LOCA, "--max_train_steps", "1")
    metrics["config"] |= {"pretrained_model_name_or_path": "/home/me/base", "train_data_dir": "/home/me/pairs"}
    assert "/home/me" not in edit_card(metrics, "me/adapter")


# What is refused

REFUSED = {
    "nothing": ((), "pretrained_model_name_or_path"),
    "no data": (
        ("--pretrained_model_name_or_path", "x"),
        "says where the pairs are; nothing was given",
    ),
    "both": (("--dataset_name", "a/b"), "says where the pairs are; both was given"),
    "another method's": (("--method", "lora", "--n_components", "3"), "--n_components is a setting of loca, sdctft, fourierft"),
    "rank": (("--rank", "3"), "--rank is a setting of lora, selora; the method is loca"),
    "preset": (("--preset", "cartoonisation"), "perhaps cartoonization"),
    "preset's method": (("--preset", "cartoonization", "--method", "lora"), "is for the method loca"),
    "flag": (("--learning_rte", "3"), "learning_rte"),
    "cache": (("--cache_latents",), "latents of random crops cannot be kept; say --center_crop too"),
    "dropout": (("--conditioning_dropout_prob", "0.5"), "it is a number from 0 to 1/3"),
    "gamma": (("--snr_gamma", "0"), "snr_gamma=0.0: it is a number above 0"),
    "rate": (("--learning_rate", "-1"), "learning_rate=-1.0: it is a finite number from 0 up"),
    "image": (("--validation_image", "x.png"), "--validation_prompt is missing"),
    "target": (("--validation_target", "x.png"), "1 of them for 0 validation images"),
    "guidance": (("--validation_guidance_scale", "0.5"), "guidance_scale=0.5: it is a finite number from 1 up"),
    "column": ((*LOCA, "--original_image_column", "befor"), "has no such column"),
    "resolution": (("--resolution", "17"), "resolution=17: it is a multiple of 2"),
    "batch": ((*LOCA, "--train_batch_size", "11"), "a step takes 11 pairs"),
    "components": (("--n_components", "1000"), "n_components=1000"),
    "base": (
        ("--pretrained_model_name_or_path", "nowhere/at-all"),
        "nowhere/at-all: it cannot be loaded as a pipeline",
    ),
    "fp16": (("--mixed_precision", "fp16"), "fp16: this precision needs a GPU"),
    "conv_in": (("--conv_in_lr", "1"), "conv_in_lr=1.0: say --train_conv_in too"),
    "ema": (("--ema_decay", "0.5"), "ema_decay=0.5: say --use_ema too"),
    "token": (("--hub_token", "x"), "--hub_token: say --push_to_hub too"),
    "shown token": (
        ("--hub_token", "x", "--push_to_hub", "--report_to", "wandb"),
        "the command line goes to others, and the token with it",
    ),
    "xformers": (("--enable_xformers_memory_efficient_attention",), "it needs xformers"),
    "8 bit": (("--use_8bit_adam",), "it needs bitsandbytes"),
    "config of a folder": ((*LOCA, "--dataset_config_name", "all"), "and a data set on the hub has such"),
    "checkpoint": (("--resume_from_checkpoint", "nowhere"), "'nowhere': there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_sentence_and_leave_nothing(case, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more, sentence = REFUSED[case]
    given = () if case == "nothing" else more if case == "no data" else (*flags, *more)
    assert main(TRAIN, *given, "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert sentence in said and said.strip().splitlines()[-1].startswith("train.py: "), said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".yaml", ".png")]


def test_what_resume_refuses(whole, flags, plain_base, tmp_path, capsys):
    out, _ = whole
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    same = (*flags, *LOCA, *SMOOTH, "--output_dir", out)
    cases = {
        (): "a run is in there",
        (
            "--resume_from_checkpoint",
            "latest",
            "--learning_rate",
            "1",
        ): "the finished run there has other settings: learning_rate",
    }
    for more, sentence in cases.items():
        assert main(TRAIN, *same, *more) == 2
        assert sentence in capsys.readouterr().err
    from_there = ("--output_dir", tmp_path / "out", "--resume_from_checkpoint", out / "checkpoint-6")
    assert main(TRAIN, *same, *from_there, "--targets", "q") == 2
    assert "the run there has other settings: targets=['q'], ['q', 'k', 'v', 'out'] before" in capsys.readouterr().err
    for more, sentence in {
        ("--train_batch_size", "2"): "batch_size=2, 4 before; of all 1 processes together",
        ("--max_train_samples", "5"): "the run there has other settings: max_train_samples=5",
        ("--max_train_steps", "3"): "6 steps are taken there, and this run is to have 3",
    }.items():
        assert main(TRAIN, *same, *from_there, *more) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_number_of_pairs_is_not_gone_on_with(flags, data, tmp_path, capsys):
    """The permutations of an epoch would be others."""
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    shutil.copytree(data, pairs)
    same = (*flags, *LOCA, "--train_data_dir", pairs, "--max_train_steps", "2")
    trained(out, *same)
    table = pairs / "train" / "metadata.jsonl"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:9]))
    (out / "metrics.json").unlink()  # as of a run that is killed at the end
    assert main(TRAIN, *same, "--output_dir", out, "--resume_from_checkpoint", "latest") == 2
    assert "pairs=9, 10 before" in capsys.readouterr().err


def test_runs_are_not_written_over(whole, flags, tmp_path, capsys):
    """By one that goes on from a checkpoint elsewhere, or from none."""
    out, _ = whole
    mine, same = tmp_path / "mine", (*flags, *LOCA, *SMOOTH)
    trained(mine, *same, "--max_train_steps", "1")
    (mine / "metrics.json").rename(tmp_path / "metrics.json")
    before = {path.name: path.stat().st_mtime_ns for path in mine.iterdir()}
    assert main(TRAIN, *same, "--output_dir", mine, "--resume_from_checkpoint", out / "checkpoint-6") == 2
    assert "a run is in there (checkpoint-1)" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in mine.iterdir()} == before
    (tmp_path / "metrics.json").rename(mine / "metrics.json")
    shutil.rmtree(mine / "checkpoint-1")
    assert main(TRAIN, *same, "--output_dir", mine, "--resume_from_checkpoint", "latest") == 2
    assert "the finished run there left no whole checkpoint to go on from" in capsys.readouterr().err


def test_a_finished_run_says_so_and_may_be_saved_in_another_dtype(whole, flags, tmp_path, capsys):
    out, metrics = whole
    shutil.copytree(out, tmp_path / "out")
    again = ("--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest")
    assert main(TRAIN, *flags, *LOCA, *SMOOTH, *again) == 0
    assert "finished, after step 6" in capsys.readouterr().out
    assert main(TRAIN, *flags, *LOCA, *SMOOTH, *again, "--adapter_dtype", "float16") == 0
    with open_safetensors(tmp_path / "out" / ADAPTER) as file:
        assert {entry.dtype for name, entry in file.entries.items() if name.endswith("coefficients")} == {"F16"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["curves"] == metrics["curves"]


def test_a_checkpoint_of_another_script_is_no_fault(flags, tmp_path, capsys):
    at = flags.index("--seed")
    path = write_checkpoint(tmp_path / "other", 1, {"a": torch.zeros(1)}, {"recipe": {"dataset": "digits"}})
    for given in (flags, (*flags[:at], *flags[at + 2 :])):
        assert main(TRAIN, *given, *LOCA, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", path) == 2
        assert "it is a checkpoint, but not of InstructPix2Pix training" in capsys.readouterr().err


# Settings

STOCK = {
    "revision": None, "variant": None, "dataset_name": None, "train_data_dir": None, "original_image_column": "input_image",
    "edited_image_column": "edited_image", "edit_prompt_column": "edit_prompt", "val_image_url": None,
    "validation_prompt": None, "dataset_config_name": None,
    "num_validation_images": 4, "validation_epochs": 1, "max_train_samples": None, "output_dir": "instruct-pix2pix-model",
    "cache_dir": None, "seed": None, "resolution": 256, "center_crop": False, "random_flip": False, "train_batch_size": 16,
    "num_train_epochs": 100, "max_train_steps": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "learning_rate": 1e-4, "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500,
    "conditioning_dropout_prob": None, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False,
    "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "push_to_hub": False, "hub_token": None, "hub_model_id": None, "logging_dir": "logs",
    "mixed_precision": None, "report_to": "tensorboard", "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "enable_xformers_memory_efficient_attention": False,
}  # fmt: skip


def test_flags_and_defaults_of_the_stock_script(capsys, monkeypatch):
    """As DIFFUSERS' train_instruct_pix2pix.py has them (0.42); every one is in --help."""
    settings = EditRecipe("base")
    found = {name: getattr(settings, name) for name in STOCK}
    assert found | {name: str(found[name]) for name in ("output_dir", "logging_dir")} == STOCK
    monkeypatch.setenv("COLUMNS", "200")
    assert main(TRAIN, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in EditRecipe.__dataclass_fields__)


def test_home(monkeypatch, tmp_path):
    """As in a file of settings, where no shell reads it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = script(TRAIN).settled(EditRecipe("base", dataset_name="a/b", output_dir=Path("~/out"), cache_dir=Path("~/c")), ())
    assert (recipe.output_dir, recipe.cache_dir, recipe.latents_dir) == (tmp_path / "out", tmp_path / "c", None)


def test_the_paper_s_table(base, data):
    """LoCA, Table 11."""
    command = script(TRAIN)
    needed = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(data)]
    for name, more in (("cartoonization", ("loca", 1e-4, 1.0)), ("cartoonization-fourierft", ("fourierft", 1e-3, 64.0))):
        parsed = command.parse(EditRecipe, [*needed, "--preset", name], prog="", presets=command.EDIT_PRESETS)
        of = command.settled(parsed.settings, parsed.given)
        assert (of.method, of.learning_rate, of.loca_scale) == more
        assert (of.train_batch_size, of.gradient_accumulation_steps, of.max_train_steps) == (2, 4, 10000)
        assert (of.adam_weight_decay, of.targets, of.learning_steps) == (1e-2, ("q", "k", "v", "out"), 1200)
        assert of.validation_steps == 500
        parsed = command.parse(
            EditRecipe, [*needed, "--preset", name, "--validation_epochs", "2"], prog="", presets=command.EDIT_PRESETS
        )
        of = command.settled(parsed.settings, parsed.given)
        assert (of.validation_steps, of.validation_epochs) == (None, 2)  # a flag is not passed over for a preset
