"""The settings of a method, and how they become updates: new ones, or those in a file."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from loca_vision.checks import check_layers, check_seed, check_targets
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.methods.update import Update
from loca_vision.offload import stored_at

FLOATS = ("F32", "F16")
_WHOLE = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


class Projection(Protocol):
    """What is to be adapted: (p, q) rows of one weight."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def weight(self) -> Tensor:
        """(p, q), the weight before any update.

        Raises:
            ValueError: it is quantised, or not a floating-point matrix for another reason.
        """
        ...


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in a file has to be: its shape, dtypes as safetensors calls them, and of what matrix it numbers cells."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    cells_of: tuple[int, int] | None = None


class AdapterConfig:
    """The settings of one adapter method. A subclass is a frozen dataclass, decorated with `kind`.

    It has the fields `targets` and `seed`, and `layers` unless it goes on all layers. It builds updates (`build`), and may give
    them their first values (`initialize`), with which they change nothing. Everything else follows, files included: a file
    holds the `state_dict` of every update.

    What trainers, reports and studies say of a method and begin with is here too, so that a method is one file. All but
    `method` has a default that will do.

    Attributes:
        method: the name of the kind, in files and on command lines.
        title: as it is written in sentences; the name by default.
        summary: a few words for `--help`.
        settings: the fields that a trainer's user may set; by default all but `targets`, `layers` and `seed`.
        moves_locations: whether the alternating schedule and its settings are for this method.
        lr, head_lr: learning rates of the adapter and of the classifier head, where the user sets none.
        lr_grid: rates that a study of classifiers tries, from small to large; by default up to `lr`.
        edit_lr: the rate in a study of edits.
        targets: which projections: "q", "k", "v", "out" of attention layers, "fc1", "fc2" of feed-forward layers (the MLPs of a
            ViT), "proj_in", "proj_out" around the blocks of diffusers' models, "linear" for every linear layer, these included.
        layers: patterns over names, as in `fnmatch`: a projection is adapted if one of them fits its name, the path of its
            layer or of a module that contains it (`"*attn2*"`, `"up_blocks.1"`), and none that begins with `!` does. A pattern
            that fits no projection of `targets`, but linear layers or 1 x 1 convolutions by their own paths
            (`"*.time_emb_proj"`), adds those. None: all layers.
    """

    method: ClassVar[str]
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    settings: ClassVar[tuple[str, ...] | None] = None
    moves_locations: ClassVar[bool] = False
    lr: ClassVar[float] = 5e-3
    head_lr: ClassVar[float] = 1e-2
    lr_grid: ClassVar[tuple[float, ...]] = ()
    edit_lr: ClassVar[float] = 1e-2
    targets: tuple[str, ...]
    seed: int
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the fields that all kinds have; a subclass with more of them checks those too.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        check_targets(self.targets)
        check_seed(self.seed)
        object.__setattr__(self, "targets", tuple(self.targets))  # which a file has as a list
        object.__setattr__(self, "layers", check_layers(self.layers))

    # Defaults that depend on the task

    @classmethod
    def editing_defaults(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults in teaching edits that differ from the class's; `chosen` are the fields that the user has set."""
        return {}

    @classmethod
    def at_budget(cls, numbers: int, shape: tuple[int, int]) -> dict[str, Any]:
        """Fields that give a projection (p, q) about that many trained numbers; empty if the method has no such choice."""
        return {}

    # New updates

    def build(self, shape: tuple[int, int]) -> Update:
        """An update for a weight (p, q), on the current device; all its numbers are about to be written.

        Raises:
            ValueError: the settings do not fit the shape; the sentence need not name the projection.
        """
        raise NotImplementedError

    def initialize(self, update: Any, projection: Projection, generator: torch.Generator) -> None:
        """Give an update that `build` has made its first numbers, with which it is to change nothing.

        The generator is the projection's own; whoever draws from it draws the same for the same seed.
        """

    def new_updates(self, projections: Sequence[Projection]) -> list[Update]:
        """New updates for these projections, of which none changes anything.

        Raises:
            ValueError: the settings do not fit one of them.
        """
        with torch.device("cpu"), ordinary_tensors():
            updates = [self._build(projection.name, projection.shape) for projection in projections]
            for update, projection in zip(updates, projections, strict=True):
                self.initialize(update, projection, generator_of(self.seed, projection.name))
        return updates

    def _build(self, projection: str, shape: tuple[int, int]) -> Update:
        """With the name of the projection in what is said against the settings, absurd sizes in a file among them."""
        try:
            return self.build(shape)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{projection}: {error}") from None

    # Files

    def file_layout(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, TensorSpec]:
        """What a file of this adapter holds for projections of these shapes, by key.

        Raises:
            ValueError: the settings do not fit one of them.
        """
        with torch.device("meta"):
            made = {projection: self._build(projection, shape) for projection, shape in shapes.items()}
        return {
            f"{projection}.{key}": TensorSpec(tuple(value.shape), _dtypes(update, key, value))
            for projection, update in made.items()
            for key, value in update.state_dict().items()
        }

    def to_tensors(self, updates: Mapping[str, Update], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a file, by key: floating-point values in `dtype`, except those that an update keeps in float32.

        Raises:
            ValueError: a value no file may hold.
        """
        return {
            f"{projection}.{key}": _written(update, key, dtype)
            for projection, update in updates.items()
            for key in update.state_dict()
        }

    def check_values(self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """Raise where finite numbers in a file make an update that is not: naming the key and the rule."""

    def from_tensors(
        self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], room: int | None = None
    ) -> Update:
        """The update in a file; its cells, where it has any, are final.

        Args:
            room: components to make room for, so that an adapter with more of them can take its place later.

        Raises:
            ValueError: there are more.
        """
        with torch.device("cpu"):
            update = self.build(shape)
        with torch.no_grad():
            for key, value in update.state_dict().items():
                value.copy_(tensors[f"{projection}.{key}"])
        return update

    def for_updates(self, updates: Mapping[str, Update]) -> AdapterConfig:
        """The settings as a file of these updates has them: projections by name, never by pattern."""
        return self

    def renamed(self, rename: Callable[[str], str]) -> AdapterConfig:
        """The settings for a model that has other names for the same projections."""
        return self

    def check_names(self, projections: Collection[str]) -> None:
        """Raise where settings read from a file name other projections than its header does."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values, from which the class makes an equal configuration; without `layers` where it is None."""
        fields = asdict(self)  # type: ignore[call-overload]
        if self.layers is None:
            fields.pop("layers", None)  # the field is newer than the files of version 0.1.0, which such a file can be read by
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _dtypes(update: Update, key: str, value: Tensor) -> tuple[str, ...]:
    """Whole numbers in their own dtype only, which no other holds exactly."""
    if value.is_floating_point():
        return FLOATS[:1] if key in update.float32_only else FLOATS
    if value.dtype not in _WHOLE:
        raise ValueError(f"{key} is {value.dtype}, which no adapter file holds")
    return (_WHOLE[value.dtype],)


def _written(update: Update, key: str, dtype: torch.dtype) -> Tensor:
    value = stored_at(update, key).detach()
    as_it_is = key in update.float32_only or not value.is_floating_point()
    return value.to("cpu", value.dtype if as_it_is else dtype, copy=True)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers of one projection, so that targets do not disturb each other; the same on every device."""
    return torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
