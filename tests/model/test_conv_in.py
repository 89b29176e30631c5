"""A UNet with additional input channels, trained together with an adapter, saved, loaded and removed."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from torch import nn

import loca_vision.diffusers  # noqa: F401
from loca_vision import LoCAConfig, inject
from loca_vision.model.conv_in import widen_conv_in
from support import pipelines as tiny
from support.timm_models import randomise

CONFIG = LoCAConfig(n_components=8, targets=("q", "k", "v", "out"))


def pipeline():
    """As a user has it who wants to edit images with a Stable Diffusion base."""
    pipe = tiny.stable_diffusion()
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder",)}
    return tiny.quiet(StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def trained(unet):
    """An adapter and a `conv_in` as training leaves them."""
    inject(unet, CONFIG)
    randomise(unet)
    unet.conv_in.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    unet(**tiny.inputs_of(unet)).sample.square().mean().backward()
    optimiser.step()
    return unet


def test_new_channels_have_no_effect_at_first():
    narrow, wide = tiny.unet(), tiny.unet()
    assert widen_conv_in(wide) is True
    given = tiny.inputs_of(narrow)
    with torch.no_grad():
        torch.nn.init.normal_(narrow.conv_in.bias)
        wide.conv_in.bias.copy_(narrow.conv_in.bias)
        before = narrow(**given).sample
        for image in (torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8)):
            after = wide(**given | {"sample": torch.cat([given["sample"], image], 1)}).sample
            torch.testing.assert_close(after, before)


def test_weights_and_the_bias_are_copied_and_the_config_knows():
    old, unet, state = tiny.unet(), tiny.unet().bfloat16(), torch.get_rng_state()
    nn.init.normal_(old.conv_in.bias)
    unet.conv_in.bias.data.copy_(old.conv_in.bias)
    unet.conv_in.requires_grad_(False)
    state = torch.get_rng_state()
    widen_conv_in(unet)
    assert torch.equal(torch.get_rng_state(), state)
    assert unet.config.in_channels == 8 == unet.conv_in.in_channels and unet.conv_in.weight.shape == (16, 8, 3, 3)
    assert torch.equal(unet.conv_in.weight[:, :4], old.conv_in.weight.bfloat16()) and not unet.conv_in.weight[:, 4:].any()
    assert torch.equal(unet.conv_in.bias, old.conv_in.bias.bfloat16()) and unet.conv_in.bias.any()
    assert not unet.conv_in.weight.requires_grad and unet.conv_in.padding == old.conv_in.padding


def test_an_offloaded_unet_is_widened_where_its_weights_are():
    unet, plain = tiny.unet(), tiny.unet()
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert widen_conv_in(unet) and widen_conv_in(plain)
    assert unet.conv_in.weight.device.type == "meta" and torch.equal(tiny.output_of(unet), tiny.output_of(plain))


def test_a_saved_model_is_wide(tmp_path):
    unet = tiny.unet()
    widen_conv_in(unet)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert again.config.in_channels == 8 and torch.equal(again.conv_in.weight, unet.conv_in.weight)


def test_eight_channels_stay_as_they_are():
    unet = tiny.unet(channels=8)
    layer = unet.conv_in
    assert widen_conv_in(unet) is False and unet.conv_in is layer


def test_what_cannot_be_widened_is_refused():
    with pytest.raises(ValueError, match="channels=4: conv_in takes 8"):
        widen_conv_in(tiny.unet(channels=8), 4)
    with pytest.raises(TypeError, match="Linear has no convolution"):
        widen_conv_in(nn.Linear(2, 2))
    unet = tiny.unet()
    inject(unet, CONFIG)
    with pytest.raises(ValueError, match="widen it first"):
        widen_conv_in(unet)
    assert unet.config.in_channels == 4


def test_training_moves_it_and_the_file_has_it(tmp_path):
    from safetensors.torch import load_file

    pipe = pipeline()
    widen_conv_in(pipe.unet)
    before = pipe.unet.conv_in.weight.clone()
    trained(pipe.unet)
    assert not torch.equal(pipe.unet.conv_in.weight, before) and pipe.unet.conv_in.weight[:, 4:].any()
    pipe.save_loca_weights(tmp_path)
    tensors = load_file(tmp_path / "pytorch_loca_weights.safetensors")
    assert torch.equal(tensors["full.unet.conv_in.weight"], pipe.unet.conv_in.weight)
    assert torch.equal(tensors["full.unet.conv_in.bias"], pipe.unet.conv_in.bias)


def test_inference_is_training_and_unloading_brings_the_base_back(tmp_path):
    pipe = pipeline()
    widen_conv_in(pipe.unet)
    trained(pipe.unet)
    wanted, shown = tiny.output_of(pipe.unet), tiny.picture(pipe)
    pipe.save_loca_weights(tmp_path)
    fresh = pipeline()
    widen_conv_in(fresh.unet)
    base, state = tiny.output_of(fresh.unet), {name: value.clone() for name, value in fresh.unet.state_dict().items()}
    fresh.load_loca_weights(tmp_path)
    assert torch.equal(tiny.output_of(fresh.unet), wanted) and not torch.equal(wanted, base)
    assert torch.equal(tiny.picture(fresh), shown)
    fresh.unload_loca_weights()
    assert torch.equal(tiny.output_of(fresh.unet), base)
    assert fresh.unet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in fresh.unet.state_dict().items())


def test_the_layer_stays_with_what_hangs_on_it():
    unet, called = tiny.unet().to(memory_format=torch.channels_last), []
    layer, bias = unet.conv_in, unet.conv_in.bias
    layer.register_forward_hook(lambda *_: called.append(1))
    widen_conv_in(unet)
    assert unet.conv_in is layer and layer.bias is bias
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    tiny.output_of(unet)
    assert called
