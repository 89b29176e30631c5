"""Settings and fixtures of every test: offline, one thread, seeded."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from support.timm_models import tiny

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start; accelerate remarks on it where it is not set
torch.set_num_threads(1)  # the models are so small that a second thread costs more than it brings


def pytest_collection_finish() -> None:
    """Imported libraries are half a million objects that stay: each full collection, and trainers ask for one, leaves them out."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_stays_on() -> Iterator[None]:
    """A test that leaves logging disabled would hide the warnings that later ones look for."""
    yield
    assert logging.root.manager.disable == logging.NOTSET


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """`tiny`, for tests that take it as a fixture."""
    return tiny


@pytest.fixture
def vit() -> nn.Module:
    """A plain vision transformer: width 48, 2 blocks, 3 heads, patches of 8 of 32 pixels, 3 classes."""
    return tiny("vit")


@pytest.fixture
def images() -> Tensor:
    """(4, 3, 32, 32), for `vit`."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def norms(monkeypatch):
    """The norm of all gradients at each step of the optimiser."""
    found = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **more):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        return step(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return found
