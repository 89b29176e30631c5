"""Initial weights that make an autoencoder a linear codec and a UNet a copier.

Group normalisation removes the brightness of an image, and a model with random weights spends its first thousands of steps
learning to preserve it. The initial weights here carry it past every nonlinearity with pairs of opposite channels:
silu(x) - silu(-x) = x. Large constants in the same group make the divisor of the normalisation nearly equal for all images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

GROUPS = 4  # of normalisation: three colours and one detail channel
_CONSTANT = 10.0  # large compared with values in [-1, 1]
_UNET_CONSTANT = 3.0  # the UNet need not be as exact
_LOG_VARIANCE = -8.0  # of the initial latents: a standard deviation of 0.018


@torch.no_grad()
def begin_linear(autoencoder: Any) -> None:
    """Set the weights of an `AutoencoderKL` with two levels, 4 latent channels and no attention to a linear codec, in place.

    The latents are then the mean colours of blocks of 2 x 2 pixels and the difference of their left and right halves; the
    decoder returns the interpolated colours. Weights that the codec does not use stay random, scaled to preserve variances.
    """
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    for module in autoencoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
        elif isinstance(module, nn.Conv2d):
            module.weight.mul_(math.sqrt(3))  # torch draws them with a third of the variance
            assert module.bias is not None
            module.bias.zero_()
    _through(encoder.conv_in, 3)
    _halve(encoder.down_blocks[0].downsamplers[0].conv)
    _head(encoder.down_blocks[1].resnets[0].conv_shortcut, encoder.conv_out, 4)
    encoder.conv_out.weight[4:] = 0
    encoder.conv_out.bias[4:] = _LOG_VARIANCE
    _through(autoencoder.quant_conv, 8)
    _through(autoencoder.post_quant_conv, 4)
    _through(decoder.conv_in, 4)
    _interpolate(decoder.up_blocks[0].upsamplers[0].conv)
    _head(decoder.up_blocks[1].resnets[0].conv_shortcut, decoder.conv_out, 3)


def _through(layer: Any, count: int) -> None:
    """Let the first `count` channels pass unchanged."""
    layer.weight[:count] = 0
    for channel in range(count):
        down, across = (side // 2 for side in layer.kernel_size)
        layer.weight[channel, channel, down, across] = 1


def _halve(layer: Any) -> None:
    """Compute block means of the first three channels, and the left half of their mean minus the right half."""
    layer.weight[:4] = 0
    for channel in range(3):
        layer.weight[channel, channel, :2, :2] = 1 / 4
        layer.weight[3, channel, :2, :2] = torch.tensor([1.0, -1.0]) / 12


def _interpolate(layer: Any) -> None:
    """Interpolate the colours bilinearly after their pixels were doubled, and let the detail channel pass unchanged."""
    _through(layer, 4)
    filter = torch.tensor([1.0, 2.0, 1.0]) / 4
    for channel in range(3):
        layer.weight[channel, channel] = torch.outer(filter, filter)


def _head(before: Any, after: Any, count: int, *, groups: int = GROUPS, start: int = 0, constant: float = _CONSTANT) -> None:
    """Set the layers before and after a normalisation and SiLU so that channels from `start` on pass unchanged through all.

    Four channels go into the first four normalisation groups, and the first `count` of them come out.
    """
    size = before.out_channels // groups
    before.weight[: 4 * size] = 0
    for channel in range(4):
        first = size * channel
        before.weight[first, start + channel], before.weight[first + 1, start + channel] = 1, -1
        before.bias[first + 2], before.bias[first + 3] = constant, -constant
    scale = constant * math.sqrt(2 / size)  # what normalisation divides by
    after.weight[:count, [size * channel + pair for channel in range(4) for pair in range(4)]] = 0
    for channel in range(count):
        after.weight[channel, size * channel, 1, 1], after.weight[channel, size * channel + 1, 1, 1] = scale, -scale


@torch.no_grad()
def begin_copying(unet: Any) -> None:
    """Set the weights of a `UNet2DConditionModel` with 4 + 4 latent channels so that it roughly predicts the image, in place.

    This is for the prediction type "sample". The image passes from the input through the outermost skip connection to the
    output, independently of what attention adds. Residuals of convolutions start at zero, which lets them train sooner.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    unet.conv_in.weight[:4] = 0
    unet.conv_in.bias[:4] = 0
    for channel in range(4):
        unet.conv_in.weight[channel, 4 + channel, 1, 1] = 1
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut
    last.bias.zero_()
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    beside = last.in_channels - unet.conv_in.out_channels  # channels from the level below come first, then those of the skip
    _head(last, unet.conv_out, 4, groups=unet.config.norm_num_groups, start=beside, constant=_UNET_CONSTANT)
