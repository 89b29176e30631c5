"""Widen a UNet's `conv_in`, permanently or while an adapter needs it, as InstructPix2Pix does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.model.state import AdapterState, state_of
from loca_vision.model.whole_tensors import held_at, own_copy, put
from loca_vision.offload import copied_elsewhere, exchange, stored_at

WEIGHT = "conv_in.weight"
MOST = 256  # channels that a file may ask for: far more than any pipeline concatenates, and 3 MB in Stable Diffusion


@torch.no_grad()
def widen_conv_in(unet: nn.Module, channels: int = 8) -> bool:
    """Let `unet.conv_in` take more input channels, which have no effect at first.

    The existing weights and the bias stay, and the weights of the new channels are zero (Brooks et al., 2023, section 3.2).
    `config.in_channels` is updated. The new weight is trainable if the old one was.

    To train `conv_in` along with an adapter, call this and then `inject(unet, config, modules_to_save=("conv_in",))`. It is
    saved with the adapter as `full.conv_in.weight` and `full.conv_in.bias`. Loading such a file does not require this call:
    it widens the `conv_in` of a plain UNet as needed, and removing the adapter restores the old one.

    Args:
        unet: a UNet of diffusers.
        channels: the number of input channels that `conv_in` is to take.

    Returns:
        Whether anything was changed: False if the UNet already takes that many channels.

    Raises:
        TypeError: the model does not have a convolution `conv_in` and a config, as a UNet of diffusers does.
        ValueError: `conv_in` takes more channels than that or is grouped, or the UNet already has an adapter.
    """
    if not _has_conv_in(unet):
        raise TypeError(f"a {type(unet).__name__} has no convolution conv_in to widen: expected a UNet of diffusers")
    layer: Any = unet.conv_in
    if layer.in_channels == channels:
        return False
    if layer.in_channels > channels or layer.groups != 1:
        raise ValueError(
            f"channels={channels}: conv_in takes {layer.in_channels}, in {layer.groups} groups, and can only be widened"
        )
    if state_of(unet) is not None:
        raise ValueError("the UNet has an adapter, which is for conv_in as it is: widen it first, then inject or load")
    _put(unet, _widened(stored_at(unet, WEIGHT), channels, layer.weight.requires_grad))
    return True


def check_wider(model: nn.Module, shape: tuple[int, ...], replacing: str | None = None) -> bool:
    """Return True if the shapes differ only by extra input channels, so that the layer can be widened.

    Args:
        model: the model that a file is loaded into.
        shape: (output channels, input channels, height, width) in the file.
        replacing: the adapter that the one in the file replaces.

    Raises:
        ValueError: the file asks for more channels than `MOST`, another adapter has its own `conv_in` with fewer channels, or
            diffusers' offloading uses copies of the layer.
    """
    layer: Any = getattr(model, "conv_in", None)
    if not _has_conv_in(model) or layer.groups != 1 or len(shape) != 4:
        return False
    (out, now, *kernel), (wanted_out, wanted, *wanted_kernel) = layer.weight.shape, shape
    if (out, kernel) != (wanted_out, wanted_kernel) or wanted <= now:
        return False
    if wanted > MOST:
        raise ValueError(f"full.{WEIGHT} is for {wanted} channels: conv_in is widened from {now} to {MOST} at most")
    if copied_elsewhere(model, layer):
        raise ValueError(
            f"full.{WEIGHT} is for {wanted} channels, and conv_in is offloaded to a disk or by a stream: load it first"
        )
    owner = _owner(model, layer.weight, replacing)
    if owner:
        raise ValueError(
            f"full.{WEIGHT} is for {wanted} channels, and adapter {owner!r} has a conv_in of its own for {now}: remove it first"
        )
    return True


def _owner(model: nn.Module, weight: Tensor, replacing: str | None) -> str | None:
    """Return the adapter that has its own `conv_in.weight` or would have one in its file, or None."""
    record = state_of(model)
    if record is None:
        return None
    trains = record.frozen and weight.requires_grad and WEIGHT not in record.base
    owners = [name for name, adapter in record.adapters.items() if trains or WEIGHT in adapter.modules_to_save]
    return next((name for name in reversed(owners) if name != replacing), None)


@torch.no_grad()
def fit_conv_in(model: nn.Module, record: AdapterState) -> None:
    """Give `conv_in` as many channels as the adapters' own `conv_in` takes, or the original number if no adapter has one.

    Call this when an adapter has been added or removed, while its tensors are in the record but not yet in the model. The
    base in the record is widened as well: with the base alone, the new channels have no effect.
    """
    base = record.base.get(WEIGHT)
    if base is None:  # no adapter has ever had one, or the layer has been replaced since
        record.narrow = None
        return
    usual = (base if record.narrow is None else record.narrow).shape[1]
    owned = (adapter.modules_to_save[WEIGHT] for adapter in record.adapters.values() if WEIGHT in adapter.modules_to_save)
    wanted = next((weight.shape[1] for weight in owned), usual)
    if wanted == base.shape[1]:
        return
    put(model, WEIGHT, base)
    weight = _kept_narrow(model, record) if wanted == usual else _widened_for_now(model, record, wanted)
    _put(model, weight)
    record.base[WEIGHT] = held_at(model, WEIGHT)
    if held_at(model, WEIGHT).device.type == "meta":
        record.base[WEIGHT] = own_copy(stored_at(model, WEIGHT), held_at(model, WEIGHT))


def _widened_for_now(model: nn.Module, record: AdapterState, channels: int) -> nn.Parameter:
    """Return the weight for that many channels, keeping the original one in the record."""
    held, values = model.get_parameter(WEIGHT), stored_at(model, WEIGHT)
    if record.narrow is None:
        record.narrow = held if held is values else nn.Parameter(values, requires_grad=held.requires_grad)
    return _widened(values, channels, held.requires_grad)


def _kept_narrow(model: nn.Module, record: AdapterState) -> nn.Parameter:
    """Return the original weight, on the device and in the precision that the model now has."""
    now, weight = stored_at(model, WEIGHT), record.narrow
    assert weight is not None
    record.narrow = None
    weight.data = weight.data.to(now.device, now.dtype)
    weight.requires_grad_(model.get_parameter(WEIGHT).requires_grad)
    return weight


@contextmanager
def conv_in_of_the_base(model: nn.Module) -> Iterator[None]:
    """Let `config` state the base's own number of channels inside the context, as a file of the base does."""
    record = state_of(model)
    if record is None or record.narrow is None or record.supplier_is_fused:
        yield
        return
    registered: Any = model
    channels = registered.config.in_channels
    registered.register_to_config(in_channels=record.narrow.shape[1])
    try:
        yield
    finally:
        registered.register_to_config(in_channels=channels)


def _has_conv_in(model: nn.Module) -> bool:
    return isinstance(getattr(model, "conv_in", None), nn.Conv2d) and hasattr(model, "register_to_config")


def _widened(weight: Tensor, channels: int, learns: bool) -> nn.Parameter:
    """Return the weight with zeros for additional channels, in the same memory format."""
    with ordinary_tensors():
        wide = functional.pad(weight.detach(), (0, 0, 0, 0, 0, channels - weight.shape[1]))
        return nn.Parameter(wide, requires_grad=learns)


def _put(model: nn.Module, weight: nn.Parameter) -> None:
    """Replace the weight of `conv_in`, and keep the layer itself with its bias and hooks."""
    unet: Any = model
    exchange(unet.conv_in, "weight", weight)
    unet.conv_in.in_channels = weight.shape[1]
    unet.register_to_config(in_channels=weight.shape[1])
