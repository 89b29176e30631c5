"""Models, adapters and oracles for the tests in layers/attention/."""

from functools import cache, partial

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import (
    Attention,
)
from peft import LoraConfig
from transformers import CLIPTextModel, T5Config, T5EncoderModel

import loca_vision.layers.effective_weight
from loca_vision import LoCAConfig, adapters, inject
from support import pipelines as tiny
from support.timm_models import randomise

CPU = torch.device("cpu")


CONFIG = LoCAConfig(n_components=30, targets=("q", "k", "v", "out"))


SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


ADDED_KV = {  # the attention of DeepFloyd and Kandinsky
    "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
}


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def small():
    """A UNet of one block with attention and one without, for slow tests such as compilation."""
    return tiny.unet(**SMALL)


FAMILIES = {
    "unet": tiny.unet,
    "sdxl": tiny.xl_unet,
    "instruct_pix2pix": partial(tiny.unet, channels=8),
    "added_kv": partial(tiny.unet, **ADDED_KV),
    "vae": tiny.vae,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "pixart": tiny.pixart,
    "clip": tiny.text_encoder,
    "t5": t5,
    "small": small,
}


LAYERS = {
    "diffusers": {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    | {"add_q": "add_q_proj", "add_k": "add_k_proj", "add_v": "add_v_proj", "add_out": "to_add_out"},
    "clip": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"},
    "t5": {"q": "q", "k": "k", "v": "v", "out": "o"},
}


KEYWORD = {"unet": "cross_attention_kwargs", "sdxl": "cross_attention_kwargs", "pixart": "cross_attention_kwargs"} | {
    "sd3": "joint_attention_kwargs",
    "flux": "joint_attention_kwargs",
}


every_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "small"])


arrivals = pytest.mark.parametrize("arrival", ("before", "after"))


def inputs(model):
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, (CLIPTextModel, T5EncoderModel)):
        return {"input_ids": torch.arange(12).reshape(2, 6)}
    if "latent_channels" in model.config:
        return {"sample": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))}
    return tiny.inputs_of(model)


def call(model, **more):
    return model(**inputs(model), **more, return_dict=False)[0]


@torch.no_grad()
def output(model, **more):
    return call(model, **more)


@cache
def base_output(family):
    return output(FAMILIES[family]())


def adapted(family="unet", *, learned=False):
    """A model with an adapter that visibly changes its output; identical at every call."""
    model = FAMILIES[family]()
    inject(model, CONFIG)
    return shown(model, learned=learned)


def shown(model, *, learned=False):
    randomise(model)
    for spectrum in adapters(model).values():
        spectrum.requires_grad_(learned)
    return model


def layer_path(projection, family="unet"):
    path, _, part = projection.rpartition(".")
    return f"{path}.{LAYERS.get(family, LAYERS['diffusers'])[part]}"


@torch.no_grad()
def written(base, spectra, family="unet", strength=1.0):
    """The base model with W + strength * delta written into its weights: the oracle."""
    for projection, spectrum in spectra.items():
        weight = base.get_submodule(layer_path(projection, family)).weight
        weight.copy_(weight.float() + strength * spectrum.delta())
    return base


@cache
def expected(family="unet", strength=1.0):
    """The output of a model with the adapter of `adapted` written into its weights."""
    return output(written(FAMILIES[family](), adapters(adapted(family)), family, strength))


def assert_near(got, wanted, tolerance=1e-5):
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


def assert_gradients_near(got, wanted, tolerance=1e-4):
    assert len(got) == len(wanted) > 0
    largest = max(one.abs().max() for one in wanted)
    assert largest > 0
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * largest


def loss_of(answer):
    """A weighted sum rather than the sum of squares, which a final layer norm would make constant."""
    return (answer * torch.arange(answer.numel()).cos().view_as(answer)).sum()


def gradients(model, **more):
    """Gradients of every coefficient and location."""
    model.zero_grad()
    loss_of(call(model, **more)).backward()
    spectra = adapters(model).values()
    return [value.grad.clone() for s in spectra for value in (s.coefficients, s.locations)]


def reference_gradients(family, strength=1.0):
    """The same gradients, computed by differentiating the base model with weights W + strength * delta."""
    spectra, base = adapters(adapted(family, learned=True)), FAMILIES[family]()
    values = dict(base.named_parameters())
    for projection, spectrum in spectra.items():
        key = f"{layer_path(projection, family)}.weight"
        values[key] = values[key].detach() + strength * spectrum.delta()
    answer = torch.func.functional_call(base, values, kwargs=inputs(base) | {"return_dict": False})[0]
    learned = [value for s in spectra.values() for value in (s.coefficients, s.locations)]
    return torch.autograd.grad(loss_of(answer), learned)


def anatomy(model):
    """The class, attribute names and registered names of every module."""

    def content(value):
        return list(value) if isinstance(value, dict) else value if isinstance(value, (bool, int, str, type)) else type(value)

    return {path: (type(m), {k: content(v) for k, v in m.__dict__.items()}) for path, m in model.named_modules()}


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


def effective_weights(model):
    return [module for module in model.modules() if isinstance(module, loca_vision.layers.effective_weight.EffectiveWeight)]


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def no_hooks_of_accelerate(model):
    remove_hook_from_module(model, recurse=True)


def no_hooks_of_diffusers(model):
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in list(registry.hooks) if registry else ():
            registry.remove_hook(name, recurse=False)


def lora(model):
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    return model


COMPANY = {
    "sequential offload": (lambda m: cpu_offload(m, execution_device=CPU), no_hooks_of_accelerate),
    "model offload": (lambda m: cpu_offload_with_hook(m, execution_device=CPU), no_hooks_of_accelerate),
    "accelerate's hooks": (
        lambda m: [add_hook_to_module(layer, AccelerateHook()) for layer in attention_layers(m)],
        no_hooks_of_accelerate,
    ),
    "group offload of leaves": (
        lambda m: apply_group_offloading(m, onload_device=CPU, offload_type="leaf_level"),
        no_hooks_of_diffusers,
    ),
    "group offload of blocks": (
        lambda m: apply_group_offloading(m, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1),
        no_hooks_of_diffusers,
    ),
    "diffusers' hooks": (
        lambda m: [
            HookRegistry.check_if_exists_or_initialize(layer).register_hook(DiffusersHook(), "its name")
            for layer in attention_layers(m)
        ],
        no_hooks_of_diffusers,
    ),
    "lora": (lora, lambda m: m.unload_lora()),
}


@cache
def alone(company):
    """The output of the base model in the same company, without an adapter."""
    model = small()
    COMPANY[company][0](model)
    return output(model)
