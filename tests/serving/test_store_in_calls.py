"""An AdapterStore whose adapters are first asked for by a call, or replaced during one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
