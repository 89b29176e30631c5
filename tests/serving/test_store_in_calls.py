"""An AdapterStore whose adapters are first asked for by a call, or replaced during one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loca_vision import AdapterStore, LoCAConfig, LoRAConfig, adapters, inject, load_adapter, per_sample, save_adapter
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
