"""What a run asks of the task that it trains for: a sample, a batch, a loss, pictures and words about them."""

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
        recipe: settled, with its seed.
        accelerator: of several processes the first reads and encodes, and the others find everything there.

    Attributes:
        models: the pipeline, with its adapters.
        samples: what is trained on, encoded or as it comes.
        digests: what says whether the samples are those of another day, by column.
        noun: what a sample is called, in the plural.
        files_key: under which metrics.json has the digests.
        tracker: the name of the project with trackers.
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
        """The digests, without loading a model."""

    @abstractmethod
    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> SharedBatches:
        """Which samples make a batch.

        Raises:
            ValueError: there are too few.
        """

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any], *, step: int, first: int) -> Tensor:
        """Of some samples, of which the first has that place in the batch of all processes: ().

        Args:
            model: `models.trained`, or what shares its gradients.
        """

    @property
    @abstractmethod
    def has_pictures(self) -> bool:
        """Whether there is anything to draw for validation."""

    @abstractmethod
    def sheet(self) -> Image.Image:
        """The validation pictures as the models stand."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What metrics.json says of the task besides."""

    @classmethod
    @abstractmethod
    def card(cls, metrics: Mapping[str, Any], repository: str) -> str:
        """The model card."""

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """The settings."""
