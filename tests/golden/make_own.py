"""Adapter files of this library, format versions 1 and 2. They were made once and are never made again: users have such files.

Run with the set and the folder for it: python make_own.py first|layers|packed|later FOLDER
"""

import sys
from pathlib import Path

import safetensors.torch
import timm
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import loca_vision.diffusers as loca
from loca_vision import (
    FourierFTConfig,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    SeLoRAConfig,
    SHiRAConfig,
    WaveFTConfig,
    adapters,
    inject,
    load_adapter,
    save_adapter,
)  # fmt: skip

METHODS = {
    "loca": LoCAConfig(n_components=7, scale=0.5),
    "sdctft": SDCTFTConfig(n_components=7),
    "fourierft": FourierFTConfig(n_components=7),
    "lora": LoRAConfig(r=2, alpha=3.0),
    "dora": LoRAConfig(r=2, use_dora=True),
    "selora": SeLoRAConfig(r=2),
}


LATER = {"waveft": WaveFTConfig(n_components=7, wavelet="db2"), "shira": SHiRAConfig(n_components=7)}


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, depth=1, img_size=32, patch_size=16)


def unet():
    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D",), ("UpBlock2D",)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, down_block_types=down, up_block_types=up,
        mid_block_type=None, cross_attention_dim=24, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


def text_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes))


class Pipeline:
    """What the functions of `loca_vision.diffusers` ask of a pipeline."""

    def __init__(self):
        self.components = {"unet": unet(), "text_encoder": text_encoder()}


@torch.no_grad()
def stirred(model, seed):
    """An adapter that changes something; its products with a vector of ones, by projection."""
    generator = torch.Generator().manual_seed(seed)
    for update in adapters(model).values():
        for name, parameter in update.named_parameters():
            if name != "locations":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return products(model)


@torch.no_grad()
def products(model, name="default"):
    """Delta W times (1, 1, ..., 1), by projection; of DoRA for a weight of cosines, which no initialisation changes."""
    found = {}
    for projection, update in adapters(model, name).items():
        weight = torch.arange(update.shape[0] * update.shape[1]).cos().view(update.shape) if update.needs_weight else None
        found[projection] = update.delta(weight=weight).sum(1)
    return found


def first(folder):
    """What 0.1.0 wrote in November 2026, before files could be of chosen layers."""
    expected = methods(folder, METHODS)
    save_pipeline(folder, "pipeline", {"targets": ("q", "out")}, expected)
    save_expected(folder / "expected.safetensors", expected)


def later(folder):
    """Methods that came after 0.1.0."""
    save_expected(folder / "later-expected.safetensors", methods(folder, LATER))


def methods(folder, configs):
    """A file of each; what is expected of them."""
    expected = {}
    for name, config in configs.items():
        model = vit()
        inject(model, config)
        expected |= {f"{name}.{key}": value for key, value in stirred(model, 1).items()}
        torch.nn.init.constant_(model.head.weight, 0.25)
        save_adapter(model, folder / f"{name}.safetensors")
    return expected


def layers(folder):
    """With layers chosen by patterns, a 1 x 1 convolution among them."""
    expected = {}
    patterns = {"unet": ("*attn*", "*.ff", "*.proj_in"), "text_encoder": ("*attn*", "*.mlp")}
    save_pipeline(folder, "layers", {"targets": ("q", "fc1"), "layers": patterns}, expected)
    save_expected(folder / "layers-expected.safetensors", expected)


def packed(folder):
    """Format version 2; what is expected is what the files give, for they round."""
    expected = {}
    for dtype in (torch.float16, torch.int8):
        model, read, name = vit(), vit(), f"packed-{dtype}".replace("torch.", "")
        inject(model, LoCAConfig(n_components={"*.q": 7, "*": 40}, scale=0.5))
        stirred(model, 1)
        torch.nn.init.constant_(model.head.weight, 0.25)
        load_adapter(read, save_adapter(model, folder / f"{name}.safetensors", dtype=dtype))
        expected |= {f"{name}.{key}": value for key, value in products(read).items()}
    patterns = {"unet": ("*attn*", "*.ff", "*.proj_in"), "text_encoder": ("*attn*", "*.mlp")}
    save_pipeline(folder, "packed", {"targets": ("q", "fc1"), "layers": patterns}, {}, dtype=torch.float16)
    read = Pipeline()
    loca.load_loca_weights(read, folder / "packed.safetensors")
    for component, model in read.components.items():
        expected |= {f"packed.{component}.{key}": value for key, value in products(model, "default_0").items()}
    save_expected(folder / "packed-expected.safetensors", expected)


def save_pipeline(folder, name, settings, expected, **saving):
    pipe = Pipeline()
    for component, model in pipe.components.items():
        chosen = settings | ({"layers": settings["layers"][component]} if "layers" in settings else {})
        inject(model, LoCAConfig(n_components=7, seed=3, **chosen))
        expected |= {f"{name}.{component}.{key}": value for key, value in stirred(model, 2).items()}
    loca.save_loca_weights(pipe, folder, "default", weight_name=f"{name}.safetensors", **saving)


def save_expected(file, expected):
    safetensors.torch.save_file({key: value.contiguous() for key, value in expected.items()}, file)


if __name__ == "__main__":
    {"first": first, "layers": layers, "packed": packed, "later": later}[sys.argv[1]](Path(sys.argv[2]))
