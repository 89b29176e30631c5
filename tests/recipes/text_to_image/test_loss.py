"""Losses against transcriptions of diffusers' scripts, on the same batch and the same noise."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.nn import functional as F

from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.draws import draws
from loca_vision.recipes.text_to_image.recipe import ImageRecipe, resolve
from loca_vision.recipes.text_to_image.task import ImageTask


@pytest.fixture(scope="module")
def recipe(base_of, subject, tmp_path_factory):
    """Of a subject with three class images."""
    folder = tmp_path_factory.mktemp("run")
    return ImageRecipe(
        str(base_of("sd")),
        instance_data_dir=subject,
        instance_prompt="a dog",
        with_prior_preservation=True,
        class_prompt="a cat",
        class_data_dir=folder / "class",
        num_class_images=3,
        prior_loss_weight=0.7,
        resolution=16,
        center_crop=True,
        train_batch_size=3,
        n_components=5,
        validation_inference_steps=1,
        output_dir=folder / "out",
        seed=3,
    )


def task_of(recipe, **changes):
    from dataclasses import replace

    given = {"resolution", "train_batch_size", "class_prompt", "class_data_dir", "num_class_images", *changes}
    return ImageTask(resolve(replace(recipe, **changes), given), Accelerator(cpu=True))


def batch_of(task, positions):
    return torch.utils.data.default_collate([task.samples[index] for index in positions])


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_prior_preservation(recipe, gamma):
    """As train_dreambooth_lora.py has it, and with an SNR gamma as its sibling for XL."""
    task = task_of(recipe, snr_gamma=gamma)
    pipe = task.models.pipe
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    batch = batch_of(task, (0, 3, 4))
    found = task.loss(pipe.unet, batch, step=5, first=0)

    one = task._draws(3, 2, (4, 8, 8), 5, 0)
    moments = torch.cat([batch["moments"][:, 0], batch["moments"][:, 1]])
    model_input = (moments[:, 0] + moments[:, 1] * one.posterior) * pipe.vae.config.scaling_factor
    noisy = scheduler.add_noise(model_input, one.noise, one.timesteps)
    texts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ["a dog"] * 3 + ["a cat"] * 3]
    with torch.no_grad():
        model_pred = pipe.unet(noisy, one.timesteps, torch.cat(texts)).sample
    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
    target, target_prior = torch.chunk(one.noise, 2, dim=0)
    loss = F.mse_loss(model_pred, target, reduction="none").mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, one.timesteps[:3])
        loss = loss * torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    wanted = loss.mean() + 0.7 * F.mse_loss(model_pred_prior, target_prior, reduction="mean")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_instance_and_class_have_noise_of_their_own(recipe):
    one = task_of(recipe)._draws(3, 2, (4, 8, 8), 0, 0)
    assert not torch.equal(one.noise[:3], one.noise[3:]) and len(one.noise) == 6


def test_captions_are_dropped_by_their_share(recipe):
    """What is dropped is the caption of the image to learn; that of the class stays."""
    task = task_of(recipe, caption_dropout=0.5)
    texts, dropped = task.data.texts, torch.tensor([True, False, True])
    found = task._texts(batch_of(task, (0, 1, 2)), 2, dropped)["text"]
    for shown, prompt in zip(found, ["", "a dog", "", "a cat", "a cat", "a cat"], strict=True):
        assert torch.equal(shown, texts[prompt]["text"].float())


def test_an_offset_of_the_noise_is_one_number_a_channel():
    def drawn(offset):
        process = Denoising(DDPMScheduler())
        return draws(3, (4, 5, 6), timestep=process.timestep, seed=1, step=2, noise_offset=offset)

    plain, moved = drawn(0.0), drawn(0.1)
    added = moved.noise - plain.noise
    assert torch.equal(plain.timesteps, moved.timesteps) and torch.equal(plain.posterior, moved.posterior)
    torch.testing.assert_close(added, added[..., :1, :1].expand(3, 4, 5, 6), atol=1e-6, rtol=0)
    assert added[..., 0, 0].unique().numel() == 12 and added.std() < 0.3


def test_the_views_of_both_images_are_of_one_bucket(recipe, tmp_path):
    task = task_of(recipe, use_aspect_ratio_buckets=True, aspect_ratio_buckets="16,16;16,32", center_crop=False)
    shapes = {tuple(task.samples[index]["pixels"].shape) for index in range(5)}
    assert shapes == {(2, 3, 16, 16), (2, 3, 16, 32)}
    assert SimpleNamespace(**vars(task.data.plan)).buckets == ((16, 16), (16, 32))
