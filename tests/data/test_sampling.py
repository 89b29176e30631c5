"""Batches and augmentation that are functions of (seed, epoch, index), whoever asks, and touch no global generator."""

import re
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from loca_vision.data.images import ImageArrays
from loca_vision.data.load import load
from loca_vision.data.sampling import EpochSampler, batches, loader, stream_seed
from loca_vision.data.transforms import Transformed, evaluation_transform, training_transform
from support.image_folders import picture, write_folder

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def the_global_generators_stay_as_they_are():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def images():
    return ImageArrays(np.stack([picture(i % 3, i) for i in range(20)]), [i % 3 for i in range(20)])


def seen(images, epoch, workers, size=20, start=0):
    """What a training loop gets in an epoch."""
    sampler = EpochSampler(size, batch_size=4, seed=1)
    sampler.set_epoch(epoch, start)
    images.set_epoch(epoch)
    return [(x.clone(), y.tolist()) for x, y in loader(images, sampler, workers=workers)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, c) and b == d for (a, b), (c, d) in zip(one, other, strict=True))


@pytest.mark.parametrize("augment", ["crop", "flip"])
def test_augmentation_depends_on_seed_epoch_and_index_only(augment, images):
    transform = training_transform(16, *HALF, augment=augment)
    data = Transformed(images, transform, seed=3)
    alone = seen(data, 1, 0)
    torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert same(alone, seen(data, 1, 2))
    assert same(alone[2:], seen(data, 1, 0, start=2)), "as after a resumption"
    data.set_epoch(1)
    assert torch.equal(data[7][0], data[7][0])
    for other_seed, epoch in ((3, 2), (4, 1)):
        other = Transformed(images, transform, seed=other_seed)
        other.set_epoch(epoch)
        assert any(not torch.equal(data[i][0], other[i][0]) for i in range(20))


def test_neighbouring_images_are_cropped_differently(images):
    """The same picture at two positions."""
    twice = ImageArrays(images.pixels[[0, 0]], [0, 0])
    data = Transformed(twice, training_transform(16, *HALF), seed=0)
    assert not torch.equal(data[0][0], data[1][0])


def test_a_workers_set_is_a_copy_of_the_epoch_it_was_started_in(images):
    data = Transformed(images, training_transform(16, *HALF), seed=3)
    assert not same(seen(data, 0, 2), seen(data, 1, 2))


def test_without_augmentation_training_sees_what_evaluation_sees(images):
    train, test = training_transform(16, *HALF, augment="none"), evaluation_transform(16, *HALF)
    for i in range(3):
        assert torch.equal(Transformed(images, train, seed=0)[i][0], Transformed(images, test)[i][0])


def test_flips_are_flips(images):
    still = Transformed(images, evaluation_transform(16, *HALF))
    data = Transformed(images, training_transform(16, *HALF, augment="flip"), seed=0)
    flipped = [torch.equal(data[i][0], still[i][0].flip(2)) for i in range(20)]
    assert all(turned or torch.equal(data[i][0], still[i][0]) for i, turned in enumerate(flipped))
    assert 3 < sum(flipped) < 17


@pytest.mark.parametrize("transform", [training_transform, evaluation_transform])
def test_the_range_of_the_input(transform):
    white = Transformed(ImageArrays(np.full((1, 40, 30, 3), 255, np.uint8), [0]), transform(16, *HALF), seed=0)[0][0]
    assert (white.shape, white.dtype) == ((3, 16, 16), torch.float32)
    assert torch.equal(white, torch.ones(3, 16, 16))


def test_the_share_that_a_crop_keeps():
    """As in timm: short side to size / crop_pct, then the centre."""
    image = Image.fromarray(np.pad(np.full((14, 14, 3), 255, np.uint8), ((1, 1), (1, 1), (0, 0))))
    whole, centre = (evaluation_transform(14, *HALF, "nearest", crop_pct=share)(image) for share in (1.0, 0.875))
    assert torch.equal(centre, torch.ones(3, 14, 14)) and whole.min() == -1


WRONG = {
    "crop": (lambda: evaluation_transform(8, *HALF, crop_pct=1.5), "crop_pct=1.5: expected a share of the image"),
    "no crop": (lambda: evaluation_transform(8, *HALF, crop_pct=0), "crop_pct=0: expected a share of the image"),
    "augment": (lambda: training_transform(8, *HALF, augment="mix"), "augment='mix': the choices are 'none', 'flip', 'crop'"),
    "batch": (lambda: batches(8, batch_size=0, seed=0, epoch=0), "batch_size=0: expected a whole number from 1 up"),
    "too few": (lambda: batches(8, batch_size=9, seed=0, epoch=0), "batch_size=9: there are 8 images, too few for one batch"),
    "start": (lambda: batches(8, batch_size=2, seed=0, epoch=0, start=5), "start=5: the epoch has 4 batches"),
    "rank": (
        lambda: EpochSampler(8, batch_size=2, seed=0, rank=2, world_size=2),
        "rank=2: expected a whole number from 0 to 1",
    ),
    "shares": (lambda: EpochSampler(8, batch_size=3, seed=0, world_size=2), "batch_size=3: 2 processes cannot share it"),
}


@pytest.mark.parametrize(("call", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize(("size", "batch_size"), [(20, 4), (21, 4), (23, 8), (5, 5), (7, 1)])
def test_an_epoch_is_a_permutation(size, batch_size):
    epoch = batches(size, batch_size=batch_size, seed=1, epoch=2, drop_last=False)
    assert sorted(chain(*epoch)) == list(range(size))
    assert [len(batch) for batch in epoch[:-1]] == [batch_size] * (len(epoch) - 1)
    whole = batches(size, batch_size=batch_size, seed=1, epoch=2)
    assert whole == [batch for batch in epoch if len(batch) == batch_size]
    for start in range(len(whole) + 1):
        assert batches(size, batch_size=batch_size, seed=1, epoch=2, start=start) == whole[start:]


def test_an_epoch_is_a_function_of_seed_and_epoch():
    assert batches(50, batch_size=5, seed=1, epoch=2) == batches(50, batch_size=5, seed=1, epoch=2)
    orders = {str(batches(50, batch_size=5, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16, "(1, 2) is not (2, 1)"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_batches_of_one(world_size, drop_last):
    ranks = [
        EpochSampler(53, batch_size=12, seed=4, rank=rank, world_size=world_size, drop_last=drop_last)
        for rank in range(world_size)
    ]
    for epoch, start in ((0, 0), (3, 1)):
        for sampler in ranks:
            sampler.set_epoch(epoch, start)
        expected = batches(53, batch_size=12, seed=4, epoch=epoch, drop_last=drop_last, start=start)
        for number, batch in enumerate(expected):
            shares = [list(sampler)[number] for sampler in ranks if number < len(sampler)]
            assert list(chain(*shares)) == batch
            assert drop_last is False or {len(share) for share in shares} == {12 // world_size}
        assert all(len(sampler) == len(list(sampler)) for sampler in ranks)


def test_processes_for_which_nothing_is_left_have_a_batch_fewer():
    """Five images, four processes, four at a time."""
    lengths = [len(EpochSampler(5, batch_size=4, seed=0, rank=rank, world_size=4, drop_last=False)) for rank in range(4)]
    assert lengths == [1, 1, 1, 2]


def test_a_sampler_works_in_any_loader(images):
    sampler = EpochSampler(20, batch_size=5, seed=0)
    data = Transformed(images, evaluation_transform(8, *HALF))
    labels = [y.tolist() for _, y in DataLoader(data, batch_sampler=sampler, generator=torch.Generator())]
    assert labels == [[i % 3 for i in batch] for batch in sampler]


def test_seeds_of_streams_are_far_apart():
    seeds = {stream_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(0, 1) == 8566881351708354045, "another number would be another training run"


def test_a_folder_from_files_to_batches(tmp_path):
    write_folder(tmp_path)
    splits = load("folder", tmp_path)
    data = Transformed(splits.train, training_transform(16, *HALF, augment=splits.augment), seed=0)
    assert same(seen(data, 1, 0, size=32), seen(data, 1, 2, size=32))
