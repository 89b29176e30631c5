"""An AdapterStore whose adapters are first asked for by a call, or replaced during one."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

import loca_vision.diffusers  # noqa: F401  which adds the methods
from loca_vision import (
    AdapterStore,
    LoCAConfig,
    LoRAConfig,
    adapters,
    head_logits,
    inject,
    load_adapter,
    per_sample,
    save_adapter,
)
from loca_vision.model import mixed_parts
from loca_vision.serving.held_file import FileReader
from support import pipelines
from support.timm_models import tiny


def written(file: Path, config: LoCAConfig | LoRAConfig, seed: int) -> None:
    model = tiny("vit")
    inject(model, config)
    torch.manual_seed(seed)
    for update in adapters(model).values():
        for parameter in update.trainable():
            torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(model.head.weight)
    save_adapter(model, file)


@pytest.mark.parametrize("config", [LoCAConfig(n_components=20), LoRAConfig(r=2)], ids=["loca", "lora"])
def test_the_first_call_may_be_one_in_inference_mode(tmp_path, vit, images, config):
    written(tmp_path / "shop.safetensors", config, 1)
    store = AdapterStore(tmp_path, capacity_bytes=2**30, base=vit)
    with torch.inference_mode(), per_sample(vit, ["shop"] * 4):
        inside = vit(images).clone()
    with torch.no_grad(), per_sample(vit, ["shop"] * 4):
        torch.testing.assert_close(vit(images), inside.clone())
    store.detach()
    load_adapter(vit, tmp_path / "shop.safetensors")
    torch.testing.assert_close(vit(images).detach(), inside.clone(), rtol=1e-4, atol=1e-5)


def test_heads_are_those_of_the_adapters_that_the_features_are_of(tmp_path, vit, images):
    file = tmp_path / "shop.safetensors"
    written(file, LoCAConfig(n_components=20), 1)
    AdapterStore(tmp_path, capacity_bytes=2**30, base=vit)
    names = ["shop"] * 4
    with torch.no_grad(), per_sample(vit, names):
        before = vit(images)
        features = vit.forward_features(images)
        written(file, LoCAConfig(n_components=20), 2)
        torch.testing.assert_close(torch.stack(head_logits(vit, features, names)), before)
    with torch.no_grad():
        assert not torch.allclose(torch.stack(head_logits(vit, features, names)), before)


@torch.no_grad()
def test_a_context_inside_another_has_no_head_of_the_other(tmp_path, vit, images):
    written(tmp_path / "shop.safetensors", LoCAConfig(n_components=20), 1)
    plain = vit(images)
    AdapterStore(tmp_path, capacity_bytes=2**30, base=vit)
    with per_sample(vit, ["shop"] * 4):
        assert not torch.allclose(vit(images), plain)
        with per_sample(vit, [None] * 4):
            torch.testing.assert_close(vit(images), plain)


def test_a_store_that_is_detached_while_it_loads_keeps_nothing(tmp_path, vit, images, monkeypatch):
    written(tmp_path / "shop.safetensors", LoCAConfig(n_components=20), 1)
    keys, store, usual = set(dict(vit.named_modules())), AdapterStore(tmp_path, capacity_bytes=2**30, base=vit), FileReader.read

    def detaching(self, name, file):
        store.detach()
        return usual(self, name, file)

    monkeypatch.setattr(FileReader, "read", detaching)
    with pytest.raises(ValueError, match="adapter 'shop': the store was detached while it was loaded"):
        store.load("shop")
    assert store.held_names() == [] and set(dict(vit.named_modules())) == keys
    monkeypatch.undo()
    store.attach(vit)
    store.load("shop")
    assert store.held_names() == ["shop"]


def test_detaching_leaves_no_hook_and_no_adapter(tmp_path, vit, images):
    written(tmp_path / "shop.safetensors", LoCAConfig(n_components=20), 1)
    store = AdapterStore(tmp_path, capacity_bytes=2**30, base=vit)
    with per_sample(vit, ["shop", None] * 2):
        vit(images)  # with gradients, for which a call is remembered
    held = weakref.ref(store.held("shop")[vit])
    store.detach()
    gc.collect()
    assert held() is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in vit.modules())


def test_layers_become_hosts_only_when_no_call_begins(tmp_path, vit, monkeypatch):
    """Else the other call would see its model change while it looks at all modules."""
    written(tmp_path / "shop.safetensors", LoCAConfig(n_components=20), 1)
    store, usual = AdapterStore(tmp_path, capacity_bytes=2**30, base=vit), mixed_parts.refuse_sharded
    loading, hosts_seen = threading.Thread(target=store.load, args=("shop",)), []

    def looking(model, sentence):
        loading.start()
        loading.join(0.3)  # it waits for the call to begin
        hosts_seen.append([name for name, _ in model.named_modules() if name.endswith("loca")])
        return usual(model, sentence)

    monkeypatch.setattr(mixed_parts, "refuse_sharded", looking)
    with per_sample(vit, [None]):
        pass
    loading.join()
    assert hosts_seen == [[]] and store.held_names() == ["shop"]


@pytest.mark.filterwarnings("ignore")
def test_all_components_of_a_call_have_one_version_of_a_file_read_once(tmp_path, monkeypatch):
    pipe, reads, usual = pipelines.stable_diffusion(), [], FileReader.read
    for component in (pipe.unet, pipe.text_encoder):
        inject(component, LoRAConfig(r=2), "ink")
    for name in ("ink", "oil"):
        pipe.save_loca_weights(tmp_path / name, "ink")
    pipe.unload_loca_weights()

    def counted(self, name, file):
        reads.append(name)
        return usual(self, name, file)

    monkeypatch.setattr(FileReader, "read", counted)
    store = AdapterStore(tmp_path, capacity_bytes=2**30, base=pipe)
    store.load("ink")
    store.capacity_bytes = store.held_bytes  # no room for both
    pipe(["a", "b"], num_inference_steps=1, output_type="latent", loca_adapters=["ink", "oil"])
    assert reads == ["ink", "oil"]
