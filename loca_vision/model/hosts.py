"""Layers that compute with the adapters of a store, whether or not the model has adapters of its own."""

from __future__ import annotations

from threading import RLock

from torch import nn

from loca_vision.layers.mixtures import handle_of
from loca_vision.layers.targets import Target
from loca_vision.layers.weight_updates import WeightUpdates
from loca_vision.model.call_scale import call_settings, forget_call_settings
from loca_vision.model.inject import updates_of
from loca_vision.model.remove import release
from loca_vision.model.state import state_of
from loca_vision.model.traversal import sites
from loca_vision.model.watching import unwatch

WALKING = RLock()
"""Held while a call walks a model, and while layers become hosts or stop being hosts, so that no call sees half a change."""


def host(model: nn.Module, target: Target) -> WeightUpdates:
    """Make the target's layer compute with its updates, of which there are none at first, until `dismiss` is called."""
    updates = updates_of(target)
    updates.hosts = True
    if target.attention is not None or target.called:
        updates.share(call_settings(model))
    handle_of(updates)
    return updates


def dismiss(model: nn.Module) -> None:
    """Stop hosting a store's adapters, and restore the original class of layers without any update."""
    with WALKING:
        for site in sites(model):
            site.updates.hosts = False
        for layer in dict.fromkeys(site.host for site in sites(model)):
            release(layer)
        if state_of(model) is None:
            forget_call_settings(model)
            unwatch(model)
