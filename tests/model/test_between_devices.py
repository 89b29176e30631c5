"""Calls of adapted models copy nothing between the host and a GPU once they have run: seen on a GPU that is not there.

Tensors without numbers say that they are on "cuda:0", so that the library goes the ways it goes there. Backward passes need a
driver: they are watched where there is one, in `test_no_sync.py`.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loca_vision
from loca_vision import adapters
from support.subjects import INTERLEAVED, SUBJECTS, Subject

PACKAGE = str(Path(loca_vision.__file__).parent)
SEEN = SUBJECTS | {"interleaved": INTERLEAVED}


class _Copies(TorchDispatchMode):
    """Operations on tensors of several devices, but for single numbers, by the line that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor) and value.dim()]
        if len({value.device for value in tensors}) > 1:
            mine = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            self.found |= {f"{frame.filename}:{frame.lineno}: {func}" for frame in mine[-1:]}
        return result


def on_no_gpu(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with tensors that have no numbers and claim to be on a GPU."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                moved = mode.from_tensor(value.detach()).to("cuda")
                module._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer).to("cuda")
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="the matrices that are kept for cuda:0 would have no numbers")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("vit", "loca"), ("vit", "fourierft"), ("unet", "loca")] + [("interleaved", kind) for kind in ("loca", "lora", "dora")],
)
def test_nothing_is_copied(name: str, kind: str) -> None:
    """In training, whatever moves, and at inference; the first call makes what is kept."""
    subject: Subject = SEEN[name]
    model, copies = subject.adapted(kind).train(), _Copies()
    real = subject.inputs()  # which are kept for other tests
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {k: mode.from_tensor(v).to("cuda") if isinstance(v, Tensor) else v for k, v in real.items()}
        on_no_gpu(model, mode)(**given)
        for moves in ("coefficients", "locations", "") if kind == "loca" else ("all", ""):
            for update in adapters(model).values():
                if kind == "loca":
                    update.coefficients.requires_grad_(moves == "coefficients")
                    update.locations.requires_grad_(moves == "locations")
            with copies, torch.set_grad_enabled(moves != ""):
                answer = model(**given)
    assert (answer if isinstance(answer, Tensor) else answer[0]).device.type == "cuda"
    assert not copies.found
