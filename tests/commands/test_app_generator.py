"""A pipeline behind the page: its pictures are those of direct calls; the mix that is written is the mix that is shown."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

import loca_vision.diffusers as face
from loca_vision import LoCAConfig, LoRAConfig, adapters, inject
from loca_vision.commands.app.generator import Wanted, generator_of, inputs_of, read_generator
from loca_vision.commands.app.mixture import FORMS, write_mix
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from support import pipelines as tiny

LOCA, DIFFUSERS, KOHYA = FORMS
STEPS = {"num_inference_steps": 2}


def strong(model, seed):
    """Give every update of the adapter values that show in a picture."""
    generator = torch.Generator().manual_seed(seed)
    for update in adapters(model).values():
        for parameter in update.trainable():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folders of two LoCA adapters and a LoRA, for both tiny pipelines."""
    found = {}
    configs = {"ink": LoCAConfig(n_components=20), "warm": LoCAConfig(n_components=9, seed=3), "low": LoRAConfig(r=2)}
    for seed, (name, config) in enumerate(configs.items()):
        pipe = tiny.small(tiny.stable_diffusion())
        inject(pipe.unet, config)
        strong(pipe.unet, seed)
        found[name] = tmp_path_factory.mktemp(name)
        face.save_loca_weights(pipe, found[name])
    return found


def generator(sources, *names):
    return generator_of(tiny.small(tiny.stable_diffusion()), {name: str(sources[name]) for name in names}, sources["ink"])


def direct(sources, strengths, prompt="a cat", seed=5):
    """The picture as a user of the library makes it."""
    pipe = tiny.small(tiny.stable_diffusion())
    for name in strengths:
        face.load_loca_weights(pipe, sources[name], name)
    if strengths:
        face.set_loca_adapters(pipe, list(strengths), list(strengths.values()))
    return np.asarray(pipe(prompt, **STEPS, generator=torch.Generator().manual_seed(seed)).images[0])


def test_pictures_are_those_of_direct_calls(sources):
    strengths, heard = {"ink": 0.5, "warm": 2.0}, []
    wanted = Wanted("a cat", 5, strengths, settings=STEPS)
    made = list(generator(sources, "ink", "warm").pictures(wanted, lambda done, of: heard.append((done, of))))
    assert [title for _, title in made] == ["Base", "ink at 0.5", "warm at 2", "Mix of all"]
    expected = [direct(sources, chosen) for chosen in ({}, {"ink": 0.5}, {"warm": 2.0}, strengths)]
    assert all(np.array_equal(picture, other) for (picture, _), other in zip(made, expected, strict=True))
    assert len({other.tobytes() for other in expected}) == 4
    assert heard == [(step, 8) for step in range(1, 9)]


def test_one_adapter_has_no_mix(sources):
    one = generator(sources, "ink")
    assert [title for title, _ in one.columns({"ink": 1.0})] == ["Base", "ink at 1"]


def test_another_request_between_two_pictures_changes_nothing(sources):
    shared = generator(sources, "ink")
    first = shared.pictures(Wanted("a cat", 5, {"ink": 0.5}, settings=STEPS))
    next(first)
    list(shared.pictures(Wanted("a dog", 6, {"ink": 2.0}, settings=STEPS)))
    assert np.array_equal(next(first)[0], direct(sources, {"ink": 0.5}))


def test_a_photograph_where_the_pipeline_takes_one(sources):
    pipe = tiny.small(tiny.instruct_pix2pix())
    inject(pipe.unet, LoCAConfig(n_components=5))
    face.save_loca_weights(pipe, sources["ink"].parent / "edit")
    edits = generator_of(tiny.small(tiny.instruct_pix2pix()), {"edit": str(sources["ink"].parent / "edit")}, sources["ink"])
    assert edits.takes_image
    with pytest.raises(ValueError, match="starts from a photograph"):
        next(edits.pictures(Wanted("make it red", 0, {"edit": 1.0})))
    photograph = Image.new("RGB", (16, 16), "red")
    base, _ = next(edits.pictures(Wanted("make it red", 0, {"edit": 1.0}, photograph, STEPS)))
    wanted = tiny.small(tiny.instruct_pix2pix())(
        "make it red", photograph, **STEPS, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.array_equal(base, wanted)


def test_what_is_missing_is_told(sources):
    with pytest.raises(ValueError, match="Expected a prompt"):
        next(generator(sources, "ink").pictures(Wanted("  ", 0, {"ink": 1.0})))
    pipe = StableDiffusionInpaintPipeline.__new__(StableDiffusionInpaintPipeline)
    with pytest.raises(ValueError, match="it takes 'mask_image', which this page cannot give"):
        inputs_of(pipe)


def test_a_folder_of_a_pipeline(sources, tmp_path):
    tiny.small(tiny.stable_diffusion()).save_pretrained(tmp_path / "base")
    read = read_generator(str(tmp_path / "base"), {"ink": str(sources["ink"])}, tmp_path)
    assert isinstance(read.pipe, StableDiffusionPipeline) and read.summary == "StableDiffusionPipeline, with adapters in unet"
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="it cannot be loaded as a pipeline"):
        read_generator(str(tmp_path / "empty"), {}, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_generator(str(tmp_path / "nowhere"), {}, tmp_path)


@pytest.mark.parametrize("strengths", [{"ink": 0.5, "warm": 2.0}, {"ink": 0.5}, {"ink": 0.5, "warm": 0.0}])
def test_the_mix_that_is_written_is_the_mix_that_is_shown(sources, tmp_path, strengths):
    file, said = write_mix(sources, strengths, LOCA, 16, tmp_path)
    assert "without loss" in said
    mixed = direct(sources | {"mix": file}, {"mix": 1.0}).astype(int)
    assert abs(mixed - direct(sources, strengths)).max() <= 1
    assert abs(mixed - direct(sources, {})).max() > 1


def test_a_mix_with_a_lora_is_a_lora(sources, tmp_path):
    strengths = {"ink": 0.5, "low": 1.5}
    file, said = write_mix(sources, strengths, LOCA, 32, tmp_path)
    assert said.startswith("A LoRA of rank 32: ")
    mixed = direct(sources | {"mix": file}, {"mix": 1.0}).astype(int)
    assert abs(mixed - direct(sources, strengths)).max() <= 2


def update(path, module):
    made = read_source(path).read(module, None)
    return made.delta() if isinstance(made, LowRankPair) else made


@pytest.mark.parametrize("form", [DIFFUSERS, KOHYA])
def test_a_mix_for_other_programs(sources, tmp_path, form):
    file, said = write_mix(sources, {"ink": 1.0, "low": 0.5}, form, 32, tmp_path)
    assert said.startswith("A LoRA of rank 32: ")
    modules = read_source(file).shapes
    assert len(modules) == 8
    for module in modules:
        wanted = update(sources["ink"], module) + 0.5 * update(sources["low"], module)
        assert torch.allclose(update(file, module), wanted, atol=1e-4)


def test_a_mix_of_nothing_is_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="there is nothing to write"):
        write_mix(sources, {"ink": 0.0, "warm": 0.0}, LOCA, 16, tmp_path)
    assert not list(tmp_path.iterdir())
