"""LoRA of convolutions keeps the shapes that other programs expect: diffusers and peft read it and compute alike."""

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import nn

from loca_vision.commands.main import main
from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora, write_peft_lora
from support.pipelines import stable_diffusion, unet

BLOCK = "unet.mid_block.attentions.0"
ONE, THREE = f"{BLOCK}.proj_in", "unet.mid_block.resnets.0.conv1"
LAYERS = {ONE: (1, 1), f"{BLOCK}.proj_out": (1, 1), THREE: (3, 3), f"{BLOCK}.transformer_blocks.0.attn1.to_q": None}


def made_up(model):
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for path in LAYERS:
        weight = model.get_parameter(f"{path.removeprefix('unet.')}.weight").flatten(1)
        down = torch.randn(3, weight.shape[1], generator=generator)
        pairs[path] = LowRankPair(down, torch.randn(len(weight), 3, generator=generator), 0.2)
    return pairs, {path: kernel for path, kernel in LAYERS.items() if kernel}


def check_weights(model, base, pairs):
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            pair, after = pairs.get(f"unet.{name}"), model.get_parameter(f"{name}.weight")
            delta = pair.delta().reshape(module.weight.shape) if pair else 0
            torch.testing.assert_close(after, module.weight + delta, atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("write", [write_diffusers_lora, write_kohya_lora])
def test_a_pipeline_takes_convolutions(write, tmp_path):
    pipe = stable_diffusion()
    pairs, kernels = made_up(pipe.unet)
    pipe.load_lora_weights(write(tmp_path / "lora.safetensors", pairs, kernels=kernels))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    check_weights(pipe.unet, unet(), pairs)


def test_peft_takes_convolutions(tmp_path):
    model = unet()
    pairs, kernels = made_up(model)
    short = {path.removeprefix("unet."): pair for path, pair in pairs.items()}
    write_peft_lora(tmp_path / "peft", short, kernels={path.removeprefix("unet."): kernel for path, kernel in kernels.items()})
    check_weights(PeftModel.from_pretrained(model, tmp_path / "peft").merge_and_unload(), unet(), pairs)


def test_factors_have_four_axes_in_kohyas_files(tmp_path):
    pairs, kernels = made_up(unet())
    read = safetensors.torch.load_file(write_kohya_lora(tmp_path / "lora.safetensors", pairs, kernels=kernels))
    shapes = {name: tuple(tensor.shape) for name, tensor in read.items()}
    assert shapes["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"] == (3, 32, 1, 1)
    assert shapes["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] == (32, 3, 1, 1)
    assert shapes["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"] == (3, 32, 3, 3)
    assert shapes["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"] == (32, 3, 1, 1)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_converted_file_loads_where_the_given_one_did(to, tmp_path):
    pairs, kernels = made_up(unet())
    without = {path: pair for path, pair in pairs.items() if path != THREE}
    write_kohya_lora(tmp_path / "in.safetensors", without, kernels=kernels)
    out = tmp_path / "out.safetensors"
    assert main(f"convert {tmp_path}/in.safetensors {out} --to {to}".split()) == 0
    pipe = stable_diffusion()
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    check_weights(pipe.unet, unet(), without)
