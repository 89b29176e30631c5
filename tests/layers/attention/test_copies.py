"""Adapted attention layers of diffusers and transformers: copies."""

import copy
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from loca_vision import LoCAConfig, adapters, inject, load_adapter, remove, save_adapter, set_adapters
from support import pipelines as tiny
from support.attention import (
    FAMILIES,
    KEYWORD,
    adapted,
    assert_near,
    base_output,
    classes,
    effective_weights,
    expected,
    output,
    shown,
    written,
)

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ("unet", "flux", "clip"))
def test_copies_are_independent_and_complete(family, clone):
    model = adapted(family)
    answer = output(model)
    twin = clone(model)
    assert all(weight._cached is None for weight in effective_weights(twin))
    assert torch.equal(output(twin), answer)
    set_adapters(twin, "default", 0.5)
    if family in KEYWORD:
        assert_near(output(twin, **{KEYWORD[family]: {"scale": 0.6}}), expected(family, 0.3))
    assert_near(output(twin), expected(family, 0.5))
    for spectrum in adapters(twin).values():
        spectrum.coefficients.data.zero_()
    assert torch.equal(output(twin), base_output(family))
    assert torch.equal(output(model), answer)
    remove(twin)
    assert classes(twin) == classes(FAMILIES[family]())
    assert not any(m._forward_pre_hooks for m in twin.modules())
    assert torch.equal(output(twin), base_output(family))
    assert torch.equal(output(model), answer)


@pytest.mark.parametrize("family", ("unet", "clip"))
@pytest.mark.parametrize("copied", (False, True), ids=("original", "copy"))
@pytest.mark.parametrize("settings", ({}, {"max_shard_size": "30KB"}), ids=("whole", "sharded"))
def test_save_pretrained_writes_the_base(family, copied, settings, tmp_path):
    model = adapted(family)
    keys = list(model.state_dict())
    if copied:
        original, model = model, copy.deepcopy(model)
        remove(original, merge=True)  # which must not be what is written
    answer = output(model)
    model.save_pretrained(tmp_path, **settings)
    stock = type(FAMILIES[family]())
    loaded, about = stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is stock
    assert torch.equal(output(loaded.eval()), base_output(family))
    assert torch.equal(output(model), answer) and list(model.state_dict()) == keys
    assert len(adapters(model)) > 0


def test_save_pretrained_with_an_adapted_mlp(tmp_path):
    model = tiny.text_encoder()
    names = inject(model, LoCAConfig(n_components=20, targets=("q", "fc1", "fc2")))
    assert {name.rpartition(".")[2] for name in names} == {"q", "fc1", "fc2"}
    shown(model)
    assert (output(model) - base_output("clip")).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded, about = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert torch.equal(output(loaded.eval()), base_output("clip"))


def test_save_pretrained_writes_the_base_of_tensors_trained_whole(tmp_path):
    model = adapted()
    model.conv_in.requires_grad_(True)
    save_adapter(model, tmp_path / "first")
    loaded = tiny.unet()
    load_adapter(loaded, tmp_path / "first")
    with torch.no_grad():
        loaded.conv_in.weight.mul_(1.5)
    loaded.save_pretrained(tmp_path / "base")
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path / "base")), base_output("unet"))
    assert not torch.equal(loaded.conv_in.weight, tiny.unet().conv_in.weight)


def test_another_base_loads_under_an_adapter():
    model, other = adapted(), tiny.unet(seed=1)
    model.load_state_dict(other.state_dict())
    assert_near(output(model), output(written(other, adapters(model))))
    assert (output(model) - expected()).abs().max() > 1e-2


def test_a_saved_adapter_on_a_saved_base(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "base")
    load_adapter(loaded, tmp_path / "adapter")
    fresh = tiny.unet()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(output(loaded), output(fresh))
    assert_near(output(loaded), output(written(tiny.unet(), adapters(loaded))))
