"""examples/instruct_pix2pix/train.py: output files."""

import shutil

import numpy as np
import pytest

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision import adapters
from loca_vision.recipes.editing import task, validation
from loca_vision.recipes.editing.recipe import EditRecipe, resolve
from loca_vision.recipes.settings.command_line import parse
from support import pipelines as tiny
from support.edit_training import ADAPTER, LOCA, METHODS, picture, pipeline, tensors, trained, weights


def test_a_run(flags, data, base, tmp_path, pictures, rendered, capsys):
    """The pictures of a fresh pipeline with the saved adapter are those that training drew, to the last bit."""
    out = tmp_path / "out"
    metrics = trained(out, *flags, *LOCA, "--center_crop", "--checkpointing_steps", "4", "--validation_steps", "3")
    written = {path.name for path in out.iterdir()}
    pictures = {"validation-3.png", "validation-6.png", "loss.png"}
    assert written == {ADAPTER, "metrics.json", "config.yaml", "checkpoint-4", "checkpoint-6", "latents", *pictures}
    assert picture(out / "loss.png").shape[1] > 200
    assert (metrics["trained_parameters"], metrics["location_parameters"]) == (16 * 10, 2 * 16 * 10)
    assert (metrics["steps"], metrics["batch_size"], metrics["pairs"], metrics["conv_in_parameters"]) == (6, 4, 10, 0)
    assert metrics["adapter_bytes"] == (out / ADAPTER).stat().st_size
    assert [len(metrics["curves"][name]) for name in ("loss", "lr", "phase")] == [6, 6, 6]
    assert "".join(phase[0] for phase in metrics["curves"]["phase"]) == "cclccc"
    assert "160 numbers" in capsys.readouterr().out

    recipe = resolve(parse(EditRecipe, list(map(str, [*flags, *LOCA])), prog="", presets={}).settings, ())
    pipe = pipeline(base)
    pipe.load_loca_weights(out)
    cases = validation.cases_of(recipe)
    assert [case.target is not None for case in cases] == [True, True]
    drawn = task.Validation(pipe, cases, task.sampling_of(recipe), recipe.validation_scales, "loca").sheet()
    kept = picture(out / "validation-6.png")
    assert np.array_equal(np.asarray(drawn), kept)
    assert not np.array_equal(picture(out / "validation-3.png"), kept)


def test_chosen_layers_learn_and_load(flags, tmp_path):
    tiny.instruct_pix2pix().save_pretrained(base := tmp_path / "base")  # of two resolutions, attention on the way up too
    flags = (*flags, "--pretrained_model_name_or_path", base)
    chosen = ("--targets", "q", "fc2", "proj_in", "--layers", "*attn2*", "*.ff", "mid_block", "!up_blocks")
    trained(tmp_path / "out", *flags, *METHODS["loca"], *chosen)
    pipe = pipeline(base)
    pipe.load_loca_weights(tmp_path / "out")
    names = set(adapters(pipe.unet, "default_0"))
    blocks = ("down_blocks.0.attentions.0.", "down_blocks.1.attentions.0.", "mid_block.attentions.0.")
    wanted = {f"{path}transformer_blocks.0.{name}" for path in blocks for name in ("attn2.q", "ff.fc2")}
    assert names == wanted | {"mid_block.attentions.0.transformer_blocks.0.attn1.q", "mid_block.attentions.0.proj_in"}
    assert all(update.coefficients.any() for update in adapters(pipe.unet, "default_0").values())


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
    monkeypatch.setattr(task, "cases_of", lambda recipe: [])
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
