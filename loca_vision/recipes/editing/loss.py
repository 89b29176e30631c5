"""The conditioning that InstructPix2Pix drops in training, so that it can be guided by text and by image."""

from __future__ import annotations

import torch
from torch import Tensor


def dropped(uniform: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Return which samples lose their text and which their image, given one uniform number each: (b,) truth values.

    Only the text below p, both from p to 2p, only the image from 2p to 3p (Brooks et al., 2023, section 3.2.1: p = 5 %).

    Raises:
        ValueError: the probability is not from 0 to 1/3.
    """
    if not 0 <= probability <= 1 / 3:
        raise ValueError(f"conditioning_dropout_prob={probability!r}: expected a number from 0 to 1/3, for 3 kinds of dropout")
    return uniform < 2 * probability, (uniform >= probability) & (uniform < 3 * probability)


def without_conditioning(
    text: Tensor, image: Tensor, null_text: Tensor, uniform: Tensor, probability: float
) -> tuple[Tensor, Tensor]:
    """Return text and image, with dropped ones replaced: by the embedding of the empty text, and by zeros.

    Args:
        text: (b, tokens, width).
        image: (b, c, h, w) latents of the original.
        null_text: (tokens, width) or (1, tokens, width), for the text "".
        uniform: (b,) in [0, 1).
    """
    no_text, no_image = (mask.to(text.device) for mask in dropped(uniform, probability))
    return torch.where(no_text[:, None, None], null_text.to(text), text), image * (~no_image)[:, None, None, None].to(image)
