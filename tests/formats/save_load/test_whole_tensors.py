"""save_adapter and load_adapter: tensors that are trained whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from loca_vision import LoCAConfig, active_adapters, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.model.heads import classifier
from support.adapter_files import CONFIG, NAME, assert_same, facts, output, tiny, train, trained


def test_the_head_travels_and_goes_back(tmp_path: Path) -> None:
    model, copy = trained(), tiny()
    with torch.no_grad():
        for parameter in classifier(copy):
            parameter.fill_(0.25)
    before = facts(copy)
    load_adapter(copy, save_adapter(model, tmp_path / NAME))
    assert torch.equal(copy.head.weight, model.head.weight)
    remove(copy)
    assert_same(copy, before)


@pytest.mark.parametrize("merge", [False, True])
def test_remove_takes_the_head_back_unless_merged(merge: bool, tmp_path: Path) -> None:
    for model in (trained(), tiny()):
        if not active_adapters(model):
            load_adapter(model, save_adapter(trained(), tmp_path / NAME))
        acting = output(model)
        remove(model, merge=merge)
        assert torch.equal(model.head.weight, (trained() if merge else tiny()).head.weight)
        torch.testing.assert_close(output(model), acting if merge else output(tiny()), rtol=0, atol=1e-4 if merge else 0)
        assert not hasattr(model, "_loca_record")
        assert {type(module) for module in model.modules()} == {type(module) for module in tiny().modules()}


def test_what_the_user_unfroze_travels_too(tmp_path: Path) -> None:
    model = tiny()
    inject(model, CONFIG)
    for parameter in model.norm.parameters():
        parameter.requires_grad_(True)
    train(model)
    file = save_adapter(model, tmp_path / NAME)
    assert {key for key in safetensors.torch.load_file(file) if key.startswith("full.")} == {
        "full.head.bias",
        "full.head.weight",
        "full.norm.bias",
        "full.norm.weight",
    }
    copy = tiny()
    before = facts(copy)
    load_adapter(copy, file)
    assert torch.equal(output(copy), output(model)) and copy.norm.weight.requires_grad
    assert save_adapter(copy, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    remove(copy)
    assert_same(copy, before)


def test_several_adapters_each_with_its_head(tmp_path: Path) -> None:
    outputs, files = {}, {}
    for seed, name in enumerate(("first", "second", "third"), 11):
        model = trained(LoCAConfig(n_components=10 + seed, seed=seed), name=name, seed=seed)
        outputs[name], files[name] = output(model), save_adapter(model, tmp_path / f"{name}.safetensors", name)
    copy = tiny()
    before = facts(copy)
    for file in files.values():
        load_adapter(copy, file)
    for name in ("first", "third", "first", "second"):
        set_adapters(copy, name)
        assert torch.equal(output(copy), outputs[name])
    for name, file in files.items():  # whether it acts or not
        assert save_adapter(copy, tmp_path / "again.safetensors", name).read_bytes() == file.read_bytes()
    set_adapters(copy, [])
    assert torch.equal(output(copy), before["output"])
    set_adapters(copy, ["second", "first"])
    remove(copy, "first")
    assert torch.equal(output(copy), outputs["second"])
    remove(copy)
    assert_same(copy, before)


def test_a_model_inside_a_module_called_full(tmp_path: Path) -> None:
    """Its projections begin with `full.` as whole tensors do."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full = tiny()

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.full(images)
            return result

    model, copy = Outer(), Outer()
    inject(model, CONFIG)
    train(model)
    load_adapter(copy, save_adapter(model, tmp_path / NAME))
    assert torch.equal(output(copy), output(model))
