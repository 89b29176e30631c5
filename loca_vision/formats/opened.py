"""The interface for reading an adapter, whether from a file or from tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import METADATA_KEY
from loca_vision.storage.safetensors_file import Entry

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Opened(Protocol):
    """An adapter whose description can be checked before its tensors are read."""

    @property
    def entries(self) -> dict[str, Entry]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class InMemory:
    """An adapter in a state dict."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    held: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {key: self.tensor(key) for key in self.held}

    def tensor(self, key: str) -> Tensor:
        return self.held[key].detach().to("cpu", copy=True).contiguous()

    @staticmethod
    def of(state: Mapping[str, Any]) -> InMemory:
        """Wrap a state dict.

        Raises:
            ValueError: a value is not a plain tensor.
        """
        held = {key: value for key, value in state.items() if key != METADATA_KEY}
        for key, value in held.items():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
            if not isinstance(key, str) or not plain or value.dtype not in _DTYPES:
                what = f"{value.layout} {value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{key!r} holds a {what}: expected plain tensors of coefficients and locations")
        entries = {key: Entry(_DTYPES[value.dtype], tuple(value.shape), 0, 0) for key, value in held.items()}
        about = state.get(METADATA_KEY)
        if about is None:
            return InMemory(entries, {}, held)
        return InMemory(entries, {METADATA_KEY: about if isinstance(about, str) else json.dumps(about)}, held)
