"""Settings and fixtures of every test: offline, one thread, seeded."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loca_vision.methods import registry
from support.accelerator import pretended
from support.timm_models import tiny

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start; accelerate remarks on it where it is not set
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # products of float32 with all its digits, as tolerances expect
torch.set_num_threads(1)  # the models are so small that a second thread costs more than it brings
if find_spec("matplotlib"):
    from loca_vision.recipes.reports import plots

    plots.DPI = 40  # drawing took 7 % of the time of tests that train
registry.entry_points = cache(registry.entry_points)  # what is installed stays the same, and a run asks fifteen times

TESTS = Path(__file__).parent
_looked_at = [0]  # how many modules had been imported when objects were frozen last
LONG = ("recipes", "docs", "examples", "layers", "pipeline", "model", "commands", "methods")

DEVICE = os.environ.get("LOCA_TEST_DEVICE", "cpu")
"""Where tests with the fixture `device` compute: "cuda", say, with `-m device` for these tests alone."""


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there at once, rather than in every test."""
    try:
        torch.ones(1, device=DEVICE).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"LOCA_TEST_DEVICE={DEVICE!r}: tests cannot compute there: {reason}") from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that fork come first: autograd cannot, once it has threads, and compiled code starts some. Then those folders
    whose files take long, so that no worker is left with one of them when the others are done."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.relative_to(TESTS).parts[0], len(order)))
    items.sort(key=lambda item: "fork" not in vars(getattr(item, "module", None) or item))
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the test computes: the CPU, or what LOCA_TEST_DEVICE names."""
    if DEVICE != "cpu":
        with warnings.catch_warnings():  # the first product in a thread of autograd's warns that CUDA has not begun there
            warnings.simplefilter("ignore")
            x = torch.ones(2, 2, device=DEVICE, requires_grad=True)
            (x @ x).sum().backward()
    return torch.device(DEVICE)


@pytest.fixture
def accelerator(device: torch.device) -> Iterator[torch.device]:
    """The same; on the CPU the library takes the branches of an accelerator meanwhile."""
    with pretended(device.type == "cpu"):
        yield device


def pytest_collection_finish() -> None:
    """Full garbage collections, which trainers ask for, leave out the half million objects of imported libraries."""
    gc.freeze()
    gc.set_threshold(20_000)  # a model is some thousand objects, and looking for garbage took a tenth of the time


def pytest_runtest_logfinish() -> None:
    """Nor do they look at what a test imported."""
    if len(sys.modules) > _looked_at[0] + 50:
        _looked_at[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes the whole stack each time, for a GPU that may come


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
