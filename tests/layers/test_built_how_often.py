"""What no gradient shows of weights that are built together: how often, how precisely, by which thread and for how long."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision import (
    LoCAConfig,
    adapters,
    inject,
)
from loca_vision.functional.cost_model import using
from loca_vision.layers import built_together
from loca_vision.layers.weight_updates import WeightUpdates
from support.timm_models import batch, tiny
from support.two_ways import (
    Answer,
    adapted,
    assert_same,
    filled,
    in_blocks,
    loss,
    numbers,
    step,
)

pytestmark = pytest.mark.usefixtures("one_by_one")


def test_evaluation_lets_go_of_what_a_pass_left() -> None:
    """A layer that was skipped has its weight, and with it the memory of all that were built with it, kept until then."""
    model, x = adapted(), batch("vit")
    with using("together"):
        step(model, x)
        step(model, x)
        in_blocks(model, x, lambda i, block, y: block(y) if i == 0 else y).backward()
        together = next(m for m in model.modules() if isinstance(m, WeightUpdates)).together
        assert together is not None and any(kept.left for kept in together._batches.values())
        with torch.no_grad():
            loss(model, x)
        assert not any(kept.left for kept in together._batches.values())


def test_layers_asked_for_in_two_precisions_are_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, build = [], built_together.built
    monkeypatch.setattr(
        built_together, "built", lambda parts, bases, *more: sizes.append(len(bases)) or build(parts, bases, *more)
    )
    model, x = adapted(LoCAConfig(n_components=40, targets=("q", "v"))), batch("vit")

    def run(i: int, block: nn.Module, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=i == 0):
            return block(y).float()

    with using("together"):
        for _ in range(3):
            in_blocks(model, x, run).backward()
    assert sizes == [1] * 6  # and not all weights anew for each


def test_nothing_is_built_twice_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the first one, in which the layers turn up one by one, nor in the first one of another precision."""
    sizes, build = [], built_together.built
    monkeypatch.setattr(
        built_together, "built", lambda parts, bases, *more: sizes.append(len(bases)) or build(parts, bases, *more)
    )
    model, x = adapted(LoCAConfig(n_components=40, targets=("q", "v"))), batch("vit")
    layers = len(model.blocks)
    with using("together"):
        for enabled in (False, False, False, True, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss(model, x).backward()
    assert layers > 1
    assert sizes == [1] * layers + [layers] * 2 + [1] * layers + [layers]


def test_gradients_arrive_in_the_dtype_of_the_products() -> None:
    """Otherwise autograd would convert each of them, and bfloat16 ones would no longer count as exact."""
    model = adapted(LoCAConfig(n_components=40, targets=("q", "v")))
    weight, layer = next((module.loca, module) for module in model.modules() if hasattr(module, "loca"))
    with using("together"):
        built = weight.together.take(weight, layer.weight, torch.bfloat16)
    assert len(built.tickets) == 2
    assert {ticket.dtype for ticket in built.tickets} == {built.weight.dtype} == {torch.bfloat16}


def test_threads_on_one_model() -> None:
    def scenario(model: nn.Module, x: Tensor) -> Answer:
        found: dict[int, Any] = {}

        def work(number: int) -> None:
            try:
                for _ in range(10):
                    value = loss(model, x)
                    found[number] = [value, torch.autograd.grad(value, numbers(model))]
            except Exception as error:
                found[number] = error

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [answer for answer in found.values() if isinstance(answer, Exception)]
        if errors:
            raise errors[0]
        return list(found.values())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert_same(scenario, torch.device("cpu"))
    finally:
        sys.setswitchinterval(before)


def test_another_thread_takes_what_one_has_just_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the one that built it looks up what it asked for itself."""
    with using("together"):
        model = adapted()
        wanted = loss(model, batch("vit"))
        wanted.backward()
        note, notes = built_together._Member.state, []

        def interrupt(self: Any, *given: Any) -> Any:
            if threading.current_thread() is threading.main_thread() and sys._getframe(1).f_code.co_name != "take":
                notes.append(self)
                if len(notes) == 2:
                    thread = threading.Thread(target=loss, args=(model, batch("vit")))
                    thread.start()
                    thread.join()
            return note(self, *given)

        monkeypatch.setattr(built_together._Member, "state", interrupt)
        torch.testing.assert_close(loss(model, batch("vit")), wanted)
        assert len(notes) > 2


def test_weights_made_in_inference_mode() -> None:
    def make() -> nn.Module:
        model = tiny("vit")
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 144:
                with torch.inference_mode():
                    module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
        inject(model, LoCAConfig(n_components=40))
        return filled(model, 5)

    assert_same(step, torch.device("cpu"), make)


def test_locations_in_half_precision_are_refused() -> None:
    model = adapted()
    for spectrum in adapters(model).values():
        spectrum.locations.data = spectrum.locations.data.bfloat16()
    with using("together"), pytest.raises(RuntimeError, match=r"locations are in torch\.bfloat16"):
        loss(model, batch("vit"))


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_memory_is_free_at_once(passes: str) -> None:
    gc.disable()
    try:
        with using("together"):
            model = adapted()
            value = loss(model, batch("vit"))
            if passes == "backward":
                value.backward()
        kept = [weakref.ref(part) for part in (model, *numbers(model), *model.modules())]
        del model, value
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()
