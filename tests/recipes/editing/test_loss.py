"""What InstructPix2Pix leaves out, against a transcription of the stock script."""

import pytest
import torch
from diffusers import DDPMScheduler

from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.draws import draws
from loca_vision.recipes.editing.loss import dropped, without_conditioning

UNIFORM = torch.tensor([0.0, 0.04999, 0.05, 0.0999, 0.1, 0.1499, 0.15, 0.5, 0.9999])


def test_what_is_dropped():
    no_text, no_image = dropped(UNIFORM, 0.05)
    assert no_text.tolist() == [True] * 4 + [False] * 5
    assert no_image.tolist() == [False] * 2 + [True] * 4 + [False] * 3
    assert not any(mask.any() for mask in dropped(UNIFORM, 0.0))


def test_dropping_is_that_of_the_stock_script():
    uniform, count, probability = UNIFORM, len(UNIFORM), 0.05
    text, image, null = torch.randn(count, 6, 8), torch.randn(count, 4, 3, 5), torch.randn(1, 6, 8)
    prompt_mask = (uniform < 2 * probability).reshape(count, 1, 1)
    wanted_text = torch.where(prompt_mask, null, text)
    image_mask = 1 - ((uniform >= probability).to(image.dtype) * (uniform < 3 * probability).to(image.dtype))
    wanted_image = image_mask.reshape(count, 1, 1, 1) * image
    for given in (null, null[0]):
        found = without_conditioning(text, image, given, UNIFORM, probability)
        assert torch.equal(found[0], wanted_text) and torch.equal(found[1], wanted_image)
    half = without_conditioning(text.bfloat16(), image.bfloat16(), null, UNIFORM, probability)
    assert half[0].dtype == half[1].dtype == torch.bfloat16


def test_each_kind_is_dropped_as_often_as_it_should():
    no_text, no_image = dropped(draws(4000, (1,), timestep=Denoising(DDPMScheduler()).timestep, seed=0, step=0).dropout, 0.05)
    shares = [(no_text & ~no_image), (no_text & no_image), (no_image & ~no_text)]
    assert all(abs(share.float().mean() - 0.05) < 0.012 for share in shares)


@pytest.mark.parametrize("probability", [-0.1, 0.4, float("nan")])
def test_a_wrong_probability_is_refused(probability):
    with pytest.raises(ValueError, match="conditioning_dropout_prob"):
        dropped(UNIFORM, probability)
