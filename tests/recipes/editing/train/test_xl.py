"""InstructPix2Pix with Stable Diffusion XL."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline

from loca_vision.recipes.diffusion.families.by_pipeline import EDITING
from loca_vision.recipes.editing import validation
from loca_vision.recipes.editing.model_card import edit_card
from loca_vision.recipes.editing.recipe import EditRecipe, resolve, sampling_of
from loca_vision.recipes.settings.command_line import parse
from support import pipelines as tiny
from support.edit_training import ADAPTER, LOCA, SMOOTH, picture, tensors, trained, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of 8 channels: noise and image."""
    folder = tmp_path_factory.mktemp("xl")
    pipe = tiny.stable_diffusion_xl()
    pipe.unet = tiny.small_xl_unet(channels=8)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(flags, base):
    return (*flags, *LOCA, *SMOOTH, "--pretrained_model_name_or_path", base)


def test_what_is_saved_draws_what_training_drew(asked, base, tmp_path, pictures):
    out = tmp_path / "out"
    metrics = trained(out, *asked)
    card = edit_card(metrics, "me/adapter")
    assert "pipe = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(" in card and "height=16, width=16)" in card
    assert metrics["steps"] == 6 and np.isfinite(metrics["curves"]["loss"]).all()
    assert any(value.any() for name, value in tensors(out / ADAPTER).items() if name.endswith("coefficients"))
    recipe = resolve(parse(EditRecipe, list(map(str, asked)), prog="", presets={}).settings, ())
    pipe = tiny.quiet(StableDiffusionXLInstructPix2PixPipeline.from_pretrained(base, add_watermarker=False))
    pipe.load_loca_weights(out)
    cases = validation.cases_of(recipe)
    drawn = validation.Validation(pipe, cases, sampling_of(recipe), recipe.validation_scales, "loca").sheet()
    assert np.array_equal(np.asarray(drawn), picture(out / "validation-6.png"))


def test_a_cache_changes_no_loss_and_a_run_goes_on(asked, tmp_path):
    cached = trained(tmp_path / "cached", *asked)
    plain = trained(tmp_path / "plain", *asked, "--no-cache_latents", "--max_train_steps", "4")
    again = trained(tmp_path / "plain", *asked, "--no-cache_latents", "--resume_from_checkpoint", "latest")
    assert plain["curves"]["loss"] == cached["curves"]["loss"][:4] and again["curves"] == cached["curves"]
    assert weights(tmp_path / "plain") == weights(tmp_path / "cached")


def test_texts_and_sizes_are_those_of_inference(base):
    """What the UNet is told in training is what the pipeline tells it for an image of that size."""
    pipe = tiny.quiet(StableDiffusionXLInstructPix2PixPipeline.from_pretrained(base, add_watermarker=False))
    family = EDITING[type(pipe).__name__](pipe, None)
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.unet, "forward", lambda *_, **given: told.update(given) or (torch.zeros(3, 4, 8, 8),))
        image = torch.zeros(1, 3, 16, 16)
        pipe("a cat", image=image, height=16, width=16, num_inference_steps=1, output_type="latent")
    texts = family.texts(["a cat"])
    assert torch.equal(told["encoder_hidden_states"][:1], texts["text"])
    assert torch.equal(told["added_cond_kwargs"]["text_embeds"][:1], texts["pooled"])
    assert told["added_cond_kwargs"]["time_ids"][0].tolist() == [16, 16, 0, 0, 16, 16]
