"""Sources that a pipeline loads adapters from: hostile files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.pipelines import picture, stable_diffusion, stable_diffusion_xl
from support.reference_weights import (
    Made,
    adapter,
    assert_near,
    assert_same,
    expected,
    facts,
)
from support.sources import UNET, C, L, Q, about, assert_refused, wide


def tensor(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Made], Made]:
    return lambda made: made.with_tensors(**{key: change(made.tensors[key].clone())})


def moved(made: Made, old: str, new: str) -> Made:
    """Another name for a component."""

    def name(key: str) -> str:
        return f"{new}{key[len(old) :]}" if key.startswith(f"{old}.") else key

    configs = {new if component == old else component: value for component, value in made.about["config"].items()}
    shapes = {name(key): value for key, value in made.about["shapes"].items()}
    return Made({name(key): value for key, value in made.tensors.items()}, made.about | {"config": configs, "shapes": shapes})


def with_projection(name: str) -> Callable[[Made], Made]:
    def broken(made: Made) -> Made:
        more = {f"{name}.coefficients": torch.ones(12), f"{name}.locations": torch.zeros(12, dtype=torch.int32)}
        return made.with_tensors(**more).but(shapes=made.about["shapes"] | {name: [32, 32]})

    return broken


def whole(name: str, value: Tensor) -> Callable[[Made], Made]:
    return lambda made: made.with_tensors(**{f"full.{name}": value}).but(whole=[name])


HOSTILE: dict[str, tuple[Callable[[Made], Made], str]] = {
    "an unknown component": (
        lambda m: moved(m, "unet", "transformer"),
        "the component transformer, but the pipeline only has",
    ),
    "a component that is not a model": (
        lambda m: moved(m, "unet", "tokenizer"),
        "the component tokenizer, but the pipeline only has",
    ),
    "a component that is None": (lambda m: moved(m, "unet", "safety_checker"), "the component safety_checker"),
    "a component without such projections": (lambda m: moved(m, "unet", "vae"), "has no projection down_blocks"),
    "components exchanged": (
        lambda m: moved(moved(moved(m, "unet", "x"), "text_encoder", "unet"), "x", "text_encoder"),
        "no projection",
    ),
    "a method for a component": (lambda m: moved(m, "unet", "__class__"), "the component __class__"),
    "a path for a component": (lambda m: moved(m, "unet", "../unet"), "belongs to none of the components ../unet"),
    "a configuration without projections": (about(lambda f: f["config"].update(vae=f["config"]["unet"])), "config: 'vae'"),
    "a component without configuration": (
        about(lambda f: f["config"].pop("text_encoder")),
        "belongs to none of the components unet",
    ),
    "no component": (about(lambda f: f.update(config={})), "config"),
    "a projection more": (with_projection("unet.mid_block.attn.q"), "the model has no projection mid_block.attn.q"),
    "a projection of no component": (with_projection("mid_block.attn.q"), "mid_block.attn.q belongs to none of the components"),
    "a projection that is a layer": (with_projection("unet.conv_in"), "the model has no projection conv_in"),
    "a target less": (about(lambda f: f["config"]["unet"]["targets"].remove("v")), "is not one of the file's targets="),
    "another shape": (wide, "is (32, 64) in the file and (32, 32) in the model"),
    "coefficients missing": (tensor(C, lambda t: None), f"{C} is missing"),
    "locations missing": (tensor(L, lambda t: None), f"{L} is missing"),
    "an unknown tensor": (lambda m: m.with_tensors(surprise=torch.ones(3)), "surprise is unknown"),
    "NaN": (tensor(C, lambda t: t.fill_(math.nan)), f"{C} holds NaN"),
    "NaN in the second component": (
        lambda m: m.with_tensors(
            **{k: v * math.nan for k, v in m.tensors.items() if k.startswith("text_") and k.endswith("nts")}
        ),
        "holds NaN",
    ),
    "infinity": (tensor(C, lambda t: t.fill_(-math.inf)), f"{C} holds NaN or infinity"),
    "too large together": (tensor(C, lambda t: t.fill_(1e38)), f"{C} times the scale 2.0 overflows"),
    "a location outside": (tensor(L, lambda t: t.fill_(1024)), f"{L} holds 1024: a 32 x 32 matrix has cells 0 to 1023"),
    "a negative location": (tensor(L, lambda t: t.fill_(-1)), f"{L} holds -1"),
    "int64 locations": (tensor(L, lambda t: t.long()), f"{L} has dtype I64"),
    "bfloat16 coefficients": (tensor(C, lambda t: t.bfloat16()), f"{C} has dtype BF16"),
    "another count": (tensor(C, lambda t: t[:-1].clone()), f"{C} has shape (11,): by the settings it is (12,)"),
    "10**9 components": (about(lambda f: f["config"]["unet"].update(n_components=10**9)), "1000000000 components, of"),
    "an unknown version": (lambda m: m.but(format_version=3), "format_version=3"),
    "another method": (lambda m: m.but(method="lokr"), "method='lokr'"),
    "a field more": (lambda m: m.but(auto_map="x"), "['auto_map']"),
    "scale 0": (about(lambda f: f["config"]["unet"].update(scale=0)), "scale=0"),
    "conv_in of fewer channels": (
        whole("unet.conv_in.weight", torch.ones(16, 3, 3, 3)),
        "full.conv_in.weight is (16, 3, 3, 3)",
    ),
    "conv_in that overflows": (
        whole("unet.conv_in.bias", torch.full((16,), 1e300, dtype=torch.float64)),
        "overflows torch.float32",
    ),
    "conv_in with NaN": (whole("unet.conv_in.bias", torch.full((16,), math.nan)), "full.unet.conv_in.bias holds NaN"),
    "a whole tensor of no component": (whole("conv_in.bias", torch.ones(16)), "conv_in.bias belongs to none of the components"),
    "a whole tensor of another component": (whole("vae.conv_in.bias", torch.ones(16)), "belongs to none of the components"),
    "a whole tensor of the adapter here": (
        whole(f"{Q.replace('attn1.q', 'attn1')}.loca.weights.on_q.updates.0.coefficients", torch.ones(12)),
        "has no parameter",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("kind", ["file", "state dict"])
def test_a_hostile_adapter_is_refused_and_nothing_is_touched(
    kind: str, case: str, still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path
) -> None:
    change, words = HOSTILE[case]
    broken = change(made)
    source: Any = broken.write(tmp_path) if kind == "file" else broken.state()
    sentence = assert_refused(still, ValueError, words, source=source)
    assert sentence.startswith(f"{source}: " if kind == "file" else "state dict: ")


def test_the_adapter_that_the_broken_ones_are_made_from_is_sound(pipe: Any, made: Made, wanted: Tensor, tmp_path: Path) -> None:
    pipe.load_loca_weights(made.write(tmp_path))
    assert_near(picture(pipe), wanted)


@pytest.mark.parametrize("at", [0, 7, 100, -1])
def test_a_file_cut_short_is_refused(at: int, still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path) -> None:
    file = made.write(tmp_path)
    file.write_bytes(file.read_bytes()[:at])
    assert_refused(still, ValueError, f"{file}: ", source=tmp_path)


def test_what_overflows_half_precision_is_refused_there(tmp_path: Path) -> None:
    pipe = stable_diffusion().to(torch.float16)
    made = adapter(stable_diffusion(), UNET, whole=["unet.conv_in.weight"])
    key = "full.unet.conv_in.weight"
    file = made.with_tensors(**{key: made.tensors[key] + 1e5}).write(tmp_path)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"full\.conv_in\.weight overflows torch\.float16"):
        pipe.load_loca_weights(file)
    assert pipe.get_loca_adapters() == {}
    found = pipe.unet.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_an_adapter_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    """SDXL's has other blocks and a second text encoder."""
    pipe, other = stable_diffusion(), stable_diffusion_xl()
    for made, words in (
        (
            adapter(other, {"text_encoder_2": ("q",), "unet": ("q",)}),
            "the component text_encoder_2, but the pipeline only has",
        ),
        (adapter(other, {"unet": ("q",)}), "no projection|in the file and"),
    ):
        before = facts(pipe)
        with pytest.raises(ValueError, match=words):
            pipe.load_loca_weights(made.write(tmp_path))
        assert_same(pipe, before)
    made = adapter(pipe, {"text_encoder": ("q", "v")}, size=3.0)
    other.load_loca_weights(made.state())  # its first text encoder is built like that one
    assert_near(picture(other), expected((made, 1.0), make=stable_diffusion_xl))


def test_of_two_text_encoders_the_sentence_names_the_one(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl()
    for component in ("text_encoder", "text_encoder_2"):
        made = adapter(stable_diffusion_xl(), {"text_encoder": ("q",), "text_encoder_2": ("q",)})
        first = next(name for name in made.about["shapes"] if name.startswith(f"{component}."))
        rows, cols = made.about["shapes"][first]
        shapes = made.about["shapes"] | {first: [rows, 2 * cols]}
        with pytest.raises(ValueError, match=rf"\b{component}\b"):
            pipe.load_loca_weights(Made(made.tensors, made.about | {"shapes": shapes}).state())
    assert pipe.get_loca_adapters() == {}
