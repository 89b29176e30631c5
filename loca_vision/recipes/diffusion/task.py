"""The interface between a run and its task: samples, batches, a loss, pictures and descriptions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from loca_vision.data.sampling import SharedBatches
from loca_vision.recipes.diffusion.models import Models
from loca_vision.recipes.diffusion.settings import Recipe


class Samples(Protocol):
    """A data set whose views change from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Task(ABC):
    """A kind of training.

    Args:
        recipe: a settled recipe, with its seed.
        accelerator: of several processes the first reads and encodes, and the others find everything there.

    Attributes:
        models: the pipeline, with its adapters.
        samples: the samples to train on, encoded or raw.
        digests: digests by column that tell whether the samples have changed since an earlier run.
        noun: what samples are called, in the plural.
        files_key: the key of the digests in metrics.json.
        tracker: the name of the project in trackers.
    """

    noun: ClassVar[str]
    files_key: ClassVar[str]
    tracker: ClassVar[str]
    models: Models
    samples: Samples
    digests: Mapping[str, str]

    @abstractmethod
    def __init__(self, recipe: Any, accelerator: Accelerator) -> None: ...

    @classmethod
    @abstractmethod
    def digests_of(cls, recipe: Any) -> Mapping[str, str]:
        """Return the digests, without loading a model."""

    @abstractmethod
    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> SharedBatches:
        """Return the sampler that chooses which samples make a batch.

        Raises:
            ValueError: there are too few samples.
        """

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any], *, step: int, first: int) -> Tensor:
        """Return the loss of some samples, (), of which the first is at position `first` in the batch of all processes.

        Args:
            model: `models.trained`, or a wrapper that shares its gradients.
        """

    @property
    @abstractmethod
    def has_pictures(self) -> bool:
        """Whether there is anything to draw for validation."""

    @abstractmethod
    def sheet(self) -> Image.Image:
        """Return the validation pictures for the models' current state."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return further facts about the task for metrics.json."""

    @classmethod
    @abstractmethod
    def card(cls, metrics: Mapping[str, Any], repository: str) -> str:
        """Return the model card."""

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """The settings."""
