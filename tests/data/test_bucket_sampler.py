"""Batches of images of one bucket: every image comes, all batches are whole, processes are in step."""

import re
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loca_vision.data.sampling import BucketSampler, bucket_batches, loader

BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=40)
BATCH, SEED, EPOCH = st.integers(1, 9), st.integers(0, 5), st.integers(0, 5)


@given(BUCKETS, BATCH, SEED, EPOCH)
def test_an_epoch_has_whole_batches_of_one_bucket_and_every_image(buckets, batch_size, seed, epoch):
    batches = bucket_batches(buckets, batch_size=batch_size, seed=seed, epoch=epoch)
    sizes, times = Counter(buckets), Counter(chain(*batches))
    assert {len(batch) for batch in batches} == {batch_size}
    assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
    assert len(batches) == sum(-(-size // batch_size) for size in sizes.values())
    assert times.keys() == set(range(len(buckets)))
    for bucket, size in sizes.items():
        often = [times[index] for index in range(len(buckets)) if buckets[index] == bucket]
        assert max(often) - min(often) <= 1, "no image comes more often than it must"
        inside = [batch for batch in batches if buckets[batch[0]] == bucket]
        assert size < batch_size or all(len(set(batch)) == batch_size for batch in inside)


@given(BUCKETS, BATCH, SEED, EPOCH, st.data())
def test_an_epoch_goes_on_where_it_stopped(buckets, batch_size, seed, epoch, data):
    whole = bucket_batches(buckets, batch_size=batch_size, seed=seed, epoch=epoch)
    start = data.draw(st.integers(0, len(whole)))
    sampler = BucketSampler(buckets, batch_size=batch_size, seed=seed)
    sampler.set_epoch(epoch, start)
    assert list(sampler) == whole[start:] and len(sampler) == len(whole) - start


@given(BUCKETS, st.integers(1, 4), st.integers(1, 3), SEED, EPOCH)
def test_processes_share_the_batches_of_one_in_step(buckets, world_size, each, seed, epoch):
    settings = {"batch_size": world_size * each, "seed": seed}
    ranks = [BucketSampler(buckets, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    steps = list(zip(*ranks, strict=True))
    assert [list(chain(*step)) for step in steps] == bucket_batches(buckets, epoch=epoch, **settings)
    for step in steps:
        assert {len(share) for share in step} == {each} and len({buckets[index] for index in chain(*step)}) == 1


def test_an_epoch_is_a_function_of_seed_and_epoch():
    buckets = [index % 3 for index in range(50)]
    orders = {str(bucket_batches(buckets, batch_size=4, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16, "(1, 2) is not (2, 1)"
    assert bucket_batches(buckets, batch_size=4, seed=1, epoch=2) == bucket_batches(buckets, batch_size=4, seed=1, epoch=2)


def test_buckets_alternate_and_others_fill_up_in_each_epoch():
    buckets = [0] * 21 + [1] * 21
    first, second = (bucket_batches(buckets, batch_size=4, seed=0, epoch=epoch) for epoch in (0, 1))
    order = [buckets[batch[0]] for batch in first]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    twice = [{index for index, times in Counter(chain(*batches)).items() if times == 2} for batches in (first, second)]
    assert len(twice[0]) == len(twice[1]) == 6 and twice[0] != twice[1]


def test_a_bucket_is_shuffled_whatever_other_buckets_there_are():
    """Images of another bucket that come or go leave its batches as they are."""
    alone = bucket_batches([1] * 9, batch_size=3, seed=0, epoch=0)
    among = bucket_batches([1] * 9 + [0, 2], batch_size=3, seed=0, epoch=0)
    assert sorted(alone) == sorted(batch for batch in among if batch[0] < 9)


def test_it_works_in_a_loader_and_leaves_the_global_generator():
    images = [torch.zeros(2 + index % 2) for index in range(7)]
    state = torch.get_rng_state()
    sampler = BucketSampler([len(image) for image in images], batch_size=2, seed=0)
    assert sorted(len(batch[0]) for batch in loader(images, sampler)) == [2, 2, 3, 3]
    assert torch.equal(torch.get_rng_state(), state)


WRONG = {
    "none": (lambda: BucketSampler([], batch_size=1, seed=0), "buckets: there are no images"),
    "batch": (lambda: BucketSampler([0], batch_size=0, seed=0), "batch_size=0: expected a whole number from 1 up"),
    "rank": (
        lambda: BucketSampler([0], batch_size=2, seed=0, rank=2, world_size=2),
        "rank=2: expected a whole number from 0 to 1",
    ),
    "shares": (lambda: BucketSampler([0], batch_size=3, seed=0, world_size=2), "batch_size=3: 2 processes cannot share it"),
    "start": (lambda: bucket_batches([0] * 5, batch_size=2, seed=0, epoch=0, start=4), "start=4: the epoch has 3 batches"),
}


@pytest.mark.parametrize(("call", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
