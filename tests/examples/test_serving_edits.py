"""Batches of edits, each by the adapter that it names."""

from __future__ import annotations

import json
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import editing_images
from editing_images import Editor
from loca_vision import LoCAConfig, LoRAConfig, adapters, inject
from loca_vision.diffusers import load_loca_weights, save_loca_weights
from loca_vision.recipes.editing.edit import Sampling, edit, square
from refusals import Refusal, Reply
from request_options import Options
from serving_settings import Settings
from support import pipelines as tiny
from support.serving import encoded, photo

SHORT = {"prompt": "make it red", "steps": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("styles")
    for index, config in enumerate([LoCAConfig(n_components=5), LoRAConfig(r=2), LoCAConfig(n_components=9)]):
        pipe = tiny.instruct_pix2pix()
        inject(pipe.unet, config)
        torch.manual_seed(index)
        for update in adapters(pipe.unet).values():
            for parameter in update.trainable():
                torch.nn.init.normal_(parameter, std=20 if isinstance(config, LoCAConfig) else 0.4)
        save_loca_weights(pipe, folder / f"style-{index}")
    (folder / "broken.safetensors").write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def editor(folder, monkeypatch):
    monkeypatch.setattr(editing_images, "_pipeline", lambda source: tiny.instruct_pix2pix())
    return Editor(Settings(folder, pipeline="base", image_size=16))


def asked(editor, name, seed=1, **more):
    """An edit of the photograph of that number, which is the seed, too."""
    query = list((SHORT | {"seed": str(seed)} | more).items())
    return editor.asked(name, encoded(photo(seed)), Options(query))


def pixels(reply):
    assert isinstance(reply, Reply) and reply.kind == "image/png", reply
    return np.asarray(Image.open(BytesIO(reply.body))).astype(int)


def alone(folder, name, seed=1, steps=2, prompt="make it red"):
    pipe = tiny.instruct_pix2pix()
    load_loca_weights(pipe, folder / name)
    return np.asarray(edit(pipe, square(photo(seed), 16), prompt, Sampling(steps, 7.0, 1.5), seed=seed)).astype(int)


def test_each_edit_is_that_of_a_pipeline_with_its_adapter_alone(editor, folder):
    """Up to one of 255 levels, which rounding may cross."""
    names = ["style-0", "style-2", "style-1", "style-0"]
    found = [pixels(reply) for reply in editor.answers([asked(editor, name, seed) for seed, name in enumerate(names)])]
    for seed, (name, edited) in enumerate(zip(names, found, strict=True)):
        assert np.abs(edited - alone(folder, name, seed)).max() <= 1
    other = alone(folder, "style-1", 0)
    assert np.abs(found[0] - other).max() > 3  # one taken for another would be noticed


def test_seeds_prompts_and_steps_are_each_requests_own(editor, folder):
    requests = [
        asked(editor, "style-0", 1),
        asked(editor, "style-0", 1, steps="3"),
        asked(editor, "style-0", 1, prompt="a cat"),
        asked(editor, "style-0", 2),
    ]
    first, longer, cat, seeded = map(pixels, editor.answers(requests))
    assert np.abs(first - alone(folder, "style-0", 1)).max() <= 1
    assert np.abs(longer - alone(folder, "style-0", 1, steps=3)).max() <= 1
    assert np.abs(cat - alone(folder, "style-0", 1, prompt="a cat")).max() <= 1
    assert np.abs(seeded - alone(folder, "style-0", 2)).max() <= 1


def test_only_edits_of_the_same_sampling_are_drawn_together(editor, monkeypatch):
    sizes, draw = [], type(editor.pipe).__call__

    def counted(pipe, prompts, **more):
        sizes.append(len(prompts))
        return draw(pipe, prompts, **more)

    monkeypatch.setattr(type(editor.pipe), "__call__", counted)
    steps = ["2", "3", "2", "2"]
    editor.answers([asked(editor, f"style-{index % 3}", steps=one) for index, one in enumerate(steps)])
    assert sizes == [3, 1]


def test_neighbours_of_a_broken_adapter_have_their_edits(editor, folder):
    first, broken, last = editor.answers([asked(editor, name) for name in ("style-0", "broken", "style-2")])
    assert np.abs(pixels(first) - alone(folder, "style-0")).max() <= 1
    assert np.abs(pixels(last) - alone(folder, "style-2")).max() <= 1
    assert isinstance(broken, Refusal) and broken.status == 422 and str(folder) not in broken.sentence
    assert editor.shelf.loads == 2


def test_what_the_safety_checker_hides_is_refused(editor, monkeypatch):
    black = Image.new("RGB", (16, 16))
    drawn = SimpleNamespace(images=[black, black], nsfw_content_detected=[True, False])
    monkeypatch.setattr(type(editor.pipe), "__call__", lambda *given, **more: drawn)
    hidden, shown = editor.answers([asked(editor, "style-0"), asked(editor, "style-1")])
    assert (hidden.status, shown.status) == (422, 200) and "safety checker" in json.loads(hidden.body)["error"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompt": ""}, "prompt: expected a text of 1 to 1000 characters"),
        ({"prompt": "x" * 1001}, "got 1001"),
        ({"seed": "-1"}, "seed='-1'"),
        ({"seed": str(2**63)}, "seed="),
        ({"steps": "51"}, "from 1 to 50"),
        ({"guidance_scale": "0.5"}, "guidance_scale"),
        ({"guidance": "2"}, "no option 'guidance'; perhaps guidance_scale"),
    ],
)
def test_options_out_of_range_are_refused(editor, more, words):
    with pytest.raises(Refusal, match=words) as caught:
        editor.asked("style-0", encoded(photo(1)), Options(list((SHORT | more).items())))
    assert caught.value.status == 400


def test_a_size_that_the_pipeline_does_not_take_is_refused(folder, editor):
    with pytest.raises(ValueError, match="image_size=17: expected a multiple of"):
        Editor(Settings(folder, pipeline="base", image_size=17))


@pytest.mark.parametrize("source", ["no/such/folder", "nothing"])
def test_a_missing_pipeline_is_one_sentence(folder, source):
    with pytest.raises(OSError, match=f"pipeline='{source}': there is no such folder"):
        Editor(Settings(folder, pipeline=source))
