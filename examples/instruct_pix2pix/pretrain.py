"""Train a small InstructPix2Pix base from scratch: no download, no GPU, a quarter of an hour on two cores.

    python examples/instruct_pix2pix/pretrain.py photographs base

It stands in for a pretrained model where the hub cannot be reached: a stock StableDiffusionInstructPix2PixPipeline for 64 x 64
pixels whose autoencoder and UNet have seen a few photographs and no edit at all. It is trained on a single instruction: keep
the photograph as it is. Its purpose is to show adapters learning an edit with exactly the code that a real base needs.
When started again, the script resumes where it was stopped and ends with exactly the same weights.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from loca_vision.checks import check_count, check_share
from loca_vision.data.images import open_image
from loca_vision.data.photographs import Photograph, photographs_in
from loca_vision.recipes.editing.edit import Sampling, edit, square
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.reports.image_quality import psnr
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.atomic_folder import remove_folder
from loca_vision.storage.output_folder import claim
from loca_vision.storage.strict_json import read_json
from photo_pairs import INSTRUCTIONS, split_of
from small_base.photo_batches import PhotoBatches
from small_base.pipeline import Shape, small_pipeline
from small_base.stages import PHRASES, Stage, autoencoder_loss, identity_loss, measure_scale, train_stage

PROG = "pretrain.py"
SETTINGS, RESULT, CARD, CHECKPOINTS = "settings.json", "pretrain.json", "README.md", "checkpoints"
VERSION = 1  # increase it when the meaning of the settings changes
HELD_SHARE = 0.1  # of the photographs, if --held_out is not given


@dataclass(frozen=True)
class Pretrain:
    """Train a small InstructPix2Pix base from random weights to keep photographs as they are."""

    photographs: Annotated[Path, tyro.conf.Positional]
    """Folder of photographs, searched recursively for images in every format that PIL reads."""
    base: Annotated[Path, tyro.conf.Positional]
    """Output folder of the pipeline, to be loaded with from_pretrained."""
    held_out: Path | None = None
    """Folder of photographs to measure on. Without it, a tenth of the others, at least one, is held out from training."""
    resolution: int = 64
    """Pixels per side."""
    channels: tuple[int, ...] = (48, 96, 128)
    """Channels of the UNet's levels."""
    autoencoder_channels: tuple[int, int] = (32, 64)
    """Channels of the autoencoder's two levels."""
    autoencoder_steps: int = 400
    """Optimiser steps of the autoencoder."""
    autoencoder_learning_rate: float = 2e-3
    """Highest learning rate of the autoencoder."""
    steps: int = 1500
    """Optimiser steps of the UNet."""
    learning_rate: float = 1e-3
    """Highest learning rate of the UNet."""
    batch_size: int = 8
    """Photographs per step, for both."""
    conditioning_dropout_prob: float = 0.1
    """Probability of dropping the text alone, and also of dropping the image alone, and of dropping both."""
    image_noise: float = 0.5
    """Largest standard deviation of the noise on the latents of half of the UNet's conditioning images. With this noise, the
    UNet cannot only copy its input and has to learn what an image contains."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the products. On processors with bfloat16 units (AMX), bf16 takes half the time; on others it is slow."""
    checkpointing_steps: int = 100
    """Steps between checkpoints."""
    num_inference_steps: int = 20
    """Denoising steps of the measured edits."""
    guidance_scale: float = 2.0
    """Guidance scale of the measured edits."""
    image_guidance_scale: float = 1.5
    """Image guidance scale of the measured edits."""
    seed: int = 0
    """Seed of the weights, the crops of the photographs and the noise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train according to the command line and return the exit status."""
    return run_command(PROG, Pretrain, pretrain, arguments, extra="edit")


def pretrain(wanted: Pretrain) -> dict[str, Any]:
    """Train what is missing, measure, save, and return the contents of pretrain.json.

    Raises:
        ValueError: a setting is out of range or differs from the one the folder was started with, or training diverged.
        FileNotFoundError: there are no photographs.
        OSError: a file cannot be written.
    """
    shape = _check(wanted)
    shown, held = _parts(wanted)
    about = _about(wanted, shown, held)
    claim(wanted.base, SETTINGS, about, "weights")
    if (wanted.base / RESULT).exists():
        print(f"{wanted.base}: it is finished, with these settings and photographs")
        done: dict[str, Any] = read_json(wanted.base / RESULT)
        return done
    photos = PhotoBatches.of(shown, wanted.resolution, wanted.seed)
    pipe = _trained(wanted, shape, photos, about)
    measured = _measured(pipe, wanted, held)
    pipe.save_pretrained(wanted.base)
    write_atomically(wanted.base / CARD, _card(wanted, measured, len(shown), len(held)).encode())
    record = {"settings": about, "measured": measured, "environment": environment()}
    write_atomically(wanted.base / RESULT, (json.dumps(record, indent=1) + "\n").encode())  # last: marks it as finished
    _forget(wanted.base / CHECKPOINTS)
    print(f"{wanted.base}: " + ", ".join(f"{name} {value:.2f}" for name, value in measured.items()))
    return record


def _check(wanted: Pretrain) -> Shape:
    counts = ("autoencoder_steps", "steps", "batch_size", "checkpointing_steps", "num_inference_steps")
    for name, least in [*((name, 1) for name in counts), ("seed", 0)]:
        check_count(name, getattr(wanted, name), least)
    for name in ("autoencoder_learning_rate", "learning_rate"):
        if not 0 < getattr(wanted, name) < 1:
            raise ValueError(f"{name}={getattr(wanted, name)}: expected a number between 0 and 1")
    check_share("conditioning_dropout_prob", wanted.conditioning_dropout_prob)
    if wanted.conditioning_dropout_prob > 1 / 3:
        raise ValueError(f"conditioning_dropout_prob={wanted.conditioning_dropout_prob}: expected a number up to 1/3")
    if not 0 <= wanted.image_noise <= 10:
        raise ValueError(f"image_noise={wanted.image_noise}: expected a number from 0 to 10")
    return Shape(wanted.resolution, wanted.channels, wanted.autoencoder_channels)


def _parts(wanted: Pretrain) -> tuple[list[Photograph], list[Photograph]]:
    """Return the photographs to train on and those to measure on; no file content is in both."""
    found = photographs_in(wanted.photographs)
    if wanted.held_out is None:
        held = [one for one in found if split_of(one, wanted.seed, 0.0, HELD_SHARE) == "test"] or found[:1]
    else:
        held = photographs_in(wanted.held_out)
    apart = {one.content for one in held}
    shown = [one for one in found if one.content not in apart]
    if not shown:
        raise ValueError(f"{wanted.photographs}: {len(found)} photographs, none of which is left to train on")
    return shown, held


def _about(wanted: Pretrain, shown: Sequence[Photograph], held: Sequence[Photograph]) -> dict[str, Any]:
    """Return everything that the weights and the measures depend on, as JSON values."""
    elsewhere = ("photographs", "base", "held_out", "checkpointing_steps")
    about = {name: value for name, value in asdict(wanted).items() if name not in elsewhere}
    parts = {"trained_on": _names(shown), "measured_on": _names(held)}
    found: dict[str, Any] = json.loads(json.dumps(about | parts | {"version": VERSION}))
    return found


def _names(photographs: Sequence[Photograph]) -> str:
    return sha256(" ".join(one.content for one in photographs).encode()).hexdigest()


def _trained(wanted: Pretrain, shape: Shape, photos: PhotoBatches, about: dict[str, Any]) -> Any:
    pipe = small_pipeline(shape, (*INSTRUCTIONS, *PHRASES), wanted.seed)
    pipe.text_encoder.requires_grad_(False)
    folder, count, every = wanted.base / CHECKPOINTS, wanted.batch_size, wanted.checkpointing_steps

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if wanted.mixed_precision == "bf16" else nullcontext()

    codec = Stage("autoencoder", wanted.autoencoder_steps, wanted.autoencoder_learning_rate, every)
    train_stage(codec, pipe.vae, autoencoder_loss(pipe.vae, photos, count, computing), folder, about)
    pipe.vae.requires_grad_(False)
    pipe.vae.register_to_config(scaling_factor=measure_scale(pipe.vae, photos))
    denoiser = Stage("unet", wanted.steps, wanted.learning_rate, every)
    loss = identity_loss(pipe, photos, count, wanted.conditioning_dropout_prob, wanted.image_noise, computing)
    train_stage(denoiser, pipe.unet, loss, folder, about)
    return pipe


def _measured(pipe: Any, wanted: Pretrain, held: Sequence[Photograph]) -> dict[str, float]:
    """Return mean PSNRs to the photographs, in decibels: of their reconstructions, and of the edit that keeps them."""
    sampling = Sampling(wanted.num_inference_steps, wanted.guidance_scale, wanted.image_guidance_scale)
    decoded, kept = [], []
    for number, one in enumerate(tqdm(held, desc="edits", dynamic_ncols=True, disable=None)):
        photo = square(open_image(one.file), wanted.resolution)
        decoded.append(psnr(_decoded(pipe, photo), photo))
        kept.append(psnr(edit(pipe, photo, PHRASES[0], sampling, seed=wanted.seed + number), photo))
    return {"autoencoder_psnr": statistics.fmean(decoded), "identity_psnr": statistics.fmean(kept)}


@torch.no_grad()
def _decoded(pipe: Any, photo: Image.Image) -> Image.Image:
    image: Image.Image = pipe.image_processor.postprocess(pipe.vae(pipe.image_processor.preprocess(photo)).sample)[0]
    return image


def _forget(folder: Path) -> None:
    """Delete the checkpoints of a finished base, which are larger than the base itself."""
    for stage in folder.iterdir() if folder.exists() else ():
        for checkpoint in stage.iterdir():
            remove_folder(checkpoint)
        stage.rmdir()
    if folder.exists():
        folder.rmdir()


def _card(wanted: Pretrain, measured: dict[str, float], shown: int, held: int) -> str:
    said = [
        "---",
        "license: other",
        "license_name: as-the-photographs",
        "library_name: diffusers",
        "tags:",
        "- instruct-pix2pix",
        "---",
        "",
        "# A small InstructPix2Pix base, made from nothing",
        "",
        "A stand-in for a pretrained model, to try training and adapters where none can be downloaded. Its autoencoder and",
        f"UNet were trained from random weights on {shown} photographs, and its text encoder not at all. It was taught one",
        "instruction, in five phrasings: to keep the photograph as it is. It makes no other edit, and no picture of a text.",
        "",
        "| | |",
        "|---|---|",
        f"| pixels a side | {wanted.resolution} |",
        f"| steps of the autoencoder, of the UNet | {wanted.autoencoder_steps}, {wanted.steps}, of {wanted.batch_size} |",
        f"| rates | {wanted.autoencoder_learning_rate:g}, {wanted.learning_rate:g} |",
        f"| precision | {'bfloat16 autocast' if wanted.mixed_precision == 'bf16' else 'float32'}, on the processor |",
        f"| seed | {wanted.seed} |",
        f"| autoencoder on {held} held-out photographs | {measured['autoencoder_psnr']:.2f} dB |",
        f'| the edit "{PHRASES[0]}" of them | {measured["identity_psnr"]:.2f} dB |',
        "",
        f"Edits: {wanted.num_inference_steps} steps, guidance {wanted.guidance_scale:g}, image guidance"
        f" {wanted.image_guidance_scale:g}; decibels to the photograph, the mean of the peak signal-to-noise ratios.",
        "",
        "The licences of the photographs hold for what was learned from them, as far as any do.",
    ]
    return "\n".join(said) + "\n"


if __name__ == "__main__":
    sys.exit(main())
