"""Adapters beside a model: loaded when they are asked for, checked as files always are, and gone when there is no room."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loca_vision.diffusers  # noqa: F401  which adds the methods
from loca_vision import AdapterStore, LoCAConfig, LoRAConfig, adapters, inject, load_adapter, per_sample, remove, save_adapter
from loca_vision.methods import packed_update
from loca_vision.serving.held_file import FileReader
from support import pipelines
from support.mixed import KINDS, stir
from support.timm_models import tiny

ROOM = 10**9


def model() -> Any:
    torch.manual_seed(0)
    return tiny("vit").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each kind, in files and in folders."""
    made = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(KINDS.items()):
        own = model()
        inject(own, config)
        stir(own, "default")
        nn.init.normal_(own.head.weight)
        save_adapter(own, made / (name if number % 2 else f"{name}.safetensors"))
    (made / "notes.txt").write_text("nothing")
    (made / "empty").mkdir()
    return made


@torch.no_grad()
def alone(folder: Path, name: str | None, x: Tensor) -> Tensor:
    own = model()
    if name is not None:
        load_adapter(own, folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors")
    result: Tensor = own(x)
    return result


@torch.no_grad()
def mixed(own: nn.Module, names: Any, x: Tensor) -> Tensor:
    with per_sample(own, names):
        result: Tensor = own(x)
    return result


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_adapters_of_every_kind_are_loaded_when_they_are_asked_for(folder: Path) -> None:
    own, x, names = model(), torch.randn(len(KINDS) + 1, 3, 32, 32), [*KINDS, None]
    keys, store = set(own.state_dict()), AdapterStore(folder, capacity_bytes=ROOM, base=own)
    assert store.names() == sorted(KINDS) and store.held_names() == [] and "lora" in store and "empty" not in store
    found = mixed(own, names, x)
    for sample, name in enumerate(names):
        close(found[sample], alone(folder, name, x[sample : sample + 1])[0])
    assert store.held_names() == list(KINDS) and store.held_bytes > 0
    assert set(own.state_dict()) == keys
    close(own(x), alone(folder, None, x))


def test_what_is_held_has_the_gradient_of_the_images(folder: Path) -> None:
    own, x = model(), torch.randn(2, 3, 32, 32, requires_grad=True)
    AdapterStore(folder, capacity_bytes=ROOM, base=own)
    with per_sample(own, ["loca", "fourierft"]):
        found = torch.autograd.grad(own(x).square().sum(), x)[0]
    for sample, name in enumerate(["loca", "fourierft"]):
        other, one = model(), x[sample : sample + 1].detach().requires_grad_()
        load_adapter(other, folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors")
        wanted = torch.autograd.grad(other(one).square().sum(), one)[0][0]
        assert (found[sample] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_the_models_own_adapters_come_first_and_may_go(folder: Path) -> None:
    own, x = model(), torch.randn(2, 3, 32, 32)
    store = AdapterStore(folder, capacity_bytes=ROOM, base=own)
    wanted = alone(folder, "lora", x)
    close(mixed(own, ["lora", "lora"], x), wanted)
    inject(own, LoCAConfig(n_components=9), "lora")
    stir(own, "lora")
    assert not torch.allclose(mixed(own, ["lora", "lora"], x), wanted)
    remove(own)
    close(mixed(own, ["lora", "lora"], x), wanted)  # layers stay hosts of the store
    store.detach()
    assert type(own.blocks[0].attn.qkv) is nn.Linear
    with pytest.raises(ValueError, match="VisionTransformer has no adapter"), per_sample(own, ["lora"]):
        pass


def test_the_least_recently_used_leave(folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"a{number}.safetensors").write_bytes((folder / "loca.safetensors").read_bytes())
    one = AdapterStore(tmp_path, capacity_bytes=ROOM, base=model())
    one.load("a0")
    store = AdapterStore(tmp_path, capacity_bytes=2 * one.held_bytes + 10, base=model())
    for name in ("a0", "a1", "a0", "a2"):
        store.load(name)
    assert store.held_names() == ["a0", "a2"] and store.held_bytes <= store.capacity_bytes
    small = AdapterStore(tmp_path, capacity_bytes=one.held_bytes - 1, base=model())
    with pytest.raises(ValueError, match=r"adapter 'a0' takes [\d,]+ bytes, and capacity_bytes=[\d,]+"):
        small.load("a0")
    assert small.held_names() == []


def test_a_batch_larger_than_the_store_keeps_what_it_uses(folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"a{number}.safetensors").write_bytes((folder / "loca.safetensors").read_bytes())
    own, x = model(), torch.randn(3, 3, 32, 32)
    probe = AdapterStore(tmp_path, capacity_bytes=ROOM, base=model())
    probe.load("a0")
    store = AdapterStore(tmp_path, capacity_bytes=probe.held_bytes, base=own)
    close(mixed(own, ["a0", "a1", "a2"], x), alone(folder, "loca", x))
    assert store.held_names() == ["a2"]


def test_threads_load_an_adapter_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, usual = [], FileReader.read

    def slow(self: FileReader, name: str, file: Path) -> Any:
        reads.append(name)
        time.sleep(0.05)
        return usual(self, name, file)

    monkeypatch.setattr(FileReader, "read", slow)
    own, x = model(), torch.randn(2, 3, 32, 32)
    AdapterStore(folder, capacity_bytes=ROOM, base=own)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(mixed(own, ["loca", "lora"], x))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == ["loca", "lora"] and len(found) == 6
    for answer in found:
        close(answer[:1], alone(folder, "loca", x[:1]))
        close(answer[1:], alone(folder, "lora", x[1:]))


def replace(file: Path, data: bytes) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(data)
    new.replace(file)


def test_a_file_that_is_replaced_is_loaded_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, own, x = tmp_path / "a.safetensors", model(), torch.randn(2, 3, 32, 32)
    loca, other = (folder / "loca.safetensors").read_bytes(), (folder / "fourierft.safetensors").read_bytes()
    file.write_bytes(loca)
    store = AdapterStore(tmp_path, capacity_bytes=ROOM, base=own)
    close(mixed(own, ["a", "a"], x), alone(folder, "loca", x))
    replace(file, other)
    close(mixed(own, ["a", "a"], x), alone(folder, "fourierft", x))
    replace(file, other[:-8])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            close(mixed(own, ["a", "a"], x), alone(folder, "fourierft", x))
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once, not at every call
    assert "its new file is not used, and the old one stays" in caplog.text and "a" in store.problems
    replace(file, loca)
    close(mixed(own, ["a", "a"], x), alone(folder, "loca", x))
    assert store.problems == {}
    file.unlink()
    with pytest.raises(ValueError, match="no adapter 'a'"), per_sample(own, ["a"]):
        pass


def test_a_broken_file_is_refused_and_the_next_one_is_not(folder: Path, tmp_path: Path) -> None:
    own, file = model(), tmp_path / "a.safetensors"
    store = AdapterStore(tmp_path, capacity_bytes=ROOM, base=own)
    file.write_bytes((folder / "loca.safetensors").read_bytes()[:-4])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"adapter 'a': .*a\.safetensors: the tensors fill"):
            store.load("a")
    replace(file, (folder / "loca.safetensors").read_bytes())
    store.load("a")
    assert store.held_names() == ["a"]


def test_files_of_one_form_are_still_checked_value_by_value(folder: Path, tmp_path: Path) -> None:
    own, data = model(), bytearray((folder / "loca.safetensors").read_bytes())
    (tmp_path / "good.safetensors").write_bytes(data)
    data[-4:] = b"\xff\xff\xff\x7f"  # the last number becomes NaN, or the last cell lies outside
    (tmp_path / "bad.safetensors").write_bytes(data)
    store = AdapterStore(tmp_path, capacity_bytes=ROOM, base=own)
    store.load("good")
    with pytest.raises(ValueError, match=r"bad\.safetensors: .*(holds NaN or infinity|matrix has cells)"):
        store.load("bad")


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".", "a.safetensors", "x" * 101, "a\0", "ä"])
def test_no_name_leaves_the_folder(folder: Path, name: str) -> None:
    own = model()
    store = AdapterStore(folder, capacity_bytes=ROOM, base=own)
    assert name not in store
    with pytest.raises(ValueError, match="no adapter"):
        store.load(name)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(folder / "loca.safetensors")
    with pytest.raises(ValueError, match="it is a link that leaves the folder"):
        AdapterStore(tmp_path, capacity_bytes=ROOM, base=model()).load("a")


def test_a_repository_lists_and_fetches_from_the_cache_without_a_connection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    top = tmp_path / "models--shops--adapters"
    for name in ("refs", "snapshots/c0ffee/dora", "blobs"):
        (top / name).mkdir(parents=True)
    (top / "refs" / "main").write_text("c0ffee")
    (top / "snapshots/c0ffee/loca.safetensors").write_bytes((folder / "loca.safetensors").read_bytes())
    lora = next((folder / "lora").iterdir())
    (top / "snapshots/c0ffee/dora" / lora.name).write_bytes(lora.read_bytes())
    own, x = model(), torch.randn(2, 3, 32, 32)
    store = AdapterStore("shops/adapters", capacity_bytes=ROOM, base=own)
    assert store.names() == ["dora", "loca"] and "../loca" not in store
    found = mixed(own, ["loca", "dora"], x)
    close(found[:1], alone(folder, "loca", x[:1]))
    close(found[1:], alone(folder, "lora", x[1:]))
    with pytest.raises(ValueError, match="no adapter 'locat' in shops/adapters; perhaps loca"):
        store.load("locat")
    with pytest.raises(FileNotFoundError, match="no repository of that name is in the cache"):
        AdapterStore("shops/others", capacity_bytes=ROOM)


@torch.no_grad()
def test_a_pipeline_has_the_adapters_of_all_its_components(tmp_path: Path) -> None:
    pipe, latents = pipelines.stable_diffusion(), torch.randn(2, 4, 8, 8)
    for component in (pipe.unet, pipe.text_encoder):
        inject(component, LoCAConfig(n_components=12), "ink")
        stir(component, "ink")

    def draw(prompts: Any, own: Tensor, **settings: Any) -> Tensor:
        given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.5, **settings}
        result: Tensor = pipe(prompts, latents=own, **given).images
        return result

    inked = draw("a cat", latents[:1])
    pipe.save_loca_weights(tmp_path / "ink", "ink")
    pipe.unload_loca_weights()
    plain = draw("a dog", latents[1:])
    store = AdapterStore(tmp_path, capacity_bytes=ROOM, base=pipe)
    found = draw(["a cat", "a dog"], latents, loca_adapters=["ink", None])
    torch.testing.assert_close(found, torch.cat([inked, plain]), atol=1e-4, rtol=1e-4)
    halves = draw(["a cat", "a cat"], latents, loca_adapters=["ink", {"ink": 0.5}], cross_attention_kwargs={"scale": 0.5})
    pipe.load_loca_weights(tmp_path / "ink", adapter_name="own")
    wanted = draw("a cat", latents[:1], cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(halves[:1], wanted, atol=1e-4, rtol=1e-4)
    pipe.unload_loca_weights()
    with pytest.raises(ValueError, match="no adapter 'inc' in the pipeline; it has 'ink'; perhaps ink"):
        draw("a cat", latents[:1], loca_adapters=["inc"])
    store.detach()
    torch.testing.assert_close(draw("a dog", latents[1:]), plain)
    assert not [name for name, _ in pipe.unet.named_modules() if "loca" in name]


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other: Any = tiny("swin").eval()
    inject(other, LoRAConfig(r=1))
    save_adapter(other, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="it was trained on swin"):
        AdapterStore(tmp_path, capacity_bytes=ROOM, base=model()).load("a")


def test_bad_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    own = model()
    for arguments, error, sentence in (
        ({"source": folder, "capacity_bytes": 0}, ValueError, "capacity_bytes=0: expected a whole number from 1 up"),
        ({"source": folder, "capacity_bytes": 1e9}, TypeError, "capacity_bytes is a float"),
        ({"source": tmp_path / "none", "capacity_bytes": 1}, FileNotFoundError, "there is no such folder"),
        ({"source": 3, "capacity_bytes": 1}, TypeError, "source is a int: expected a folder of adapters"),
        ({"source": folder, "capacity_bytes": 1, "base": 3}, TypeError, "a int is not a pipeline"),
    ):
        with pytest.raises(error, match=sentence):  # type: ignore[call-overload]
            AdapterStore(**arguments)  # type: ignore[arg-type]
    store = AdapterStore(folder, capacity_bytes=ROOM)
    with pytest.raises(ValueError, match="the store has no base"):
        store.load("loca")
    store.attach(own)
    with pytest.raises(ValueError, match="the store is attached to a VisionTransformer"):
        store.attach(model())
    with pytest.raises(ValueError, match="VisionTransformer has a store"):
        AdapterStore(folder, capacity_bytes=ROOM, base=own)


def test_loaded_adapters_take_what_their_files_do(folder: Path) -> None:
    own = model()
    store = AdapterStore(folder, capacity_bytes=ROOM, base=own)
    store.load("loca")
    other = model()
    load_adapter(other, folder / "loca.safetensors")
    components = sum(len(update.coefficients) for update in adapters(other).values())
    assert store.held_bytes == 8 * components + own.head.weight.nbytes + own.head.bias.nbytes


def test_spectra_are_packed_when_they_are_first_used_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, usual = [], packed_update.packed_cosines
    monkeypatch.setattr(packed_update, "packed_cosines", lambda *own: packed.append(own[2]) or usual(*own))
    own, x = model(), torch.randn(2, 3, 32, 32)
    store = AdapterStore(folder, capacity_bytes=ROOM, base=own)
    store.load("loca")
    size = store.held_bytes
    assert packed == [] and size > 0
    with torch.inference_mode(), per_sample(own, ["loca", None]):  # what is made in it could not be used outside
        own(x)
    close(mixed(own, ["loca", "loca"], x), alone(folder, "loca", x))
    assert len(packed) == 1 and store.held_bytes == size
