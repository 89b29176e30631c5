"""From photographs to a training step: the parts of InstructPix2Pix training combined."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from loca_vision import LoCAConfig, inject
from loca_vision.data.pair_views import PairTensors, View
from loca_vision.data.pairs import CARTOONIZATION, read_pairs
from loca_vision.model.conv_in import widen_conv_in
from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.draws import draws
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.diffusion.errors import denoising_loss
from loca_vision.recipes.diffusion.families.stable_diffusion import StableDiffusion
from loca_vision.recipes.editing.latent_cache import encoded, encoded_now
from loca_vision.recipes.editing.loss import without_conditioning
from support import pipelines as tiny
from support.photographs import photograph, script
from support.timm_models import randomise

pytest.importorskip("cv2")
pytest.importorskip("datasets")


def loss_of(unet, encoders, batch, one):
    """As the paper has it, on one batch."""
    process = Denoising(tiny.scheduler(), snr_gamma=5.0)
    latents = StableDiffusion(encoders.family.pipe, process).latents(batch["edited"], one.posterior)
    noisy, timesteps = process.noisy(latents, one.noise, one.timesteps)
    text, image = without_conditioning(batch["text"], batch["original"], encoders.texts([""])["text"], one.dropout, 0.2)
    prediction = unet(torch.cat([noisy, image], 1), timesteps, text).sample
    return denoising_loss(prediction, process.target(latents, one.noise, one.timesteps), process.weights(one.timesteps))


def test_one_step_is_the_same_with_and_without_a_cache(tmp_path):
    for number in range(3):
        photograph(tmp_path / "photos" / f"{number}.png", number)
    none_held = ["--test_share", "0", "--validation_share", "0"]
    assert script().main([str(tmp_path / "photos"), str(tmp_path / "set"), "--size", "16", "--crops", "2", *none_held]) == 0
    pairs = read_pairs(tmp_path / "set", columns=CARTOONIZATION, cache_dir=tmp_path / "cache")
    encoders, view = Encoders(StableDiffusion(tiny.stable_diffusion(), None)), View(16, flip=True)
    unet = tiny.unet()
    widen_conv_in(unet)
    inject(unet, LoCAConfig(n_components=6, targets=("q", "k", "v", "out")))
    randomise(unet)
    unet.conv_in.requires_grad_(True)
    learned = [p for p in unet.parameters() if p.requires_grad]
    one, gradients, losses = draws(6, (4, 8, 8), timestep=Denoising(tiny.scheduler()).timestep, seed=0, step=0), [], []
    cached = encoded(pairs, view, encoders, tmp_path / "latents", seed=0, progress=False)
    fresh = PairTensors(pairs, view, 0)
    for data, prepare in ((cached, lambda batch: batch), (fresh, partial(encoded_now, encoders=encoders))):
        (batch,) = DataLoader(data, 6)
        unet.zero_grad()
        loss = loss_of(unet, encoders, prepare(batch), one)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in learned])
    assert losses[0] == losses[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients[0])
