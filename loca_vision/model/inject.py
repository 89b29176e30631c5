"""Put an adapter into a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from loca_vision.layers.adapted_attention import adapt_attention
from loca_vision.layers.adapted_linear import adapt
from loca_vision.layers.targets import Target
from loca_vision.layers.weight_updates import AdapterSlot, WeightUpdates
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.update import Update
from loca_vision.model.activation import activate, claim_trained, store_live_tensors
from loca_vision.model.call_scale import call_settings
from loca_vision.model.conv_in import fit_conv_in
from loca_vision.model.state import Adapter, start_record
from loca_vision.model.target_checks import check_new_name, classifier, linear_targets
from loca_vision.model.traversal import moved_by_training, own_parameters, own_tensors, unwrap
from loca_vision.offload import device_for, stored_at


def inject(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, modules_to_save: Sequence[str] = ()
) -> tuple[str, ...]:
    """Adapt the projections `config.targets` of every attention layer (and MLP of a ViT) of a model.

    The model's own parameters are frozen, a timm classifier head stays trainable. Updates start at zero, so the
    output is bit-identical at first; adapters that act already go on acting. Every key of the base `state_dict` stays.

    Args:
        model: any timm model with attention layers, a diffusers UNet or transformer, a CLIP or T5 text encoder; or a module
            that contains one.
        config: what to inject: a LoCAConfig, or one of another kind.
        name: of the adapter, letters, digits, `_` and `-`.
        modules_to_save: names of modules to train as a whole, as in peft: they are saved with the adapter and removed with it.

    Returns:
        The names of the adapted projections, "<path of the attention layer>.<part>", in the order of the model's modules.

    Raises:
        ValueError: the name is in use, a part of `config.targets` or a module to save is nowhere in the model, or the settings
            do not fit it.
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
    found = linear_targets(model, config.targets)
    whole = _parameters_of(model, modules_to_save, found)
    attach(model, name, Adapter(config, whole), list(zip(found, config.new_updates(found), strict=True)))
    return tuple(target.name for target in found)


def _parameters_of(model: nn.Module, modules: Sequence[str], targets: Sequence[Target]) -> dict[str, Tensor]:
    """Copies of the parameters of these modules, by name."""
    if isinstance(modules, str):
        raise ValueError(f"modules_to_save={modules!r}: expected a sequence of names")
    keys: list[str] = []
    for module in modules:
        inside = [key for key in own_parameters(model) if key.startswith(f"{module}.")]
        if not inside:
            raise ValueError(f"modules_to_save={module!r}: the model has no module of that name with parameters")
        adapted = next((target.name for target in targets if f"{target.layer_path}.".startswith(f"{module}.")), None)
        if adapted is not None:
            raise ValueError(f"modules_to_save={module!r}: {adapted} is in there, which is adapted")
        keys += inside
    return {key: stored_at(model, key).detach().clone() for key in keys}


def attach(model: nn.Module, name: str, adapter: Adapter, placed: list[tuple[Target, Update]], *, freeze: bool = True) -> None:
    """Put updates made beforehand into their layers; the adapter acts at 1.0 at once. Nothing here can be refused any more.

    Whole tensors given with the adapter go into the model, whose `conv_in` is widened for one of more channels. With `freeze`
    everything else of the model stops learning but a classifier head, which becomes the adapter's own where it brings none;
    without, as for inference, all stays as it is.
    """
    record = start_record(model)
    tensors = own_tensors(model)
    if record.frozen:
        claim_trained(record, tensors)
    if freeze:
        record.frozen = True
        head = classifier(model)
        for key, parameter in own_parameters(model).items():
            learns = key in adapter.modules_to_save or any(parameter is p for p in head)
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None  # an optimiser made before would still apply it
    store_live_tensors(model, record)
    own = moved_by_training(tensors) if freeze else {}
    live = {key: stored_at(model, key).detach().clone() for key in (own | adapter.modules_to_save)}
    record.base = {key: value.clone() for key, value in live.items()} | record.base
    adapter.modules_to_save = {key: live[key] for key in own} | adapter.modules_to_save
    record.adapters[name] = adapter
    fit_conv_in(model, record)
    for target, update in placed:
        updates = updates_of(target)
        if target.attention is not None:
            updates.share(call_settings(model))
        updates.add(AdapterSlot(name, target.name, target.rows), update.to(device_for(target.layer)))
    activate(model, record, record.active | {name: 1.0}, enabled=True)


def updates_of(target: Target) -> WeightUpdates:
    """The updates of the target's weight, which its layer computes with from now on."""
    if target.attention is not None:
        return adapt_attention(target.attention).part(target.name.rpartition(".")[2])
    return adapt(target.layer)
