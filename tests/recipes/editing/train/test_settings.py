"""examples/instruct_pix2pix/train.py: settings."""

import shutil

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.recipes.diffusion import train as training
from loca_vision.recipes.editing import task, validation
from loca_vision.recipes.editing.recipe import EditRecipe, resolve
from loca_vision.recipes.settings.command_line import parse
from loca_vision.storage.safetensors_file import open_safetensors
from support import pipelines as tiny
from support.edit_training import ADAPTER, LOCA, TRAIN, picture, pipeline, tensors, trained, weights
from support.scripts import main


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
    assert len(names) == 16
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
    made, scalers = training.accelerator_for, []

    def scaling(**settings):
        accelerator = made(**settings)
        accelerator.scaler = Overflowing("cpu", init_scale=2.0, growth_interval=2)
        scalers.append(accelerator.scaler)
        scalers[-1].losses = 3 * (len(scalers) - 1)  # the second run goes on after the third step
        return accelerator

    monkeypatch.setattr(training, "accelerator_for", scaling)
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


def test_packed_files(flags, tmp_path, capsys):
    sizes = [
        trained(tmp_path / name, *flags, *LOCA, "--adapter_dtype", name)["adapter_bytes"]
        for name in ("float32", "float16", "int8")
    ]
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]
    whole, exact = tensors(tmp_path / "float32" / ADAPTER), 0
    with open_adapter(tmp_path / "float16" / ADAPTER) as file:
        for key, value in file.tensors().items():
            if key.endswith(".locations"):
                exact += torch.equal(value, whole[key].sort().values)
    assert exact == sum(key.endswith(".locations") for key in whole)
    assert main(TRAIN, *flags, "--method", "lora", "--adapter_dtype", "int8", "--output_dir", tmp_path / "lora") == 2
    assert "adapter_dtype='int8': lora is stored in float32 or float16" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_a_base_of_four_channels(flags, plain_base, tmp_path, pictures, capsys):
    """conv_in is widened, trained at its own rate, saved; and a pipeline of the base with the file draws what training drew."""
    asked = (*flags, *LOCA, "--pretrained_model_name_or_path", plain_base)
    assert main(TRAIN, *asked, "--output_dir", tmp_path / "out") == 2
    assert "its UNet takes 4 channels, and sees no image to edit; --train_conv_in widens it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    out = tmp_path / "out"
    metrics = trained(out, *asked, "--train_conv_in", "--conv_in_lr", "1e-2")
    assert metrics["conv_in_parameters"] == 16 * 8 * 9 + 16
    saved, unet = tensors(out / ADAPTER), tiny.small_unet()
    trained_in = saved["full.unet.conv_in.weight"]
    assert trained_in.shape == (16, 8, 3, 3) and trained_in[:, 4:].any()
    assert (trained_in[:, :4] - unet.conv_in.weight).abs().max() < 0.1
    pipe = pipeline(plain_base)
    pipe.load_loca_weights(out)
    recipe = resolve(parse(EditRecipe, list(map(str, asked)), prog="", presets={}).settings, ())
    cases = validation.cases_of(recipe)
    drawn = task.Validation(pipe, cases, task.sampling_of(recipe), recipe.validation_scales, "loca").sheet()
    assert np.array_equal(np.asarray(drawn), picture(out / "validation-6.png"))
