"""Two threads that call at the same time, each with a scale of its own."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from loca_vision.layers.call_settings import CallSettings
from support.loader import BOTH, TEXT, UNET
from support.pipelines import picture, quiet, scheduler, stable_diffusion, tokenizer
from support.reference_weights import Made, adapter, assert_far, assert_near, expected

SCALES = (0.5, 0.25)


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What these answer, each in its own thread."""
    answers: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            answers[number] = tasks[number]()
        except BaseException as error:
            answers[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    errors = [answer for answer in answers.values() if isinstance(answer, BaseException)]
    if errors:
        raise errors[0]
    return [answers[number] for number in range(len(tasks))]


class Meeting:
    """Every thread passes a meeting point only with the other, so that their calls interleave the same way every time."""

    def __init__(self, threads: int = 2) -> None:
        self.barrier = threading.Barrier(threads, timeout=60)

    def before(self, model: Any) -> Any:
        """Meet whenever the model is about to run."""
        return model.register_forward_pre_hook(lambda *_: self.wait(), prepend=True)

    def wait(self) -> None:
        self.barrier.wait()


def drawings(pipes: list[Any], meeting_in: Callable[[Any], list[Any]], scales: tuple[Any, ...] = SCALES) -> list[Tensor]:
    meeting = Meeting()
    models = {id(model): model for pipe in pipes for model in meeting_in(pipe)}.values()
    hooks = [meeting.before(model) for model in models]
    try:
        calls = [{} if scale is None else {"cross_attention_kwargs": {"scale": scale}} for scale in scales]
        return at_once(*(lambda pipe=pipe, call=call: picture(pipe, **call) for pipe, call in zip(pipes, calls, strict=True)))
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module", params=[UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def made(request: pytest.FixtureRequest) -> Made:
    return adapter(stable_diffusion(), request.param, seed=4, size=0.5)


def blocks(pipe: Any) -> list[Any]:
    """Before each of these the threads change places, several times within a call of the model."""
    return [pipe.unet, *pipe.unet.down_blocks, pipe.unet.mid_block, pipe.text_encoder, *_layers(pipe.text_encoder)]


def _layers(encoder: Any) -> list[Any]:
    return [module for module in encoder.modules() if type(module).__name__ == "CLIPEncoderLayer"]


def for_threads(pipe: Any) -> Any:
    """The pipeline, with a tokenizer that one thread uses at a time.

    transformers sets padding and truncation on a tokenizer before it reads the text: a second thread between the two gives the
    first tokens padded otherwise.
    """
    lock, encode = threading.Lock(), type(pipe.tokenizer)._encode_plus

    def one_at_a_time(self: Any, *inputs: Any, **named: Any) -> Any:
        with lock:
            return encode(self, *inputs, **named)

    pipe.tokenizer._encode_plus = MethodType(one_at_a_time, pipe.tokenizer)
    return pipe


def with_the_models_of(pipe: Any) -> Any:
    """Another pipeline with the same models; what a call writes to, the tokenizer and the scheduler, is its own."""
    own = {"tokenizer": tokenizer(), "scheduler": scheduler()}
    return quiet(type(pipe)(**pipe.components | own, requires_safety_checker=False))


@pytest.mark.parametrize("scales", [SCALES, (None, 0.5), (0.5, None), (0.0, 1.0)], ids=str)
def test_two_calls_of_one_pipeline(made: Made, scales: tuple[Any, ...]) -> None:
    pipe = for_threads(stable_diffusion())
    pipe.load_loca_weights(made.state())
    wanted = [expected((made, 1.0 if scale is None else scale)) for scale in scales]
    assert_far(*wanted)
    for found, right in zip(drawings([pipe, pipe], blocks, scales), wanted, strict=True):
        assert_near(found, right)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_two_pipelines_that_share_their_models(made: Made) -> None:
    one = stable_diffusion()
    one.load_loca_weights(made.state())
    other = with_the_models_of(one)
    for found, scale in zip(drawings([one, other], blocks), SCALES, strict=True):
        assert_near(found, expected((made, scale)))


def test_a_prompt_read_while_the_other_pipeline_reads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapter(stable_diffusion(), TEXT, seed=4, size=0.5)
    one = stable_diffusion()
    one.load_loca_weights(made.state())
    other = with_the_models_of(one)
    prepare = one.tokenizer.set_truncation_and_padding

    def prepare_and_be_interrupted(**settings: Any) -> None:
        prepare(**settings)
        if settings["padding_strategy"] == "max_length":
            interruptions.append(other.tokenizer("a cat", padding="longest"))

    interruptions: list[Any] = []
    monkeypatch.setattr(one.tokenizer, "set_truncation_and_padding", prepare_and_be_interrupted)
    assert_near(picture(one), expected((made, 1.0)))
    assert interruptions


def test_low_memory(made: Made) -> None:
    pipe = for_threads(stable_diffusion())
    pipe.load_loca_weights(made.state())
    pipe.enable_loca_low_memory()
    for found, scale in zip(drawings([pipe, pipe], blocks), SCALES, strict=True):
        assert_near(found, expected((made, scale)))


def test_a_thread_without_a_call_sees_what_was_set_last() -> None:
    settings = CallSettings()
    settings.set_scale(0.5)
    assert at_once(lambda: settings.scale) == [0.5]

    def set_and_read() -> float:
        settings.set_scale(0.25)
        return settings.scale

    assert at_once(set_and_read) == [0.25]
    assert settings.scale == 0.5
    assert at_once(lambda: settings.scale) == [0.25]


def test_a_copied_context_has_its_own_scale_from_then_on() -> None:
    settings = CallSettings()
    settings.set_scale(0.5)
    context = contextvars.copy_context()
    assert context.run(lambda: settings.scale) == 0.5
    context.run(settings.set_scale, 0.25)
    assert (settings.scale, context.run(lambda: settings.scale)) == (0.5, 0.25)


def test_nothing_is_remembered_of_settings_that_are_gone() -> None:
    from loca_vision.layers import call_settings

    for _ in range(50):
        CallSettings().set_scale(0.5)
    kept = CallSettings()
    kept.set_scale(0.5)
    assert sum(key() is not None for key in call_settings._SET_HERE.get()) == len(call_settings._SET_HERE.get())


def test_gradients_of_two_threads() -> None:
    made = adapter(stable_diffusion(), UNET, seed=4, size=0.5)
    from loca_vision import adapters
    from support.pipelines import inputs_of

    pipe = stable_diffusion()
    pipe.load_loca_weights(made.state())
    unet = pipe.unet
    unet.enable_gradient_checkpointing()
    unet.train()
    spectra = list(adapters(unet, "default_0").values())
    for spectrum in spectra:
        spectrum.requires_grad_(True)

    def gradient(scale: float) -> Tensor:
        output = unet(**inputs, cross_attention_kwargs={"scale": scale}).sample
        return torch.cat([g.flatten() for g in torch.autograd.grad(output.sum(), [s.coefficients for s in spectra])])

    inputs = inputs_of(unet)
    wanted = [gradient(scale) for scale in SCALES]
    assert_far(*wanted)
    meeting = Meeting()
    hooks = [meeting.before(model) for model in (unet, unet.mid_block)]
    try:
        found = at_once(*(lambda scale=scale: gradient(scale) for scale in SCALES))
    finally:
        for hook in hooks:
            hook.remove()
    for one, right in zip(found, wanted, strict=True):
        assert_near(one, right, 1e-4 * float(right.abs().max()))
