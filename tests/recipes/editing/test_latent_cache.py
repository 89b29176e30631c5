"""Latents and texts on disk: the same tensors as without, computed once, even after kills and damage."""

import logging
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from loca_vision.data.pair_views import PairTensors, View
from loca_vision.data.pairs import Pair
from loca_vision.recipes.diffusion import cache as diffusion_cache
from loca_vision.recipes.diffusion.encoders import Encoders, words_of
from loca_vision.recipes.diffusion.families.stable_diffusion import StableDiffusion
from loca_vision.recipes.editing.latent_cache import encoded, encoded_now
from loca_vision.storage.tensor_store import TensorStore
from support import pipelines as tiny
from support.pairs import Listed, picture

FLIPPED = View(16, flip=True)


def encoders_of(vae, text_encoder, tokenizer):
    pipe = tiny.stable_diffusion()
    pipe.vae, pipe.text_encoder, pipe.tokenizer = vae, text_encoder, tokenizer
    encoders = Encoders(StableDiffusion(pipe, None))
    encoders.words = (text_encoder, tokenizer)
    return encoders


@pytest.fixture(scope="module")
def encoders():
    return encoders_of(tiny.vae(), tiny.text_encoder(), tiny.tokenizer())


@pytest.fixture
def counted(encoders, monkeypatch):
    """How many images and texts are encoded."""
    calls = Counter()

    def counting(name):
        inner = getattr(Encoders, name)

        def outer(self, given):
            calls[name] += len(given)
            return inner(self, given)

        return outer

    for name in ("moments", "texts"):
        monkeypatch.setattr(Encoders, name, counting(name))
    return calls


def some(count=5):
    prompts = ["a cat", "make it red", "a cartoon of a dog"]
    return Listed([Pair(picture(i, (24, 16)), picture(50 + i, (24, 16)), prompts[i % 3]) for i in range(count)])


def made(encoders, folder, pairs=None, view=FLIPPED, seed=3):
    return encoded(pairs or some(), view, encoders, folder, seed=seed, progress=False)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_the_same_with_and_without(encoders, tmp_path, dtype):
    encoders = encoders_of(tiny.vae().to(dtype), tiny.text_encoder().to(dtype), encoders.words[1])
    cached, plain = made(encoders, tmp_path), PairTensors(some(), FLIPPED, 3)
    for epoch in range(3):
        cached.set_epoch(epoch)
        plain.set_epoch(epoch)
        for one, other in zip(DataLoader(cached, 2), DataLoader(plain, 2), strict=True):
            assert equal(one, encoded_now(other, encoders)) and one["edited"].dtype == dtype
    assert one["original"].shape == (1, 4, 8, 8) and one["edited"].shape == (1, 2, 4, 8, 8) and one["text"].shape == (1, 12, 24)


def test_the_latents_are_those_of_the_stock_script(encoders, tmp_path):
    item, pixels = made(encoders, tmp_path, view=View(16))[0], PairTensors(some(), View(16), 3)[0]
    with torch.no_grad():
        original = encoders.vae.encode(pixels["original"][None]).latent_dist.mode()[0]
        edited = encoders.vae.encode(pixels["edited"][None]).latent_dist
        words = encoders.words[1](["a cat"], max_length=12, padding="max_length", truncation=True, return_tensors="pt")
        text = encoders.words[0](words.input_ids)[0][0]
    assert torch.equal(item["original"], original) and torch.equal(item["text"], text)
    drawn = edited.sample(torch.Generator().manual_seed(1))[0]
    mean, deviation = item["edited"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))[0]
    assert torch.equal(mean + deviation * noise, drawn)


def test_an_image_may_be_original_and_edited_at_once(encoders, tmp_path):
    pairs = Listed([Pair(picture(0, (16, 16)), picture(0, (16, 16)), "a cat")])
    item = made(encoders, tmp_path, pairs, View(16))[0]
    assert torch.equal(item["original"], item["edited"][0]) and item["edited"].shape == (2, 4, 8, 8)


def test_both_views_are_cached_and_each_epoch_chooses(encoders, tmp_path):
    cached = made(encoders, tmp_path)
    seen = set()
    for epoch in range(8):
        cached.set_epoch(epoch)
        seen.add(cached[0]["original"].numpy().tobytes())
    assert len(seen) == 2


def test_nothing_is_computed_twice(encoders, counted, tmp_path):
    first = made(encoders, tmp_path)
    assert counted == {"moments": 20, "texts": 3}
    again = made(encoders, tmp_path)
    assert counted == {"moments": 20, "texts": 3} and equal(first[2], again[2])
    more = made(encoders, tmp_path, some(6), view=View(16))
    assert counted == {"moments": 22, "texts": 3} and equal(more[1], made(encoders, tmp_path, view=View(16))[1])


def test_the_cache_is_keyed_by_all_that_it_depends_on(encoders, counted, tmp_path):
    made(encoders, tmp_path, view=View(16))
    counted.clear()
    made(encoders, tmp_path, view=View(8))
    assert counted == {"moments": 10}  # another size; the texts are the same
    counted.clear()
    other = tiny.vae()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    made(encoders_of(other, encoders.words[0], encoders.words[1]), tmp_path, view=View(16))
    made(
        encoders_of(tiny.vae().bfloat16(), encoders.words[0], encoders.words[1]),
        tmp_path,
        view=View(16),
    )
    assert counted == {"moments": 20}
    counted.clear()
    made(encoders_of(encoders.vae, tiny.text_encoder(5), encoders.words[1]), tmp_path, view=View(16))
    shorter = tiny.tokenizer()
    shorter.model_max_length = 9
    made(encoders_of(encoders.vae, encoders.words[0], shorter), tmp_path, view=View(16))
    assert counted == {"texts": 6}


def test_one_changed_pixel_is_another_image(encoders, counted, tmp_path):
    pairs = some(2)
    made(encoders, tmp_path, pairs, View(16))
    counted.clear()
    pixels = np.array(pairs.pairs[1].edited)
    pixels[8, 12, 0] ^= 255
    pairs.pairs[1] = pairs.pairs[1]._replace(edited=Image.fromarray(pixels))
    made(encoders, tmp_path, pairs, View(16))
    assert counted == {"moments": 1}


def test_what_was_computed_before_an_interrupt_stays(encoders, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion_cache, "SHARD", 4)
    pairs = some()
    whole = made(encoders, tmp_path / "whole", pairs)
    counted.clear()

    class Interrupted(Listed):
        def __getitem__(self, index):
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        made(encoders, tmp_path / "out", Interrupted(pairs.pairs))
    assert counted["moments"] == 12
    again = made(encoders, tmp_path / "out", pairs)
    assert counted["moments"] == 20 and all(equal(whole[i], again[i]) for i in range(5))


def test_a_damaged_file_is_made_anew(encoders, counted, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(diffusion_cache, "SHARD", 4)
    first = made(encoders, tmp_path, view=View(16))
    files = sorted(tmp_path.glob("latents-*/shard-*.safetensors"))
    lost = sum(len(load_file(file)) for file in files[:2])
    data = bytearray(files[0].read_bytes())
    data[-5] ^= 1  # one bit of one number
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:-8])
    counted.clear()
    with caplog.at_level(logging.WARNING):
        again = made(encoders, tmp_path, view=View(16))
    assert len(caplog.records) == 2 and "SHA-256" in caplog.text
    assert counted["moments"] == lost
    assert all(equal(first[i], again[i]) for i in range(5))


def test_files_of_another_model_are_refused(encoders, tmp_path):
    made(encoders, tmp_path, view=View(16))
    (mine,) = tmp_path.glob("latents-*")
    other = encoders_of(tiny.vae().bfloat16(), encoders.words[0], encoders.words[1])
    made(other, tmp_path / "other", view=View(16))
    (theirs,) = (tmp_path / "other").glob("latents-*/shard-*")
    (mine / theirs.name).write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match="does not belong in this folder"):
        made(encoders, tmp_path, view=View(16))


def test_autocast_and_training_mode_change_nothing(encoders, tmp_path):
    plain = made(encoders, tmp_path / "plain", view=View(16))
    text_encoder = tiny.text_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        inside = made(
            encoders_of(tiny.vae().train(), text_encoder.train(), encoders.words[1]),
            tmp_path / "in",
            view=View(16),
        )
    assert all(equal(plain[i], inside[i]) for i in range(5)) and not text_encoder.training


def test_workers_of_other_processes_can_have_it(encoders, tmp_path):
    cached = made(encoders, tmp_path)
    cached.set_epoch(2)
    assert equal(pickle.loads(pickle.dumps(cached))[3], cached[3])


def test_random_crops_cannot_be_cached(encoders, tmp_path):
    with pytest.raises(ValueError, match="crop='random'"):
        made(encoders, tmp_path, view=View(16, crop="random"))


def test_the_tokenizer_is_the_same_after_a_call(encoders):
    fresh = tiny.tokenizer()
    before = words_of(fresh)
    fresh(["a cat"], max_length=7, padding="max_length", truncation=True)
    assert words_of(fresh) == before


# The store


def test_tensors_come_back_bit_for_bit(tmp_path):
    values = {"a": torch.tensor([1.0, -0.0, float("inf")]), "b": torch.randn(2, 3).bfloat16(), "c": torch.randn(()).half()}
    TensorStore(tmp_path, "mine").add({"a": values["a"]})
    store = TensorStore(tmp_path, "mine")
    store.add({name: values[name] for name in "bc"})
    for found in (store, TensorStore(tmp_path, "mine")):
        assert len(found) == 3 and "d" not in found
        for name, value in values.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            assert found[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def test_a_file_cut_short_while_open_is_told(tmp_path):
    store = TensorStore(tmp_path, "mine")
    store.add({"a": torch.randn(64)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(OSError, match="cut short"):
        store["a"]


def test_a_key_that_was_changed_in_the_header_is_noticed(tmp_path, caplog):
    TensorStore(tmp_path, "mine").add({"aaaa": torch.randn(4)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b'"aaaa"', b'"bbbb"'))
    with caplog.at_level(logging.WARNING):
        assert len(TensorStore(tmp_path, "mine")) == 0
    assert not list(tmp_path.iterdir()) and "removed" in caplog.text


def test_latents_made_in_tiles_are_others(encoders, tmp_path):
    """At 32 pixels, of an autoencoder whose tiles are of 16."""
    vae, view = tiny.vae(), View(32)
    tiled = encoders_of(vae, encoders.words[0], encoders.words[1])
    whole = made(tiled, tmp_path, view=view)[0]["original"]
    vae.enable_tiling()
    item = PairTensors(some(), view, 3)[0]
    found = made(tiled, tmp_path, view=view)[0]["original"]
    assert torch.equal(found, tiled.moments(item["original"][None])[0, 0]) and not torch.equal(found, whole)


def test_an_autoencoder_that_overflows_is_refused_and_nothing_is_kept(encoders, tmp_path):
    vae = tiny.vae().half()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(6e4)
    broken = encoders_of(vae, encoders.words[0], encoders.words[1])
    with pytest.raises(ValueError, match=r"not finite in torch\.float16: bring the autoencoder to torch\.float32"):
        made(broken, tmp_path)
    assert not list(tmp_path.rglob("latents-*/*"))
