"""Attention layers adapted as a whole, in the company they keep: processors, fusing, checkpointing, compilers, offloading."""

import contextlib
import copy
import logging
import pickle
from functools import cache, partial

import pytest
import tiny
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from conftest import randomise
from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, T5Config, T5EncoderModel

import loca_vision.layers.effective_weight
from loca_vision import LoCAConfig, adapters, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.model.call_scale import set_low_memory

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
    """One block of a UNet with attention and one without, for what takes long."""
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
    """A model whose adapter shows, the same one every time."""
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
    """The base with W + strength * delta in its weights: the oracle."""
    for projection, spectrum in spectra.items():
        weight = base.get_submodule(layer_path(projection, family)).weight
        weight.copy_(weight.float() + strength * spectrum.delta())
    return base


@cache
def expected(family="unet", strength=1.0):
    """What a model with the adapter of `adapted` written into its weights answers."""
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
    """Not the sum of squares, which a last layer norm makes a constant."""
    return (answer * torch.arange(answer.numel()).cos().view_as(answer)).sum()


def gradients(model, **more):
    """Of every coefficient and location."""
    model.zero_grad()
    loss_of(call(model, **more)).backward()
    spectra = adapters(model).values()
    return [value.grad.clone() for s in spectra for value in (s.coefficients, s.locations)]


def reference_gradients(family, strength=1.0):
    """The same, by differentiating W + strength * delta as the weights of the base."""
    spectra, base = adapters(adapted(family, learned=True)), FAMILIES[family]()
    values = dict(base.named_parameters())
    for projection, spectrum in spectra.items():
        key = f"{layer_path(projection, family)}.weight"
        values[key] = values[key].detach() + strength * spectrum.delta()
    answer = torch.func.functional_call(base, values, kwargs=inputs(base) | {"return_dict": False})[0]
    learned = [value for s in spectra.values() for value in (s.coefficients, s.locations)]
    return torch.autograd.grad(loss_of(answer), learned)


def anatomy(model):
    """The class of every module, the names of its attributes and of all that is registered in it."""

    def content(value):
        return list(value) if isinstance(value, dict) else value if isinstance(value, (bool, int, str, type)) else type(value)

    return {path: (type(m), {k: content(v) for k, v in m.__dict__.items()}) for path, m in model.named_modules()}


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


def readings(model):
    return [module for module in model.modules() if isinstance(module, loca_vision.layers.effective_weight.Reading)]


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


# What is computed


@every_family
def test_injecting_changes_nothing_at_first(family):
    model = FAMILIES[family]()
    keys, before = list(model.state_dict()), output(model)
    inject(model, CONFIG)
    assert torch.equal(output(model), before)
    assert [key for key in model.state_dict() if ".loca." not in key] == keys


NAMES = {
    "flux": [f"transformer_blocks.0.attn.{part}" for part in LAYERS["diffusers"]]
    + [f"single_transformer_blocks.0.attn.{part}" for part in "qkv"],
    "sd3": [f"transformer_blocks.0.attn.{part}" for part in LAYERS["diffusers"]]
    + [f"transformer_blocks.1.attn.{part}" for part in LAYERS["diffusers"] if part != "add_out"],
    "clip": [f"encoder.layers.{block}.self_attn.{part}" for block in (0, 1) for part in LAYERS["clip"]],
    "t5": [f"encoder.block.{block}.layer.0.SelfAttention.{part}" for block in (0, 1) for part in LAYERS["t5"]],
    "vae": [f"{side}.mid_block.attentions.0.{part}" for side in ("encoder", "decoder") for part in ("q", "k", "v", "out")],
}


@pytest.mark.parametrize("family", NAMES)
def test_names_are_those_of_the_projections(family):
    model = FAMILIES[family]()
    names = inject(model, CONFIG)
    found = [name.removeprefix("text_model.") for name in names]
    assert sorted(found) == sorted(NAMES[family])
    assert tuple(adapters(model)) == names


def test_a_unet_has_all_its_attention_adapted():
    model = tiny.unet()
    names = inject(model, CONFIG)
    assert len(names) == 4 * len(attention_layers(model)) == 4 * len(model.attn_processors)
    assert inject(tiny.unet(), LoCAConfig(n_components=5, targets=("v",))) == tuple(n for n in names if n.endswith(".v"))


@every_family
def test_the_output_is_that_of_the_written_weights(family):
    model = adapted(family)
    assert (expected(family) - base_output(family)).abs().max() > 1e-2 * base_output(family).abs().max()
    assert_near(output(model), expected(family))
    set_adapters(model, "default", -0.5)
    assert_near(output(model), expected(family, -0.5))
    set_adapters(model, [])
    assert torch.equal(output(model), base_output(family))


@every_family
def test_every_projection_alone(family):
    """So that a small one is not lost beside the others."""
    parts = dict.fromkeys(name.rpartition(".")[2] for name in adapters(adapted(family)))
    for part in parts:
        model = adapted(family)
        for projection, spectrum in adapters(model).items():
            spectrum.coefficients.data.mul_(5.0 if projection.endswith(f".{part}") else 0.0)
        alone = output(written(FAMILIES[family](), adapters(model), family))
        effect = (alone - base_output(family)).abs().max()
        assert effect > 1e-4, part
        assert (output(model) - alone).abs().max() < 0.02 * effect, part


@every_family
def test_gradients_are_those_of_the_written_weights(family):
    assert_gradients_near(gradients(adapted(family, learned=True)), reference_gradients(family))


def test_a_base_that_learns_beside_the_adapter_gets_its_gradient():
    model, base = adapted(learned=True), written(tiny.unet(), adapters(adapted()))
    base.requires_grad_(True)
    paths = [layer_path(projection) for projection in adapters(model)]
    for path in paths:
        model.get_submodule(path).weight.requires_grad_(True)
    got = gradients(model)
    loss_of(call(base)).backward()
    assert_gradients_near(got, reference_gradients("unet"))
    assert_gradients_near(
        [model.get_submodule(path).weight.grad for path in paths], [base.get_submodule(path).weight.grad for path in paths]
    )


def test_adapters_add_up():
    model = adapted()
    inject(model, LoCAConfig(n_components=20, targets=("k", "v"), seed=1), "second")
    randomise(model, "second", 0.2)
    set_adapters(model, ["default", "second"], [0.5, 2.0])
    twin = written(written(tiny.unet(), adapters(model), strength=0.5), adapters(model, "second"), strength=2.0)
    assert_near(output(model), output(twin))
    remove(model, "default")
    assert_near(output(model), output(written(tiny.unet(), adapters(model, "second"), strength=2.0)))
    remove(model, "second")
    assert torch.equal(output(model), base_output("unet"))


def test_a_layer_put_in_the_place_of_another_is_adapted():
    model, base = adapted(), tiny.unet()
    torch.manual_seed(5)
    other = nn.Linear(16, 16, bias=False)
    for one in (model, base):
        attention = one.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        attention.to_q = copy.deepcopy(other)
    assert_near(output(model), output(written(base, adapters(model))))


def test_what_others_hang_on_a_linear_layer_runs():
    model, seen, hung = adapted(), [], []
    for layer in attention_layers(model):
        layer.to_k.register_forward_hook(lambda module, given, answer: seen.append(module))
        layer.to_out[0].register_forward_pre_hook(lambda module, given: seen.append(module))
        run = layer.to_v.forward
        layer.to_v.forward = lambda x, run=run, module=layer.to_v: seen.append(module) or run(x)
        hung += [layer.to_k, layer.to_out[0], layer.to_v]
    assert_near(output(model), expected())
    assert {id(module) for module in seen} == {id(module) for module in hung}
    assert_gradients_near(gradients(shown(model, learned=True)), reference_gradients("unet"))


# Removal


@every_family
@pytest.mark.parametrize("called", (False, True), ids=("unused", "used"))
def test_removal_leaves_no_trace(family, called):
    model = FAMILIES[family]()
    before, tensors = anatomy(model), {key: value.clone() for key, value in model.state_dict().items()}
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    held = {name: id(p) for name, p in model.named_parameters()}
    inject(model, CONFIG)
    shown(model, learned=True)
    if called:
        gradients(model)
        output(model)
    assert classes(model) != {path: cls for path, (cls, _) in before.items()}
    remove(model)
    assert anatomy(model) == before
    assert list(model.state_dict()) == list(tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learned
    assert {name: id(p) for name, p in model.named_parameters()} == held
    assert torch.equal(output(model), base_output(family))


@every_family
def test_merged_weights_are_the_written_ones(family):
    model = adapted(family)
    oracle = written(FAMILIES[family](), adapters(model), family, 0.5)
    set_adapters(model, "default", 0.5)
    remove(model, merge=True)
    assert classes(model) == classes(oracle)
    assert list(model.state_dict()) == list(oracle.state_dict())
    for key, value in oracle.state_dict().items():
        assert_near(model.state_dict()[key], value, 1e-6)
    assert_near(output(model), expected(family, 0.5))


# Projections fused by diffusers

FUSABLE = pytest.mark.parametrize("family", ("unet", "sdxl", "sd3", "flux", "pixart", "vae"))


def fused(model):
    return [m for m in model.modules() if any(name in m._modules for name in ("to_qkv", "to_kv", "to_added_qkv"))]


@FUSABLE
@arrivals
def test_fused_projections_are_adapted(family, arrival):
    model = FAMILIES[family]()
    if arrival == "before":
        model.fuse_qkv_projections()
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        model.fuse_qkv_projections()
    assert fused(model)
    assert_near(output(model), expected(family))
    set_adapters(model, "default", 0.5)
    assert_near(output(model), expected(family, 0.5))
    set_adapters(model, "default")
    model.unfuse_qkv_projections()
    assert_near(output(model), expected(family))
    remove(model)
    assert torch.equal(output(model), base_output(family))


@FUSABLE
@arrivals
def test_removal_while_fused(family, arrival):
    model, base = FAMILIES[family](), FAMILIES[family]()
    base.fuse_qkv_projections()
    if arrival == "before":
        model.fuse_qkv_projections()
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        model.fuse_qkv_projections()
    assert_near(output(model), expected(family))
    remove(model)
    assert classes(model) == classes(base)
    assert torch.equal(output(model), output(base))


@FUSABLE
def test_merging_while_fused_writes_both(family):
    model = adapted(family)
    model.fuse_qkv_projections()
    remove(model, merge=True)
    assert_near(output(model), expected(family))
    model.unfuse_qkv_projections()
    assert_near(output(model), expected(family))


def test_gradients_through_fused_projections():
    for family in ("unet", "flux"):
        model = adapted(family, learned=True)
        model.fuse_qkv_projections()
        assert_gradients_near(gradients(model), reference_gradients(family))


# Processors


PROCESSORS = {
    "AttnProcessor": lambda m: m.set_attn_processor(AttnProcessor()),
    "AttnProcessor2_0": lambda m: m.set_attn_processor(AttnProcessor2_0()),
    "SlicedAttnProcessor": lambda m: m.set_attn_processor(SlicedAttnProcessor(1)),
    "default": lambda m: m.set_default_attn_processor(),
    "slicing": lambda m: m.set_attention_slice("max"),
    "by name": lambda m: m.set_attn_processor({name: AttnProcessor() for name in m.attn_processors}),
}


@pytest.mark.parametrize("choose", PROCESSORS.values(), ids=PROCESSORS)
@arrivals
def test_any_processor_sees_adapted_projections(choose, arrival):
    model = tiny.unet()
    names = list(model.attn_processors)
    if arrival == "before":
        choose(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        choose(model)
    assert list(model.attn_processors) == names
    chosen = tiny.unet()
    choose(chosen)
    assert [type(p) for p in model.attn_processors.values()] == [type(p) for p in chosen.attn_processors.values()]
    assert_near(output(model), expected())
    remove(model)
    assert torch.equal(output(model), output(chosen))


def test_processors_of_joint_attention():
    model = adapted("sd3")
    model.set_attn_processor(JointAttnProcessor2_0())
    assert_near(output(model), expected("sd3"))


def ip_adapter(model):
    """An IP-Adapter of random weights, by the way diffusers loads one."""
    torch.manual_seed(6)
    layers = {}
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            for part in ("k", "v"):
                layers[name, part] = torch.randn(module.to_k.out_features, 24) / 5
    cross = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    weights = {
        f"{2 * i + 1}.to_{part}_ip.weight": layers[name.removesuffix(".processor"), part]
        for i, name in enumerate(cross)
        for part in ("k", "v")
    }
    image = {"proj.weight": torch.randn(4 * 24, 10), "proj.bias": torch.randn(4 * 24)}
    image |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}])
    return model


@arrivals
def test_an_ip_adapter_beside(arrival):
    pictures = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 10)]}}
    model = tiny.unet()
    if arrival == "before":
        ip_adapter(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        ip_adapter(model)
    oracle, base = ip_adapter(written(tiny.unet(), adapters(model))), ip_adapter(tiny.unet())
    wanted = output(oracle, **pictures)
    assert (wanted - expected()).abs().max() > 1e-2
    assert_near(output(model, **pictures), wanted)
    remove(model)
    assert torch.equal(output(model, **pictures), output(base, **pictures))


class Curious:
    """A processor that reads weights, keeps notes on the layer and asks what it is."""

    def __init__(self):
        self.layers, self.kinds, self.fused = [], [], []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, mark=None):
        self.kinds.append((isinstance(attn, Attention), attn.__class__.__name__, len(attn.to_out)))
        self.fused.append(any(hasattr(attn, name) for name in ("to_qkv", "to_kv", "to_added_qkv")))
        attn.calls = getattr(attn, "calls", 0) + 1
        attn.mark = mark
        attn.last = nn.Identity()
        self.layers.append(attn.to_q.in_features)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = F.linear(hidden_states, attn.to_q.weight, attn.to_q.bias)
        key, value = attn.to_k(text), F.linear(text, attn.to_v.weight)
        query, key, value = (attn.head_to_batch_dim(one) for one in (query, key, value))
        scores = attn.get_attention_scores(query, key, attention_mask)
        answer = attn.batch_to_head_dim(torch.bmm(scores, value))
        answer = F.linear(answer, attn.to_out[0].weight, attn.to_out[0].bias)
        return attn.to_out[1](answer)


def test_a_processor_that_reads_weights():
    model = adapted()
    processor = Curious()
    model.set_attn_processor(processor)
    assert_near(output(model), expected())
    count = len(attention_layers(model))
    assert processor.kinds == [(True, "Attention", 2)] * count
    assert processor.fused == [False] * count
    assert set(processor.layers) == {16, 32}
    assert_gradients_near(gradients(shown(model, learned=True)), reference_gradients("unet"))


def test_what_a_processor_sets_is_set_on_the_layer():
    model = adapted()
    model.set_attn_processor(Curious())
    output(model, cross_attention_kwargs={"mark": 5})
    output(model, cross_attention_kwargs={"mark": 6, "scale": 0.5})
    for removed in (False, True):
        if removed:
            remove(model)
        for layer in attention_layers(model):
            assert layer.__dict__["calls"] == 2 and layer.__dict__["mark"] == 6
            assert isinstance(layer._modules["last"], nn.Identity)


def test_a_fused_layer_shows_that_it_is():
    model = adapted()
    model.fuse_qkv_projections()
    processor = Curious()
    model.set_attn_processor(processor)
    assert_near(output(model), expected())
    assert all(processor.fused)


# The strength of one call


@pytest.fixture
def diffusers_log(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("family", KEYWORD)
def test_strength_of_a_call(family, diffusers_log):
    model, keyword = adapted(family), KEYWORD[family]
    assert torch.equal(output(model, **{keyword: {"scale": 0}}), base_output(family))
    assert torch.equal(output(model, **{keyword: {"scale": 0.0}}), base_output(family))
    given = {"scale": 0.3}
    assert_near(output(model, **{keyword: given}), expected(family, 0.3))
    assert given == {"scale": 0.3}
    assert_near(output(model), expected(family))
    set_adapters(model, "default", 0.6)
    assert_near(output(model, **{keyword: {"scale": 0.5}}), expected(family, 0.3))
    assert_near(output(model, **{keyword: None}), expected(family, 0.6))
    assert not [record for record in diffusers_log.records if record.levelno >= logging.WARNING]


def test_strength_of_a_call_while_fused():
    for family in ("unet", "flux"):
        model = adapted(family)
        model.fuse_qkv_projections()
        assert_near(output(model, **{KEYWORD[family]: {"scale": 0.3}}), expected(family, 0.3))
        assert_near(output(model), expected(family))


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), "0.5", True))
def test_a_strength_that_is_no_finite_number_is_refused(scale):
    model = adapted()
    with pytest.raises(ValueError, match=r"scale=.*finite number"):
        output(model, cross_attention_kwargs={"scale": scale})
    assert_near(output(model), expected())


def test_after_removal_the_strength_of_a_call_means_nothing():
    model = adapted()
    output(model, cross_attention_kwargs={"scale": 0.3})
    remove(model)
    assert torch.equal(output(model, cross_attention_kwargs={"scale": 0.3}), base_output("unet"))


# Gradient checkpointing


@pytest.mark.parametrize("scale", (None, 0.3))
@pytest.mark.parametrize("family", KEYWORD)
def test_gradient_checkpointing(family, scale):
    more = {} if scale is None else {KEYWORD[family]: {"scale": scale}}
    exact = gradients(adapted(family, learned=True).train(), **more)
    model = adapted(family, learned=True).train()
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, **more)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(checkpointed, exact, strict=True))
    assert_gradients_near(checkpointed, reference_gradients(family, scale or 1.0))


@pytest.mark.parametrize("family", ("clip", "t5"))
def test_gradient_checkpointing_of_a_text_encoder(family):
    model = adapted(family, learned=True).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_gradients_near(gradients(model), reference_gradients(family))


# Compilers


@contextlib.contextmanager
def nothing_compiled_anew():
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def small_oracle(model, strength=1.0):
    return output(written(small(), adapters(model), strength=strength))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
@arrivals
def test_compiled(compiler, arrival):
    """`arrival` of the compiler. Afterwards other weights, and other scales of a call, compile nothing anew."""
    model = small()
    if arrival == "before":
        compiled = compiler(model)
        assert torch.equal(output(compiled), output(small()))
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        compiled = compiler(model)
    assert_near(output(compiled), small_oracle(model))
    with nothing_compiled_anew():
        set_adapters(compiled, "default", 0.5)
        assert_near(output(compiled), small_oracle(model, 0.5))
        set_adapters(compiled, [])
        assert_near(output(compiled), output(small()), 1e-6)
        set_adapters(compiled, "default")
        assert_near(output(compiled), small_oracle(model))
    if arrival == "before":
        return
    assert_near(output(compiled, cross_attention_kwargs={"scale": 0.5}), small_oracle(model, 0.5))
    assert_near(output(compiled, cross_attention_kwargs={"scale": 0.3}), small_oracle(model, 0.3))
    with nothing_compiled_anew():
        assert_near(output(compiled, cross_attention_kwargs={"scale": 0.7}), small_oracle(model, 0.7))
        assert_near(output(compiled), small_oracle(model))


@pytest.mark.filterwarnings("ignore")
def test_training_compiled(compiler):
    model = small()
    inject(model, CONFIG)
    exact = gradients(shown(model, learned=True))
    compiled = compiler(model)
    assert_gradients_near(gradients(compiled), exact)
    with torch.no_grad():
        for spectrum in adapters(model).values():
            spectrum.coefficients.mul_(2)
            spectrum.locations.copy_(1 - spectrum.locations)
    assert_near(call(compiled).detach(), small_oracle(model))


@pytest.mark.filterwarnings("ignore")
def test_training_a_frozen_adapter_that_was_compiled(compiler):
    model = small()
    inject(model, CONFIG)
    layer, x = attention_layers(shown(model))[0], torch.randn(2, 5, 16)
    compiled = compiler(layer)
    compiled(x)
    spectra = list(adapters(model).values())[:4]
    for spectrum in spectra:
        spectrum.requires_grad_(True)
    learned = [value for s in spectra for value in (s.coefficients, s.locations)]
    exact = torch.autograd.grad(loss_of(layer(x)), learned)
    assert_gradients_near(torch.autograd.grad(loss_of(compiled(x)), learned), exact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ("flux", "clip"))
def test_other_models_compiled(compiler, family):
    model = adapted(family)
    compiled = compiler(model)
    assert_near(output(compiled), expected(family))
    with nothing_compiled_anew():
        set_adapters(model, "default", 0.5)
        assert_near(output(compiled), expected(family, 0.5))


BESIDE = {"fused": lambda m: m.fuse_qkv_projections(), "lora": lambda m: lora(m)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", BESIDE.values(), ids=BESIDE)
@arrivals
def test_one_layer_compiled(compiler, change, arrival):
    model, x = small(), torch.randn(2, 5, 16)
    if arrival == "before":
        change(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        change(model)
    compiled = compiler(attention_layers(model)[0])
    for strength in (1.0, 0.5, 0.0):
        set_adapters(model, "default", strength)
        oracle = written(small(), adapters(model), strength=strength)
        change(oracle)
        with torch.no_grad():
            assert_near(compiled(x), attention_layers(oracle)[0](x))


@pytest.mark.filterwarnings("ignore")
def test_one_layer_compiled_in_low_memory(compiler):
    model, x = small(), torch.randn(2, 5, 16)
    inject(model, CONFIG)
    set_low_memory(shown(model), True)
    layer, oracle = attention_layers(model)[0], attention_layers(written(small(), adapters(model)))[0]
    with torch.no_grad():
        assert_near(compiler(layer)(x), oracle(x))
    assert all(reading._kept is None and reading.delta is None for reading in readings(model))


@pytest.mark.filterwarnings("ignore")
@arrivals
def test_regional_compilation(compiler, arrival):
    model = small()
    model._repeated_blocks = ["BasicTransformerBlock"]
    if arrival == "before":
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        output(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_near(output(model), small_oracle(model))


# Hooks and layers of others, in every order of coming and going


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
in_company = pytest.mark.parametrize("company", COMPANY)


@cache
def alone(company):
    """What the base answers in that company."""
    model = small()
    COMPANY[company][0](model)
    return output(model)


@cache
def expected_in(company):
    oracle = written(small(), adapters(adapted("small")))
    COMPANY[company][0](oracle)
    return output(oracle)


@in_company
@arrivals
@pytest.mark.parametrize("departure", ("first", "last"))
def test_in_company(company, arrival, departure):
    """`arrival` and `departure` are those of the others."""
    join, leave = COMPANY[company]
    model = small()
    if arrival == "before":
        join(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        join(model)
    for _ in range(2):
        assert_near(output(model), expected_in(company))
    if departure == "first":
        leave(model)
        assert_near(output(model), expected("small"))
        remove(model)
    else:
        remove(model)
        assert torch.equal(output(model), alone(company))
        leave(model)
    assert torch.equal(output(model), base_output("small"))
    assert classes(model) == classes(small())


@in_company
def test_after_company_has_left(company):
    """Hooks leave the method they found on the layer itself, where it hides that of the class."""
    join, leave = COMPANY[company]
    model = small()
    join(model)
    leave(model)
    inject(model, CONFIG)
    assert_near(output(shown(model)), expected("small"))
    remove(model)
    assert torch.equal(output(model), base_output("small"))


@in_company
def test_strength_of_a_call_in_company(company):
    join, _ = COMPANY[company]
    model, oracle = adapted("small"), written(small(), adapters(adapted("small")), strength=0.3)
    join(model)
    join(oracle)
    scale = {"cross_attention_kwargs": {"scale": 0.3}}
    wanted = output(oracle, **scale) if company == "lora" else output(oracle)
    assert_near(output(model, **scale), wanted)


OFFLOADED = pytest.mark.parametrize("company", [name for name in COMPANY if "offload" in name])


@OFFLOADED
def test_saving_while_offloaded(company, tmp_path):
    model = adapted("small")
    before = load_file(save_adapter(model, tmp_path / "before"))
    join, _ = COMPANY[company]
    join(model)
    output(model)
    during = load_file(save_adapter(model, tmp_path / "during"))
    assert before.keys() == during.keys()
    assert all(torch.equal(before[key], during[key]) for key in before)
    other = small()
    join(other)
    load_adapter(other, tmp_path / "during")
    fresh = small()
    load_adapter(fresh, tmp_path / "before")
    assert_near(output(other), output(fresh))
    assert (output(fresh) - base_output("small")).abs().max() > 1e-2


@OFFLOADED
def test_whole_tensors_of_an_offloaded_model(company, tmp_path):
    model = adapted("small")
    model.conv_in.requires_grad_(True)
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)
    saved = load_file(save_adapter(model, tmp_path))
    assert {"full.conv_in.weight", "full.conv_in.bias"} <= saved.keys()
    fresh, other = small(), small()
    load_adapter(fresh, tmp_path)
    assert not torch.equal(fresh.conv_in.weight, small().conv_in.weight)
    join, _ = COMPANY[company]
    join(other)
    load_adapter(other, tmp_path)
    assert_near(output(other), output(fresh))
    set_adapters(other, [])
    assert torch.equal(output(other), base_output("small"))
    set_adapters(other, "default")
    assert_near(output(other), output(fresh))
    again = load_file(save_adapter(other, tmp_path / "again"))
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
    remove(other)
    assert torch.equal(output(other), base_output("small"))


def test_merging_into_an_offloaded_model():
    model = adapted()
    cpu_offload(model, execution_device=CPU)
    remove(model, merge=True)
    assert_near(output(model), expected())
    no_hooks_of_accelerate(model)
    assert_near(output(model), expected())


def test_nothing_is_kept_beside_a_layer_that_is_offloaded():
    model = adapted()
    cpu_offload(model, execution_device=CPU)
    assert_near(output(model), expected())
    assert next(model.parameters()).device.type == "meta"
    assert all(reading._kept is None and reading.delta is None for reading in readings(model))


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


@arrivals
def test_layerwise_casting(arrival):
    """The base is rounded to eight bits, the adapter is not."""
    model, rounded = tiny.unet(), tiny.unet()
    if arrival == "before":
        cast(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        cast(model)
    rounded.load_state_dict({key: value.float() for key, value in cast(tiny.unet()).state_dict().items()})
    base = output(rounded)
    assert model.get_submodule(layer_path(next(iter(adapters(model))))).weight.dtype == torch.float8_e4m3fn
    assert (base - base_output("unet")).abs().max() > 1e-3
    assert_near(output(model), output(written(rounded, adapters(adapted()))))
    for spectrum, exact in zip(adapters(model).values(), adapters(adapted()).values(), strict=True):
        assert torch.equal(spectrum.coefficients, exact.coefficients)
        assert torch.equal(spectrum.locations, exact.locations)
    with pytest.raises(ValueError, match="nothing can be written into it"):
        remove(model, merge=True)
    remove(model)
    assert torch.equal(output(model), base)


def test_lora_takes_only_layers_of_the_model():
    """peft looks for modules whose path ends in a name, such as the `q` of T5."""
    for family, names in (("t5", ["q", "k", "v", "o"]), ("clip", ["q_proj", "out_proj"]), ("unet", ["to_q", "to_out.0"])):
        model, base = adapted(family), FAMILIES[family]()
        for one in (model, base):
            torch.manual_seed(3)
            one.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        wrapped = [[path for path, m in one.named_modules() if isinstance(m, LoraLayer)] for one in (model, base)]
        assert wrapped[0] == wrapped[1]


def test_gradients_beside_lora():
    spectra = adapters(adapted(learned=True))
    model, base = shown(lora(adapted()), learned=True), lora(tiny.unet())  # peft freezes all but its own
    values = dict(base.named_parameters())
    for projection, spectrum in spectra.items():
        key = f"{layer_path(projection)}.base_layer.weight"
        values[key] = values[key].detach() + spectrum.delta()
    answer = torch.func.functional_call(base, values, kwargs=inputs(base) | {"return_dict": False})[0]
    learned = [value for s in spectra.values() for value in (s.coefficients, s.locations)]
    assert_gradients_near(gradients(model), torch.autograd.grad(loss_of(answer), learned))


def test_half_precision_beside_lora():
    model, oracle, base = lora(adapted()), lora(written(tiny.unet(), adapters(adapted()))), lora(tiny.unet())
    exact, effect = output(oracle), (output(oracle) - output(base)).abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (output(model) - exact).abs().max() < 0.2 * effect
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs(model).items()}
    with torch.no_grad():
        half = model.to(torch.bfloat16)(**given, return_dict=False)[0]
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.2 * effect


def test_merging_under_lora():
    model, oracle = lora(adapted()), lora(written(tiny.unet(), adapters(adapted())))
    remove(model, merge=True)
    assert_near(output(model), output(oracle))
    model.unload_lora()
    assert_near(output(model), expected())


# Quantised layers

quantised = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)


def eight_bits(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@quantised
@arrivals
def test_quantised_layers(arrival):
    """The update comes beside what the quantised layer answers."""
    base, deltas = eight_bits(tiny.unet()), adapters(adapted())
    bare = output(base)
    if arrival == "before":
        model = eight_bits(tiny.unet())
        inject(model, CONFIG)
        shown(model)
    else:
        model = eight_bits(adapted())
    for projection, spectrum in deltas.items():
        layer, delta = base.get_submodule(layer_path(projection)), spectrum.delta().detach()
        assert not isinstance(layer, nn.Linear) or not layer._parameters
        layer.register_forward_hook(lambda module, given, answer, delta=delta: answer + F.linear(given[0], delta))
    wanted = output(base)
    assert (wanted - bare).abs().max() > 1e-2
    assert_near(output(model), wanted, 1e-4)
    assert_near(output(model, cross_attention_kwargs={"scale": 0}), bare, 1e-7)
    remove(model)
    assert torch.equal(output(model), bare)


@quantised
def test_merging_into_quantised_weights_is_refused():
    model = eight_bits(adapted())
    answer, before = output(model), anatomy(model)
    with pytest.raises(ValueError, match=r"attn1\.to_q is a Linear without a plain floating-point weight"):
        remove(model, merge=True)
    assert anatomy(model) == before
    assert torch.equal(output(model), answer)


# Copies and files

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ("unet", "flux", "clip"))
def test_copies_are_independent_and_complete(family, clone):
    model = adapted(family)
    answer = output(model)
    twin = clone(model)
    assert all(reading._kept is None for reading in readings(twin))
    assert torch.equal(output(twin), answer)
    set_adapters(twin, "default", 0.5)
    if family in KEYWORD:
        assert_near(output(twin, **{KEYWORD[family]: {"scale": 0.6}}), expected(family, 0.3))
    assert_near(output(twin), expected(family, 0.5))
    for spectrum in adapters(twin).values():
        spectrum.coefficients.data.zero_()
    assert torch.equal(output(twin), base_output(family))
    assert torch.equal(output(model), answer)
    remove(twin)
    assert classes(twin) == classes(FAMILIES[family]())
    assert not any(m._forward_pre_hooks for m in twin.modules())
    assert torch.equal(output(twin), base_output(family))
    assert torch.equal(output(model), answer)


@pytest.mark.parametrize("family", ("unet", "clip"))
@pytest.mark.parametrize("copied", (False, True), ids=("original", "copy"))
@pytest.mark.parametrize("settings", ({}, {"max_shard_size": "30KB"}), ids=("whole", "sharded"))
def test_save_pretrained_writes_the_base(family, copied, settings, tmp_path):
    model = adapted(family)
    keys = list(model.state_dict())
    if copied:
        original, model = model, copy.deepcopy(model)
        remove(original, merge=True)  # which must not be what is written
    answer = output(model)
    model.save_pretrained(tmp_path, **settings)
    stock = type(FAMILIES[family]())
    loaded, about = stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is stock
    assert torch.equal(output(loaded.eval()), base_output(family))
    assert torch.equal(output(model), answer) and list(model.state_dict()) == keys
    assert len(adapters(model)) > 0


def test_save_pretrained_of_a_mlp_adapted_beside(tmp_path):
    model = tiny.text_encoder()
    names = inject(model, LoCAConfig(n_components=20, targets=("q", "fc1", "fc2")))
    assert {name.rpartition(".")[2] for name in names} == {"q", "fc1", "fc2"}
    shown(model)
    assert (output(model) - base_output("clip")).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded, about = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert torch.equal(output(loaded.eval()), base_output("clip"))


def test_save_pretrained_writes_the_base_of_tensors_trained_whole(tmp_path):
    model = adapted()
    model.conv_in.requires_grad_(True)
    save_adapter(model, tmp_path / "first")
    loaded = tiny.unet()
    load_adapter(loaded, tmp_path / "first")
    with torch.no_grad():
        loaded.conv_in.weight.mul_(1.5)
    loaded.save_pretrained(tmp_path / "base")
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path / "base")), base_output("unet"))
    assert not torch.equal(loaded.conv_in.weight, tiny.unet().conv_in.weight)


def test_another_base_loads_under_an_adapter():
    model, other = adapted(), tiny.unet(seed=1)
    model.load_state_dict(other.state_dict())
    assert_near(output(model), output(written(other, adapters(model))))
    assert (output(model) - expected()).abs().max() > 1e-2


def test_a_saved_adapter_on_a_saved_base(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "base")
    load_adapter(loaded, tmp_path / "adapter")
    fresh = tiny.unet()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(output(loaded), output(fresh))
    assert_near(output(loaded), output(written(tiny.unet(), adapters(loaded))))


# Precision and memory


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", ("unet", "flux", "clip"))
def test_half_precision_models_keep_exact_adapters(family, dtype):
    model, exact = adapted(family).to(dtype), adapters(adapted(family))
    for projection, spectrum in adapters(model).items():
        assert torch.equal(spectrum.coefficients, exact[projection].coefficients)
        assert torch.equal(spectrum.locations, exact[projection].locations)
    oracle = written(FAMILIES[family]().to(dtype), exact, family)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(model).items()}
    with torch.no_grad():
        got, wanted = (one(**given, return_dict=False)[0] for one in (model, oracle))
    assert got.dtype == dtype
    assert torch.equal(got, wanted)  # the sum is rounded once


def test_autocast():
    model, oracle, base = adapted(), written(tiny.unet(), adapters(adapted())), tiny.unet()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted, bare = output(model), output(oracle), output(base)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, bare)
    exact = gradients(shown(model, learned=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in rough)
    assert_gradients_near(rough, exact, 0.1)


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a weight is built."""
    count = []
    build = loca_vision.layers.effective_weight.Reading._built
    monkeypatch.setattr(
        loca_vision.layers.effective_weight.Reading, "_built", lambda *given, **more: count.append(1) or build(*given, **more)
    )
    return count


@pytest.mark.parametrize("family", ("unet", "sd3", "clip"))
def test_without_gradients_a_weight_is_built_once(family, builds):
    model = adapted(family)
    first = output(model)
    once = len(builds)
    assert torch.equal(output(model), first)
    with torch.inference_mode():
        assert torch.equal(call(model), first)
    assert len(builds) == once == len(adapters(model))
    set_adapters(model, "default", 0.5)
    assert_near(output(model), expected(family, 0.5))
    assert len(builds) == 2 * once


def test_a_kept_weight_follows_every_change(builds):
    model = adapted()
    output(model)
    for spectrum in adapters(model).values():
        spectrum.coefficients.data.mul_(2)
        spectrum.locations.data.copy_(1 - spectrum.locations)
    assert_near(output(model), output(written(tiny.unet(), adapters(model))))
    with torch.no_grad():
        for layer in attention_layers(model):
            layer.to_v.weight.mul_(1.5)
    base = tiny.unet()
    for layer in attention_layers(base):
        layer.to_v.weight.data.mul_(1.5)
    assert_near(output(model), output(written(base, adapters(model))))


def test_fused_weights_are_built_once(builds):
    model = adapted()
    model.fuse_qkv_projections()
    first = output(model)
    once = len(builds)
    assert torch.equal(output(model), first)
    assert 0 < len(builds) == once < len(adapters(model))


def test_training_does_not_keep_weights():
    model = adapted(learned=True)
    output(model)
    assert sum(reading._kept is not None for reading in readings(model)) == len(adapters(model))
    gradients(model)
    assert all(reading._kept is None for reading in readings(model))


def input_gradient(model):
    given = inputs(model)
    name = "sample" if "sample" in given else "hidden_states"
    given[name] = given[name].clone().requires_grad_()
    loss_of(model(**given, return_dict=False)[0]).backward()
    return given[name].grad


@pytest.mark.parametrize("family", ("unet", "sd3", "flux"))
@arrivals
def test_low_memory(family, arrival):
    model = FAMILIES[family]()
    if arrival == "before":
        set_low_memory(model, True)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        output(model)
        set_low_memory(model, True)
    assert_near(output(model), expected(family))
    assert_near(output(model, **{KEYWORD[family]: {"scale": 0.3}}), expected(family, 0.3))
    got = input_gradient(model)
    assert all(reading._kept is None and reading.delta is None for reading in readings(model))
    assert_near(got, input_gradient(written(FAMILIES[family](), adapters(model), family)), 1e-4)
    set_low_memory(model, False)
    output(model)
    assert any(reading._kept is not None for reading in readings(model))


def test_low_memory_builds_nothing(builds):
    model = adapted()
    set_low_memory(model, True)
    output(model)
    assert not builds
    model.fuse_qkv_projections()
    assert_near(output(model), expected())
    assert not builds


def test_low_memory_still_learns():
    model = adapted(learned=True)
    set_low_memory(model, True)
    assert_gradients_near(gradients(model), reference_gradients("unet"))


# Bad input


BAD = {
    "no such targets": (LoCAConfig(n_components=5, targets=("q", "fc1")), "new", "has no 'fc1' projection"),
    "a name in use": (CONFIG, "default", "has an adapter of that name"),
    "too many components": (LoCAConfig(n_components=257, targets=("q",)), "new", "n_components=257: .* 16 x 16 = 256 cells"),
}


@pytest.mark.parametrize(("config", "name", "sentence"), BAD.values(), ids=BAD)
def test_what_is_refused_leaves_the_model_as_it_was(config, name, sentence):
    model = adapted()
    answer, before = output(model), anatomy(model)
    with pytest.raises(ValueError, match=sentence):
        inject(model, config, name)
    assert anatomy(model) == before
    assert torch.equal(output(model), answer)
    fresh = tiny.unet()
    if name == "new":
        before = anatomy(fresh)
        with pytest.raises(ValueError, match=sentence):
            inject(fresh, config)
        assert anatomy(fresh) == before
