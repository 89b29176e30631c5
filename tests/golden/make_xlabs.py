"""A LoRA of XLabs' x-flux (Apache-2.0), by its own model: python make_xlabs.py FOLDER, in a checkout with einops importable."""

import sys
from pathlib import Path

import safetensors.torch
import torch
from src.flux.model import Flux, FluxParams
from src.flux.modules.layers import DoubleStreamBlockLoraProcessor

LAYERS = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
}


@torch.no_grad()
def main(folder):
    model = Flux(
        FluxParams(
            in_channels=4, vec_in_dim=6, context_in_dim=10, hidden_size=16, mlp_ratio=4.0, num_heads=2, depth=1,
            depth_single_blocks=1, axes_dim=[2, 2, 4], theta=10_000, qkv_bias=True, guidance_embed=False,
        )
    )  # fmt: skip
    processors = model.attn_processors  # those of single blocks are made for the width of the real model alone
    made = {name: DoubleStreamBlockLoraProcessor(dim=16, rank=2) for name in processors if name.startswith("double")}
    model.set_attn_processor({**processors, **made})
    generator, expected = torch.Generator().manual_seed(1), {}
    for name, processor in made.items():
        for part, layer in processor.named_children():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            weight = f"{name.removesuffix('.processor')}.{LAYERS[part]}.weight"
            expected[weight] = layer(torch.eye(layer.down.in_features)).T.contiguous()
    # as train_flux_lora_deepspeed.py saves it
    state = {k: v for k, v in model.state_dict().items() if "_lora" in k}
    safetensors.torch.save_file(state, folder / "xlabs.safetensors")
    safetensors.torch.save_file(expected, folder / "xlabs-expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
