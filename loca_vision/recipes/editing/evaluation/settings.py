"""The settings of an evaluation of edits, as one dataclass, and which of them contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loca_vision.checks import check_count, check_seed, is_finite
from loca_vision.data.pairs import CARTOONIZATION, Columns
from loca_vision.recipes.editing.edit import Sampling
from loca_vision.recipes.reports.image_quality import SMALLEST
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.recipes.settings.plugins import Imports

_DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OF_PAIRS = ("split", "original_image_column", "edit_prompt_column", "edited_image_column")
# Settings that no edit depends on, or that are kept in another form: files by their content, the device as it was found.
_NOT_KEPT = {"adapter", "other", "max_photographs", "device", "lpips", "clip_model", "output_dir", "config", "imports"}


@dataclass(frozen=True)
class EditEvaluation:
    """Edit photographs with an InstructPix2Pix model and its adapters, and measure the edits.

    Every photograph has its own seed, the same for all editors. An interrupted evaluation continues when it is started again.
    """

    pretrained_model_name_or_path: str
    """The base: a folder or a name on the hub, such as timbrooks/instruct-pix2pix."""
    adapter: str
    """A folder, a file, or a name on the hub."""
    other: tuple[str, ...] = ()
    """More adapters to compare with; each acts at scale 1."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines the method of an adapter; may be repeated."""
    revision: str | None = None
    """Revision of the base on the hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""

    photographs: Path | None = None
    """A folder of photographs to edit; give either this or --pairs."""
    pairs: str | None = None
    """A data set of photographs, instructions and targets: a folder, a parquet file, or a name on the hub."""
    split: str = "test"
    """Split of the pairs."""
    original_image_column: str = CARTOONIZATION.original
    """Column of the photographs in the pairs. The default names are those that build_pairs.py writes."""
    edit_prompt_column: str = CARTOONIZATION.prompt
    """Column of the instructions in the pairs."""
    edited_image_column: str = CARTOONIZATION.edited
    """Column of the targets in the pairs."""
    prompt: str | None = None
    """The instruction for all photographs; with --pairs, instead of their own."""
    max_photographs: int | None = None
    """At most this many: from a folder the first by the hash of their files, from pairs a random choice by the seed."""
    resolution: int = 256
    """Pixels a side, a multiple of 8: the short side is resized to it and the centre cropped, as in training."""

    scales: tuple[float, ...] = (0.5, 1.0)
    """Strengths of the adapter, with an edit for each."""
    num_inference_steps: int = 20
    """Steps of the pipeline's scheduler."""
    guidance_scale: float = 7.0
    """How strongly the instruction counts, from 1 up."""
    image_guidance_scale: float = 1.5
    """How strongly the photograph counts, from 1 up."""
    seed: int = 0
    """Seed of the noise, together with the content of each photograph."""

    clip_model: str | None = "openai/clip-vit-large-patch14"
    """A folder or a name on the hub; None for no CLIP measures."""
    lpips: bool = True
    """Measure LPIPS, for which torchvision downloads AlexNet (233 MB) once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "fp16", "bf16"] = "float32"
    """Precision of the pipeline. fp16 is for GPUs."""
    output_dir: Path = Path("evaluation")
    """Folder for evaluation.json, contact_sheet.png and edits/."""
    config: Path | None = None
    """A YAML file of these settings."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.num_inference_steps, self.guidance_scale, self.image_guidance_scale)

    @property
    def columns(self) -> Columns:
        """The columns of the pairs."""
        return Columns(self.original_image_column, self.edit_prompt_column, self.edited_image_column)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


def checked(wanted: EditEvaluation, given: Collection[str] = ()) -> torch.device:
    """Return the device to compute on, after every check that needs no file.

    Args:
        given: the fields that the user has set; with photographs, those of pairs are refused.

    Raises:
        ValueError: a value is out of range, or settings contradict each other; the error is one sentence.
    """
    _check_data(wanted, given)
    _check_numbers(wanted)
    device = _device(wanted.device)
    if wanted.dtype == "fp16" and device.type == "cpu":
        raise ValueError("dtype='fp16': it is for GPUs, and the device is the CPU; float32 and bf16 are for both")
    return device


def kept(wanted: EditEvaluation, files: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return everything that an edit depends on except its photograph, as JSON; `files` are facts about the adapters' files."""
    settings = {name: value for name, value in as_json_dict(wanted).items() if name not in _NOT_KEPT}
    return settings | {"device": device.type, "adapters": {name: facts["sha256"] for name, facts in files.items()}}


def _check_data(wanted: EditEvaluation, given: Collection[str]) -> None:
    if (wanted.photographs is None) == (wanted.pairs is None):
        raise ValueError("say what to edit: either --photographs, a folder, or --pairs, a data set")
    if wanted.photographs is not None:
        if wanted.prompt is None:
            raise ValueError("--photographs need an instruction: say --prompt")
        for name in (name for name in _OF_PAIRS if name in given):
            raise ValueError(f"--{name} is a setting of --pairs, and --photographs are what is edited")
    if wanted.prompt is not None and not wanted.prompt.strip():
        raise ValueError("prompt must be an instruction, got ''")


def _check_numbers(wanted: EditEvaluation) -> None:
    check_seed(wanted.seed)
    check_count("num_inference_steps", wanted.num_inference_steps)
    if wanted.max_photographs is not None:
        check_count("max_photographs", wanted.max_photographs)
    if wanted.resolution < SMALLEST or wanted.resolution % 8:
        raise ValueError(f"resolution={wanted.resolution!r}: expected a multiple of 8 from 16 up")
    if not wanted.scales or not all(map(is_finite, wanted.scales)):
        raise ValueError(f"scales must be finite numbers, at least one, got {wanted.scales!r}")
    if len({f"{scale:g}" for scale in wanted.scales}) < len(wanted.scales):
        raise ValueError(f"scales={wanted.scales!r}: one comes twice")
    _ = wanted.sampling  # it checks its own values


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda, one of these with its number, or mps") from None
    there: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device.type in there and not there[device.type]():
        raise ValueError(f"device={name!r}: this machine has no such device")
    return device
