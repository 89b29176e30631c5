"""Modules that are trained whole together with an adapter, and belong to it."""

import pytest
import torch

from loca_vision import LoCAConfig, LoRAConfig, inject, load_adapter, parameter_groups, remove, save_adapter, set_adapters
from support import pipelines as tiny
from support.timm_models import randomise

CONFIG = LoCAConfig(n_components=4)


@pytest.fixture
def unet():
    return tiny.unet(channels=8)


def conv_in(model):
    return torch.cat([p.detach().flatten() for p in model.conv_in.parameters()])


def move(model, name="default"):
    """As training would: everything that is trained."""
    with torch.no_grad():
        for parameter in model.conv_in.parameters():
            parameter.add_(torch.randn_like(parameter))
    randomise(model, name)


def test_it_learns_saves_loads_and_leaves(unet, tmp_path):
    before = conv_in(unet)
    inject(unet, CONFIG, modules_to_save=["conv_in"])
    assert torch.equal(conv_in(unet), before)
    assert {name for name, p in unet.named_parameters() if p.requires_grad and "loca" not in name} >= {
        "conv_in.weight",
        "conv_in.bias",
    }
    (head,) = (group for group in parameter_groups(unet, lr=1, head_lr=2) if group["name"] == "head")
    assert {id(p) for p in head["params"]} == {id(p) for p in unet.conv_in.parameters()} and head["lr"] == 2
    move(unet)
    after = conv_in(unet)
    save_adapter(unet, tmp_path)
    fresh = tiny.unet(channels=8)
    load_adapter(fresh, tmp_path)
    assert torch.equal(conv_in(fresh), after)
    remove(unet)
    assert torch.equal(conv_in(unet), before) and all(p.requires_grad for p in unet.parameters())


def test_each_adapter_has_its_own(unet):
    before = conv_in(unet)
    inject(unet, CONFIG, "one", modules_to_save=("conv_in",))
    move(unet, "one")
    first = conv_in(unet)
    inject(unet, LoRAConfig(r=2), "two", modules_to_save=("conv_in", "conv_out"))
    assert torch.equal(conv_in(unet), first)  # it begins with what is in the model, whose output stays
    set_adapters(unet, "one")
    assert torch.equal(conv_in(unet), first)
    set_adapters(unet, [])
    assert torch.equal(conv_in(unet), before)


def test_what_is_refused(unet):
    keys = set(unet.state_dict())
    for modules, sentence in (
        (
            ["conv_inn"],
            "modules_to_save='conv_inn': the model has no parameter, and no module .* of that name; perhaps conv_in",
        ),
        (["mid_block"], r"modules_to_save='mid_block': mid_block\S+ is in there, which is adapted"),
        ("conv_in", "modules_to_save='conv_in': expected a sequence of names"),
        (["conv_act"], "no module with parameters, of that name"),
    ):
        with pytest.raises(ValueError, match=sentence):
            inject(unet, CONFIG, modules_to_save=modules)
    assert set(unet.state_dict()) == keys and all(p.requires_grad for p in unet.parameters())
