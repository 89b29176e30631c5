"""A base from nothing: it loads, resumes to the same bits, is not made twice, and its autoencoder starts as a linear codec."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from loca_vision.data.photographs import photographs_in
from loca_vision.recipes.diffusion.encoders import identity_of
from photo_pairs import INSTRUCTIONS
from small_base.photo_batches import PhotoBatches
from small_base.pipeline import Shape, small_pipeline
from small_base.stages import PHRASES
from support.photographs import photograph

SCRIPT = Path(__file__).parents[2] / "examples" / "instruct_pix2pix" / "pretrain.py"
SMALL = ["--resolution", "16", "--channels", "8", "16", "--autoencoder_channels", "16", "24", "--batch_size", "2"]
SMALL += ["--steps", "3", "--autoencoder_steps", "3", "--checkpointing_steps", "2", "--num_inference_steps", "2"]
TINY = Shape(16, (8, 16), (16, 24))


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        photograph(folder / f"{number}.png", number)
    return folder


@pytest.fixture(scope="module")
def made(pretrain, photos, tmp_path_factory):
    base = tmp_path_factory.mktemp("out") / "base"
    assert pretrain.main([str(photos), str(base), *SMALL]) == 0
    return base


def weights_of(base):
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(base, safety_checker=None)
    return [identity_of(part) for part in (pipe.vae, pipe.unet, pipe.text_encoder)]


def test_the_base_is_a_pipeline_that_edits(made):
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(made, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    edits = pipe(INSTRUCTIONS[0], image=Image.new("RGB", (16, 16)), num_inference_steps=2, output_type="np").images
    assert edits.shape == (1, 16, 16, 3) and np.isfinite(edits).all()
    assert pipe.vae.config.scaling_factor != 0.18215 and pipe.scheduler.config.prediction_type == "sample"
    record = json.loads((made / "pretrain.json").read_text())
    card = (made / "README.md").read_text()
    assert all(f"{record['measured'][name]:.2f} dB" in card for name in ("autoencoder_psnr", "identity_psnr"))
    assert "1 held-out" in card and "on 3 photographs" in card
    assert not (made / "checkpoints").exists()


@pytest.mark.parametrize("stopped", ["autoencoder", "unet"])
def test_a_stopped_run_goes_on_to_the_same_bits(pretrain, photos, made, tmp_path, monkeypatch, stopped):
    pretraining = sys.modules["small_base.stages"]
    save, written = pretraining._save, []

    def dies(model, optimizer, folder, step, about):
        save(model, optimizer, folder, step, about)
        written.append((folder.name, step))
        if written[-1] == (stopped, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(pretrain.tyro.cli(pretrain.Pretrain, args=[str(photos), str(tmp_path / "base"), *SMALL]))
    monkeypatch.setattr(pretraining, "_save", lambda *given: (written.append((given[2].name, given[3])), save(*given))[1])
    assert pretrain.main([str(photos), str(tmp_path / "base"), *SMALL]) == 0
    assert written == [("autoencoder", 2), ("autoencoder", 3), ("unet", 2), ("unet", 3)]
    assert weights_of(tmp_path / "base") == weights_of(made)
    assert (tmp_path / "base" / "pretrain.json").read_bytes() == (made / "pretrain.json").read_bytes()


def test_a_finished_base_is_not_made_again(pretrain, photos, made, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "small_pipeline", None)
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    assert pretrain.main([str(photos), str(made), *SMALL]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", "1"], "seed=0, not 1"),
        (["--image_noise", "-1"], "image_noise=-1"),
        (["--steps", "4"], "steps=3, not 4"),
        (["--steps", "0"], "steps=0"),
        (["--learning_rate", "nan"], "learning_rate=nan"),
        (["--conditioning_dropout_prob", "0.4"], "conditioning_dropout_prob=0.4"),
        (["--resolution", "18"], "multiple of 4"),
        (["--channels", "12"], "multiples of 8"),
        (["--autoencoder_channels", "24", "16"], "the second larger"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(pretrain, photos, made, capsys, flags, sentence):
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    assert pretrain.main([str(photos), str(made), *SMALL, *flags]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert before == {file: file.stat().st_mtime_ns for file in made.rglob("*")}


def test_other_photographs_are_other_settings(pretrain, made, tmp_path, capsys):
    photograph(tmp_path / "photos" / "a.png", 7)
    photograph(tmp_path / "photos" / "b.png", 8)
    assert pretrain.main([str(tmp_path / "photos"), str(made), *SMALL]) == 2
    assert "trained_on" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(pretrain, photos, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert pretrain.main([str(photos), str(tmp_path), *SMALL]) == 2
    assert "something else" in capsys.readouterr().err and [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_held_out_is_not_trained_on(pretrain, photos, tmp_path):
    wanted = pretrain.Pretrain(photos, tmp_path)
    shown, held = pretrain._parts(wanted)
    assert held and not {one.content for one in shown} & {one.content for one in held} and len(shown) + len(held) == 4
    photograph(tmp_path / "held" / "same.png", 2)
    shown, held = pretrain._parts(pretrain.Pretrain(photos, tmp_path, held_out=tmp_path / "held"))
    assert len(shown) == 3 and [one.file.name for one in held] == ["same.png"]
    with pytest.raises(ValueError, match="none of which"):
        pretrain._parts(pretrain.Pretrain(photos, tmp_path, held_out=photos))


def test_batches_are_functions_of_seed_and_step(photos):
    found = photographs_in(photos)
    batches, other = PhotoBatches.of(found, 16, 0), PhotoBatches.of(found, 16, 1)
    one = batches.batch(5, 3)
    assert one.shape == (3, 3, 16, 16) and one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, PhotoBatches.of(found, 16, 0).batch(5, 3))
    assert not torch.equal(one, batches.batch(6, 3)) and not torch.equal(one, other.batch(5, 3))


@pytest.mark.parametrize("shape", [TINY, Shape()])
def test_an_autoencoder_begins_as_a_linear_codec(shape):
    """Its latents are the mean colours of blocks, and what comes back are these, interpolated."""
    vae = small_pipeline(shape, (), 0).vae.eval()
    blocks = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    smooth = torch.nn.functional.interpolate(blocks, size=(16, 16), mode="bicubic")
    with torch.no_grad():
        latents = vae.encode(smooth).latent_dist
        decoded = vae.decode(latents.mode()).sample
    means = torch.nn.functional.avg_pool2d(smooth, 2)
    assert (latents.mode()[:, :3] - means).abs().max() < 0.01 and latents.std.max() < 0.02
    wanted = torch.nn.functional.interpolate(means, scale_factor=2, mode="bilinear")
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # at the edge there is darkness outside
    assert (decoded - wanted)[inner].abs().max() < 0.05


def test_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = (small_pipeline(TINY, PHRASES, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert identity_of(one.unet) == identity_of(same.unet) != identity_of(other.unet)


def test_words_are_tokens_and_other_texts_are_letters():
    words = small_pipeline(TINY, ["make it a cartoon"], 0).tokenizer
    assert words.tokenize("a cartoon") == ["a</w>", "cartoon</w>"]
    assert words.tokenize("dog!") == ["d", "o", "g</w>", "!</w>"]
    assert words("dog", padding="max_length").input_ids[0] == words.bos_token_id
