"""The adapters of a folder, for requests that name them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from loca_vision import AdapterStore
from loca_vision.formats.adapter_file import FILE_NAME
from loca_vision.layers.mixtures import HeldAdapter
from loca_vision.messages import nearest, one_line
from loca_vision.recipes.classification.run_folder import SETTINGS
from loca_vision.recipes.reports.metrics import METRICS
from refusals import Refusal

LATER = 5  # seconds after which a file that cannot be read now may be readable
_Stamp = tuple[int, int, int] | None


class AdapterShelf:
    """A store that turns its errors into refusals and counts its loads.

    Args:
        folder: the folder of the adapters.
        capacity: how many bytes of adapters are held in memory.
        base: the model or pipeline that the adapters are for.
        models: the base's models, which are inspected to count loads.
    """

    def __init__(self, folder: Path, capacity: int, base: Any, models: Sequence[nn.Module]) -> None:
        self.folder, self.models, self.loads = folder, models, 0
        self.store = AdapterStore(folder, capacity_bytes=capacity, base=base)
        self._seen: dict[str, weakref.ref[HeldAdapter]] = {}

    def check_name(self, name: str) -> None:
        """Check that an adapter exists.

        Raises:
            Refusal: there is no adapter with this name.
        """
        if name not in self.store:
            raise Refusal(404, f"there is no adapter {one_line(repr(name), 120)}{nearest(name, self.store.names())}")

    def ready(self, name: str) -> HeldAdapter:
        """Load an adapter if needed and return it as held for the first model that it applies to.

        Raises:
            Refusal: there is no adapter with this name, or its file cannot be used.
        """
        self.check_name(name)
        try:
            held = self.store.held(name)
        except (ValueError, OSError) as error:
            raise self.refusal(error) from None
        found = next(held[model] for model in self.models if model in held)
        seen = self._seen.get(name)
        if seen is None or seen() is not found:
            self._seen[name] = weakref.ref(found)
            self.loads += 1
        return found

    def refusal(self, error: Exception) -> Refusal:
        """Turn an error of the store into a refusal that does not reveal the path of the folder."""
        sentence = one_line(error, 1000).replace(f"{self.folder}/", "")
        if isinstance(error, OSError):
            return Refusal(503, f"the adapter cannot be read now: {sentence}", again=LATER)
        return Refusal(422, sentence)

    def stamps(self, name: str) -> tuple[_Stamp, ...]:
        """Return stamps that change when a file of the adapter is replaced."""
        own = self.folder / name
        files = (self.folder / f"{name}.safetensors", own / FILE_NAME, own / METRICS, own / SETTINGS)
        return tuple(map(_stamp, files))


def _stamp(file: Path) -> _Stamp:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
