"""Fusing into quantised weights is refused before anything is written; the update acts beside the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision import remove
from support.fusing import BOTH
from support.pipelines import picture, stable_diffusion
from support.quantised import QUANTISED
from support.reference_weights import Made, adapter, assert_far, assert_near, layers

every_form = pytest.mark.parametrize("form", QUANTISED)
WRITES: dict[str, Callable[[Any], None]] = {
    "fuse": lambda pipe: pipe.fuse_loca(),
    "fuse safely": lambda pipe: pipe.fuse_loca(safe_fusing=True),
    "fuse by name": lambda pipe: pipe.fuse_loca(["text_encoder"], adapter_names=["a"], scale=0.5),
    "merge": lambda pipe: remove(pipe.text_encoder, merge=True),
}


@pytest.fixture(scope="module")
def made() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=2)


def quantise(model: nn.Module, form: str) -> None:
    """Every projection of attention."""
    for _, layer in list(layers(model)):
        path = next(path for path, module in model.named_modules() if module is layer)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, QUANTISED[form](layer))


def quantised(form: str, *components: str) -> Any:
    pipe = stable_diffusion()
    for component in components:
        quantise(getattr(pipe, component), form)
    return pipe


def with_updates_beside(pipe: Any, made: Made) -> Any:
    """The oracle: what each layer answers, plus its input times the update."""
    for component in BOTH:
        for projection, layer in layers(getattr(pipe, component)):
            if f"{component}.{projection}" in made.updates:
                update = made.updates[f"{component}.{projection}"].float()
                layer.register_forward_hook(lambda _, given, answer, update=update: answer + F.linear(given[0], update))
    return pipe


@every_form
def test_the_update_acts_beside_the_layers(form: str, made: Made) -> None:
    pipe, base = quantised(form, *BOTH), picture(quantised(form, *BOTH))
    pipe.load_loca_weights(made.state(), "a")
    shown = picture(pipe)
    assert_far(shown, base)
    assert_near(shown, picture(with_updates_beside(quantised(form, *BOTH), made)), 1e-4)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


@every_form
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused_before_anything_is_written(write: str, form: str, made: Made) -> None:
    """The UNet, which comes first and could be written, stays as it is too."""
    pipe = quantised(form, "text_encoder")
    pipe.load_loca_weights(made.state(), "a")
    shown, versions = picture(pipe), written_to(pipe.unet)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj is a \w+ without a plain floating-point weight: nothing can be"):
        WRITES[write](pipe)
    assert pipe.fused_locas == set() and pipe.get_active_loca_adapters() == ["a"]
    assert written_to(pipe.unet) == versions
    assert torch.equal(picture(pipe), shown)


def written_to(model: nn.Module) -> dict[str, int]:
    """How often each weight has been written to."""
    return {name: parameter._version for name, parameter in model.named_parameters() if ".loca." not in name}


def test_one_component_can_be_fused_beside_a_quantised_one(made: Made) -> None:
    pipe = quantised("disguised", "text_encoder")
    pipe.load_loca_weights(made.state(), "a")
    shown: Tensor = picture(pipe)
    pipe.fuse_loca(["unet"], safe_fusing=True)
    assert_near(picture(pipe), shown)
    pipe.unfuse_loca()
    assert torch.equal(picture(pipe), shown)
