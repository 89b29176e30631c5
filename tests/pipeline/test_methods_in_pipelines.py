"""Properties of every kind of adapter in diffusers' models and pipelines, alone and together with other adapters."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import nn

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, LoRAConfig, adapters, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.model.call_scale import set_low_memory
from support import pipelines as tiny
from support.formulas import KINDS, numbers, stir, written

every_kind = pytest.mark.parametrize("kind", KINDS)
SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
EVERYWHERE = {kind: replace(config, targets=("q", "k", "v", "out")) for kind, config in KINDS.items()}
DORA = ("dora", "selora dora")
quantised = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)


def unet():
    """Self and cross attention in one block."""
    return tiny.unet(**SMALL)


def adapted(kind, name="default", model=None):
    """A UNet with an adapter that shows."""
    model = model or unet()
    inject(model, EVERYWHERE[kind], name)
    return stir(model, name)


def term(kind, model, strength=1.0, name="default"):
    return EVERYWHERE[kind], adapters(model, name), strength


def pipeline(kind, seed=3, name="default"):
    """A pipeline whose UNet and text encoder have an adapter of the kind."""
    pipe = tiny.stable_diffusion()
    for model in (pipe.unet, pipe.text_encoder):
        inject(model, EVERYWHERE[kind], name)
        stir(model, name, seed)
        model.requires_grad_(False)
    return pipe


def near(found, wanted, tolerance=1e-4):
    assert found.isfinite().all()
    assert (found - wanted).abs().max() < tolerance, (found - wanted).abs().max()


def shows(found, base):
    assert (found - base).abs().max() > 1e-2


def eight_bits(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# Models


@every_kind
def test_nothing_changes_at_first(kind):
    model, base = unet(), unet()
    inject(model, EVERYWHERE[kind])
    assert torch.equal(tiny.output_of(model), tiny.output_of(base))
    assert [key for key in model.state_dict() if ".loca." not in key] == list(base.state_dict())


@every_kind
def test_the_output_is_that_of_the_weights_by_the_formula(kind):
    model, bare = adapted(kind), tiny.output_of(unet())
    wanted = tiny.output_of(written(unet(), term(kind, model)))
    shows(wanted, bare)
    near(tiny.output_of(model), wanted)
    near(model(**tiny.inputs_of(model), return_dict=False)[0].detach(), wanted)
    half = tiny.output_of(written(unet(), term(kind, model, 0.5)))
    near(tiny.output_of(model, cross_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(tiny.output_of(model, cross_attention_kwargs={"scale": 0}), bare)
    set_low_memory(model, True)
    near(tiny.output_of(model), wanted)
    near(tiny.output_of(model, cross_attention_kwargs={"scale": 0.5}), half)
    set_low_memory(model, False)
    remove(model, merge=True)
    near(tiny.output_of(model), wanted)


@every_kind
@pytest.mark.parametrize("low_memory", (False, True))
def test_fused_projections_with_and_without_autocast(kind, low_memory):
    model = adapted(kind)
    wanted, effect = tiny.output_of(model), (tiny.output_of(model) - tiny.output_of(unet())).norm()
    model.fuse_qkv_projections()
    set_low_memory(model, low_memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (tiny.output_of(model) - wanted).norm() < 0.5 * effect
        learning = model(**tiny.inputs_of(model), return_dict=False)[0]
    assert (learning.detach() - wanted).norm() < 0.5 * effect
    learning.float().sum().backward()
    assert all(p.grad.isfinite().all() for update in adapters(model).values() for p in update.trainable())
    near(tiny.output_of(model), wanted)


@every_kind
def test_gradient_checkpointing_changes_nothing(kind):
    model, found = adapted(kind).train(), []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        model(**tiny.inputs_of(model), return_dict=False)[0].square().sum().backward()
        found.append([p.grad.clone() for update in adapters(model).values() for p in update.trainable()])
    assert all(map(torch.equal, *found))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


# In company


def lora(model):
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    return model


@every_kind
@pytest.mark.parametrize("arrival", ("before", "after"))
def test_together_with_lora_of_peft(kind, arrival):
    """Both changes add; that of DoRA is of the base weight, whatever peft adds."""
    exact = adapted(kind)
    model = lora(adapted(kind)) if arrival == "after" else lora(unet())
    if arrival == "before":
        inject(model, EVERYWHERE[kind])
        for update, other in zip(adapters(model).values(), adapters(exact).values(), strict=True):
            update.load_state_dict(other.state_dict())
    wanted = tiny.output_of(lora(written(unet(), term(kind, exact))))
    shows(wanted, tiny.output_of(exact))
    near(tiny.output_of(model), wanted)
    near(model(**tiny.inputs_of(model), return_dict=False)[0].detach(), wanted)
    remove(model)
    assert torch.equal(tiny.output_of(model), tiny.output_of(lora(unet())))


@quantised
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*DORA, "sdctft")])
def test_on_quantised_layers_the_update_is_applied_to_activations(kind):
    model, exact, base = eight_bits(unet()), adapted(kind), eight_bits(unet())
    inject(model, EVERYWHERE[kind])
    for update, other in zip(adapters(model).values(), adapters(exact).values(), strict=True):
        update.load_state_dict(other.state_dict())
    change = tiny.output_of(exact) - tiny.output_of(unet())
    found = tiny.output_of(model) - tiny.output_of(base)
    assert (found - change).norm() < 0.2 * change.norm()
    near(tiny.output_of(eight_bits(exact)), tiny.output_of(model))


@quantised
@pytest.mark.parametrize("kind", (*DORA, "sdctft"))
def test_what_depends_on_a_quantised_weight_is_refused(kind, tmp_path):
    """Injected, and, of DoRA, loaded or quantised afterwards: in one sentence."""
    words = re.escape(".Linear: its weight is not a plain floating-point matrix, on which the adapter depends")
    model, keys = eight_bits(unet()), eight_bits(unet()).state_dict().keys()
    with pytest.raises(ValueError, match=words):
        inject(model, EVERYWHERE[kind])
    file = save_adapter(adapted(kind), tmp_path)
    if kind == "sdctft":  # whose cells are in the file
        load_adapter(model, file)
        return
    with pytest.raises(ValueError, match=words):
        load_adapter(model, file)
    assert model.state_dict().keys() == keys
    with pytest.raises(ValueError, match=words):
        tiny.output_of(eight_bits(adapted(kind)))


# Pipelines


@every_kind
def test_saved_and_loaded_a_pipeline_draws_the_same(kind, tmp_path):
    pipe, fresh = pipeline(kind), tiny.stable_diffusion()
    wanted, bare = tiny.picture(pipe), tiny.picture(fresh)
    loca.save_loca_weights(pipe, tmp_path)
    loca.load_loca_weights(fresh, tmp_path, adapter_name="mine")
    assert torch.equal(tiny.picture(fresh), wanted)
    loca.set_loca_adapters(fresh, "mine", 0.5)
    halved = tiny.picture(fresh)
    assert not torch.equal(halved, wanted) and not torch.equal(halved, bare)
    loca.unload_loca_weights(fresh)
    assert torch.equal(tiny.picture(fresh), bare)


@every_kind
def test_fused_and_unfused(kind):
    pipe, base = pipeline(kind), tiny.stable_diffusion()
    wanted = tiny.picture(pipe)
    loca.fuse_loca(pipe)
    near(tiny.picture(pipe), wanted)
    weights = dict(written(tiny.unet(), term(kind, pipe.unet)).named_parameters())
    changed = 0
    for key, value in weights.items():
        torch.testing.assert_close(pipe.unet.get_parameter(key), value, rtol=1e-5, atol=1e-5)
        changed += not torch.equal(value, base.unet.get_parameter(key))
    assert changed == len(adapters(pipe.unet))
    loca.unfuse_loca(pipe)
    for key, value in base.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[key], value)
    assert torch.equal(tiny.picture(pipe), wanted)


def test_what_a_weight_decomposed_adapter_depends_on_is_not_fused_under_it():
    pipe = pipeline("lora", name="a")
    adapted("dora", name="b", model=pipe.unet)
    wanted = tiny.picture(pipe)
    with pytest.raises(ValueError, match=r"adapter 'b' depends on the weight, which would be changed under it"):
        loca.fuse_loca(pipe, adapter_names=["a"])
    assert torch.equal(tiny.picture(pipe), wanted) and not pipe.fused_locas
    loca.fuse_loca(pipe)
    near(tiny.picture(pipe), wanted)
    loca.unfuse_loca(pipe)
    loca.fuse_loca(pipe, adapter_names=["b"])  # on top of which the other one goes on
    near(tiny.picture(pipe), wanted)


@every_kind
def test_hotswap_within_a_kind(kind, tmp_path):
    one, other = pipeline(kind), pipeline(kind, seed=9)
    loca.save_loca_weights(one, tmp_path / "one")
    loca.save_loca_weights(other, tmp_path / "other")
    pipe = tiny.stable_diffusion()
    loca.load_loca_weights(pipe, tmp_path / "one", adapter_name="a")
    tensors = {name: id(p) for name, p in pipe.unet.named_parameters()}
    for folder, wanted in (("other", other), ("one", one)):
        loca.load_loca_weights(pipe, tmp_path / folder, adapter_name="a", hotswap=True)
        assert torch.equal(tiny.picture(pipe), tiny.picture(wanted))
    assert {name: id(p) for name, p in pipe.unet.named_parameters()} == tensors


APART = ("loca", "fourierft", "lora", "dora", "selora haar", "selora dora")  # LoCA and sDCTFT are alike to a pipeline
PAIRS = [
    *zip(APART, (*APART[1:], APART[0]), strict=True),
    ("dora", "lora"),
    ("selora dora", "selora haar"),
    ("fourierft", "loca"),
]


@pytest.mark.parametrize(("kind", "other"), PAIRS)
def test_hotswap_between_kinds_is_refused_and_nothing_is_touched(kind, other, saved):
    pipe = tiny.stable_diffusion()
    loca.load_loca_weights(pipe, saved(kind), adapter_name="a")
    before = {name: numbers(update) for name, update in adapters(pipe.unet, "a").items()}
    with pytest.raises(ValueError, match="is of another kind"):
        loca.load_loca_weights(pipe, saved(other), adapter_name="a", hotswap=True)
    for name, update in adapters(pipe.unet, "a").items():
        assert all(torch.equal(value, before[name][key]) for key, value in numbers(update).items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of an adapter of a kind, written once."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("kind")
            loca.save_loca_weights(pipeline(kind), folders[kind])
        return folders[kind]

    return folder


def test_hotswap_takes_over_what_is_no_tensor(saved, tmp_path):
    """The basis of SeLoRA, and a rank that comes to the same number of coefficients."""
    other = tiny.stable_diffusion()
    for model in (other.unet, other.text_encoder):
        inject(model, replace(EVERYWHERE["selora haar"], r=6, eta=0.7, alpha=5.0))
        stir(model)
    loca.save_loca_weights(other, tmp_path)
    pipe = tiny.stable_diffusion()
    loca.load_loca_weights(pipe, saved("selora haar"), adapter_name="a")
    loca.load_loca_weights(pipe, saved("selora fft"), adapter_name="a", hotswap=True)
    assert torch.equal(tiny.picture(pipe), tiny.picture(pipeline("selora fft")))
    loca.load_loca_weights(pipe, tmp_path, adapter_name="a", hotswap=True)
    assert torch.equal(tiny.picture(pipe), tiny.picture(other))


def test_an_adapter_of_two_kinds_goes_into_no_file(tmp_path):
    pipe = tiny.stable_diffusion()
    inject(pipe.unet, LoCAConfig(n_components=5))
    inject(pipe.text_encoder, LoRAConfig(r=2))
    with pytest.raises(
        ValueError, match=r"adapter 'default' is (loca in unet and lora|lora in text_encoder and loca) elsewhere"
    ):
        loca.save_loca_weights(pipe, tmp_path)
    assert not list(tmp_path.iterdir())


@every_kind
def test_copies_of_a_unet(kind):
    model = adapted(kind)
    answer, twin = tiny.output_of(model), copy.deepcopy(model)
    assert torch.equal(tiny.output_of(twin), answer)
    set_adapters(twin, [])
    assert torch.equal(tiny.output_of(twin), tiny.output_of(unet()))
    assert torch.equal(tiny.output_of(model), answer)
