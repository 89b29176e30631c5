"""LoCAAttnProcessor: locations."""

from __future__ import annotations

import torch

from loca_vision import adapters, inject
from loca_vision.diffusers import LoCAAttnProcessor
from support.pipelines import unet
from support.processors import ATTENTION, CONFIG, wrap


def test_components_stand_where_inject_puts_them() -> None:
    """The seed and the name of the layer decide."""
    model, injected = unet(), unet()
    made = wrap(model)
    inject(injected, CONFIG)
    for name, spectrum in adapters(injected).items():
        path, _, part = name.rpartition(".")
        assert torch.equal(made[path].spectra[part].locations, spectrum.locations)
    one, other = (LoCAAttnProcessor.of(model.get_submodule(ATTENTION), CONFIG) for _ in range(2))
    assert torch.equal(one.spectra["q"].locations, other.spectra["q"].locations)
    assert not torch.equal(one.spectra["q"].locations, made[ATTENTION].spectra["q"].locations)
