"""The base class of methods whose update is a sparse spectrum, which all count, draw, save and read components alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.checks import check_components, check_factor, counts_by_name
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.methods.adapter_config import AdapterConfig, Projection, TensorSpec, generator_of
from loca_vision.methods.locations import cell_locations, cells_at, random_locations
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update
from loca_vision.offload import stored


class SparseConfig(AdapterConfig):
    """The settings of a method whose update is a sparse spectrum.

    A subclass also has the fields `n_components` and `scale`. It defines the `spectrum` and may override its initial
    locations and coefficients.

    A file holds `<projection>.coefficients` (B,) and `<projection>.locations` int32 (B,) = row * q + column, which are final.
    """

    lr: ClassVar[float] = 5e-2
    lr_grid: ClassVar[tuple[float, ...]] = (1.5e-3, 5e-3, 1.5e-2)  # for atoms of norm 1
    edit_lr: ClassVar[float] = 2e-2
    n_components: int | Mapping[str, int]
    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_components(self.n_components)
        check_factor("scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))
        if isinstance(self.n_components, Mapping):
            object.__setattr__(self, "n_components", dict(self.n_components))

    @classmethod
    def at_budget(cls, numbers: int, shape: tuple[int, int]) -> dict[str, Any]:
        return {"n_components": numbers}

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> Spectrum:
        """Return the update with these coefficients (B,) and locations (B, 2)."""
        raise NotImplementedError

    def first_locations(self, projection: Projection, count: int, generator: torch.Generator) -> Tensor:
        """Return the (B, 2) initial locations of a new update's components, in distinct cells, each cell equally likely."""
        return random_locations(projection.shape, count, generator)

    def components(self, names: list[str]) -> dict[str, int]:
        """Return the number of components of each named projection.

        Raises:
            ValueError: a name matches no pattern, or a pattern decides the count of no name.
        """
        return counts_by_name(self.n_components, names)

    def new_updates(self, projections: Sequence[Projection]) -> list[Update]:
        counts = self.components([projection.name for projection in projections])
        for projection in projections:
            rows, cols = projection.shape
            if counts[projection.name] > rows * cols:
                raise ValueError(
                    f"n_components={counts[projection.name]}: {projection.name} has {rows} x {cols} = {rows * cols} cells"
                )
        return [self._new(projection, counts[projection.name]) for projection in projections]

    def _new(self, projection: Projection, count: int) -> Spectrum:
        generator = generator_of(self.seed, projection.name)
        with torch.device("cpu"), ordinary_tensors():
            locations = self.first_locations(projection, count, generator)
            return self.spectrum(projection.shape, self.first_coefficients(count, generator), locations)

    def first_coefficients(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the initial coefficients (B,), zeros so that the update changes nothing at first."""
        return torch.zeros(count, dtype=torch.float32)

    def file_layout(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, TensorSpec]:
        found: dict[str, TensorSpec] = {}
        counts = self.n_components if isinstance(self.n_components, Mapping) else dict.fromkeys(shapes, self.n_components)
        for projection, (rows, cols) in shapes.items():
            count = counts[projection]
            if count > rows * cols:
                raise ValueError(f"{projection} has {count} components, of {rows} x {cols} = {rows * cols} cells")
            found[f"{projection}.coefficients"] = TensorSpec((count,))
            found[f"{projection}.locations"] = TensorSpec((count,), ("I32",), cells_of=(rows, cols))
        return found

    def to_tensors(self, updates: Mapping[str, Update], dtype: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for projection, update in updates.items():
            count = update.count if isinstance(update, Spectrum) else None
            coefficients = stored(update, "coefficients").detach()[:count]
            found[f"{projection}.coefficients"] = coefficients.to("cpu", dtype, copy=True)
            found[f"{projection}.locations"] = _flat(projection, update.shape, stored(update, "locations")[:count])
        return found

    def check_values(self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        coefficients = tensors[f"{projection}.coefficients"]
        size = abs(self.scale) * float(torch.linalg.vector_norm(coefficients, 1, dtype=torch.float64))
        if size * max(shape) > torch.finfo(torch.float32).max:  # transforms have intermediate values this large
            raise ValueError(f"{projection}.coefficients times the scale {self.scale} overflows float32")

    def from_tensors(
        self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], room: int | None = None
    ) -> Update:
        flat = tensors[f"{projection}.locations"].long()
        coefficients = tensors[f"{projection}.coefficients"].to(torch.float32)
        count = len(flat)
        if room is not None and count > room:
            raise ValueError(f"{projection} has {count} components: there is room for {room}")
        if room is not None:
            coefficients, flat = F.pad(coefficients, (0, room - count)), F.pad(flat, (0, room - count))
        spectrum = self.spectrum(shape, coefficients, cell_locations(flat, shape))
        spectrum.locations.requires_grad_(False)
        spectrum.count, spectrum.final = count, True
        return spectrum

    def for_updates(self, updates: Mapping[str, Update]) -> AdapterConfig:
        if isinstance(self.n_components, int):
            return self
        counts = {projection: len(stored(update, "coefficients")) for projection, update in updates.items()}
        counts |= {projection: update.count for projection, update in updates.items() if isinstance(update, Spectrum)}
        return replace(self, n_components=counts)  # type: ignore[type-var]

    def renamed(self, rename: Callable[[str], str]) -> AdapterConfig:
        if not isinstance(self.n_components, Mapping):
            return self
        return replace(self, n_components={rename(name): count for name, count in self.n_components.items()})  # type: ignore[type-var]

    def check_names(self, projections: Collection[str]) -> None:
        if isinstance(self.n_components, Mapping) and set(self.n_components) != set(projections):
            raise ValueError("config: n_components does not name the projections of the file")

    def as_json(self) -> dict[str, Any]:
        counts = self.n_components
        return super().as_json() | {"n_components": dict(counts) if isinstance(counts, Mapping) else counts}


S = TypeVar("S", bound=Spectrum)


def fixed(spectrum: S) -> S:
    """Fix the locations of a spectrum for good, and return it."""
    spectrum.locations.requires_grad_(False)
    spectrum.final = True
    return spectrum


def _flat(projection: str, shape: tuple[int, int], locations: Tensor) -> Tensor:
    """Return the cells as int32 row * q + column."""
    rows, cols = shape
    if rows * cols > 2**31:
        raise ValueError(f"{projection}: {rows} x {cols} cells are more than int32 locations can number")
    if not torch.isfinite(locations).all():
        raise ValueError(f"{projection}.locations holds NaN or infinity")
    cells = cells_at(locations, shape).cpu()
    return (cells[:, 0] * cols + cells[:, 1]).to(torch.int32)
