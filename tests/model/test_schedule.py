"""Phases by optimiser step, and that nothing moves the frozen half."""

import copy
import itertools

import pytest
import torch

from loca_vision import (
    AlternatingSchedule,
    LoCAConfig,
    adapters,
    inject,
    load_adapter,
    parameter_groups,
    save_adapter,
    set_adapters,
)
from loca_vision.methods.spectrum import random_spectrum
from loca_vision.model.schedule import phase_at

OPTIMISERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.5),
    "sgd with momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9),
}


def test_phases_of_algorithm_1():
    """B_a = 2, B_l = 3, B_s = 7, written out by hand."""
    phases = [phase_at(step, 2, 3, 7)[0] for step in range(10)]
    assert "".join(phases) == "ccl" + "ll" + "cc" + "ccc"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_steps": 0}, "cccccc"),  # V1 of Table 5
        ({"learning_steps": None}, "cllcll"),  # V2
        ({"learning_steps": 4, "together": True}, "bbbbcc"),  # V3
        ({"learning_steps": 5}, "cllclc"),
        ({"coefficient_steps": 0, "learning_steps": 3}, "lllccc"),
        ({"location_steps": 0, "learning_steps": 3}, "cccccc"),
    ],
)
def test_schedule_follows_its_settings(vit, settings, expected):
    inject(vit, LoCAConfig(n_components=5))
    schedule = AlternatingSchedule(vit, **({"coefficient_steps": 1, "location_steps": 2} | settings))
    spectrum = adapters(vit)["blocks.0.attn.q"]
    for letter in expected:
        assert schedule.phase[0] == letter
        assert spectrum.coefficients.requires_grad == (letter in "cb")
        assert spectrum.locations.requires_grad == (letter in "lb")
        schedule.step()


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_frozen_half_does_not_move(vit, images, make):
    """Neither momentum nor weight decay of an earlier phase carries it on: bit-identical, step by step."""
    inject(vit, LoCAConfig(n_components=20))
    schedule = AlternatingSchedule(vit, coefficient_steps=2, location_steps=2, learning_steps=9)
    optimiser = make(parameter_groups(vit, lr=0.1, location_lr=0.02, weight_decay=0.3))
    moved = {"coefficients": 0, "locations": 0}
    for _ in range(12):
        before = {name: [p.detach().clone() for p in s.parameters()] for name, s in adapters(vit).items()}
        phase = schedule.phase
        vit(images).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
        schedule.step()
        for name, spectrum in adapters(vit).items():
            frozen = int(phase == "coefficients")
            after = list(spectrum.parameters())
            assert torch.equal(after[frozen], before[name][frozen])
            moved[phase] += int(not torch.equal(after[1 - frozen], before[name][1 - frozen]))
    assert min(moved.values()) > 0


def test_steps_are_optimiser_steps_not_micro_batches(vit, images):
    """Four micro-batches, one step: the same weights as one whole batch, in every phase."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = copy.deepcopy(vit)
        inject(model, LoCAConfig(n_components=20))
        schedule = AlternatingSchedule(model, coefficient_steps=1, location_steps=1, learning_steps=3)
        optimiser = torch.optim.SGD(parameter_groups(model, lr=0.05, location_lr=0.01))
        for _ in range(4):
            optimiser.zero_grad()
            for part in images.chunk(parts):
                (model(part).square().sum() / len(images)).backward()
            optimiser.step()
            schedule.step()
        results.append([p.detach() for s in adapters(model).values() for p in s.parameters()])
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-5)  # of numbers up to 6, in float32


def test_locations_are_brought_back_into_the_matrix(vit, images):
    inject(vit, LoCAConfig(n_components=50))
    schedule = AlternatingSchedule(vit, coefficient_steps=1, location_steps=3, learning_steps=8)
    optimiser = torch.optim.AdamW(parameter_groups(vit, lr=0.1, location_lr=0.6))
    for _ in range(8):
        optimiser.zero_grad()
        vit(images).square().sum().backward()
        optimiser.step()
        schedule.step()
        locations = torch.cat([s.locations for s in adapters(vit).values()])
        assert locations.min() >= 0 and locations.max() <= 1
    assert {0.0, 1.0} <= set(locations.flatten().tolist())


def test_state_goes_on_where_it_stood(vit):
    inject(vit, LoCAConfig(n_components=5))
    first = AlternatingSchedule(vit, coefficient_steps=1, location_steps=2, learning_steps=30)
    for _ in range(5):
        first.step()
    second = AlternatingSchedule(vit, coefficient_steps=1, location_steps=2, learning_steps=30)
    second.load_state_dict(first.state_dict())
    for _ in range(40):
        assert first.phase == second.phase
        first.step()
        second.step()


def test_state_of_another_schedule_is_refused(vit):
    inject(vit, LoCAConfig(n_components=5))
    schedule = AlternatingSchedule(vit)
    for state in ({}, schedule.state_dict() | {"location_steps": 7}, schedule.state_dict() | {"step": -1}):
        with pytest.raises(ValueError, match="step"):
            schedule.load_state_dict(state)
    assert schedule.steps_done == 0


def test_groups_hold_every_trainable_parameter_once(vit):
    inject(vit, LoCAConfig(n_components=5))
    AlternatingSchedule(vit)  # freezes the locations for now, which must not hide them
    groups = {group["name"]: group for group in parameter_groups(vit, lr=1.0, location_lr=0.5, head_lr=2.0, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "coefficients": (1.0, 0.1),
        "locations": (0.5, 0.0),
        "head": (2.0, 0.1),
    }
    listed = [id(p) for p in itertools.chain(*(g["params"] for g in groups.values()))]
    spectra = adapters(vit).values()
    wanted = [s.coefficients for s in spectra] + [s.locations for s in spectra] + list(vit.head.parameters())
    assert sorted(listed) == sorted(map(id, wanted))
    assert parameter_groups(vit, lr=1.0)[-1]["lr"] == 1.0


def test_wholly_frozen_adapters_stay_frozen(vit):
    inject(vit, LoCAConfig(n_components=5), "old")
    for spectrum in adapters(vit, "old").values():
        spectrum.requires_grad_(False)
    inject(vit, LoCAConfig(n_components=5), "new")
    AlternatingSchedule(vit)
    assert not any(p.requires_grad for s in adapters(vit, "old").values() for p in s.parameters())
    assert len(parameter_groups(vit, lr=1.0)[0]["params"]) == 4


def test_final_locations_and_idle_adapters_are_left_alone(vit, build, tmp_path):
    inject(vit, LoCAConfig(n_components=5), "old")
    other = build("vit")
    load_adapter(other, save_adapter(vit, tmp_path, "old"))
    inject(other, LoCAConfig(n_components=5, seed=1), "idle")
    inject(other, LoCAConfig(n_components=5, seed=2), "new")
    set_adapters(other, ["old", "new"])
    schedule = AlternatingSchedule(other, coefficient_steps=0)
    assert schedule.phase == "locations"
    assert not any(s.locations.requires_grad for s in adapters(other, "old").values())
    assert all(s.coefficients.requires_grad for s in adapters(other, "old").values())
    assert not any(s.coefficients.requires_grad for s in adapters(other, "new").values())
    assert all(s.locations.requires_grad for s in adapters(other, "new").values())
    groups = {group["name"]: group["params"] for group in parameter_groups(other, lr=1.0)}
    assert (len(groups["coefficients"]), len(groups["locations"])) == (8, 4)
    idle = {id(p) for s in adapters(other, "idle").values() for p in s.parameters()}
    assert not idle & {id(p) for params in groups.values() for p in params}


def test_locations_stay_inside_without_a_schedule(vit, images):
    inject(vit, LoCAConfig(n_components=50))
    optimiser = torch.optim.SGD(parameter_groups(vit, lr=1.0, location_lr=5.0))
    for _ in range(3):
        vit(images).square().sum().backward()
        optimiser.step()
    vit(images)
    locations = torch.cat([s.locations for s in adapters(vit).values()])
    assert locations.min() >= 0 and locations.max() <= 1


def test_a_spectrum_may_stand_alone():
    spectrum = random_spectrum((6, 6), 3, name="q", seed=0)
    groups = parameter_groups(spectrum, lr=0.1)
    assert [group["name"] for group in groups] == ["coefficients", "locations"]
    torch.optim.SGD(groups)
