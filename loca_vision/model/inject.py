"""Put an adapter into a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loca_vision.layers.adapted_attention import adapt_attention
from loca_vision.layers.adapted_linear import ReadLayer, adapt
from loca_vision.layers.called_layers import CalledConvolution, CalledLinear
from loca_vision.layers.targets import Target, canonical
from loca_vision.layers.weight_updates import AdapterSlot, WeightUpdates
from loca_vision.messages import nearest
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.update import Update
from loca_vision.model.activation import strengthen
from loca_vision.model.atomic import atomic
from loca_vision.model.base_checkpoint import keep_adapters_when_saved
from loca_vision.model.call_scale import call_settings
from loca_vision.model.conv_in import fit_conv_in
from loca_vision.model.heads import classifier, say_what_freezes
from loca_vision.model.state import Adapter, AdapterState, start_record
from loca_vision.model.target_checks import check_new_name, targets_for
from loca_vision.model.traversal import moved_by_training, own_parameters, own_tensors, unwrap
from loca_vision.model.whole_tensors import adopt, claim, held_at, keep_base, load_tensors, own_copy
from loca_vision.offload import device_for, stored_at


def inject(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, modules_to_save: Sequence[str] = ()
) -> tuple[str, ...]:
    """Adapt the projections `config.targets` of a model in the layers that `config.layers` selects.

    The model's own parameters are frozen, except that the classifier heads of timm models and of transformers' image
    classifiers stay trainable. A warning is logged if other parts are frozen that are named like a head, or that were
    trainable while the rest was frozen. Updates start at zero, so the output is bit-identical at first. Active adapters stay
    active. Every key of the base `state_dict` stays the same.

    Args:
        model: any timm model with attention layers, a diffusers UNet or transformer, a model of transformers, or a module that
            contains one. In any other module, only the linear layers that `config` names can be adapted.
        config: the settings of the adapter: a LoCAConfig, or the config of another method.
        name: the name of the adapter, made of letters, digits, `_` and `-`.
        modules_to_save: names of modules, or of single parameters such as `pos_embed`, to train as a whole, as in peft; they
            are saved with the adapter and removed with it.

    Returns:
        The names of the adapted projections, in the order of the model's modules: "<path of the attention or feed-forward
        layer>.<part>", or the layer's own path for linear layers that are not part of one.

    Raises:
        ValueError: the name is in use; a part of `config.targets`, a pattern of `config.layers` or a module to save does not
            occur in the model; or the settings do not fit the model.
        TypeError: a target is not a `torch.nn.Linear` that owns its weight.
        In each case, the error is raised before the model is touched.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config is a {type(config).__name__}: expected a LoCAConfig or the config of another method")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a module; of a pipeline, pass a component such as pipe.unet"
        )
    check_new_name(model, name)
    model = unwrap(model)
    found = targets_for(model, config)
    whole = _parameters_of(model, modules_to_save, found)
    placed = list(zip(found, config.new_updates(found), strict=True))
    say_what_freezes(model, whole)
    attach(model, name, Adapter(config, whole), placed)
    return tuple(target.name for target in found)


def _parameters_of(model: nn.Module, modules: Sequence[str], targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return the parameters with these names, and all parameters of modules with these names, by name."""
    if isinstance(modules, str):
        raise ValueError(f"modules_to_save={modules!r}: expected a sequence of names")
    keys: list[str] = []
    own = own_parameters(model)
    for module in modules:
        inside = [key for key in own if key == canonical(module) or key.startswith(f"{canonical(module)}.")]
        if not inside:
            raise ValueError(
                f"modules_to_save={module!r}: the model has no parameter, and no module with parameters, of that name"
                f"{nearest(module, {path for key in own for path in (key, key.rpartition('.')[0])})}"
            )
        adapted = next((target.name for target in targets if f"{target.layer_path}.".startswith(f"{canonical(module)}.")), None)
        if adapted is not None:
            raise ValueError(f"modules_to_save={module!r}: {adapted} is in there, which is adapted")
        keys += inside
    return {key: held_at(model, key) for key in keys}


def attach(
    model: nn.Module,
    name: str,
    adapter: Adapter,
    placed: list[tuple[Target, Update]],
    *,
    freeze: bool = True,
    learn: bool = True,
) -> None:
    """Put updates into their layers and whole tensors into the model, and activate the adapter at 1.0; all or nothing.

    `conv_in` is widened if the adapter's own takes more channels. With `freeze`, the model's parameters are frozen except for
    the classifier head, which becomes the adapter's own unless the adapter brings one; without it, as for inference,
    `requires_grad` flags do not change. With `freeze` but without `learn`, all of the model's parameters are frozen.
    """
    brought = {key: value for key, value in adapter.modules_to_save.items() if value is not held_at(model, key)}
    with atomic(model, [stored_at(model, key) for key in brought]):
        record = start_record(model)
        keep_adapters_when_saved(model)
        adopt(model, record)
        if freeze:
            _freeze(model, record, adapter, learn)
        record.adapters[name] = adapter
        _take_whole_tensors(model, record, name, brought, freeze)
        fit_conv_in(model, record)
        for target, update in placed:
            updates = updates_of(target)
            if target.attention is not None or target.called:
                updates.share(call_settings(model))
            updates.build_with(record.together)
            updates.add(AdapterSlot(name, target.name, target.rows), update.to(device_for(target.layer)))
        record.active, record.enabled = record.active | {name: 1.0}, True
        load_tensors(model, record)
        strengthen(model, record)


def _freeze(model: nn.Module, record: AdapterState, adapter: Adapter, learn: bool) -> None:
    """Freeze the model's parameters; with `learn`, except classifier heads and what the adapter trains as a whole."""
    record.frozen = True
    head = {id(parameter) for parameter in classifier(model)}
    for key, parameter in own_parameters(model).items():
        learns = learn and (key in adapter.modules_to_save or id(parameter) in head)
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None  # an optimiser created before would still apply it


@torch.no_grad()
def _take_whole_tensors(model: nn.Module, record: AdapterState, name: str, brought: dict[str, Tensor], freeze: bool) -> None:
    """Give the new adapter its own tensors; the first adapter gets those in the model, so that an optimiser keeps them."""
    tensors = own_tensors(model)
    keys = [*(moved_by_training(tensors) if freeze else ()), *record.adapters[name].modules_to_save]
    for key in dict.fromkeys(keys):
        value, live = brought.get(key), tensors[key]
        if value is None:
            claim(model, record, name, key, live)
        elif value.shape == live.shape and key not in record.base:
            claim(model, record, name, key, live)
            stored_at(model, key).copy_(value)
        else:
            keep_base(model, record, key)
            record.adapters[name].modules_to_save[key] = own_copy(value, live)


def updates_of(target: Target) -> WeightUpdates:
    """Make the target's layer compute with updates, and return those of the target's weight."""
    if target.attention is not None:
        return adapt_attention(target.attention).part(target.name.rpartition(".")[2])
    if target.convolution:
        return adapt(target.layer, CalledConvolution)
    return adapt(target.layer, CalledLinear if target.called else ReadLayer)
