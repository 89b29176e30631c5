"""Load an adapter into all the pipeline components it is for, or into none."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from loca_vision.formats.adapter_file import Description, check_values, read_description
from loca_vision.formats.match_model import base_model_name, match
from loca_vision.formats.module_names import as_in_files
from loca_vision.formats.opened import Opened
from loca_vision.formats.save_load import OwnTensors, in_model, prepared
from loca_vision.formats.sources import Request, opened, with_description
from loca_vision.layers.linear_layouts import features
from loca_vision.layers.targets import Target, find_targets
from loca_vision.methods.update import Update
from loca_vision.model.activation import activate
from loca_vision.model.atomic import atomic_all
from loca_vision.model.call_scale import takes_attention_kwargs
from loca_vision.model.inject import attach
from loca_vision.model.options import settings_of
from loca_vision.model.state import Adapter
from loca_vision.model.target_checks import check_new_name
from loca_vision.offload import stored_at
from loca_vision.pipeline.call_entry import tell_scale
from loca_vision.pipeline.components import adapted_in, models_in, names_in
from loca_vision.pipeline.hot_swap import check_swap, swap, written_by_swap


def load(
    pipe: Any, source: str | os.PathLike[str] | Mapping[str, Any], request: Request, adapter_name: str | None, *, hotswap: bool
) -> None:
    """Implement `LoCALoaderMixin.load_loca_weights`."""
    with opened(source, request) as file:
        about = read_description(_metadata(pipe, file), file.entries)
        assigned = assigned_parts(pipe, about)
        name = _name_to_load(pipe, adapter_name, hotswap, assigned)
        found = {}
        for component, (model, part, own) in assigned.items():
            with naming(component):
                found[component] = match(model, part, own(file.entries), replacing=name if hotswap else None)
        tensors = file.tensors()  # after the checks it is known to be no larger than the pipeline, except for a wider conv_in
        check_values(tensors, about)
        made = {}
        for component, (model, part, own) in assigned.items():
            with naming(component):
                room = None if hotswap else settings_of(model).max_components
                made[component] = prepared(model, part, found[component], own(tensors), room, learn=False)
                if hotswap:
                    check_swap(model, name, made[component][1])
    if not all(takes_attention_kwargs(model) for model, _, _ in assigned.values()):
        tell_scale(type(pipe))  # the class is wrapped already, unless the methods are not registered
    if hotswap:
        _swap_all(pipe, name, made)
    else:
        _attach_all(pipe, name, {c: (assigned[c][0], *made[c]) for c in assigned})


def _metadata(pipe: Any, file: Opened) -> dict[str, str]:
    def shapes() -> Iterator[tuple[str, tuple[int, int]]]:
        for component, model in models_in(pipe).items():
            rename = as_in_files(model)
            for target in find_targets(model):
                if features(target.layer) is not None:
                    yield f"{component}.{rename(target.name)}", target.shape
                    yield f"{component}.{target.name}", target.shape

    return with_description(file, lambda: dict(shapes()))


def assigned_parts(pipe: Any, about: Description) -> dict[str, tuple[nn.Module, Description, OwnTensors]]:
    """Return, for each component in the file, its model, its part of the description, and a function that picks its tensors."""
    models = models_in(pipe)
    if "" in about.configs:  # saved from a single model, whose class tells which component it is
        same = [name for name, model in models.items() if base_model_name(model) == about.base_model]
        if len(same) != 1:
            raise ValueError(f"it was trained on a {about.base_model}, of which the pipeline has {len(same)}")
        return {same[0]: (models[same[0]], *in_model(models[same[0]], about.of(""), ""))}
    for component in about.configs:
        if component not in models:
            raise ValueError(f"it is for the component {component}, but the pipeline only has {', '.join(models)}")
    return {name: (models[name], *in_model(models[name], about.of(name), name)) for name in about.configs}


@contextmanager
def naming(component: str) -> Iterator[None]:
    """Prefix errors raised inside with the component."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{component}: {error}") from None


def _name_to_load(pipe: Any, name: str | None, hotswap: bool, components: Collection[str]) -> str:
    names = names_in(pipe)
    if hotswap:
        name = names[0] if name is None and len(names) == 1 else name
        if name not in names:
            raise ValueError(f"adapter_name={name!r}: hotswap replaces a loaded adapter; there is {', '.join(names) or 'none'}")
        there = adapted_in(pipe)
        for component in components:
            if component not in there or name not in there[component][1].adapters:
                raise ValueError(f"it is for the component {component}, where there is no adapter {name!r} to be replaced")
        return name
    if name is None:
        return next(free for i in range(len(names) + 1) if (free := f"default_{i}") not in names)
    if name in names:
        raise ValueError(f"adapter_name={name!r}: the pipeline has an adapter of that name; delete it first or choose another")
    for model in models_in(pipe).values():
        check_new_name(model, name)
    return name


def _swap_all(pipe: Any, name: str, made: Mapping[str, tuple[Adapter, list[tuple[Target, Update]]]]) -> None:
    """Swap in all components or, if one fails, in none. Where the new adapter has nothing, the old one becomes inactive."""
    there = {component: pair for component, pair in adapted_in(pipe).items() if name in pair[1].adapters}
    with atomic_all((model for model, _ in there.values()), lambda model: written_by_swap(model, name)):
        for component, (model, record) in there.items():
            swap(model, name, *made.get(component, (Adapter(record.adapters[name].config), [])))


def _attach_all(pipe: Any, name: str, made: Mapping[str, tuple[nn.Module, Any, Any]]) -> None:
    """Attach to all components or, if one fails, to none."""
    brought = {model: adapter.modules_to_save for model, adapter, _ in made.values()}
    others = [model for model, _ in adapted_in(pipe).values() if model not in brought]
    with atomic_all((*brought, *others), lambda model: [stored_at(model, key) for key in brought.get(model, ())]):
        for model, adapter, placed in made.values():
            attach(model, name, adapter, placed, freeze=False)
        for model, record in adapted_in(pipe).values():
            activate(model, record, {name: 1.0} if name in record.adapters else {}, enabled=True)
