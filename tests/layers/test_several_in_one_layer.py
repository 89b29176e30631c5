"""Layers of diffusers that hold several projections: which rows are whose, and how files name them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loca_vision import LoCAConfig, LoRAConfig, adapters, inject, load_adapter, remove, save_adapter
from loca_vision.diffusers import load_loca_weights
from loca_vision.formats.conversion.to_adapter import Budget, to_loca
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from loca_vision.layers.projection_rows import projections_of_modules, rows_of_target
from loca_vision.layers.targets import find_targets
from loca_vision.methods.lora import LoRA
from support import diffusers_zoo as zoo
from support.formulas import stir

pytestmark = pytest.mark.skipif(not diffusers.__version__.startswith(zoo.VERSION), reason="the zoo is that of another version")
PARTS = ("q", "k", "v", "out", "fc1", "fc2")
FUSED = {
    "Flux2Transformer2DModel": ("fused_q", "fused_k", "fused_v"),
    "StableAudio3DiTModel": ("fused_q", "fused_k", "fused_v"),
    "PRXTransformer2DModel": ("img_q", "img_k", "img_v", "txt_k", "txt_v"),
    "JoyImageEditTransformer3DModel": ("img_q", "img_k", "img_v", "txt_q", "txt_k", "txt_v"),
    "SanaWMTransformer3DModel": ("fused_q", "fused_k", "fused_v"),
    "ConsisIDTransformer3DModel": ("fused_k", "fused_v"),
}
WITHOUT_TORCH = ("SanaWMTransformer3DModel", "ConsisIDTransformer3DModel")  # whose attention is computed by hand


@pytest.mark.parametrize("name", [name for name in FUSED if name not in WITHOUT_TORCH])
def test_an_update_reaches_what_it_is_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a "v" the values that torch's attention is given, one of a "q" the queries, and nothing else of them."""
    model = zoo.model(name)
    for position, kind in enumerate("qkv"):
        found = {part for part in FUSED[name] if part.endswith(f"_{kind}")}
        targets = [target for target in find_targets(model, (kind,)) if target.name.rpartition(".")[2] in found]
        if not targets:  # of the other layer
            continue
        given = operands(model, name, monkeypatch)
        inject(model, LoCAConfig(n_components=4, targets=(kind,), layers=[targets[0].name]))
        stir(model)
        after = operands(model, name, monkeypatch)
        remove(model)
        first = next(i for i, pair in enumerate(zip(given, after, strict=True)) if changed(*pair))
        assert changed(given[first], after[first]) == {position}


def operands(model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """Query, key and value of every call of torch's attention, in order."""
    calls: list[tuple[torch.Tensor, ...]] = []
    genuine = F.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        calls.append((query, key, value))
        return genuine(query, key, value, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", watched)
        zoo.answer(model, name)
    return calls


def changed(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> set[int]:
    return {i for i, (one, other) in enumerate(zip(before, after, strict=True)) if not torch.equal(one, other)}


def test_the_feed_forward_half_of_flux_2() -> None:
    model = zoo.model("Flux2Transformer2DModel")
    layer = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    there = {target.name.rpartition(".")[2]: target.shape[0] for target in find_targets(model) if target.layer_path == layer}
    inner = model.single_transformer_blocks[0].attn.inner_dim
    whole = model.get_submodule(layer).out_features
    assert there == {"fused_q": inner, "fused_k": inner, "fused_v": inner, "fused_fc1": whole - 3 * inner}


@pytest.mark.parametrize("part", ("fused_q", "fused_fc1", "img_k", "txt_v"))
def test_names_do_not_tell_the_rows(part: str) -> None:
    assert rows_of_target(f"transformer.blocks.0.attn.{part}") is None


@pytest.mark.parametrize("part", ("to_out", "to_q_t", "q_img", "to_query", "to_qkv_mlp_proj", "img_attn_proj", "img_in"))
def test_layers_that_are_named_as_they_are(part: str) -> None:
    path = f"transformer.blocks.0.attn.{part}"
    known = rows_of_target(path)
    assert known is not None and known.module == path
    assert projections_of_modules([path])[path].projection == path


class Plain(nn.Module):
    """A model of nobody's, with a layer at the path where Flux.2 has it."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        attention = nn.ModuleDict({"attn": nn.ModuleDict({"to_qkv_mlp_proj": nn.Linear(like.in_features, like.out_features)})})
        self.single_transformer_blocks = nn.ModuleList([attention])


def test_an_adapter_of_the_whole_layer_loads(tmp_path: Path) -> None:
    """As `convert` makes it of a LoRA, from names alone."""
    name, layer = "Flux2Transformer2DModel", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    model = zoo.model(name)
    weight = model.get_submodule(layer).weight
    plain, kept = type(name, (Plain,), {})(model.get_submodule(layer)), weight.clone()
    inject(plain, LoCAConfig(n_components=20, targets=("linear",)))
    stir(plain)
    delta = adapters(plain)[layer].delta().detach()
    save_adapter(plain, tmp_path)
    assert load_adapter(model, tmp_path) == (layer,)
    found = zoo.answer(model, name)
    remove(model)
    with torch.no_grad():
        weight += delta
        wanted = zoo.answer(model, name)
        weight.copy_(kept)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


ATTENTION = "visual_transformer_blocks.0.self_attention"
LORAS = {
    "Flux2Transformer2DModel": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.0.ff.linear_in"),
    "Kandinsky5Transformer3DModel": (f"{ATTENTION}.to_query", "visual_transformer_blocks.0.feed_forward.in_layer"),
    "HiDreamImageTransformer2DModel": ("double_stream_blocks.0.block.attn1.to_q_t", "caption_projection.0.linear"),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_converts_by_names_alone_and_loads(name: str, tmp_path: Path) -> None:
    model, pairs = zoo.model(name), {}
    for path in LORAS[name]:
        layer = model.get_submodule(path)
        pairs[f"transformer.{path}"] = LowRankPair(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    to_loca(read_source(tmp_path / "lora.safetensors"), Budget("ratio", 1.0), tmp_path / "loca")
    pipe = SimpleNamespace(transformer=model, components={"transformer": model})
    load_loca_weights(pipe, tmp_path / "loca", "default")
    found = {path: update.delta().detach() for path, update in adapters(model).items()}
    remove(model)
    assert found.keys() == set(LORAS[name])
    for path, delta in found.items():
        assert (delta - pairs[f"transformer.{path}"].delta()).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config", (LoCAConfig(n_components=4, targets=PARTS), LoRAConfig(r=2, targets=PARTS)), ids=("loca", "lora")
)
@pytest.mark.parametrize("name", ("Flux2Transformer2DModel", "PRXTransformer2DModel", "HunyuanDiT2DModel"))
def test_gradients_are_those_of_merged_weights(name: str, config: Any) -> None:
    """Also where weights are read, as in the pooling of Hunyuan-DiT."""
    model = zoo.model(name)
    places = {target.name: target for target in find_targets(model)}
    inject(model, config)
    stir(model)
    updates = adapters(model)
    for update in updates.values():
        if isinstance(update, LoRA):  # whose products grow large
            update.up.data.mul_(0.1)
    learned = [parameter for update in updates.values() for parameter in update.parameters()]
    found = torch.autograd.grad(loss(model, name), learned)
    deltas = {projection: update.delta() for projection, update in updates.items()}
    remove(model)
    values = {}
    for projection, delta in deltas.items():
        key, rows = f"{places[projection].layer_path}.weight", places[projection].rows or slice(None)
        weight = values.get(key, model.get_parameter(key).detach())
        values[key] = weight.index_add(0, torch.arange(len(weight))[rows], delta)
    wanted = torch.autograd.grad(loss(lambda **inputs: torch.func.functional_call(model, values, kwargs=inputs), name), learned)
    largest = max(one.abs().max() for one in wanted)
    assert largest > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * largest


def loss(called: Any, name: str) -> torch.Tensor:
    torch.manual_seed(7)
    answer = called(**zoo.CASES[name].inputs())[0]
    return (answer * torch.arange(answer.numel()).cos().view_as(answer)).sum()


@pytest.mark.parametrize("name", FUSED)
def test_file(name: str, tmp_path: Path) -> None:
    model = zoo.model(name)
    inject(model, LoCAConfig(n_components=4, targets=("k", "v")))
    stir(model)
    wanted = zoo.answer(model, name)
    save_adapter(model, tmp_path)
    remove(model)
    load_adapter(model, tmp_path)
    found = zoo.answer(model, name)
    remove(model)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
