"""The settings of a method, and how updates are made from them: new updates, or those stored in a file."""

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
    """A projection to adapt: (p, q) rows of one weight."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def weight(self) -> Tensor:
        """Return the weight (p, q) before any update.

        Raises:
            ValueError: the weight is quantised or, for another reason, not a floating-point matrix.
        """
        ...


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in a file must look like.

    Attributes:
        shape: the shape of the tensor.
        dtypes: the dtypes that are allowed, by their names in safetensors.
        cells_of: the shape of the matrix whose cells the tensor numbers; None for a tensor that does not hold cells.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    cells_of: tuple[int, int] | None = None


class AdapterConfig:
    """The settings of one adapter method. A subclass is a frozen dataclass, decorated with `kind`.

    A subclass has the fields `targets` and `seed`, and also `layers` unless it always adapts all layers. It builds updates
    (`build`) and may set their initial values (`initialize`), with which they must change nothing. Everything else follows from
    these, including files: a file holds the `state_dict` of every update.

    The class also holds the name, the description and the default learning rates that trainers, reports and studies use, so
    that one file is enough to define a method. All of these except `method` have usable defaults.

    Attributes:
        method: the name of the method in files and on command lines.
        title: the name as it is written in sentences; `method` by default.
        summary: a few words for `--help`.
        settings: the fields that the user of a trainer may set; by default all except `targets`, `layers` and `seed`.
        moves_locations: whether the alternating schedule and its settings apply to this method.
        lr, head_lr: learning rates of the adapter and of the classifier head if the user sets none.
        lr_grid: learning rates that a study of classifiers tries, from small to large; by default up to `lr`.
        edit_lr: the learning rate in a study of edits.
        targets: which projections to adapt: "q", "k", "v", "out" of attention layers, "fc1", "fc2" of feed-forward layers (the
            MLPs of a ViT), "proj_in", "proj_out" around the blocks of diffusers' models, or "linear" for every linear layer,
            including all of these.
        layers: name patterns as in `fnmatch`. A projection is adapted if a pattern matches its name, the path of its layer or
            the path of a module that contains it (`"*attn2*"`, `"up_blocks.1"`), and no pattern that begins with `!` does. A
            pattern that matches no projection of `targets`, but does match linear layers or 1 x 1 convolutions by their own
            paths (`"*.time_emb_proj"`), adds those. None: all layers.
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
        """Check the fields that all methods have; a subclass with more fields extends this to check them.

        Raises:
            ValueError: a field is invalid; the message names the field, its value and the rule.
        """
        check_targets(self.targets)
        check_seed(self.seed)
        object.__setattr__(self, "targets", tuple(self.targets))  # a list if it was read from a file
        object.__setattr__(self, "layers", check_layers(self.layers))

    # Defaults that depend on the task

    @classmethod
    def editing_defaults(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults for training on edits that differ from the class's; `chosen` holds the fields the user set."""
        return {}

    @classmethod
    def at_budget(cls, numbers: int, shape: tuple[int, int]) -> dict[str, Any]:
        """Return fields that give a projection (p, q) about `numbers` trained numbers; empty if no field controls this."""
        return {}

    # New updates

    def build(self, shape: tuple[int, int]) -> Update:
        """Return an update for a weight (p, q) on the current device; `initialize` or a file then sets its values.

        Raises:
            ValueError: the settings do not fit the shape; the message need not name the projection.
        """
        raise NotImplementedError

    def initialize(self, update: Any, projection: Projection, generator: torch.Generator) -> None:
        """Set the initial values of an update that `build` returned; with them, the update must not change the weight.

        The generator belongs to this projection alone, so the same seed always draws the same values.
        """

    def new_updates(self, projections: Sequence[Projection]) -> list[Update]:
        """Return new updates for these projections, none of which changes anything yet.

        Raises:
            ValueError: the settings do not fit one of the projections.
        """
        with torch.device("cpu"), ordinary_tensors():
            updates = [self._build(projection.name, projection.shape) for projection in projections]
            for update, projection in zip(updates, projections, strict=True):
                self.initialize(update, projection, generator_of(self.seed, projection.name))
        return updates

    def _build(self, projection: str, shape: tuple[int, int]) -> Update:
        """Call `build` and put the projection's name into its errors, including those about absurd sizes in a file."""
        try:
            return self.build(shape)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{projection}: {error}") from None

    # Files

    def file_layout(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, TensorSpec]:
        """Return what a file of this adapter holds for projections of these shapes, by key.

        Raises:
            ValueError: the settings do not fit one of the projections.
        """
        with torch.device("meta"):
            made = {projection: self._build(projection, shape) for projection, shape in shapes.items()}
        return {
            f"{projection}.{key}": TensorSpec(tuple(value.shape), _dtypes(update, key, value))
            for projection, update in made.items()
            for key, value in update.state_dict().items()
        }

    def to_tensors(self, updates: Mapping[str, Update], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a file by key; floating-point values are in `dtype`, except those an update keeps in float32.

        Raises:
            ValueError: an update has a value that no file may hold.
        """
        return {
            f"{projection}.{key}": _written(update, key, dtype)
            for projection, update in updates.items()
            for key in update.state_dict()
        }

    def check_values(self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError, naming the key and the rule, if finite values in a file make an update that is not finite."""

    def from_tensors(
        self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], room: int | None = None
    ) -> Update:
        """Return the update stored in a file; its cells, if it has any, are final.

        Args:
            room: the number of components to reserve, so that an adapter with more components can replace this one later.

        Raises:
            ValueError: the file has more components than `room`.
        """
        with torch.device("cpu"):
            update = self.build(shape)
        with torch.no_grad():
            for key, value in update.state_dict().items():
                value.copy_(tensors[f"{projection}.{key}"])
        return update

    def for_updates(self, updates: Mapping[str, Update]) -> AdapterConfig:
        """Return the settings as a file of these updates stores them, with projections by name and never by pattern."""
        return self

    def renamed(self, rename: Callable[[str], str]) -> AdapterConfig:
        """Return the settings for a model that uses other names for the same projections."""
        return self

    def check_names(self, projections: Collection[str]) -> None:
        """Raise ValueError if settings read from a file name other projections than its header does."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values that recreate an equal configuration; `layers` is left out if it is None."""
        fields = asdict(self)  # type: ignore[call-overload]
        if self.layers is None:
            fields.pop("layers", None)  # version 0.1.0 did not have this field: without it, that version can read the file
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _dtypes(update: Update, key: str, value: Tensor) -> tuple[str, ...]:
    """Return the dtypes a file may use; integers keep their own dtype, since no other is sure to hold them exactly."""
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
    """Return the random generator of one projection, so that targets do not affect each other; the same on every device."""
    return torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
