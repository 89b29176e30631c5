"""Adapter files in the form that calls which mix adapters need, for a model or for the components of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.formats.adapter_file import Description, check_values, read_description
from loca_vision.formats.match_model import match
from loca_vision.formats.opened import Opened
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.formats.save_load import OwnTensors, in_dtypes, part_for_model
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.mixtures import HeldAdapter, PlacedUpdate, handle_of
from loca_vision.layers.targets import Target
from loca_vision.methods.packed_update import PackedUpdate
from loca_vision.model.hosts import WALKING, host
from loca_vision.model.traversal import own_tensors, unwrap
from loca_vision.offload import device_for, split_path
from loca_vision.pipeline.components import models_in
from loca_vision.pipeline.load import assigned_parts, naming
from loca_vision.serving.held_updates import Held, held_updates
from loca_vision.storage.safetensors_file import OpenFile, tensors_like

_FORMS = 8  # number of forms to remember


@dataclass(frozen=True)
class HeldFile:
    """The contents of an adapter file, ready for use.

    Args:
        adapters: the adapter for each model that the file is for.
        size: the bytes of all their tensors.
    """

    adapters: Mapping[nn.Module, HeldAdapter]
    size: int


@dataclass(frozen=True)
class _Part:
    """What a file has for one model: the targets, and the whole tensors with the dtypes they have in the model.

    Attributes:
        handles: the handles of the targets' layers, once these are hosts.
    """

    component: str
    model: nn.Module
    about: Description
    own: OwnTensors
    targets: list[Target]
    dtypes: Mapping[str, torch.dtype]
    handles: list[int] = field(default_factory=list)

    def naming(self) -> AbstractContextManager[None]:
        return naming(self.component) if self.component else nullcontext()


@dataclass(frozen=True)
class _Form:
    """Everything that a file's header says, checked against the base."""

    file: Opened
    about: Description
    parts: tuple[_Part, ...]


class FileReader:
    """Reads adapter files for one base, with every check. Identical headers are checked once.

    Args:
        base: a model or a pipeline.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self._forms: tuple[_Form, ...] = ()

    def models(self) -> list[nn.Module]:
        """Return the models that adapters can be for."""
        return [unwrap(self.base)] if isinstance(self.base, nn.Module) else list(models_in(self.base).values())

    def read(self, name: str, file: Path) -> HeldFile:
        """Read an adapter from a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not valid for this base.
        """
        with ordinary_tensors():  # the first call that requests it may be inside `inference_mode`
            form, tensors = self._opened(file)
            try:
                check_values(tensors, form.about)
                made = {part.model: self._held(name, part, tensors) for part in form.parts}
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        return HeldFile(made, sum(map(_size, made.values())))

    def _opened(self, file: Path) -> tuple[_Form, dict[str, Tensor]]:
        for form in self._forms:
            tensors = tensors_like(file, form.file) if isinstance(form.file, OpenFile) else None
            if tensors is not None:
                return form, tensors
        with open_adapter(file) as opened:
            known = self._form_of(opened)
            return known, opened.tensors()

    def _form_of(self, opened: Opened) -> _Form:
        """Return the form of an open file. The headers of packed files can differ and still say the same once unpacked."""
        for form in self._forms:
            if (form.file.metadata, form.file.entries) == (opened.metadata, opened.entries):
                return form
        about = read_description(opened.metadata, opened.entries)
        with WALKING:
            form = _Form(opened, about, tuple(self._parts(about, opened)))
        self._forms = (form, *self._forms[: _FORMS - 1])
        return form

    def _parts(self, about: Description, file: Opened) -> list[_Part]:
        if isinstance(self.base, nn.Module):
            model = unwrap(self.base)
            assigned = {"": (model, *part_for_model(model, about))}
        else:
            assigned = assigned_parts(self.base, about)
        found = []
        for component, (model, part, own) in assigned.items():
            with naming(component) if component else nullcontext():
                targets = match(model, part, own(file.entries))
            tensors = own_tensors(model) if part.whole else {}
            dtypes = {name: tensors[name].dtype for name in part.whole}
            found.append(_Part(component, model, part, own, targets, dtypes))
        return found

    def _held(self, name: str, part: _Part, tensors: dict[str, Tensor]) -> HeldAdapter:
        own = part.own(tensors)
        with part.naming():
            updates = held_updates(part.about.configs[""], part.targets, own)
            whole = {key: value.to(_device(part.model, key)) for key, value in in_dtypes(part.dtypes, own).items()}
        return HeldAdapter(name, self._placed(part, updates), whole)

    def _placed(self, part: _Part, updates: list[Held]) -> dict[int, list[PlacedUpdate]]:
        found: dict[int, list[PlacedUpdate]] = {}
        if not part.handles:
            with WALKING:
                part.handles[:] = [handle_of(host(part.model, target)) for target in part.targets]
        for handle, target, update in zip(part.handles, part.targets, updates, strict=True):
            found.setdefault(handle, []).append(PlacedUpdate(target.rows, update, target.part not in ("linear", "conv")))
        return found


def _device(model: nn.Module, key: str) -> torch.device:
    module, name = split_path(model, key)
    return device_for(module, name)


def _size(adapter: HeldAdapter) -> int:
    """Return the bytes of all its tensors."""
    updates = [one.update for placed in adapter.updates.values() for one in placed]
    packed = sum(update.nbytes for update in updates if isinstance(update, PackedUpdate))
    others = [tensor for update in updates if not isinstance(update, PackedUpdate) for tensor in update.tensors()]
    return packed + sum(tensor.nbytes for tensor in (*others, *adapter.whole.values()))
