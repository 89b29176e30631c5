"""The adapter files that `save_pretrained` writes beside a model that has adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from loca_vision.formats.adapter_file import FILE_NAME, check_values
from loca_vision.formats.save_load import contents, write_adapter
from loca_vision.model.base_checkpoint import written_by
from loca_vision.model.state import state_of
from loca_vision.model.traversal import unwrap


@written_by
def prepare(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> Callable[[Path], None]:
    """Check every adapter that is not fused into the weights, and return a function that writes their files into a folder.

    The only adapter, or the one named "default", goes into the folder itself; the others go into subfolders with their names.

    Args:
        state: a state dict of the model, whose values are written instead of the model's.

    Raises:
        ValueError: a value cannot be stored in a file.
    """
    record = state_of(model)
    names = [name for name in record.adapters if name not in record.fused.adapters] if record is not None else []
    files = {name: contents(unwrap(model), name, state=state) for name in names}
    for about, tensors in files.values():
        check_values(tensors, about)

    def write(folder: Path) -> None:
        for name, (about, tensors) in files.items():
            write_adapter(folder / place(name, names), about, tensors)

    return write


def place(name: str, names: Collection[str]) -> Path:
    """Return the relative path of an adapter's file in the folder of a model that has adapters of these names."""
    return Path(FILE_NAME) if name == "default" or len(names) == 1 else Path(name, FILE_NAME)
