"""Show the contents of an adapter file or a LoRA as text and as a picture; no model is needed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import (
    FORMAT_VERSION,
    METADATA_KEY,
    Description,
    check_values,
    component_of,
    read_description,
)
from loca_vision.formats.conversion.base_tensors import matrices_in
from loca_vision.formats.lora_files.layer_tensors import LoraFile
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.reader import has_lora, read_lora
from loca_vision.formats.opened import Opened
from loca_vision.formats.packed.reading import PACKED_VERSION, PackedFile, open_adapter
from loca_vision.formats.save_load import file_to_read
from loca_vision.functional.dct import dct2
from loca_vision.messages import aligned
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.storage.safetensors_file import open_safetensors

_MOST_CELLS = 2**26  # of a matrix that is built for inspection: 8192 x 8192, 256 MB
HEADER = ("projection", "shape", "trained", "norm", "energy", "low / middle / high")


@dataclass(frozen=True)
class Inspect:
    """Show the contents of an adapter file or a LoRA, projection by projection."""

    file: Path
    """The adapter, or the folder it is in."""
    base: Path | None = None
    """The weights it is for, if a file's meaning depends on their sizes (FourierFT of peft)."""
    picture: Path | None = None
    """A PNG file for the cosine spectra of the updates."""


def inspect(command: Inspect) -> str:
    """Return the description; if a picture is requested, it is drawn first.

    Raises:
        FileNotFoundError, ValueError, OSError: as `contents_of`; or the picture cannot be written.
    """
    said = describe(command.file, command.base)
    if command.picture is not None:
        from loca_vision.commands.spectrum_picture import draw_spectra

        title = f"Cosine spectra of the updates in {command.file.name}"
        draw_spectra(command.picture, title, contents_of(command.file, command.base).layers())
    return said


@dataclass(frozen=True)
class Layer:
    """One update.

    Args:
        trained: how many numbers it was made from.
        norm: Frobenius norm; None if only a weight tells it.
        delta: the matrix; None in that case too, and if it is too large to look at.
    """

    name: str
    shape: tuple[int, int]
    trained: int
    norm: float | None
    delta: Tensor | None


@dataclass(frozen=True)
class Contents:
    """A file's description, line by line, and its updates, made one at a time."""

    head: list[str]
    layers: Callable[[], Iterator[Layer]]


def contents_of(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Contents:
    """Read a file's description and its updates.

    Args:
        base: the weights it is for, whose sizes determine the cells of peft's FourierFT.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, except for what only a model can tell; or, for a LoRA, as `read_lora`.
    """
    file = Path(path)
    if has_lora(file) or (file.is_file() and not _is_adapter(file)):
        return _of_lora(file, matrices_in(base) if base is not None else None)
    file = file_to_read(path)
    with open_adapter(file) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        size = file.stat().st_size
        check_values(tensors, about)
    whole = {key.removeprefix("full."): tuple(value.shape) for key, value in tensors.items() if key.startswith("full.")}
    head = [
        f"{file}: {size:,} bytes, adapter {about.name!r} of {about.base_model}, by loca-vision {about.library_version}",
        _storage(opened, tensors, size),
        *(
            f"{f'{component}: ' if component else ''}{config.method}; {_settings(config)}"
            for component, config in about.configs.items()
        ),
        *(f"trained whole: {name} {shape}" for name, shape in whole.items()),
    ]
    return Contents(head, lambda: _updates(about, tensors))


def _storage(opened: Opened, tensors: Mapping[str, Tensor], size: int) -> str:
    """Return the format version and the bytes per component, counting everything that is not trained as a whole."""
    packed = opened if isinstance(opened, PackedFile) else None
    coefficients = [value for key, value in tensors.items() if key.endswith(".coefficients") and not key.startswith("full.")]
    version = f"format version {PACKED_VERSION if packed else FORMAT_VERSION}"
    if not coefficients:
        return version
    count = sum(map(len, coefficients))
    rest = size - sum(value.nbytes for key, value in tensors.items() if key.startswith("full."))
    stored = packed.stored if packed else str(coefficients[0].dtype).removeprefix("torch.")
    return f"{version}: {count:,} components in {stored}, {rest / count:.1f} bytes each, with settings and names"


def describe(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> str:
    """Return the file's settings, then a line for each projection: (p, q), trained numbers, Frobenius norm of the update, its
    share of the squared norm of all, and how that is spread over the lower, middle and upper third of the frequencies.

    The last three of a weight-decomposed update need a model, and the spread is not computed for an enormous one.

    Raises:
        FileNotFoundError, ValueError: as `contents_of`.
    """
    contents = contents_of(path, base)
    return "\n".join([*contents.head, "", aligned(table_of(contents), str.ljust)])


def table_of(contents: Contents) -> list[tuple[str, ...]]:
    """Return `HEADER`, then a row for each projection, as in `describe`."""
    measured = [(layer.name, layer.shape, layer.trained, layer.norm, _bands(layer.delta)) for layer in contents.layers()]
    total = sum(norm**2 for *_, norm, _ in measured if norm is not None) or 1.0
    rows: list[tuple[str, ...]] = [HEADER]
    for name, (p, q), trained, norm, bands in measured:
        size, energy = ("-", "-") if norm is None else (f"{norm:.4g}", f"{100 * norm**2 / total:.1f} %")
        spread = " / ".join(f"{100 * band / (sum(bands) or 1.0):.0f}" for band in bands) + " %" if bands else "-"
        rows.append((name, f"{p} x {q}", str(trained), size, energy, spread))
    return rows


def _is_adapter(file: Path) -> bool:
    with open_safetensors(file, eight_bits=True) as opened:
        return METADATA_KEY in opened.metadata or any(key.endswith(".coefficients") for key in opened.entries)


@torch.no_grad()
def _updates(about: Description, tensors: dict[str, Tensor]) -> Iterator[Layer]:
    for projection, shape in about.shapes.items():
        update = about.configs[component_of(projection, about.configs)].from_tensors(projection, shape, tensors)
        trained = sum(parameter.numel() for parameter in update.trainable())
        seen = not update.needs_weight and math.prod(shape) <= _MOST_CELLS
        yield Layer(projection, shape, trained, update.norm(), update.delta() if seen else None)


def _of_lora(file: Path, sizes: Mapping[str, tuple[int, int]] | None) -> Contents:
    lora = read_lora(file, skip=True, sizes=sizes)
    head = [
        f"{file}: {_kinds(lora)}",
        *(f"trained whole: {name} {tuple(value.shape)}" for name, value in lora.whole.items()),
        *(f"added to: {name} {tuple(value.shape)}" for name, value in lora.differences.items()),
        *(f"not understood: {key}: {why}" for key, why in lora.skipped.items()),
    ]

    def layers() -> Iterator[Layer]:
        for name, update in lora.updates.items():
            seen = not update.needs_weight and math.prod(update.shape) <= _MOST_CELLS
            made = update.read(None) if seen else None
            delta = made.delta().float() if isinstance(made, LowRankPair) else made
            yield Layer(name, update.shape, update.trained, None if delta is None else float(delta.norm()), delta)

    return Contents(head, layers)


def _kinds(lora: LoraFile) -> str:
    """Return how many modules have each kind of update, and the ranks of those that are LoRA."""
    counts = Counter(update.kind for update in lora.updates.values())
    ranks = sorted({pair.rank for pair in lora.pairs.values()})
    told = f", ranks {', '.join(map(str, ranks))}" if ranks else ""
    return "; ".join(f"{kind} of {count} modules" for kind, count in counts.items()) + told


def _bands(delta: Tensor | None) -> tuple[float, ...]:
    """Return the squared norm in each third of the distance from frequency zero; nothing if there is no matrix."""
    if delta is None:
        return ()
    energy = dct2(delta).double().square()
    rows, cols = (torch.arange(size, dtype=torch.float64) / max(size - 1, 1) for size in delta.shape)
    band = (torch.hypot(rows[:, None], cols[None]) / 2**0.5 * 3).long().clamp(max=2)
    return tuple(float(energy[band == third].sum()) for third in range(3))


def _settings(config: AdapterConfig) -> str:
    """Return all fields on one line; counts by projection are in the table."""
    fields = {name: value for name, value in config.as_json().items() if not isinstance(value, Mapping)}
    return "; ".join(f"{name} {', '.join(value) if name == 'targets' else value}" for name, value in fields.items())
