"""Measures of images against formulas and small reimplementations; CLIP with a tiny model from a folder."""

import math
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.signal import convolve2d
from transformers import CLIPImageProcessor, CLIPModel

from loca_vision.recipes.reports.image_quality import Clip, Perceptual, finite, psnr, similarity, ssim
from support import pipelines as tiny
from support.clip import write_tiny_clip
from support.photographs import scene


def noisy(image, amount, seed=0):
    drawn = np.random.default_rng(seed).normal(0, amount, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + drawn, 0, 255).astype(np.uint8))


def wang(one, other):
    """SSIM of one channel in [0, 1], written after the paper: equation 13, with the window of section III B."""
    at = np.arange(11) - 5
    window = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(values):
        return convolve2d(values, window, mode="valid")

    a, b = mean(one), mean(other)
    variances = mean(one**2) - a**2, mean(other**2) - b**2
    shared = mean(one * other) - a * b
    small, smaller = 0.01**2, 0.03**2
    return ((2 * a * b + small) * (2 * shared + smaller) / ((a**2 + b**2 + small) * (sum(variances) + smaller))).mean()


@pytest.fixture(scope="module")
def pictures():
    one = scene(40).convert("RGB").crop((0, 0, 40, 30))
    return one, noisy(one, 25)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_tiny_clip(folder)
    return folder


def test_psnr_is_its_formula(pictures):
    one, other = pictures
    error = ((np.asarray(one, float) - np.asarray(other, float)) ** 2).mean()
    assert psnr(one, other) == pytest.approx(10 * math.log10(255**2 / error), rel=1e-6) == psnr(other, one)
    black, grey = (Image.new("RGB", (12, 12), (value,) * 3) for value in (0, 51))
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert psnr(one, one) == math.inf and finite(math.inf) is None and finite(1.5) == 1.5


def test_ssim_is_that_of_the_paper(pictures):
    one, other = (np.asarray(image, float) / 255 for image in pictures)
    wanted = np.mean([wang(one[..., channel], other[..., channel]) for channel in range(3)])
    assert ssim(*pictures) == pytest.approx(wanted, rel=1e-6) and 0 < wanted < 0.95
    assert ssim(pictures[0], pictures[0]) == pytest.approx(1)


def test_what_cannot_be_compared(pictures):
    one, _ = pictures
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="40 x 30 and 30 x 40 pixels: those that are compared have one size"):
            measure(one, one.transpose(Image.Transpose.ROTATE_90))
    with pytest.raises(ValueError, match="pictures must have at least 11 pixels a side, got 10 x 12"):
        ssim(one.resize((10, 12)), one.resize((10, 12)))


def test_clip_directions_are_those_of_the_model(clip_folder, pictures):
    clip, (one, other) = Clip(clip_folder), pictures
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(images=[one, other], return_tensors="pt")
    words = tiny.tokenizer()("make it red", return_tensors="pt")
    with torch.no_grad():
        found = model(**pixels, **words)
    logits = found.logits_per_image[:, 0] / model.logit_scale.exp()
    for picture, wanted in zip((one, other), logits.tolist(), strict=True):
        assert similarity(clip.image(picture), clip.text("make it red")) == pytest.approx(wanted, abs=1e-5)
    a, b = (clip.image(picture) for picture in (one, other))
    assert similarity(a, a) == pytest.approx(1, abs=1e-6) and similarity(a, b) == similarity(b, a) < 1
    assert a.shape == (8,) and float(a.norm()) == pytest.approx(1)
    assert clip.text("a cat " * 40).shape == (8,)  # cut to what the model takes


def test_clip_that_cannot_be_had(tmp_path):
    with pytest.raises(OSError, match="it cannot be read as a CLIP model"):
        Clip(tmp_path)
    with pytest.raises(OSError, match="nobody/no-model: it cannot be read as a CLIP model"):
        Clip("nobody/no-model")


def test_lpips_that_cannot_be_had(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match=r"the weights of AlexNet are not available \(.*no route"):
        Perceptual()


@pytest.fixture
def random_alexnet(monkeypatch):
    import torchvision

    original = torchvision.models.alexnet

    def seeded(weights):
        torch.manual_seed(0)
        return original(weights=None)

    monkeypatch.setattr(torchvision.models, "alexnet", seeded)


def test_lpips_tells_pictures_apart(random_alexnet):
    one = scene(64).convert("RGB")
    measure = Perceptual()
    near, far = measure(one, noisy(one, 5)), measure(one, noisy(one, 60))
    assert measure(one, one) == 0 < near < far and measure(noisy(one, 5), one) == pytest.approx(near)
    assert measure(one, noisy(one, 5)) == near  # nothing is left of the pairs before
    with pytest.raises(ValueError, match="at least 64 pixels a side"):
        measure(one.resize((32, 32)), one.resize((32, 32)))
