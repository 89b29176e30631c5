"""Steps of optimisers that leave no version are noted, in compiled code too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from loca_vision.functional.snapshot import Snapshot, last_unseen_step


class Foreign(torch.optim.Optimizer):
    """An optimiser of another library."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stepped() -> tuple[torch.nn.Parameter, Foreign]:
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    return parameter, Foreign([parameter], {})


def test_a_snapshot_ends_with_a_step_that_leaves_no_version() -> None:
    parameter, foreign = stepped()
    snapshot = Snapshot([parameter], [])
    assert snapshot.holds_for([parameter], [])
    foreign.step()
    assert not snapshot.holds_for([parameter], [])


def test_an_ordinary_step_is_not_noted() -> None:
    parameter, _ = stepped()
    before = last_unseen_step()
    torch.optim.SGD([parameter], lr=0.1).step()
    assert last_unseen_step() is before


def test_an_optimiser_is_compiled_once() -> None:
    _, foreign = stepped()
    counter = CompileCounter()
    run, seen = torch.compile(lambda: foreign.step(), backend=counter, fullgraph=True), [last_unseen_step()]
    for _ in range(4):
        run()
        seen.append(last_unseen_step())
    assert counter.frame_count == 1
    assert len(set(seen)) == 5
