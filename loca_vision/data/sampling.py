"""Which images make a batch: a function of (seed, epoch), wherever an epoch starts and however many processes share it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def stream_seed(*keys: int) -> int:
    """A seed in [0, 2^63) for the random numbers that the keys name, such as (seed, epoch, index).

    Hashed, so that neighbouring keys have unrelated numbers and (1, 2) others than (2, 1).
    """
    digest = hashlib.blake2b(repr(tuple(int(key) for key in keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def batches(size: int, *, batch_size: int, seed: int, epoch: int, drop_last: bool = True, start: int = 0) -> list[list[int]]:
    """The batches of one epoch, from number `start` on: a permutation of 0 to size - 1, cut into lists.

    Args:
        drop_last: leave out the last batch where it is not whole.
        start: batches of this epoch that were taken before, as when training resumes.

    Raises:
        ValueError: an empty set, no whole batch, or a start that is not in the epoch.
    """
    count = _count(size, batch_size, drop_last)
    if not 0 <= start <= count:
        raise ValueError(f"start={start}: the epoch has {count} batches")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(stream_seed(seed, epoch))).tolist()
    return [order[number * batch_size : (number + 1) * batch_size] for number in range(start, count)]


def _count(size: int, batch_size: int, drop_last: bool) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it is a whole number from 1 up")
    count = size // batch_size if drop_last else -(-size // batch_size)
    if count < 1:
        raise ValueError(f"batch_size={batch_size}: there are {size} images, too few for one batch")
    return count


class EpochSampler(Sampler[list[int]]):
    """A `batch_sampler`: of every global batch the share of one process, in order and without a gap.

    Together the processes see exactly the batches of a single one. Call `set_epoch` before each pass. Nothing is drawn
    from torch's global generator; `loader` below keeps the DataLoader from doing so, too.

    Args:
        size: images in the set.
        batch_size: of all processes together.
        rank, world_size: this process and their number.
        drop_last: leave out the last batch where it is not whole; otherwise its shares may differ by one image, and
            processes for which none is left have a batch fewer.

    Raises:
        ValueError: the batch cannot be shared equally, or is larger than the set.
    """

    def __init__(
        self, size: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: it is a whole number from 0 to {world_size - 1}, of {world_size} processes")
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size}: {world_size} processes cannot share it equally")
        _count(size, batch_size, drop_last)
        self.size, self.batch_size, self.seed, self.drop_last = size, batch_size, seed, drop_last
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, from 0, and the number of its batches to leave out because they were taken before."""
        settings: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "drop_last": self.drop_last}
        shares = map(self._share, batches(self.size, epoch=epoch, start=start, **settings))
        self.shares = [share for share in shares if share]

    def _share(self, batch: list[int]) -> list[int]:
        return batch[len(batch) * self.rank // self.world_size : len(batch) * (self.rank + 1) // self.world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.shares)

    def __len__(self) -> int:
        """Batches that are left of the epoch."""
        return len(self.shares)


def loader(images: Dataset[Any], sampler: EpochSampler, *, workers: int = 0) -> DataLoader[Any]:
    """A DataLoader over the sampler's batches that leaves the global generator as it is.

    A DataLoader draws the seed of its workers anew for each pass, from the global generator unless it has its own.
    """
    own = torch.Generator().manual_seed(stream_seed(sampler.seed))
    return DataLoader(images, batch_sampler=sampler, num_workers=workers, generator=own)
