"""Mixup: an image and its target are the same blend of two; what is drawn depends on seed, epoch and index alone."""

import numpy as np
import torch

from loca_vision.data.images import ImageArrays
from loca_vision.data.mixup import Mixed
from loca_vision.data.transforms import Transformed


def mixed(seed=0, alpha=0.5):
    pixels = np.stack([np.full((4, 4, 3), 80 * label, np.uint8) for label in (0, 1, 2)] * 5)
    images = ImageArrays(pixels, [0, 1, 2] * 5)
    return Mixed(Transformed(images, lambda image: torch.from_numpy(np.array(image)).float()), 3, alpha, seed)


def test_image_and_target_are_the_same_blend():
    images = mixed()
    for index in range(len(images)):
        pixels, target = images[index]
        assert target.sum() == 1 and (target >= 0).all()
        torch.testing.assert_close(pixels, torch.full((4, 4, 3), float(target @ torch.tensor([0.0, 80.0, 160.0]))))


def test_what_is_drawn_is_a_function_of_seed_epoch_and_index():
    one, other = mixed(), mixed()
    shares = [one[index][1] for index in range(15)]
    torch.testing.assert_close([other[index][1] for index in reversed(range(15))][::-1], shares)
    one.set_epoch(1)
    assert not torch.equal(torch.stack([one[index][1] for index in range(15)]), torch.stack(shares))
    assert not torch.equal(torch.stack([mixed(seed=1)[index][1] for index in range(15)]), torch.stack(shares))


def test_a_large_alpha_blends_in_halves():
    shares = torch.stack([mixed(alpha=1e4)[index][1] for index in range(15)])
    assert ((shares - 0.5).abs().amin(1) < 0.05).logical_or(shares.amax(1) == 1).all()
