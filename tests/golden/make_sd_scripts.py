"""LoRA files of kohya's sd-scripts (Apache-2.0), by its own networks: python make_sd_scripts.py FOLDER, in a checkout of it.

The checkout, einops, opencv-python and diffusers have to be importable. With transformers 5, CLIPFeatureExtractor in its
library/ has to be called CLIPImageProcessor.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from library.flux_models import Flux, FluxParams
from networks import lora, lora_flux
from transformers import CLIPTextConfig, CLIPTextModel


def unet():
    down, up = ("CrossAttnDownBlock2D",), ("UpBlock2D",)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, down_block_types=down, up_block_types=up,
        mid_block_type=None, cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def text_encoder():
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes))


def flux():
    return Flux(
        FluxParams(
            in_channels=4, vec_in_dim=6, context_in_dim=10, hidden_size=16, mlp_ratio=4.0, num_heads=2, depth=1,
            depth_single_blocks=1, axes_dim=[2, 2, 4], theta=10_000, qkv_bias=True, guidance_embed=False,
        )
    )  # fmt: skip


@torch.no_grad()
def stirred(network):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def changed(before, model):
    """What a merge added to each weight."""
    return {name: value - before[name] for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def stable_diffusion(folder):
    torch.manual_seed(0)
    encoder, denoiser = text_encoder(), unet()
    network = lora.create_network(1.0, 2, 1.0, None, encoder, denoiser, conv_dim=2, conv_alpha=3.0)
    network.apply_to(encoder, denoiser)
    stirred(network).save_weights(str(folder / "sd-scripts.safetensors"), torch.float32, {"ss_network_dim": "2"})
    torch.manual_seed(0)
    encoder, denoiser = text_encoder(), unet()
    before = copy_of(encoder), copy_of(denoiser)
    file = str(folder / "sd-scripts.safetensors")
    network, tensors = lora.create_network_from_weights(1.0, file, None, encoder, denoiser, for_inference=True)
    network.merge_to(encoder, denoiser, tensors, torch.float32, "cpu")
    expected = {f"text_encoder.{key}": value for key, value in changed(before[0], encoder).items()}
    expected |= {f"unet.{key}": value for key, value in changed(before[1], denoiser).items()}
    safetensors.torch.save_file(expected, folder / "sd-scripts-expected.safetensors")


def of_flux(folder):
    torch.manual_seed(0)
    model = flux()
    network = lora_flux.create_network(1.0, 2, 1.0, None, [None, None], model)
    network.apply_to([None, None], model, apply_text_encoder=False)
    file = str(folder / "sd-scripts-flux.safetensors")
    stirred(network).save_weights(file, torch.float32, None)
    torch.manual_seed(0)
    model = flux()
    before = copy_of(model)
    network, tensors = lora_flux.create_network_from_weights(1.0, file, None, [None, None], model, for_inference=True)
    network.merge_to([None, None], model, tensors, torch.float32, "cpu")
    safetensors.torch.save_file(changed(before, model), folder / "sd-scripts-flux-expected.safetensors")


if __name__ == "__main__":
    stable_diffusion(Path(sys.argv[1]))
    of_flux(Path(sys.argv[1]))
