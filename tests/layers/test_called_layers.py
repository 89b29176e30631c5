"""Linear layers and 1 x 1 convolutions outside attention, in models of diffusers and transformers, which call them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from loca_vision import LoCAConfig, LoRAConfig, adapters, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.methods.lora import LoRA
from support import pipelines as tiny
from support.attention import COMPANY, SMALL, assert_near, classes, inputs, output
from support.formulas import stir

EVERYTHING = ("q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear")
CONFIG = LoCAConfig(n_components=20, targets=EVERYTHING)
MODELS = {
    "unet": (partial(tiny.unet, **SMALL), CONFIG),
    "linear projections": (partial(tiny.unet, **SMALL, use_linear_projection=True), CONFIG),
    "convolutions": (partial(tiny.unet, **SMALL), LoCAConfig(n_components=20, layers=("*conv_shortcut", "*proj_in"))),
    "sd3": (tiny.sd3, LoCAConfig(n_components=20, targets=("fc1", "fc2", "linear"))),
    "flux": (tiny.flux, LoCAConfig(n_components=20, targets=("fc1", "fc2", "proj_out", "linear"))),
    "clip": (tiny.text_encoder, LoCAConfig(n_components=20, targets=("fc1", "fc2", "linear"))),
}
every_model = pytest.mark.parametrize("name", MODELS)
_PATHS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0", "add_q": "add_q_proj", "add_k": "add_k_proj"} | {
    "add_v": "add_v_proj", "add_out": "to_add_out", "fc1": "net.0.proj", "fc2": "net.2"
}  # fmt: skip
_CLIP = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def layer(model: nn.Module, projection: str) -> Any:
    """The layer that a projection is, by the names written out here."""
    parent, _, part = projection.rpartition(".")
    paths = [projection, *(f"{parent}.{known[part]}" for known in (_CLIP, _PATHS) if part in known)]
    modules = dict(model.named_modules())
    return next(modules[path] for path in paths if path in modules)


def adapted(name: str) -> nn.Module:
    make, config = MODELS[name]
    model = make()
    inject(model, config)
    stir(model)
    return model


@torch.no_grad()
def written(base: nn.Module, spectra: dict[str, Any], strength: float = 1.0) -> nn.Module:
    """The oracle: the weights, with the updates added to them."""
    for projection, spectrum in spectra.items():
        weight = layer(base, projection).weight
        weight += strength * spectrum.delta().view(weight.shape)
    return base


@every_model
def test_output_is_that_of_merged_weights(name: str) -> None:
    make, config = MODELS[name]
    model = make()
    keys, before = list(model.state_dict()), output(model)
    names = inject(model, config)
    assert any(layer(make(), one) is not None and ".attn" not in one for one in names)
    assert torch.equal(output(model), before)
    assert [key for key in model.state_dict() if ".loca." not in key] == keys
    stir(model)
    wanted = output(written(make(), adapters(model)))
    assert (wanted - before).abs().max() > 1e-2
    for _ in range(2):
        assert_near(output(model), wanted)
    other = copy.deepcopy(model)
    remove(model)
    assert torch.equal(output(model), before)
    assert classes(model) == classes(make())
    remove(other, merge=True)
    assert_near(output(other), wanted)


@every_model
@pytest.mark.parametrize("config", (LoCAConfig(n_components=20), LoRAConfig(r=2)), ids=("loca", "lora"))
def test_gradients_are_those_of_merged_weights(name: str, config: Any) -> None:
    make, where = MODELS[name]
    model = make()
    inject(model, type(config)(**{**vars(config), "targets": where.targets, "layers": where.layers}))
    stir(model)
    updates = adapters(model)
    for update in updates.values():
        if isinstance(update, LoRA):  # whose products grow large
            update.up.data.mul_(0.1)
    learned = [parameter for update in updates.values() for parameter in update.parameters()]
    found = torch.autograd.grad(_loss(model(**inputs(model), return_dict=False)[0]), learned)
    base = make()
    values = dict(base.named_parameters())
    owners = {id(parameter): key for key, parameter in values.items()}
    for projection, update in updates.items():
        key = owners[id(layer(base, projection).weight)]
        values[key] = values[key].detach() + update.delta().view(values[key].shape)
    answer = torch.func.functional_call(base, values, kwargs=inputs(base) | {"return_dict": False})[0]
    wanted = torch.autograd.grad(_loss(answer), learned)
    largest = max(one.abs().max() for one in wanted)
    assert largest > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * largest


def _loss(answer: Tensor) -> Tensor:
    return (answer * torch.arange(answer.numel()).cos().view_as(answer)).sum()


def lora_everywhere(model: Any) -> None:
    torch.manual_seed(3)
    targets = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "linear_1"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


OTHERS = COMPANY | {"lora": (lora_everywhere, lambda model: model.unload_lora())}


@pytest.mark.parametrize("company", OTHERS)
@pytest.mark.parametrize("arrival", ("before", "after"))
@pytest.mark.parametrize("name", ("unet", "convolutions"))
def test_in_company(company: str, arrival: str, name: str) -> None:
    """`arrival` is that of the others."""
    join, leave = OTHERS[company]
    make, config = MODELS[name]
    oracle = written(make(), adapters(adapted(name)))
    join(oracle)
    model = make()
    if arrival == "before":
        join(model)
    inject(model, config)
    stir(model)
    if arrival == "after":
        join(model)
    for _ in range(2):
        assert_near(output(model), output(oracle))
    leave(model)
    assert_near(output(model), output(written(make(), adapters(adapted(name)))))
    remove(model)
    assert torch.equal(output(model), output(make()))
    assert classes(model) == classes(make())


def test_lora_fused_into_adapted_layers_stays() -> None:
    model = adapted("unet")
    lora_everywhere(model)
    both = output(model)
    model.fuse_lora()
    assert_near(output(model), both)
    model.unload_lora()
    assert_near(output(model), both)
    remove(model)
    oracle = tiny.unet(**SMALL)
    lora_everywhere(oracle)
    assert_near(output(model), output(oracle))


def test_strength_of_a_call() -> None:
    model, scale = adapted("unet"), {"cross_attention_kwargs": {"scale": 0.3}}
    assert_near(output(model, **scale), output(written(tiny.unet(**SMALL), adapters(model), 0.3)))
    set_adapters(model, "default", 2.0)
    assert_near(output(model, **scale), output(written(tiny.unet(**SMALL), adapters(model), 0.6)))


def test_layerwise_casting_and_half_precision() -> None:
    wanted = output(adapted("unet"))
    model = adapted("unet").to(torch.bfloat16)
    given = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs(model).items()}
    with torch.no_grad():
        assert_near(model(**given, return_dict=False)[0].float(), wanted, 0.05)
    cast = adapted("unet")
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_near(output(cast), wanted, 0.3)
    assert all(s.coefficients.dtype == torch.float32 for s in adapters(cast).values())


@pytest.mark.parametrize("name", ("unet", "convolutions"))
def test_compiled(name: str) -> None:
    model = adapted(name)
    for spectrum in adapters(model).values():
        spectrum.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = output(model)
    assert_near(output(compiled), wanted)
    set_adapters(model, "default", 0.5)
    assert_near(output(compiled), output(written(MODELS[name][0](), adapters(model), 0.5)))


@every_model
def test_file(name: str, tmp_path: Any) -> None:
    make, _ = MODELS[name]
    model, fresh = adapted(name), make()
    save_adapter(model, tmp_path)
    assert load_adapter(fresh, tmp_path) == tuple(adapters(model))
    assert_near(output(fresh), output(model), 1e-6)


def test_an_update_that_depends_on_a_convolutions_weight() -> None:
    model = tiny.unet(**SMALL)
    inject(model, LoRAConfig(r=2, use_dora=True, targets=("proj_in", "fc1")))
    before = output(tiny.unet(**SMALL))
    assert_near(output(model), before)
    stir(model)
    after = output(model)
    assert (after - before).abs().max() > 1e-3
    remove(model, merge=True)
    assert_near(output(model), after)
