"""train-image on a tiny pipeline of every family: it learns, goes on, and what is saved draws what training drew."""

import numpy as np
import pytest

from loca_vision.recipes.diffusion.drawing import pictures
from loca_vision.recipes.text_to_image.recipe import ImageRecipe, picture_of
from support.edit_training import ADAPTER, picture, tensors, weights
from support.image_training import FAMILIES, FEW, PRIOR, length_of, pipeline, run, trained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subject(family, base_of, subject, tmp_path):
    """With images of the class; stopped after two steps, it takes the others as without; the file draws the same picture."""
    base, out = base_of(family), tmp_path / "out"
    asked = ("--pretrained_model_name_or_path", base, "--instance_data_dir", subject, "--instance_prompt", "a dog", *FEW)
    asked += (*PRIOR, "--center_crop", "--random_flip", "--class_data_dir", tmp_path / "class", *length_of(family))
    shown = ("--validation_prompt", "a red dog", "--validation_scales", "0.5", "1")
    metrics = trained(out, *asked, *shown)
    assert (metrics["steps"], metrics["images"], metrics["class_images"], metrics["batch_size"]) == (4, 5, 3, 2)
    assert np.isfinite(metrics["curves"]["loss"]).all() and metrics["location_parameters"] > 0
    learned = tensors(out / ADAPTER)
    assert any(value.any() for name, value in learned.items() if name.endswith("coefficients"))

    assert run(tmp_path / "again", *asked, "--max_train_steps", "2", "--no-cache_latents") == 0
    again = trained(tmp_path / "again", *asked, "--resume_from_checkpoint", "latest")
    assert again["curves"] == metrics["curves"] and weights(tmp_path / "again") == weights(out)

    pipe = pipeline(base)
    pipe.load_loca_weights(out)
    recipe = ImageRecipe("", resolution=16, validation_inference_steps=2)
    more = {"max_sequence_length": 16} if length_of(family) else {}
    drawn = pictures(pipe, "a red dog", [3], picture_of(recipe, more))[0]
    sheet = picture(out / "validation-4.png")
    assert contains(sheet, np.asarray(drawn))
    assert not contains(sheet, np.asarray(pictures(pipe, "a red dog", [4], picture_of(recipe, more))[0]))


def contains(sheet, image):
    """Whether a picture of 16 pixels, enlarged to a cell of 128, is somewhere on a sheet."""
    cell = image.repeat(8, 0).repeat(8, 1)
    height, width = (whole - part + 1 for whole, part in zip(sheet.shape[:2], cell.shape[:2], strict=True))
    corners = np.argwhere((sheet[:height, :width] == cell[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + 128, x : x + 128], cell) for y, x in corners)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_and_buckets(family, base_of, style, tmp_path, capsys):
    base, out = base_of(family), tmp_path / "out"
    asked = ("--pretrained_model_name_or_path", base, "--train_data_dir", style, *FEW, *length_of(family))
    asked += ("--use_aspect_ratio_buckets", "--caption_dropout", "0.3", "--train_text_encoder", "--text_encoder_lr", "1e-2")
    if family in ("klein", "flux2"):
        assert run(out, *asked) == 2
        assert "has no text encoder that can be trained here" in capsys.readouterr().err and not out.exists()
        return
    metrics = trained(out, *asked)
    again = trained(tmp_path / "again", *asked, "--gradient_checkpointing")
    np.testing.assert_allclose(again["curves"]["loss"], metrics["curves"]["loss"], rtol=1e-4)
    assert [name for name in tensors(out / ADAPTER) if name.startswith("text_encoder.")]
    pipe = pipeline(base)
    pipe.load_loca_weights(out)
