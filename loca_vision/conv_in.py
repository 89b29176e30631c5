"""A UNet that takes the latents of an image beside the noisy ones: four more channels at its entrance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loca_vision.record import record_of


@torch.no_grad()
def widen_conv_in(unet: nn.Module, channels: int = 8) -> bool:
    """Let `unet.conv_in` take more channels; what is in the new ones has no effect at first.

    The first weights and the bias are copied, the others are zero (Brooks et al., 2023, section 3.2). `config.in_channels`
    says so. The parameters of the new layer are as trainable as those of the old one.

    To train it beside an adapter, call this, then `inject`, then `unet.conv_in.requires_grad_(True)`: it is saved with the
    adapter as `full.conv_in.weight` and `full.conv_in.bias`. To load that file into a pipeline of the base, widen its UNet
    first.

    Returns:
        Whether anything had to be done: False for a UNet that takes so many channels already.

    Raises:
        TypeError: the model has no convolution `conv_in`, or no config, as a UNet of diffusers does.
        ValueError: it takes more channels than that, has an adapter already, or its layers are not 2-D and ungrouped.
    """
    old = getattr(unet, "conv_in", None)
    if not isinstance(old, nn.Conv2d) or not hasattr(unet, "register_to_config"):
        raise TypeError(f"a {type(unet).__name__} has no convolution conv_in to widen: a UNet of diffusers is wanted")
    if old.in_channels == channels:
        return False
    if old.in_channels > channels or old.groups != 1:
        raise ValueError(
            f"channels={channels}: conv_in takes {old.in_channels}, in {old.groups} groups, and can only be widened"
        )
    if record_of(unet) is not None:
        raise ValueError("the UNet has an adapter, which is for conv_in as it is: widen it first, then inject or load")
    registered: Any = unet
    registered.conv_in = _widened(old, channels)
    registered.register_to_config(in_channels=channels)
    return True


def _widened(old: nn.Conv2d, channels: int) -> nn.Conv2d:
    settings: dict[str, Any] = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation}
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
        device="meta",  # so that no random number is drawn
        **settings,
    ).to_empty(device=old.weight.device)
    new.to(old.weight.dtype).train(old.training)
    new.weight.zero_()[:, : old.in_channels] = old.weight
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias)
    for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return new
