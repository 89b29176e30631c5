"""Every model of diffusers computes as merged weights do: its named projections, and all its linear layers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from loca_vision import LoCAConfig, adapters, inject, remove
from loca_vision.layers.targets import Target, find_targets
from support import diffusers_zoo as zoo
from support import model_tables
from support.formulas import stir

pytestmark = pytest.mark.skipif(not diffusers.__version__.startswith(zoo.VERSION), reason="the zoo is that of another version")
every_model = pytest.mark.parametrize("name", zoo.CASES)
PARTS = {"named": ("q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out"), "linear": ("linear",)}
_CONVOLUTION = "adapters go on (torch.nn.Linear|linear) layers"
REFUSED = {
    ("AutoencoderKLCosmos", "named"): _CONVOLUTION,
    ("AutoencoderKLHunyuanImage", "named"): _CONVOLUTION,
    ("AutoencoderKLHunyuanImageRefiner", "named"): _CONVOLUTION,
    ("AutoencoderKLHunyuanVideo15", "named"): _CONVOLUTION,
    ("AutoencoderVidTok", "named"): _CONVOLUTION,
    ("MMAudioVAE", "named"): _CONVOLUTION,
    ("UniDiffuserTextDecoder", "linear"): "transformer.lm_head shares its weight with transformer.transformer.wte",
}
ROUNDED = {"AceStepAudioTokenizer"}  # to a few levels: small updates vanish
# Linear layers in attention layers that are not projections: reachable as "linear", or by their names.
GATES_AND_KIN = {
    ("Krea2Attention", "to_gate"),
    ("RFD4ProteinaPairAttention", "to_g"),
    ("RFD4ProteinaPairAttention", "to_bias"),
    ("RFD4ProteinaAdaptiveAttention", "scale_output.0"),
    ("SDCascadeAttnBlock", "kv_mapper.1"),  # of the text, before the attention layer
    ("ResidualAttentionBlock", "attn.out_proj"),  # of torch.nn.MultiheadAttention
    ("MiniMaxH3AudioAttnProjection", "proj"),
    ("AceStepAttentionPooler", "embed_tokens"),
}


def test_every_class_is_in_the_zoo_or_left_out_with_a_reason() -> None:
    assert zoo.exported() == {*zoo.CASES, *zoo.LEFT_OUT}
    assert not {*zoo.CASES} & {*zoo.LEFT_OUT}


@pytest.fixture(autouse=True, scope="module")
def _not_collected() -> Iterator[None]:
    """What is here already is not garbage: to look through it takes as long as all of the tests."""
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def targets_of(name: str) -> list[Target]:
    return find_targets(zoo.model(name))


@cache
def before(name: str) -> list[Tensor]:
    return zoo.answer(zoo.model(name), name)


@every_model
@pytest.mark.parametrize("which", ("named", "linear"))
def test_output_is_that_of_merged_weights(name: str, which: str) -> None:
    model, first = zoo.model(name), before(name)
    targets = [target for target in targets_of(name) if _wanted(target, which) and ".motion_modules." not in target.name]
    parts = tuple(part for part in PARTS[which] if which == "linear" or any(target.part == part for target in targets))
    if not targets:
        pytest.skip("it has none")
    config = LoCAConfig(n_components=2, targets=parts)
    if (name, which) in REFUSED:
        with pytest.raises((ValueError, TypeError), match=REFUSED[name, which]):
            inject(model, config)
        return
    inject(model, config)
    try:
        if which == "linear":
            assert_equal(zoo.answer(model, name), first)
        stir(model)
        found = zoo.answer(model, name)
        deltas = {projection: update.delta().detach() for projection, update in adapters(model).items()}
    finally:
        remove(model)
    assert deltas.keys() == {target.name for target in targets}
    if which == "linear":
        assert_equal(zoo.answer(model, name), first)
    with written(targets, deltas):
        wanted = zoo.answer(model, name)
    change = max((one - other).abs().max() / other.abs().max() for one, other in zip(wanted, first, strict=True))
    assert change > 1e-4 or name in ROUNDED
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def _wanted(target: Target, which: str) -> bool:
    return target.part in PARTS["named"] if which == "named" else target.linear


class written:
    """The oracle: the weights, with the updates added to their rows, as long as it lasts."""

    def __init__(self, targets: list[Target], deltas: dict[str, Tensor]) -> None:
        self.targets, self.deltas = targets, deltas

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = [(target.layer.weight, target.layer.weight.clone()) for target in self.targets]
        for target in self.targets:
            weight: Any = target.layer.weight
            rows = slice(None) if target.rows is None else target.rows
            weight[rows] += self.deltas[target.name].view(weight[rows].shape)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, values in reversed(self.kept):
            weight.copy_(values)


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@every_model
def test_every_linear_layer_is_found(name: str) -> None:
    model = zoo.model(name)
    found = {id(target.layer) for target in targets_of(name)}
    missed = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in found}
    assert not missed


def _in_attention(name: str) -> Iterator[tuple[str, str, Target]]:
    modules = dict(zoo.model(name).named_modules())
    for target in targets_of(name):
        owners = target.layer_path.split(".")[:-1]
        while owners and type(modules[".".join(owners)]).__module__.startswith("torch."):
            owners.pop()
        owner = ".".join(owners)
        cls = type(modules[owner]).__name__
        if "Att" in cls and target.linear:
            yield cls, target.layer_path[len(owner) + 1 if owner else 0 :], target


def test_every_layer_in_attention_is_a_named_projection() -> None:
    unnamed = set()
    for name in zoo.CASES:
        unnamed |= {(cls, path) for cls, path, target in _in_attention(name) if target.part == "linear"}
    assert unnamed == GATES_AND_KIN


def test_a_tied_layer_can_be_left_out() -> None:
    model = zoo.model("UniDiffuserTextDecoder")
    names = inject(model, LoCAConfig(n_components=2, targets=("linear",), layers=("!transformer.lm_head",)))
    remove(model)
    assert names == ("encode_prefix", "decode_prefix")


def test_the_tables_of_the_documentation() -> None:
    """`python tests/support/model_tables.py` writes them anew."""
    assert model_tables.in_page(model_tables.PAGE.read_text()) == model_tables.tables()
