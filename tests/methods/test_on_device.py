"""Every kind of adapter on a device, against weights computed by its formula and against training on the CPU."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loca_vision import (
    adapters,
    disable_adapter,
    explain,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    save_adapter,
    set_adapters,
)
from loca_vision.functional import cost_model
from loca_vision.model.call_scale import set_low_memory
from support.accelerator import pretended
from support.formulas import KINDS, stir, written
from support.subjects import INTERLEAVED, SUBJECTS, Subject, losses, optimiser, same_keys
from support.tolerance import GRADIENTS, RELATIVE, STEPS, assert_all_near, assert_near

every_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "selora dora"])


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def expected(subject: Subject, *terms: tuple[str, nn.Module, str, float]) -> Tensor:
    """The output of a model on the CPU with the changes of adapters (kind, model, name, strength) in its weights."""
    changes = [(subject.config(kind), adapters(model, name), strength) for kind, model, name, strength in terms]
    with pretended(False):
        return subject.output(written(subject.make(), *changes))


@every_kind
def test_nothing_changes_at_first(kind: str, subject: Subject, accelerator: torch.device) -> None:
    base, model = subject.make().to(accelerator), subject.make().to(accelerator)
    inject(model, subject.config(kind))
    assert all(p.device.type == accelerator.type for p in model.parameters())
    assert_near(subject.output(model), subject.output(base))
    assert_near(subject.answer(model), subject.output(base))


@every_kind
def test_outputs_are_those_of_the_weights_by_the_formula(kind: str, subject: Subject, accelerator: torch.device) -> None:
    """At inference, with gradients, in low memory, merged; alone, weaker, beside another; switched off, and gone."""
    model, base = subject.adapted(kind, accelerator), subject.output(subject.make().to(accelerator))
    wanted = expected(subject, (kind, model, "default", 1.0))
    assert float((wanted - base.cpu()).abs().max()) > 1e-2
    assert_near(subject.output(model), wanted)
    assert_near(subject.answer(model), wanted)
    with disable_adapter(model):
        assert torch.equal(subject.output(model), base)
    inject(model, subject.config("loca"), "other")
    stir(model, "other", seed=8)
    set_adapters(model, ["default", "other"], [0.5, -0.4])
    together = (kind, model, "default", 0.5), ("loca", model, "other", -0.4)
    assert_near(subject.output(model), expected(subject, *together))
    assert_near(subject.answer(model), expected(subject, *together))
    set_adapters(model, "default", 0.5)
    half = expected(subject, together[0])
    set_low_memory(model, True)
    assert_near(subject.output(model), half)
    set_low_memory(model, False)
    assert_near(subject.output(model), half)
    assert all(row.learns != "nothing" and row.path for row in explain(model)) and "projections" in str(explain(model))
    twin = copy.deepcopy(model)
    remove(model, "default", merge=True)
    set_adapters(model, [])
    assert_near(subject.output(model), half)
    remove(twin)
    assert torch.equal(subject.output(twin), base)


@every_kind
def test_copies_files_and_moves_keep_it(kind: str, subject: Subject, accelerator: torch.device, tmp_path: Path) -> None:
    model, fresh = subject.adapted(kind, accelerator), subject.make().to(accelerator)
    answer = subject.output(model)
    load_adapter(fresh, save_adapter(model, tmp_path))
    assert_near(subject.output(fresh), answer)
    twin = copy.deepcopy(model)
    assert_near(subject.output(twin), answer)
    stir(twin, seed=9)
    assert torch.equal(subject.output(model), answer)
    assert float((subject.output(twin) - answer).abs().max()) > 1e-3
    with pretended(False):
        model.to("cpu")
        assert_near(subject.output(model), answer)
        save_adapter(model, tmp_path / "cpu")
    files = [next(folder.glob("*.safetensors")).read_bytes() for folder in (tmp_path, tmp_path / "cpu")]
    assert files[0] == files[1]
    assert_near(subject.output(model.to(accelerator)), answer)
    assert_near(subject.answer(model), answer)


@every_kind
def test_steps_of_training_are_those_of_the_cpu(kind: str, subject: Subject, accelerator: torch.device) -> None:
    """In the phases of a schedule, which for other kinds than LoCA are one; and what is learned acts afterwards."""
    model = subject.adapted(kind, accelerator)
    found = losses(subject, model, 4)
    with pretended(False):
        reference = subject.adapted(kind)
        wanted, answer = losses(subject, reference, 4), subject.output(reference)
    assert_near(found, wanted, STEPS)
    assert_near(subject.output(model), answer, STEPS)


@every_kind
def test_gradients_are_those_of_the_cpu(kind: str, subject: Subject, accelerator: torch.device) -> None:
    """With checkpoints too; and under autocast they are near."""
    model = subject.adapted(kind, accelerator).train()
    with pretended(False):
        wanted = subject.gradients(subject.adapted(kind).train())
    found = subject.gradients(model)
    assert_all_near(*same_keys((found, wanted)), GRADIENTS)
    subject.checkpoint(model)
    assert_all_near(*same_keys((subject.gradients(model), wanted)), GRADIENTS)
    with torch.autocast(accelerator.type, dtype=torch.bfloat16):
        loss = subject.loss(model)
    with pretended(False):
        exact = subject.loss(subject.adapted(kind).train())
    assert_near(loss, exact, dtype=torch.bfloat16)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert parameter.grad.dtype == torch.float32
            error = float((parameter.grad.cpu() - wanted[name]).norm())
            assert error <= 5 * RELATIVE[torch.bfloat16] * float(wanted[name].norm()) + 1e-4, name


@pytest.mark.parametrize("strategy", ("whole", "sampled", "applied"))
@pytest.mark.parametrize("rows", ("range", "interleaved"))
def test_every_strategy_has_the_same_gradients(rows: str, strategy: cost_model.Strategy, accelerator: torch.device) -> None:
    """Whichever the device prefers, and whichever rows of a fused weight."""
    subject = INTERLEAVED if rows == "interleaved" else SUBJECTS["vit"]
    with pretended(False), cost_model.using("whole"):
        wanted = subject.gradients(subject.adapted("loca"))
    model = subject.adapted("loca", accelerator)
    with cost_model.using(strategy):
        assert_all_near(*same_keys((subject.gradients(model), wanted)), GRADIENTS)


class Elsewhere(torch.optim.Optimizer):
    """An optimiser of another library, whose kernels write where a parameter is, and tell nobody."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad.sign())


OPTIMISERS = {
    "one by one": partial(optimiser, foreach=False),
    "foreach": partial(optimiser, foreach=True),
    "fused": partial(optimiser, fused=True),
    "another library's": lambda model: Elsewhere(parameter_groups(model, lr=1e-2), {}),
}


@every_kind
def test_what_is_kept_for_inference_follows_every_change(kind: str, accelerator: torch.device) -> None:
    """In place, by optimisers of every make, and by another weight underneath."""
    subject = SUBJECTS["vit"]
    model = subject.adapted(kind, accelerator)
    before = [subject.output(model)]

    def follows() -> None:
        after = subject.output(model)
        assert float((after - before[-1]).abs().max()) > 1e-4
        assert_near(after, subject.output(copy.deepcopy(model)))  # a copy keeps nothing
        before.append(after)

    update = adapters(model)["blocks.0.attn.q"]
    with torch.no_grad():
        update.trainable()[0].view(-1)[3:6] += 1.0
    follows()
    for make in OPTIMISERS.values():
        adam = make(model)
        subject.loss(model).backward()
        subject.output(model)
        adam.step()
        follows()
        subject.output(model)
        adam.step()  # with nothing built between two steps
        follows()
    with torch.no_grad():
        dict(model.named_parameters())["blocks.0.attn.qkv.weight"].mul_(1.1)
    follows()
