"""LoCAAttnProcessor: copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from loca_vision import LoCAConfig
from support.pipelines import output_of, unet
from support.processors import CONFIG, Biased, scatter, wrap
from support.reference_weights import assert_far


def test_its_spectra_are_parameters_of_the_unet() -> None:
    model = unet()
    base = set(model.state_dict())
    made = wrap(model)
    keys = set(model.state_dict())
    added = keys - base
    assert base < keys and len(added) == 2 * sum(len(each.spectra) for each in made.values())
    assert all(".processor." in key and key.endswith(("coefficients", "locations")) for key in added)
    parameters = {id(p) for p in model.parameters()}
    assert all(id(s.coefficients) in parameters for each in made.values() for s in each.spectra.values())


def test_a_state_dict_brings_them_into_another_unet() -> None:
    model, other = unet(), unet(seed=9)
    scatter(wrap(model))
    wrap(other, LoCAConfig(n_components=12, scale=2.0, targets=CONFIG.targets, seed=5))
    assert_far(output_of(other), output_of(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(other), output_of(model))


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


def saved_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("copying", [copied, pickled, saved_by_torch])
@pytest.mark.parametrize("processor", [AttnProcessor2_0, Biased])
def test_a_copy_has_processors_of_its_own(processor: Callable[[], Any], copying: Callable[[Any], Any]) -> None:
    model = unet()
    scatter(wrap(model, processor=processor))
    before = output_of(model)
    other = copying(model)
    assert torch.equal(output_of(other), before)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("coefficients"):
                parameter.zero_()
    plain = unet()
    plain.set_attn_processor(processor())
    assert torch.equal(output_of(other), output_of(plain))
    assert torch.equal(output_of(model), before)


def test_a_copied_processor_passes_arguments_to_its_own_inner_one() -> None:
    model = unet()
    wrap(model, processor=Biased)
    other = copy.deepcopy(model)
    output_of(other, cross_attention_kwargs={"strength": 0.5})
    heard = [p.processor.heard for p in model.attn_processors.values()]
    assert heard == [[]] * len(heard)
    assert all(p.processor.heard[0]["strength"] == 0.5 for p in other.attn_processors.values())


def test_base_keys_are_saved_with_the_models_own_save_pretrained(tmp_path: Any) -> None:
    """What a processor adds is the user's to keep; stock `from_pretrained` warns of it and gives the base."""
    model = unet()
    wrap(model)
    model.set_attn_processor(AttnProcessor2_0())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output_of(again), output_of(unet()))
