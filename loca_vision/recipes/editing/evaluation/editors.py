"""The editors that an evaluation compares: the base, an adapter at several scales, and other adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from loca_vision.data.images import as_png, open_image
from loca_vision.formats.adapter_file import FILE_NAME
from loca_vision.formats.sources import Request, locate
from loca_vision.model.adapters import adapters
from loca_vision.pipeline.components import adapted_in
from loca_vision.pipeline.loader import LoCALoaderMixin as Loca
from loca_vision.recipes.editing.edit import Sampling, edit
from loca_vision.recipes.editing.evaluation.photos import EditCase
from loca_vision.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class Editor:
    """The pipeline with one adapter, or with none.

    Args:
        title: a unique title.
        adapter: its name in the pipeline; None for the base model.
        scale: the adapter's strength.
    """

    title: str
    adapter: str | None = None
    scale: float = 1.0

    @property
    def file_title(self) -> str:
        """A unique title for file names: no name of an adapter contains the sign @."""
        return self.title.replace(" at ", "@")

    def act(self, pipe: Any) -> None:
        """Activate this editor's adapter in the pipeline, and no other."""
        Loca.set_loca_adapters(pipe, [] if self.adapter is None else self.adapter, None if self.adapter is None else self.scale)


BASE = Editor("base")


def columns_of(first: str, others: Sequence[str], scales: Sequence[float]) -> list[Editor]:
    """Return the base, the first adapter at each scale, and each of the others as it is; adapters are given by name."""
    graded = [Editor(f"{first} at {scale:g}", first, scale) for scale in scales]
    return [BASE, *graded, *(Editor(name, name) for name in others)]


def named(sources: Sequence[str]) -> dict[str, str]:
    """Name each source of an adapter, in order, after its file, its folder, or its repository.

    If several have the same name, the second becomes `name-2`.
    """
    names: dict[str, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        plain = path.resolve() if path.exists() else path
        last = plain.parent.name if plain.name == FILE_NAME else plain.name.removesuffix(".safetensors")
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-")[:80] or "adapter"
        name = f"{name}-adapter" if name in ("base", "photograph", "target") else name
        free = (name, *(f"{name}-{number}" for number in range(2, len(sources) + 1)))
        names[next(one for one in free if one not in names)] = source
    return names


def files_of(sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the facts about each adapter's file by the adapter's name, fetching the file from the hub if necessary.

    Raises:
        FileNotFoundError, OSError, ValueError: a file is not available.
    """
    files: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        data = locate(str(Path(source).expanduser()) if source.startswith("~") else source, Request()).read_bytes()
        files[name] = {"source": source, "bytes": len(data), "sha256": sha256(data).hexdigest()}
    return files


def load_all(pipe: Any, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Load the adapters under their names; return what each of them is and how many numbers it holds.

    Raises:
        FileNotFoundError, OSError, ValueError: one of them cannot be loaded into this pipeline.
    """
    for name, source in sources.items():
        Loca.load_loca_weights(pipe, str(Path(source).expanduser()) if source.startswith("~") else source, name)
    return {name: _facts(pipe, name) for name in sources}


def _facts(pipe: Any, name: str) -> dict[str, Any]:
    parts = [(model, record.adapters[name]) for model, record in adapted_in(pipe).values() if name in record.adapters]
    learned = [p for model, _ in parts for update in adapters(model, name).values() for p in update.trainable()]
    return {
        "methods": sorted({part.config.method for _, part in parts}),
        "trained_numbers": sum(p.numel() for p in learned),
        "trained_whole": sum(tensor.numel() for _, part in parts for tensor in part.modules_to_save.values()),
    }


def edits_of(subjects: Sequence[EditCase], columns: Sequence[Editor], folder: Path) -> dict[Editor, dict[str, Path]]:
    """Return the path of every edit, whether it exists or not, by column and then by the subject's name."""
    return {column: {one.name: folder / f"{one.name}-{column.file_title}.png" for one in subjects} for column in columns}


def make_edits(
    pipe: Any, subjects: Sequence[EditCase], columns: Sequence[Editor], sampling: Sampling, folder: Path
) -> dict[Editor, dict[str, Path]]:
    """Edit every subject by every column into PNG files; existing ones are kept.

    Edits are made column by column, because an adapter's weights are built once when it is activated.

    Raises:
        ValueError: a photograph cannot be read, or cannot be edited by this pipeline.
        OSError: an edit cannot be written.
    """
    files = edits_of(subjects, columns, folder)
    missing = [(column, one) for column in columns for one in subjects if not files[column][one.name].exists()]
    acting = None
    for column, one in tqdm(missing, desc="edits", unit="edit", dynamic_ncols=True, disable=None):
        if column is not acting:
            column.act(pipe)
            acting = column
        photo, _ = one.read()
        edited = edit(pipe, photo, one.prompt, sampling, seed=one.seed)
        write_atomically(files[column][one.name], as_png(edited))
    return files


def pictures_of(one: EditCase, files: Mapping[Editor, Mapping[str, Path]]) -> Iterator[tuple[str, Image.Image]]:
    """Yield the photograph, its edits by the titles of the columns, and the target if there is one."""
    photo, target = one.read()
    yield "photograph", photo
    for column, there in files.items():
        yield column.title, open_image(there[one.name])
    if target is not None:
        yield "target", target
