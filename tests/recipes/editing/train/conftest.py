"""Fixtures of the tests in recipes/editing/train/."""

import json

import pytest
from PIL import ImageOps

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.recipes.editing import task
from support import pipelines as tiny
from support.edit_training import COLUMNS, LOCA, PICTURES, SMOOTH, trained
from support.photographs import scene


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten pairs to train on and three to validate on, of other proportions than square."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, numbers in (("train", range(10)), ("validation", range(10, 13))):
        (folder / split).mkdir()
        rows = []
        for number in numbers:
            image = scene(32).rotate(17 * number).crop((0, 4, 32, 28))
            image.save(folder / split / f"{number}.png")
            ImageOps.invert(image).save(folder / split / f"{number}-after.png")
            names = {"before_file_name": f"{number}.png", "after_file_name": f"{number}-after.png"}
            rows.append({**names, "edit_prompt": ["make it red", "a cartoon of it"][number % 2]})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.small(tiny.instruct_pix2pix()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    """Stable Diffusion, of 4 channels."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.small(tiny.stable_diffusion()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(base, data, tmp_path_factory):
    """Six steps of four pairs, without pictures."""
    cache = tmp_path_factory.mktemp("cache")
    return (
        *("--pretrained_model_name_or_path", base, "--train_data_dir", data, *COLUMNS, "--cache_dir", cache),
        *("--resolution", "16", "--train_batch_size", "4", "--max_train_steps", "6", "--lr_warmup_steps", "0"),
        *("--conditioning_dropout_prob", "0.1", "--seed", "3", "--report_to", "none", *PICTURES),
    )


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take most of the time; tests of them ask for the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(task, "cases_of", lambda recipe: [])


@pytest.fixture
def pictures():
    """Validation pictures are drawn."""


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run in one piece, to compare with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "cases_of", lambda recipe: [])
        return out, trained(out, *flags, *LOCA, *SMOOTH)
