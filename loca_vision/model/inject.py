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
    """Adapt the projections `config.targets` of a model, in the layers that `config.layers` chooses.

    The model's own parameters are frozen; the classifier heads of timm models and of transformers' image classifiers stay
    trainable. The log says if other parts are frozen that are named like a head, or that were trainable while the rest was
    frozen. Updates start at zero, so that the
    output is bit-identical at first; active adapters go on acting. Every key of the base `state_dict` stays.

    Args:
        model: any timm model with attention layers, a diffusers UNet or transformer, a model of transformers; or a module
            that contains one. Of any other module, the linear layers that `config` names.
        config: what to inject: a LoCAConfig, or one of another kind.
        name: of the adapter, letters, digits, `_` and `-`.
        modules_to_save: names of modules, or of single parameters such as `pos_embed`, to train as a whole, as in peft: they
            are saved with the adapter and removed with it.

    Returns:
        The names of the adapted projections, in the order of the model's modules: "<path of the attention or feed-forward
        layer>.<part>", or, of linear layers that are not part of one, their own paths.

    Raises:
        ValueError: the name is in use, a part of `config.targets`, a pattern of `config.layers` or a module to save is nowhere
            in the model, or the settings do not fit it.
        TypeError: a target is not a `torch.nn.Linear` with a weight of its own.
        In each case before the model is touched.
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
    """These parameters, and those of these modules, by name."""
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
    """Put updates into their layers, and whole tensors into the model; the adapter acts at 1.0 at once. All or nothing.

    `conv_in` is widened for a whole tensor of more channels. With `freeze`, the parameters of the model stop learning, except
    the classifier head, which becomes the adapter's own unless it brings one; without, as for inference, flags stay.
    With `freeze` and without `learn`, nothing of the model learns.
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
    """Let nothing of the model learn but, with `learn`, classifier heads and what the adapter trains as a whole."""
    record.frozen = True
    head = {id(parameter) for parameter in classifier(model)}
    for key, parameter in own_parameters(model).items():
        learns = learn and (key in adapter.modules_to_save or id(parameter) in head)
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None  # an optimiser made before would still apply it


@torch.no_grad()
def _take_whole_tensors(model: nn.Module, record: AdapterState, name: str, brought: dict[str, Tensor], freeze: bool) -> None:
    """Give the new adapter objects of its own: for the first adapter those in the model, so that an optimiser keeps them."""
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
    """The updates of the target's weight, which its layer computes with from now on."""
    if target.attention is not None:
        return adapt_attention(target.attention).part(target.name.rpartition(".")[2])
    if target.convolution:
        return adapt(target.layer, CalledConvolution)
    return adapt(target.layer, CalledLinear if target.called else ReadLayer)
