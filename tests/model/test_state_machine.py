"""Random sequences of verbs against weights written by hand: fifty of them, or, with LOCA_NIGHTLY=1, a thousand."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from scipy.fft import idctn
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision import (
    LoCAConfig,
    LoRAConfig,
    active_adapters,
    adapters,
    disable_adapter,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    rename_adapter,
    save_adapter,
    set_adapters,
)
from loca_vision.pipeline.fuse import fuse, unfuse
from support.adapter_files import IMAGES, tiny

NIGHTLY = os.environ.get("LOCA_NIGHTLY") == "1"
NAMES = ("a", "b", "c")
CONFIGS = (
    LoCAConfig(n_components=9, scale=2.0),
    LoCAConfig(n_components=5, targets=("k", "out", "fc1"), seed=3),
    LoRAConfig(r=2, targets=("q", "v", "fc2")),
)
ROWS = {"q": slice(0, 48), "k": slice(48, 96), "v": slice(96, 144)}
STRENGTHS = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])


@dataclass
class Known:
    """An adapter as the oracle knows it: dense updates by projection, and a head."""

    deltas: dict[str, np.ndarray] = field(default_factory=dict)
    head: tuple[Tensor, Tensor] | None = None


def dense(update: Any) -> np.ndarray:
    """The update, from its numbers alone."""
    if hasattr(update, "up"):
        return update.scale * (update.up.detach().double() @ update.down.detach().double()).numpy()
    spectrum, sizes = np.zeros(update.shape), np.array(update.shape) - 1
    cells = np.rint(update.locations.detach().numpy() * sizes.astype(np.float32)).astype(int)
    np.add.at(spectrum, tuple(cells.T), update.coefficients.detach().double().numpy())
    return update.scale * idctn(spectrum, norm="ortho")


def add(plain: nn.Module, projection: str, delta: np.ndarray) -> None:
    path, _, part = projection.rpartition(".")
    layer = {"q": "qkv", "k": "qkv", "v": "qkv", "out": "proj"}.get(part, part)
    weight = plain.get_parameter(f"{path}.{layer}.weight")
    weight[ROWS.get(part, slice(None))] += torch.from_numpy(delta).to(weight.dtype)


class Verbs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.base = tiny(), tiny()  # the oracle's base moves when something is merged into it
        self.plain: Any = tiny()  # which the oracle writes weights into
        self.known: dict[str, Known] = {}
        self.active: dict[str, float] = {}
        self.fused: dict[str, float] = {}

    # The oracle

    @torch.no_grad()
    def expected(self, acting: dict[str, float]) -> Tensor:
        plain = self.plain
        for parameter, value in zip(plain.parameters(), self.base.parameters(), strict=True):
            parameter.copy_(value)
        for name, strength in acting.items():
            for projection, delta in self.known[name].deltas.items():
                add(plain, projection, strength * delta)
        supplier = next((name for name in reversed(acting) if self.known[name].head is not None), None)
        if supplier is not None:
            plain.head.weight.copy_(self.known[supplier].head[0])  # type: ignore[index]
            plain.head.bias.copy_(self.known[supplier].head[1])  # type: ignore[index]
        result: Tensor = plain(IMAGES)
        return result

    @property
    def acting(self) -> dict[str, float]:
        """What acts and how strongly; the last name with a head supplies it, and being active counts after being fused."""
        strengths = self.active | self.fused
        names = dict.fromkeys(reversed([*self.fused, *self.active]))
        return {name: strengths[name] for name in reversed(names)}

    @property
    def supplier(self) -> str | None:
        return next((name for name in reversed(self.acting) if self.known[name].head is not None), None)

    @torch.no_grad()
    def learn_from(self, *names: str) -> None:
        """Take note of what an adapter has become."""
        head: Any = self.model.head
        for name in names:
            self.known[name].deltas = {projection: dense(update) for projection, update in adapters(self.model, name).items()}
        if self.supplier in names:
            self.known[self.supplier].head = head.weight.clone(), head.bias.clone()

    @invariant()
    def the_output_is_that_of_weights_written_by_hand(self) -> None:
        with torch.no_grad():
            torch.testing.assert_close(self.model(IMAGES), self.expected(self.acting), rtol=2e-4, atol=2e-4)
        assert active_adapters(self.model) == self.active and list(active_adapters(self.model)) == list(self.active)

    # Verbs

    @precondition(lambda self: len(self.known) < len(NAMES))
    @rule(config=st.sampled_from(CONFIGS), seed=st.integers(0, 99))
    def inject(self, config: Any, seed: int) -> None:
        name = next(name for name in NAMES if name not in self.known)
        before = self.expected(self.acting)
        inject(self.model, config, name)
        with torch.no_grad():
            torch.testing.assert_close(self.model(IMAGES), before, rtol=2e-4, atol=2e-4)
            generator = torch.Generator().manual_seed(seed)
            for update in adapters(self.model, name).values():
                for parameter in (*update.trainable(), *update.location_parameters()):
                    parameter.copy_(torch.rand(parameter.shape, generator=generator))
            for parameter in self.model.head.parameters():  # type: ignore[union-attr]
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        head: Any = self.model.head
        self.known[name] = Known(head=(head.weight.detach().clone(), head.bias.detach().clone()))
        self.active = self.active | {name: 1.0}
        self.learn_from(name)

    @precondition(lambda self: self.active and not self.fused)
    @rule(seed=st.integers(0, 99))
    def train(self, seed: int) -> None:
        for name in self.active:
            for update in adapters(self.model, name).values():
                for parameter in update.trainable():
                    parameter.requires_grad_(True)
        for parameter in self.model.head.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(parameter_groups(self.model, lr=0.3, location_lr=1e-3, head_lr=0.1))
        images = torch.rand(IMAGES.shape, generator=generator)
        F.cross_entropy(self.model(images), torch.randint(3, (len(images),), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in self.active:
            for update in adapters(self.model, name).values():
                if hasattr(update, "confine"):
                    update.confine()
        self.learn_from(*self.active)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def weigh(self, data: st.DataObject) -> None:
        free = [name for name in self.known if name not in self.fused]
        names = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        if not names and self.fused:
            return
        weights = [data.draw(STRENGTHS) for _ in names]
        set_adapters(self.model, names, weights)
        self.active = dict(zip(names, weights, strict=True))

    @precondition(lambda self: any(name not in self.fused for name in self.active))
    @rule()
    def fuse(self) -> None:
        new = {name: strength for name, strength in self.active.items() if name not in self.fused}
        fuse(self.model, new)
        self.fused = new | self.fused

    @precondition(lambda self: self.fused)
    @rule()
    def unfuse(self) -> None:
        unfuse(self.model)
        self.fused = {}

    @precondition(lambda self: any(name not in self.fused for name in self.known))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name in self.known if name not in self.fused]))
        remove(self.model, name)
        self.forget(name)

    @precondition(lambda self: self.active and not self.fused)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.active)))
        with torch.no_grad():
            for projection, delta in self.known[name].deltas.items():
                add(self.base, projection, self.active[name] * delta)
            if self.supplier == name:
                self.base.head.weight.copy_(self.known[name].head[0])  # type: ignore[index, union-attr, operator, arg-type]
                self.base.head.bias.copy_(self.known[name].head[1])  # type: ignore[index, union-attr, operator, arg-type]
        remove(self.model, name, merge=True)
        self.forget(name)

    def forget(self, name: str) -> None:
        del self.known[name]
        self.active = {other: strength for other, strength in self.active.items() if other != name}

    @precondition(lambda self: any(name not in self.fused for name in self.known))
    @rule(data=st.data())
    def save_remove_load(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name in self.known if name not in self.fused]))
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, folder, name)
            remove(self.model, name)
            load_adapter(self.model, folder)
        known = self.known.pop(name)
        self.known[name] = known
        self.active = {other: s for other, s in self.active.items() if other != name} | {name: 1.0}

    @precondition(lambda self: self.known and len(self.known) < len(NAMES))
    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.known)))
        new = next(free for free in NAMES if free not in self.known)
        rename_adapter(self.model, name, new)
        for values in (self.known, self.active, self.fused):
            items: Any = {new if key == name else key: value for key, value in values.items()}
            values.clear()
            values.update(items)

    @precondition(lambda self: self.known and not self.fused)
    @rule()
    def disable(self) -> None:
        with disable_adapter(self.model), torch.no_grad():
            torch.testing.assert_close(self.model(IMAGES), self.expected({}), rtol=2e-4, atol=2e-4)

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def cast_there_and_back(self) -> None:
        self.model.double().float()

    @precondition(lambda self: NIGHTLY)
    @rule()
    def compile(self) -> None:
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(self.model, backend="eager")(IMAGES)
            torch.testing.assert_close(compiled, self.expected(self.acting), rtol=2e-4, atol=2e-4)


def test_sequences_of_verbs() -> None:
    run_state_machine_as_test(
        Verbs,
        settings=settings(
            max_examples=int(os.environ.get("LOCA_SEQUENCES", 1000 if NIGHTLY else 50)),
            stateful_step_count=30 if NIGHTLY else 10,
            deadline=None,
            database=None,
            derandomize=not NIGHTLY,
            suppress_health_check=list(HealthCheck),
        ),
    )
