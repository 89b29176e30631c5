"""Draw one prompt and seed at three scales of one adapter, with a diffusion pipeline trained from scratch.

It takes minutes and needs no download. A text-to-image model with a million weights is trained on scikit-learn's handwritten
digits, 8 x 8 pixels, with prompts such as "seven". It is a stock `StableDiffusionPipeline` except for its autoencoder, which
passes pixels through. LoCA then adapts its attention, with everything else frozen, to draw the same digits in amber. The
adapter is saved and removed, loaded into the pipeline again, and drawn at scales 0 (the base model, bit for bit), 0.5 and 1.

    python examples/scales.py --output scales
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import torch
import tyro
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import loca_vision.diffusers as loca
from loca_vision import AlternatingSchedule, LoCAConfig, inject, parameter_groups, remove

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE, LENGTH = 8, 8
AMBER = (1.0, 0.6, 0.0)  # red, green and blue in [0, 1]


@dataclass(frozen=True)
class Settings:
    """Train a small pipeline on digits, adapt it to amber digits with LoCA, and draw both."""

    output: Path = Path("scales")
    """Folder for the adapter and the picture."""
    base_steps: int = 1500
    """Optimiser steps for the base model."""
    steps: int = 600
    """Optimiser steps for LoCA."""
    n_components: int = 300
    """Number of components B of each projection."""
    batch_size: int = 32
    """Digits per step."""
    seed: int = 0
    """Seed of the weights, the batches and the noise."""

    def __post_init__(self) -> None:
        for field in ("base_steps", "steps", "n_components", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: expected a whole number from 1 up")


class Pixels(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An autoencoder whose latents are the pixels."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, scaling_factor: float = 1.0, block_out_channels: tuple[int, ...] = (1,), latent_channels: int = 3
    ) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        return SimpleNamespace(sample=latents) if return_dict else (latents,)


def tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with a vocabulary of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def pipeline(seed: int) -> Any:
    """Return a Stable Diffusion pipeline with random weights; the text encoder is never trained."""
    torch.manual_seed(seed)
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        vae=Pixels(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits() -> tuple[Tensor, Tensor]:
    """Return white digits on black, (1797, 3, 8, 8) in [-1, 1], and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return images, torch.from_numpy(data.target)


def in_amber(images: Tensor) -> Tensor:
    """Return the same digits in amber on black."""
    return (images + 1) * torch.tensor(AMBER).view(1, 3, 1, 1) - 1


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator)
        yield images[chosen], labels[chosen]


@torch.no_grad()
def embedded(pipe: Any) -> Tensor:
    """Return the embeddings (11, tokens, width) of the ten prompts and, last, of the empty prompt."""
    tokens = pipe.tokenizer([*WORDS, ""], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    result: Tensor = pipe.text_encoder(tokens.input_ids)[0]
    return result


def train(pipe: Any, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, settings: Settings, steps: int) -> float:
    """Train noise prediction as Stable Diffusion does; a tenth of the prompts are dropped for guidance.

    Returns:
        The mean loss of the last 50 steps.
    """
    schedule = AlternatingSchedule(pipe.unet) if loca.get_loca_adapters(pipe) else None
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.05
    )
    prompts, losses = embedded(pipe), []
    torch.manual_seed(settings.seed + 1)
    pipe.unet.train()
    batch = batches(images, labels, settings.batch_size, settings.seed)
    for _ in (bar := tqdm(range(steps), unit="step", desc="LoCA" if schedule else "base")):
        clean, which = next(batch)
        which = torch.where(torch.rand(len(which)) < 0.1, len(WORDS), which)
        noise, times = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        loss = F.mse_loss(pipe.unet(noisy, times, prompts[which]).sample, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        decay.step()
        if schedule:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
    pipe.unet.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def draw(pipe: Any, file: Path, scales: tuple[float, ...] = (0, 0.5, 1)) -> None:
    """Draw a row for each scale; every column has its own prompt and seed."""
    figure, axes = plt.subplots(len(scales), len(WORDS), figsize=(len(WORDS), len(scales) + 0.4), squeeze=False)
    for row, scale in zip(axes, scales, strict=True):
        noise = [torch.Generator().manual_seed(i) for i in range(len(WORDS))]
        asked = {"num_inference_steps": 50, "guidance_scale": 3.0, "height": SIZE, "width": SIZE, "output_type": "np"}
        images = pipe(list(WORDS), generator=noise, cross_attention_kwargs={"scale": scale}, **asked).images
        for axis, image, word in zip(row, images, WORDS, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=word if scale == scales[0] else "")
        row[0].set_ylabel(f"scale {scale:g}")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def run(settings: Settings) -> None:
    images, labels = digits()
    pipe = pipeline(settings.seed)
    pipe.text_encoder.requires_grad_(False)
    base_loss = train(pipe, torch.optim.AdamW(pipe.unet.parameters(), lr=2e-3), images, labels, settings, settings.base_steps)
    inject(pipe.unet, LoCAConfig(n_components=settings.n_components, targets=("q", "k", "v", "out")), name="amber")
    groups = parameter_groups(pipe.unet, lr=5e-2)
    trained = sum(p.numel() for group in groups if group["name"] == "coefficients" for p in group["params"])
    before = loss_on(pipe, in_amber(images), labels, settings)
    train(pipe, torch.optim.AdamW(groups), in_amber(images), labels, settings, settings.steps)
    after = loss_on(pipe, in_amber(images), labels, settings)
    file = loca.save_loca_weights(pipe, settings.output, "amber")
    remove(pipe.unet)
    loca.load_loca_weights(pipe, settings.output)
    draw(pipe, settings.output / "scales.png")
    print(f"base: {sum(p.numel() for p in pipe.unet.parameters()):,} weights, loss {base_loss:.4f}")
    print(
        f"LoCA: {trained:,} coefficients, loss on amber {before:.4f} before, {after:.4f} after; {file.stat().st_size:,} bytes"
    )
    print(f"{settings.output / 'scales.png'}")


@torch.no_grad()
def loss_on(pipe: Any, images: Tensor, labels: Tensor, settings: Settings) -> float:
    """Return the loss on the same 512 noised images at every call."""
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randint(len(images), (512,), generator=generator)
    noise = torch.randn(512, 3, SIZE, SIZE, generator=generator)
    times = torch.randint(1000, (512,), generator=generator)
    noisy = pipe.scheduler.add_noise(images[chosen], noise, times)
    return float(F.mse_loss(pipe.unet(noisy, times, embedded(pipe)[labels[chosen]]).sample, noise))


def main() -> int:
    try:
        run(tyro.cli(partial(Settings), description=Settings.__doc__, use_underscores=True))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
