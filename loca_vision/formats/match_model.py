"""Check that an adapter file fits a model: the model has all its projections and whole tensors, in the same shapes."""

from __future__ import annotations

from typing import Any

from torch import nn

from loca_vision.formats.adapter_file import FLOATS, Description
from loca_vision.layers.targets import Target, find_targets, with_whole_layers
from loca_vision.messages import nearest
from loca_vision.model.conv_in import WEIGHT, check_wider
from loca_vision.model.heads import classifier, head_of
from loca_vision.model.sharding import class_name
from loca_vision.model.target_checks import check_linear
from loca_vision.model.traversal import own_tensors
from loca_vision.storage.safetensors_file import Entry


def match(model: nn.Module, about: Description, entries: dict[str, Entry], *, replacing: str | None = None) -> list[Target]:
    """Return the targets in the model that a described adapter is for; other layers are not adapted.

    A `conv_in` with more channels than the model's is accepted: `attach` and `swap` make room for it.

    Args:
        replacing: the adapter that this one will replace.

    Raises:
        ValueError: the file does not fit the model; the error names what differs.
    """
    targets = _match_projections(model, about)
    _match_whole_tensors(model, about, entries, replacing)
    return targets


def base_model_name(model: nn.Module) -> str:
    """Return timm's name for the model, with the tag of its weights if there is one: `vit_small_patch16_224.augreg_in21k`.

    For a model that is not timm's, return the name of its class.
    """
    about: Any = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = about.get("architecture"), about.get("tag")
    return f"{architecture}.{tag}" if architecture and tag else architecture or class_name(model)


def may_be_the_same(mine: str, theirs: str) -> bool:
    """Return whether two names have the same architecture and, if both have one, the same tag."""
    (architecture, _, tag), (other, _, other_tag) = mine.partition("."), theirs.partition(".")
    return architecture == other and (not tag or not other_tag or tag == other_tag)


def is_of_head(model: nn.Module, name: str) -> bool:
    """Return whether a whole tensor belongs to a classifier head: the model's or, if the model lacks it, judged by its name."""
    own = own_tensors(model).get(name)
    return head_of(name) is not None if own is None else any(own is parameter for parameter in classifier(model))


def _match_projections(model: nn.Module, about: Description) -> list[Target]:
    """Return the model's targets that the file has updates for, in the model's order."""
    head = {id(parameter) for parameter in classifier(model)}
    own = [target for target in find_targets(model) if id(target.layer._parameters.get("weight")) not in head]
    found = with_whole_layers(own)
    for projection in about.shapes:
        if projection not in found:
            raise ValueError(f"the model has no projection {projection}{nearest(projection, found)}")
    targets = [target for name, target in found.items() if name in about.shapes]
    check_linear(model, targets)
    config = about.configs[""]
    for target in targets:
        if config.layers is None and target.part not in config.targets and "linear" not in config.targets:
            raise ValueError(f"{target.name} is not one of the file's targets={config.targets!r}")
        if target.shape != about.shapes[target.name]:
            shape = about.shapes[target.name]
            raise ValueError(f"{target.name} is {shape} in the file and {target.shape} in the model")
    return targets


def _match_whole_tensors(model: nn.Module, about: Description, entries: dict[str, Entry], replacing: str | None) -> None:
    parameters = own_tensors(model)
    for name in about.whole:
        entry = entries[f"full.{name}"]
        if entry.dtype not in FLOATS:
            raise ValueError(f"full.{name} has dtype {entry.dtype}: expected one of {', '.join(FLOATS)}")
        if name not in parameters:
            hint = (
                "; build it with num_classes, or leave the head out with load_adapter(..., head=False)"
                if head_of(name)
                else nearest(name, parameters)
            )
            raise ValueError(f"full.{name}: the model has no parameter {name}{hint}")
        shape = tuple(parameters[name].shape)
        if shape == entry.shape or (name == WEIGHT and check_wider(model, entry.shape, replacing)):
            continue
        if not _is_other_head(model, about, entries, name):
            raise ValueError(f"full.{name} is {entry.shape} in the file and {shape} in the model")


def _is_other_head(model: nn.Module, about: Description, entries: dict[str, Entry], name: str) -> bool:
    """Return whether a tensor belongs to a linear head for another number of classes, and the file has the whole head."""
    own, path = own_tensors(model), name.rpartition(".")[0]
    if not any(own[name] is parameter for parameter in classifier(model)) or not isinstance(
        model.get_submodule(path), nn.Linear
    ):
        return False
    parts = [key for key in own if key.rpartition(".")[0] == path]
    rows = {entries[f"full.{key}"].shape[:1] for key in parts if key in about.whole}
    return set(parts) <= set(about.whole) and len(rows) == 1 and entries[f"full.{name}"].shape[1:] == tuple(own[name].shape[1:])
