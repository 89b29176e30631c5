"""An eight-channel conv_in in a four-channel UNet: loading and unloading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loca_vision.diffusers  # noqa: F401
from loca_vision import LoCAConfig, inject, load_adapter, remove, save_adapter
from loca_vision.model.conv_in import widen_conv_in
from support import pipelines as tiny
from support.reference_weights import Made, adapter, assert_near, expected
from support.wide_conv_in import CONV_IN, UNET, as_base, assert_as_before, everything, is_wide, pipeline, trained, widened


def test_the_loaded_unet_is_the_one_that_was_trained(tmp_path: Path) -> None:
    model = trained(pipeline())
    output, shown = tiny.output_of(model.unet), tiny.picture(model)
    file, pipe = model.save_loca_weights(tmp_path), pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(file)
    assert is_wide(pipe)
    assert torch.equal(tiny.output_of(pipe.unet), output) and torch.equal(tiny.picture(pipe), shown)
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_a_file_of_the_unet_alone_goes_into_a_unet_and_into_a_pipeline(tmp_path: Path) -> None:
    model = trained(pipeline()).unet
    model.conv_in.weight.data[:, 4:] += 1
    output, file = tiny.output_of(model), save_adapter(model, tmp_path)
    unet = tiny.unet()
    kept = {key: (p, p.detach().clone(), p.requires_grad) for key, p in unet.named_parameters()}
    settings = dict(unet.config)
    load_adapter(unet, tmp_path)
    assert unet.conv_in.weight.requires_grad and torch.equal(tiny.output_of(unet), output)
    again = save_adapter(unet, tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()
    remove(unet)
    assert dict(unet.config) == settings and list(kept) == [key for key, _ in unet.named_parameters()]
    for key, p in unet.named_parameters():
        assert p is kept[key][0] and torch.equal(p, kept[key][1]) and p.requires_grad == kept[key][2]
    pipe = pipeline()
    pipe.load_loca_weights(file)
    assert torch.equal(tiny.output_of(pipe.unet), output)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_trainable_stays_so(frozen: bool, wide: Made) -> None:
    pipe = pipeline()
    pipe.unet.requires_grad_(not frozen)
    before = everything(pipe)
    pipe.load_loca_weights(wide.state(), "a")
    assert pipe.unet.conv_in.weight.requires_grad is not frozen
    pipe.delete_loca_adapters("a")
    assert_as_before(pipe, before)


def test_more_channels_still() -> None:
    """Nine, as for inpainting; what the rule is for does not matter."""
    model = tiny.unet()
    widen_conv_in(model, 9)
    inject(model, LoCAConfig(n_components=4))
    model.conv_in.requires_grad_(True)
    torch.nn.init.normal_(model.conv_in.weight)
    state = {f"full.unet.conv_in.{key}": value for key, value in model.conv_in.state_dict().items()}
    made = adapter(pipeline(), UNET)
    made = Made(made.tensors | state, made.about | {"whole": list(CONV_IN)})
    pipe = pipeline()
    pipe.load_loca_weights(made.state())
    assert is_wide(pipe, 9) and torch.equal(pipe.unet.conv_in.weight, model.conv_in.weight)


def test_a_weight_without_a_bias_leaves_the_bias_of_the_base() -> None:
    made, pipe = adapter(widened(), UNET, whole=CONV_IN[:1]), pipeline()
    torch.nn.init.normal_(pipe.unet.conv_in.bias)
    before = everything(pipe)
    pipe.load_loca_weights(made.state())
    assert torch.equal(pipe.unet.conv_in.weight, made.whole[CONV_IN[0]])
    assert torch.equal(pipe.unet.conv_in.bias, before["tensors"]["unet.conv_in.bias"])
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


@pytest.mark.parametrize("merge", [lambda p: remove(p.unet, merge=True), lambda p: remove(p.unet, "a", merge=True)])
def test_merged_it_stays(merge: Callable[[Any], None], wide: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    merge(pipe)
    assert pipe.get_loca_adapters() == {} and is_wide(pipe)
    assert torch.equal(pipe.unet.conv_in.weight, wide.whole[CONV_IN[0]])
    assert_near(tiny.picture(pipe), expected((wide, 1.0), make=widened))


def test_merged_while_another_stays(wide: Made, plain: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(plain.state(), "b")
    pipe.load_loca_weights(wide.state(), "a")
    pipe.set_loca_adapters(["a", "b"])
    remove(pipe.unet, "a", merge=True)
    pipe.unload_loca_weights()
    assert is_wide(pipe) and torch.equal(pipe.unet.conv_in.weight, wide.whole[CONV_IN[0]])
    assert_near(tiny.picture(pipe), expected((wide, 1.0), make=widened))


def test_merging_one_that_has_none_brings_the_old_layer_back(wide: Made, plain: Made) -> None:
    pipe = pipeline()
    old = pipe.unet.conv_in.weight
    pipe.load_loca_weights(wide.state(), "a")
    pipe.load_loca_weights(plain.state(), "b")
    remove(pipe.unet, merge=True)
    assert is_wide(pipe, 4) and pipe.unet.conv_in.weight is old
    assert_near(tiny.picture(as_base(pipe)), expected((plain, 1.0)))
