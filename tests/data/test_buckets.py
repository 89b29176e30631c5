"""Sizes for images of several shapes, which one suits an image, and what of the image is seen there."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loca_vision.data.buckets import BucketView, Drawn, buckets_for, nearest_bucket, parse_buckets
from loca_vision.data.pair_views import View
from loca_vision.data.pairs import Pair
from support.pairs import picture

SIDES = st.integers(1, 90)
SIZES = st.tuples(SIDES, SIDES)
DRAWN = st.builds(Drawn, st.floats(0, 1), st.floats(0, 1), st.booleans())


# Sizes


def test_a_list_of_sizes():
    assert parse_buckets("1024,1024; 768 , 1280;1280,768", 16) == ((1024, 1024), (768, 1280), (1280, 768))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected sizes such as \"1024,1024;768,1280\", got ''"),
        ("512,512;", "got ''"),
        ("512x512", "got '512x512'"),
        ("512,512,512", "got '512,512,512'"),
        ("-512,512", "got '-512,512'"),
        ("512.0,512", "got '512.0,512'"),
        ("٥١٢,512", "got '٥١٢,512'"),
        ("512," + "1" * 5000, "got '512,111"),
        ("512,520", "expected sides that are multiples of 16, got '512,520'"),
        ("0,512", "expected sides that are multiples of 16, got '0,512'"),
        ("512,512; 512,512", "'512,512' comes twice"),
    ],
)
def test_what_is_no_list_of_sizes(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        parse_buckets(text, 16)
    assert len(str(caught.value)) < 400


@given(st.integers(1, 1200), st.integers(1, 64), st.floats(1, 5))
def test_automatic_sizes(resolution, divisor, most):
    if resolution < divisor:
        with pytest.raises(ValueError, match=f"resolution={resolution}"):
            buckets_for(resolution, divisor, most=most)
        return
    buckets = buckets_for(resolution, divisor, most=most)
    square = resolution // divisor * divisor
    assert buckets[0] == (square, square) and len(set(buckets)) == len(buckets)
    stretches = [max(size) / min(size) for size in buckets]
    assert stretches == sorted(stretches) and stretches[-1] <= most
    for height, width in buckets:
        assert (width, height) in buckets and height % divisor == width % divisor == 0
        assert min(height, width) >= min(64, square)
        assert height * width <= resolution**2
        short, long = sorted((height, width))
        if short < long:
            assert short * (long + divisor) > resolution**2, "longer would be too large"
    assert (square + divisor) ** 2 > resolution**2


def test_automatic_sizes_of_stable_diffusion():
    assert buckets_for(512, 64) == ((512, 512), (448, 576), (576, 448), (384, 640), (640, 384))
    assert buckets_for(16, 8) == ((16, 16),)
    assert len(buckets_for(1024, 64)) == 9 and (768, 1344) not in buckets_for(1024, 64, most=1.5)


@pytest.mark.parametrize("most", [0.9, float("nan"), float("inf"), "2"])
def test_a_stretch_below_one(most):
    with pytest.raises(ValueError, match="expected a number from 1 up"):
        buckets_for(512, 64, most=most)


@given(SIZES, st.lists(SIZES, min_size=1, max_size=6))
def test_the_nearest_by_the_logarithm_of_the_ratio(size, buckets):
    width, height = size
    distances = [abs(math.log(width / height) - math.log(w / h)) for h, w in buckets]
    assert distances[nearest_bucket(size, buckets)] <= min(distances) + 1e-12


def test_of_equally_near_ones_the_first():
    for tall_first in (True, False):
        buckets = [(128, 64), (64, 128)] if tall_first else [(64, 128), (128, 64)]
        assert nearest_bucket((7, 7), buckets) == 0
    assert nearest_bucket((30, 10), [(64, 64), (64, 128), (32, 64)]) == 1
    assert [nearest_bucket(size, buckets_for(512, 64)) for size in ((640, 480), (480, 640), (1920, 1080))] == [1, 2, 3]


# Views


def coordinates(width, height):
    """An image whose pixels say where they are."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


@given(SIZES, SIZES, DRAWN)
def test_the_image_just_covers_the_size_and_the_crop_lies_in_it(image_size, size, drawn):
    view = BucketView(size)
    (width, height), (view_height, view_width) = view.whole(image_size), size
    assert width >= view_width and height >= view_height and (width == view_width or height == view_height)
    top, left = view.place(image_size, drawn)
    assert 0 <= top <= height - view_height and 0 <= left <= width - view_width
    pixels = view.pixels(Image.new("RGB", image_size), drawn)
    assert pixels.shape == (3, *size) and pixels.dtype == torch.uint8


@given(st.integers(8, 40), st.integers(8, 40), DRAWN)
def test_the_place_is_where_the_crop_lies_in_the_mirrored_image(width, height, drawn):
    """An image that needs no resizing on one side, so that its pixels are seen as they are."""
    view = BucketView((8, 8))
    image = coordinates(width, 8) if drawn.across > drawn.down else coordinates(8, height)
    seen = view.pixels(image, drawn)
    if drawn.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = view.place(image.size, drawn)
    expected = np.asarray(image)[top : top + 8, left : left + 8]
    assert torch.equal(seen.permute(1, 2, 0), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(("image_size", "size"), [((90, 40), (16, 24)), ((40, 90), (24, 16)), ((10, 7), (32, 32))])
def test_pixels_are_those_of_pil(image_size, size):
    image, view = picture(3, image_size), BucketView(size)
    whole = image.resize(view.whole(image_size), Image.Resampling.BICUBIC)
    top, left = view.place(image_size, Drawn())
    expected = whole.crop((left, top, left + size[1], top + size[0]))
    assert torch.equal(view.pixels(image, Drawn()).permute(1, 2, 0), torch.from_numpy(np.array(expected)))


def test_a_pair_is_looked_at_as_its_images_are():
    pair = Pair(picture(0, (31, 20)), picture(1, (31, 20)), "x")
    for crop, flip in (("center", False), ("random", True)):
        square, view = View(16, crop, flip), BucketView((16, 16), crop, flip)
        assert square.all == view.all
        for index in range(5):
            drawn = view.drawn(3, 1, index)
            assert drawn == square.drawn(3, 1, index)
            assert torch.equal(square.pixels(pair, drawn), torch.stack([view.pixels(image, drawn) for image in pair[:2]]))


def test_a_view_is_a_function_of_seed_epoch_and_index_whatever_the_size():
    view = BucketView((8, 16), "random", True)
    draws = [view.drawn(*keys) for keys in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(set(draws)) == 4 and draws[0] == BucketView((24, 8), "random", True).drawn(0, 0, 0)
    flips = BucketView((8, 16), flip=True)
    assert {flips.drawn(0, 0, index) for index in range(50)} == set(flips.all)
    assert BucketView((8, 16)).all == (Drawn(),) and view.all == ()


def test_the_draws_of_pairs_are_those_of_earlier_versions():
    """Others would be another training run."""
    assert View(8, "random", True).drawn(5, 2, 7) == Drawn(0.1095986803017398, 0.9417414294722922, True)


def test_a_wrong_view_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        BucketView((8, 0))
    with pytest.raises(ValueError, match="crop='middle'"):
        BucketView((8, 8), crop="middle")
