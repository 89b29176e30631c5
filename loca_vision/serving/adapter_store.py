"""Serve many adapters with one model: each is loaded when first requested, within a limit of bytes."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from torch import nn

from loca_vision.layers.mixtures import HeldAdapter
from loca_vision.messages import nearest, one_line
from loca_vision.model.adapter_sources import give_source, source_of
from loca_vision.model.hosts import dismiss
from loca_vision.pipeline.call_entry import tell_scale
from loca_vision.pipeline.components import models_in
from loca_vision.serving.adapter_files import adapter_files
from loca_vision.serving.held_file import FileReader, HeldFile

_LOG = logging.getLogger(__name__)
_Stamp = tuple[int, int, int]  # identifies a file's version: it changes when the file is replaced


@dataclass(frozen=True)
class _Held:
    """A loaded adapter, and the stamp of the file it came from."""

    file: HeldFile
    stamp: _Stamp


class AdapterStore:
    """The adapters of a folder or repository, for calls that mix them.

    Example::

        store = AdapterStore("adapters", capacity_bytes=2**30, base=model)
        with per_sample(model, ["shop-a", "shop-b", None]):  # adapters/shop-a.safetensors, ...
            logits = model(images)

    An adapter is loaded when it is first requested, with every check of the file; when room runs out, the least recently used
    ones are dropped. When a file is replaced, the next call uses the new one; if that is broken, the log and `problems` say so
    and the old one stays in use. Spectra of cosines take 8 bytes per component. The store is safe to use from several threads:
    each adapter is loaded once, and a running call keeps the adapters it uses.

    Args:
        source: a folder, or `"user/repository"` on the hub, that contains `<name>.safetensors` or
            `<name>/pytorch_loca_weights.safetensors`. Names consist of letters, digits, `_` and `-`.
        capacity_bytes: the most bytes that the tensors of loaded adapters may take.
        base: the model or pipeline that the adapters are for; without it, see `attach`.

    Attributes:
        problems: for each adapter whose new file is broken, so that its old one stays in use, what is wrong with the file.

    Raises:
        TypeError: the source, capacity or base has another type.
        ValueError: the capacity is below 1, or the base has a store already.
        FileNotFoundError, OSError: there is no such folder or repository, or it cannot be reached.
    """

    def __init__(self, source: str | os.PathLike[str], *, capacity_bytes: int, base: Any = None) -> None:
        if not isinstance(capacity_bytes, int) or isinstance(capacity_bytes, bool):
            raise TypeError(f"capacity_bytes is a {type(capacity_bytes).__name__}: expected a whole number")
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes={capacity_bytes}: expected a whole number from 1 up")
        self.capacity_bytes = capacity_bytes
        self.problems: dict[str, str] = {}
        self._source, self._files = os.fspath(source) if isinstance(source, os.PathLike) else source, adapter_files(source)
        self._reader: FileReader | None = None
        self._lock = Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the most recently used is last
        self._loading: dict[str, Future[_Held]] = {}
        self._broken: dict[str, _Stamp] = {}
        if base is not None:
            self.attach(base)

    def attach(self, base: Any) -> None:
        """Make these adapters available to calls of a model or pipeline.

        Raises:
            TypeError: it is neither.
            ValueError: the store has a base already, or the base has a store.
        """
        reader = FileReader(base if isinstance(base, nn.Module) or models_in(base) else None)
        if self._reader is not None:
            raise ValueError(f"the store is attached to a {type(self._reader.base).__name__}: call detach first")
        for model in reader.models():
            if source_of(model) is not None:
                raise ValueError(f"{type(model).__name__} has a store: detach that one first")
        self._reader = reader
        for model in reader.models():
            give_source(model, self)
        if not isinstance(base, nn.Module):
            tell_scale(type(base))

    def detach(self) -> None:
        """Release all adapters and the base, whose layers are then as they were before."""
        if self._reader is None:
            return
        reader, self._reader = self._reader, None  # first, so that an adapter being loaded is not kept
        for model in reader.models():
            give_source(model, None)
            dismiss(model)
        with self._lock:
            self._held.clear()
            self._loading.clear()
            self._broken.clear()
            self.problems.clear()

    def names(self) -> list[str]:
        """Return the names of all current adapters, loaded or not, sorted."""
        return self._files.names()

    def held_names(self) -> list[str]:
        """Return the names of the loaded adapters, least recently used first."""
        with self._lock:
            return list(self._held)

    @property
    def held_bytes(self) -> int:
        """The bytes that the tensors of loaded adapters take."""
        with self._lock:
            return sum(held.file.size for held in self._held.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._files.find(name) is not None

    def load(self, name: str) -> None:
        """Load an adapter before it is needed.

        Raises:
            ValueError: there is no adapter of that name, its file is not valid for the base, or it is larger than the store.
            OSError: its file cannot be read.
        """
        self._current(name)

    def held(self, name: str) -> Mapping[nn.Module, HeldAdapter]:
        """Return the adapter, loading it if necessary, by each model of the base that its file has anything for."""
        return self._current(name).file.adapters

    def _current(self, name: str) -> _Held:
        """Return the adapter as its file is now; one thread reads it for all that request it meanwhile."""
        file, reader = self._files.find(name), self._reader
        if reader is None:
            raise ValueError("the store has no base: pass it as base=, or call attach")
        if file is None:
            raise ValueError(f"no adapter {name!r} in {self._source}{nearest(name, self.names())}")
        stamp = _stamp_of(file)
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._held.move_to_end(name)
                if held.stamp == stamp or self._broken.get(name) == stamp:
                    return held
            waiting = self._loading.get(name)
            if waiting is None:
                mine = self._loading[name] = Future()
        return waiting.result() if waiting is not None else self._load_for_all(reader, name, file, stamp, held, mine)

    def _load_for_all(
        self, reader: FileReader, name: str, file: Path, stamp: _Stamp, old: _Held | None, all_of_us: Future[_Held]
    ) -> _Held:
        try:
            found = self._read(reader, name, file, stamp)
        except BaseException as error:
            self._no_longer_loading(name, all_of_us)
            if old is None or not isinstance(error, (ValueError, OSError)) or self._reader is not reader:
                all_of_us.set_exception(error)
                raise
            self._broken[name], self.problems[name] = stamp, one_line(error)
            _LOG.warning("adapter %r: its new file is not used, and the old one stays: %s", name, one_line(error))
            found = old
        else:
            self._no_longer_loading(name, all_of_us)
            with self._lock:
                if self._reader is reader:
                    self._keep(name, found)
        all_of_us.set_result(found)
        return found

    def _no_longer_loading(self, name: str, mine: Future[_Held]) -> None:
        with self._lock:
            if self._loading.get(name) is mine:
                del self._loading[name]

    def _read(self, reader: FileReader, name: str, file: Path, stamp: _Stamp) -> _Held:
        self._files.check(file)
        try:
            found = reader.read(name, file)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from None
        if self._reader is not reader:
            for model in (model for model in reader.models() if source_of(model) is None):
                dismiss(model)  # reading has prepared layers for it
            raise ValueError(f"adapter {name!r}: the store was detached while it was loaded")
        if found.size > self.capacity_bytes:
            raise ValueError(f"adapter {name!r} takes {found.size:,} bytes, and capacity_bytes={self.capacity_bytes:,}")
        return _Held(found, stamp)

    def _keep(self, name: str, held: _Held) -> None:
        """Keep an adapter, and drop the least recently used ones until all fit."""
        self._held[name] = held
        self._held.move_to_end(name)
        self._broken.pop(name, None)
        self.problems.pop(name, None)
        total = sum(one.file.size for one in self._held.values())
        while total > self.capacity_bytes:
            _, gone = self._held.popitem(last=False)
            total -= gone.file.size


def _stamp_of(file: Path) -> _Stamp:
    about = file.stat()
    return about.st_mtime_ns, about.st_size, about.st_ino
