"""Averages of trained tensors, with diffusers' `EMAModel` as the oracle."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from loca_vision import AlternatingSchedule, LoCAConfig, adapters, inject
from loca_vision.recipes.training.ema import EMA, Decay, locations_among
from loca_vision.storage.run_checkpoint import read_checkpoint, write_checkpoint
from support import pipelines as tiny

DECAYS = [
    ({}, {}),
    ({"most": 0.3}, {"decay": 0.3}),
    ({"least": 0.2, "update_after_step": 3}, {"min_decay": 0.2, "update_after_step": 3}),
    ({"warmup": True}, {"use_ema_warmup": True}),
    ({"warmup": True, "inv_gamma": 4.0, "power": 0.75}, {"use_ema_warmup": True, "inv_gamma": 4.0, "power": 0.75}),
]


@pytest.mark.parametrize(("mine", "theirs"), DECAYS)
def test_the_decay_and_the_averages_are_those_of_diffusers(mine, theirs):
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    average = EMA(dict(zip("ab", parameters, strict=True)), Decay(**mine))
    oracle = EMAModel(parameters, **theirs)
    for _ in range(15):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        average.step()
        oracle.step(parameters)
        assert average.decay.at(average.steps) == oracle.cur_decay_value
        assert all(torch.equal(a, b) for a, b in zip(average.averages.values(), oracle.shadow_params, strict=True))


@pytest.fixture
def training():
    """A UNet with an adapter and `conv_in` to train, and one step of it."""
    unet = tiny.unet()
    inject(unet, LoCAConfig(n_components=6, targets=("q",)))
    unet.conv_in.requires_grad_(True)
    learned = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    schedule = AlternatingSchedule(unet, coefficient_steps=1, location_steps=2, learning_steps=6)
    optimiser = torch.optim.AdamW(learned.values(), lr=0.05)

    def step():
        optimiser.zero_grad()
        unet(**tiny.inputs_of(unet)).sample.square().mean().backward()
        optimiser.step()
        schedule.step()

    return unet, learned, step


def test_locations_are_taken_and_all_else_is_averaged(training):
    unet, learned, step = training
    taken = locations_among(unet, learned)
    assert len(taken) == len(adapters(unet)) and all(name.endswith("locations") for name in taken)
    average, wanted = EMA(learned, Decay(0.5), taken=taken), {name: value.detach().clone() for name, value in learned.items()}
    for number in range(1, 5):
        step()
        average.step()
        share = 0.0 if number == 1 else min(0.5, number / (9 + number))
        for name, value in learned.items():
            wanted[name] = value.detach().clone() if name in taken else share * wanted[name] + (1 - share) * value.detach()
            torch.testing.assert_close(average.averages[name], wanted[name])
    moved = [name for name in learned if not torch.equal(average.averages[name], learned[name])]
    assert {"conv_in.weight", "conv_in.bias"} < set(moved) and not taken & set(moved)


def test_inside_the_averages_act_and_behind_training_goes_on(training):
    unet, learned, step = training
    average = EMA(learned, Decay(0.9), taken=locations_among(unet, learned))
    for _ in range(3):
        step()
        average.step()
    before, raw = tiny.output_of(unet), {name: value.detach().clone() for name, value in learned.items()}
    with pytest.raises(RuntimeError, match="in the middle"), average.applied():
        inside = tiny.output_of(unet)
        assert all(torch.equal(value, average.averages[name]) for name, value in learned.items())
        raise RuntimeError("in the middle")
    assert torch.equal(tiny.output_of(unet), before) and not torch.equal(inside, before)
    assert all(torch.equal(value, raw[name]) for name, value in learned.items())


def test_a_checkpoint_goes_on_to_the_same_averages(training, tmp_path):
    unet, learned, step = training
    taken = locations_among(unet, learned)
    average = EMA(learned, taken=taken)
    for _ in range(2):
        step()
        average.step()
    path = write_checkpoint(tmp_path, 2, {"model.x": torch.ones(1)} | average.state(), {})
    again = EMA(learned, taken=taken)
    again.restore(read_checkpoint(path)[0])
    step()
    for one in (average, again):
        one.step()
    assert again.steps == 3 and all(torch.equal(again.averages[name], value) for name, value in average.averages.items())


def test_a_wrong_state_is_refused_before_anything_is_touched():
    average = EMA({"a": torch.zeros(2), "b": torch.zeros(2)})
    good = EMA({"a": torch.ones(2), "b": torch.ones(2)}).state()
    for change, sentence in [
        ({"ema.c": torch.ones(1)}, "ema.c: it is of nothing"),
        ({"ema.b": torch.ones(3)}, r"ema.b is \(3,\), not \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            average.restore(good | change)
    for gone, sentence in [("ema.a", "ema.a: it is missing"), ("ema_steps", "ema_steps: it is missing")]:
        with pytest.raises(ValueError, match=sentence):
            average.restore({name: value for name, value in good.items() if name != gone})
    assert not average.averages["a"].any() and average.steps == 0


@pytest.mark.parametrize("wrong", [{"most": 1.5}, {"least": -1}, {"update_after_step": -1}, {"inv_gamma": 0}, {"power": -1}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Decay(**wrong)
    with pytest.raises(ValueError, match="taken='z'"):
        EMA({"a": torch.zeros(1)}, taken=frozenset("z"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_are_not_lost_in_half_precision(dtype):
    """One in ten thousand of the way, as at the end of training, is nothing to numbers of 8 or 11 bits."""
    value = torch.ones(3, dtype=dtype)
    ema = EMA({"a": value}, Decay(0.9999, least=0.9999))
    ema.step()
    value.fill_(2.0)
    for _ in range(1000):
        ema.step()
    wanted = 2 - 0.9999**1000
    torch.testing.assert_close(ema.averages["a"], torch.full((3,), wanted), rtol=1e-4, atol=0)
    with ema.applied():
        assert value.dtype == dtype and torch.equal(value, torch.full((3,), wanted).to(dtype))
    assert torch.equal(value, torch.full((3,), 2.0).to(dtype))
