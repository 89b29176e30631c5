"""Which images make a batch: a function of (seed, epoch), wherever an epoch starts and however many processes share it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

_BUCKET, _BATCHES = 12, 13  # keys of streams of random numbers


def stream_seed(*keys: int) -> int:
    """Return a seed in [0, 2^63) for the stream of random numbers that the keys name, such as (seed, epoch, index).

    It is a hash, so that neighbouring keys give unrelated numbers, and (1, 2) others than (2, 1).
    """
    digest = hashlib.blake2b(repr(tuple(int(key) for key in keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def batches(size: int, *, batch_size: int, seed: int, epoch: int, drop_last: bool = True, start: int = 0) -> list[list[int]]:
    """Return the batches of one epoch, from number `start` on: a permutation of 0 to size - 1, cut into lists.

    Args:
        drop_last: leave out the last batch if it is incomplete.
        start: number of batches of this epoch that were used before, as when training resumes.

    Raises:
        ValueError: the set is empty, there is no complete batch, or the start is not in the epoch.
    """
    count = _count(size, batch_size, drop_last)
    _check_start(start, count)
    order = _permutation(size, seed, epoch)
    return [order[number * batch_size : (number + 1) * batch_size] for number in range(start, count)]


def _count(size: int, batch_size: int, drop_last: bool) -> int:
    _check_batch_size(batch_size)
    count = size // batch_size if drop_last else -(-size // batch_size)
    if count < 1:
        raise ValueError(f"batch_size={batch_size}: there are {size} images, too few for one batch")
    return count


def bucket_batches(buckets: Sequence[int], *, batch_size: int, seed: int, epoch: int, start: int = 0) -> list[list[int]]:
    """Return the batches of one epoch, from number `start` on: all complete, each from one bucket, in a random order.

    Each bucket is permuted and cut into batches. The last one is filled up with the first images of the permutation, which is
    repeated if the bucket has fewer images than a batch. So every image occurs at least once.

    Args:
        buckets: the bucket of each image.
        start: number of batches of this epoch that were used before, as when training resumes.

    Raises:
        ValueError: the batch size is below 1, there is no image, or the start is not in the epoch.
    """
    _check_batch_size(batch_size)
    members: dict[int, list[int]] = {}
    for index, bucket in enumerate(buckets):
        members.setdefault(int(bucket), []).append(index)
    if not members:
        raise ValueError("buckets: there are no images")
    cut = []
    for bucket, images in sorted(members.items()):
        order = _permutation(len(images), seed, epoch, bucket, _BUCKET)
        count = -(-len(images) // batch_size)
        places = (order[place % len(images)] for place in range(count * batch_size))
        cut += [[images[place] for place in islice(places, batch_size)] for _ in range(count)]
    _check_start(start, len(cut))
    return [cut[number] for number in _permutation(len(cut), seed, epoch, _BATCHES)[start:]]


def _permutation(size: int, *keys: int) -> list[int]:
    """Return a permutation of 0 to size - 1 that depends on the keys alone."""
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(stream_seed(*keys))).tolist()
    return order


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected a whole number from 1 up")


def _check_start(start: int, count: int) -> None:
    if not 0 <= start <= count:
        raise ValueError(f"start={start}: the epoch has {count} batches")


class SharedBatches(Sampler[list[int]], ABC):
    """A `batch_sampler` that yields one process's share of every global batch, in order and without a gap.

    Together the processes see exactly the batches of a single one. Call `set_epoch` before each pass. Nothing is drawn
    from torch's global generator; `loader` below keeps the DataLoader from doing so, too.

    Args:
        batch_size: the size of a global batch, of all processes together.
        rank, world_size: this process and their number.

    Raises:
        ValueError: the batch cannot be shared equally.
    """

    def __init__(self, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected a whole number from 0 to {world_size - 1}, of {world_size} processes")
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size}: {world_size} processes cannot share it equally")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.set_epoch(0)

    @abstractmethod
    def global_batches(self, epoch: int, start: int) -> list[list[int]]:
        """Return the batches of an epoch, from number `start` on, that the processes share."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, from 0, and the number of its batches to skip because they were used before."""
        self.shares = [share for batch in self.global_batches(epoch, start) if (share := self._share(batch))]

    def _share(self, batch: list[int]) -> list[int]:
        return batch[len(batch) * self.rank // self.world_size : len(batch) * (self.rank + 1) // self.world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.shares)

    def __len__(self) -> int:
        """Return the number of batches left in the epoch."""
        return len(self.shares)


class EpochSampler(SharedBatches):
    """The batches of `batches`, shared as in `SharedBatches`.

    Args:
        size: number of images in the set.
        drop_last: leave out the last batch if it is incomplete; otherwise its shares may differ by one image, and processes
            for which none is left have one batch less.

    Raises:
        ValueError: as `SharedBatches`, or the batch is larger than the set.
    """

    def __init__(
        self, size: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        self.size, self.drop_last = size, drop_last
        super().__init__(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def global_batches(self, epoch: int, start: int) -> list[list[int]]:
        settings: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "drop_last": self.drop_last}
        return batches(self.size, epoch=epoch, start=start, **settings)


class BucketSampler(SharedBatches):
    """The batches of `bucket_batches`, shared as in `SharedBatches`: in each step all processes get images of one bucket.

    Args:
        buckets: the bucket of each image.

    Raises:
        ValueError: as `SharedBatches` and `bucket_batches`.
    """

    def __init__(self, buckets: Sequence[int], *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.buckets = list(buckets)
        super().__init__(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def global_batches(self, epoch: int, start: int) -> list[list[int]]:
        return bucket_batches(self.buckets, batch_size=self.batch_size, seed=self.seed, epoch=epoch, start=start)


def loader(images: Dataset[Any], sampler: SharedBatches, *, workers: int = 0) -> DataLoader[Any]:
    """Return a DataLoader over the sampler's batches that leaves the global generator as it is.

    A DataLoader draws the seed of its workers anew for each pass, from the global generator unless it has its own.
    """
    own = torch.Generator().manual_seed(stream_seed(sampler.seed))
    return DataLoader(images, batch_sampler=sampler, num_workers=workers, generator=own)
