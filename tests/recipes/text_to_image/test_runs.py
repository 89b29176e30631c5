"""train-image: runs that give the same numbers, class images, captions, averages, cards."""

import json
import random

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from loca_vision.recipes.diffusion.drawing import Picture, pictures
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.text_to_image import class_pictures
from loca_vision.recipes.text_to_image.model_card import image_card
from support.edit_training import ADAPTER, METHODS, tensors, weights
from support.image_training import FEW, PRIOR, TRAIN, captioned, photographs, pipeline, run, trained
from support.scripts import killed, together


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_loads(method, dreambooth, base_of, tmp_path):
    plain = (
        "--n_components",
        "--location_lr",
        "--coefficient_steps",
        "--location_steps",
        "--learning_steps",
        "--learning_rate",
    )
    trained(tmp_path / "out", *without(dreambooth, plain), "--method", method, *METHODS[method])
    pipe = pipeline(base_of("sd"))
    pipe.load_loca_weights(tmp_path / "out")
    assert any(value.any() for name, value in tensors(tmp_path / "out" / ADAPTER).items() if value.is_floating_point())


def without(words, flags):
    """A command line without some flags and their values."""
    left = list(words)
    for flag in flags:
        at = left.index(flag)
        del left[at : at + 2]
    return tuple(left)


def test_killed_runs_go_on_to_the_same_bits(dreambooth, tmp_path):
    """With text encoders, random crops, averages, worker processes and images of the class."""
    hard = (*dreambooth, *PRIOR, "--no-center_crop", "--random_flip", "--use_ema", "--train_text_encoder", "--caption_dropout")
    hard += ("0.2", "--dataloader_num_workers", "1", "--checkpointing_steps", "1", "--class_data_dir", tmp_path / "class")
    metrics, chance = trained(tmp_path / "whole", *hard), random.Random(2)
    killed(tmp_path / "out", 2, chance.random() * 0.05, *hard, command=(TRAIN,))
    again = trained(tmp_path / "out", *hard, "--resume_from_checkpoint", "latest")
    assert again["curves"] == metrics["curves"] and weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_locations_by_the_gradient(dreambooth, tmp_path):
    """The first of three steps chooses; a run goes on from there to the same bits."""
    chosen = (*dreambooth, "--max_train_steps", "3", "--location_init", "gradient", "--location_batches", "1")
    chosen += ("--location_rule", "sampled")
    metrics = trained(tmp_path / "whole", *chosen)
    assert len(metrics["curves"]["loss"]) == 3 and metrics["curves"]["lr"][0] == 0 and metrics["curves"]["phase"][0] is None
    killed(tmp_path / "out", 2, 0.0, *chosen, "--checkpointing_steps", "1", command=(TRAIN,))
    again = trained(tmp_path / "out", *chosen, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest")
    assert again["curves"] == metrics["curves"] and weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("more", [(), ("--train_text_encoder",)])
def test_two_processes_are_one(more, dreambooth, tmp_path):
    """Of a subject with images of the class, which they draw together, in several shapes."""
    asked = (*dreambooth, *PRIOR, "--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "16,16;16,24", *more)
    one = trained(tmp_path / "one", *asked, "--class_data_dir", tmp_path / "class", "--train_batch_size", "4")
    log, out = tmp_path / "log.txt", tmp_path / "two"
    told = (*asked, "--class_data_dir", tmp_path / "other", "--train_batch_size", "1", "--gradient_accumulation_steps", "2")
    assert together(log, *told, "--output_dir", out, name=TRAIN) == [0, 0], log.read_text()
    found = json.loads((out / "metrics.json").read_text())
    assert (found["processes"], found["batch_size"], one["batch_size"]) == (2, 4, 4)
    assert same_files(tmp_path / "class", tmp_path / "other") == 3
    np.testing.assert_allclose(found["curves"]["loss"], one["curves"]["loss"], rtol=1e-4)
    torch.testing.assert_close(tensors(out / ADAPTER), tensors(tmp_path / "one" / ADAPTER), rtol=1e-3, atol=1e-4)


def same_files(one, other):
    """How many files two folders of images have, after asserting that they show the same but for rounding."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        with Image.open(one / name) as mine, Image.open(other / name) as theirs:
            assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 1
    return len(names)


def test_the_autoencoder_of_xl_is_exact_under_autocast(base_of, tmp_path):
    """In pictures too: latents go through it in float32."""
    pipe, how = pipeline(base_of("xl")), Picture(16, 16, 1)
    seen, decode = [], type(pipe.vae.decoder).forward

    def spy(decoder, latents, *more):
        seen.append((latents.dtype, torch.is_autocast_enabled("cpu"), decode(decoder, latents, *more)))
        return seen[-1][2]

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(type(pipe.vae.decoder), "forward", spy)
        pictures(pipe, "a cat", [1], how)
    assert [one[:2] for one in seen] == [(torch.float32, False)] and seen[0][2].dtype == torch.float32
    assert "decode" not in vars(pipe.vae) and "encode" not in vars(pipe.vae)


@pytest.mark.parametrize(
    ("more", "rest"),
    [((), ["vae", "text_encoder"]), (("--no-cache_latents",), ["text_encoder"]), (("--train_text_encoder",), ["vae"])],
)
def test_what_has_encoded_everything_leaves_the_device(more, rest, dreambooth, tmp_path, monkeypatch):
    """And is there again for pictures."""
    moved = []

    def move(encoders, device):
        names = {id(getattr(encoders.family.pipe, name)): name for name in ("vae", "text_encoder")}
        moved.append((str(device), [names[id(model)] for model in encoders.resting]))

    monkeypatch.setattr(Encoders, "_move", move)
    trained(tmp_path / "out", *dreambooth, *more, "--validation_prompt", "a cat", "--validation_steps", "2")
    assert moved == [("cpu", rest)] * 5  # at the start, and to the device and back for each of two pictures


def test_only_missing_class_images_are_drawn_and_those_that_are_there_count(dreambooth, tmp_path, monkeypatch):
    asked = (*dreambooth, *PRIOR, "--class_data_dir", tmp_path / "class", "--sample_batch_size", "1")
    drawn, draw = [], class_pictures.pictures

    def broken(pipe, prompt, seeds, how, *, scale):
        assert (prompt, scale) == ("a cat", 0)
        drawn.append(seeds)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(pipe, prompt, seeds, how, scale=scale)

    monkeypatch.setattr(class_pictures, "pictures", broken)
    assert run(tmp_path / "out", *asked) == 130
    assert [path.name for path in (tmp_path / "class").iterdir()] == ["class-00000.png"]
    trained(tmp_path / "out", *asked)
    assert len(drawn) == 4 and drawn[1] == drawn[2]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "class").iterdir()}
    trained(tmp_path / "again", *asked)
    assert len(drawn) == 4 and before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "class").iterdir()}

    photographs(tmp_path / "mine", 4)  # of any names: nothing is drawn
    metrics = trained(tmp_path / "third", *asked, "--class_data_dir", tmp_path / "mine")
    assert len(drawn) == 4 and metrics["class_images"] == 3


def test_captions_that_are_cut_are_counted(dreambooth, base_of, tmp_path, capsys):
    folder = captioned(tmp_path / "style")
    (folder / "2.txt").write_text("a red dog " * 20)
    asked = ("--pretrained_model_name_or_path", base_of("sd"), "--train_data_dir", folder, *FEW, "--max_train_steps", "1")
    assert trained(tmp_path / "out", *asked)["cut_captions"] == 1
    said = capsys.readouterr().out
    assert (
        "1 of 5 captions are longer than the 12 tokens that are read, and are cut there; the first is number 2, with 62" in said
    )


def test_a_small_set_fills_its_batches(dreambooth, tmp_path):
    """Three images and batches of eight."""
    folder = photographs(tmp_path / "dog", 3)
    asked = (*dreambooth, "--instance_data_dir", folder, "--train_batch_size", "8", "--num_train_epochs", "2")
    at = asked.index("--max_train_steps")
    metrics = trained(tmp_path / "out", *asked[:at], *asked[at + 2 :])
    assert (metrics["steps"], metrics["images"], metrics["batch_size"]) == (2, 3, 8)


def test_a_yaml_file_makes_the_run_again(dreambooth, tmp_path):
    trained(tmp_path / "out", *dreambooth)
    config = tmp_path / "out" / "config.yaml"
    trained(tmp_path / "again", "--config", config)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


class Hub:
    """What a run asks of it."""

    def __init__(self, token=None):
        pass

    def create_repo(self, name, private, exist_ok):
        return type("Url", (str,), {"repo_id": f"me/{name}"})(f"https://hub/me/{name}")

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        Hub.files = {path: (folder_path / path).read_bytes() for path in allow_patterns}


def test_upload_and_the_code_of_the_card(dreambooth, base_of, subject, tmp_path, monkeypatch):
    """The code draws the picture of the validation's seed, by the names of a hub."""
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "dog"
    metrics = trained(out, *dreambooth, "--push_to_hub", "--validation_prompt", "a red dog")
    assert set(Hub.files) == {"README.md", ADAPTER, "metrics.json", "config.yaml", "loss.png", "validation-4.png"}
    _, front, text = Hub.files["README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["pipeline_tag"] == "text-to-image" and {"dreambooth", "loca"} <= set(about["tags"])
    assert "The subject was shown as `a dog`." in text and str(tmp_path) not in text
    home = [str(place).encode() for place in (subject.parent, tmp_path)]
    assert not [path for path, content in Hub.files.items() for place in home if place in content]

    metrics["config"] |= {"pretrained_model_name_or_path": "a/base"}
    code = image_card(metrics, "me/dog").split("```python\n")[1].split("```")[0]
    pipe, asked = pipeline(base_of("sd")), []
    pipe.load_loca_weights = lambda name: asked.append(name)
    monkeypatch.setattr(type(pipe), "from_pretrained", lambda name, **more: asked.append((name, more)) or pipe)
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    assert asked == [("a/base", {}), "me/dog"] and found["picture"].size == (16, 16)
