"""`loca-vision convert` and `extract`: convert adapters and weights between formats, and report what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from loca_vision.commands.convert_report import advice, left_out_lines, size_of, table, uncounted_lines, warnings
from loca_vision.commands.named_model import model_named
from loca_vision.formats.adapter_file import FILE_NAME as ADAPTER_NAME
from loca_vision.formats.conversion.base_tensors import matrices_in
from loca_vision.formats.conversion.base_weights import given_weights, is_pipeline
from loca_vision.formats.conversion.checkpoint_difference import open_difference
from loca_vision.formats.conversion.conversion_error import LayerFidelity
from loca_vision.formats.conversion.dct_truncation import Budget, BudgetRule
from loca_vision.formats.conversion.to_adapter import to_loca, to_lora_adapter
from loca_vision.formats.conversion.to_full_file import to_full
from loca_vision.formats.conversion.to_lora_file import to_lora
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, read_source
from loca_vision.formats.lora_files.reader import DIFFUSERS_WEIGHTS
from loca_vision.formats.lora_files.written_layers import file_to_write
from loca_vision.layers.projection_rows import ProjectionRows, projections_of_modules
from loca_vision.storage.safetensors_file import PICKLES

KINDS: tuple[BudgetRule, ...] = ("count", "threshold", "ratio", "energy")


@dataclass(frozen=True)
class OutputOptions:
    """The format of the output, and how much of the updates to keep."""

    to: Literal["loca", "lora", "diffusers", "kohya", "peft", "full"] = "loca"
    """loca or lora, as adapters of this library; a LoRA file for other programs, where kohya is for ComfyUI and A1111 (and
    diffusers reads it too) and diffusers is for diffusers alone; or full, the whole update without loss, for ComfyUI and
    A1111."""
    count: int | None = None
    """LoCA: keep this many components."""
    threshold: float | None = None
    """LoCA: keep the components of at least this magnitude."""
    ratio: float | None = None
    """LoCA: keep this share of all cells."""
    energy: float | None = None
    """LoCA: keep as few components as hold this share of the squared norm."""
    shared: bool = False
    """LoCA: use one such budget for all layers instead of one for each."""
    rank: int | None = None
    """LoRA: the rank of every module; by default the factors stay as they are."""
    model: str | None = None
    """timm's name of the model, or a folder of transformers, for updates of an image classifier."""
    half: bool = False
    """LoRA and full: store numbers in float16."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """LoCA: dtype of the coefficients; in 16 or 8 bits they are packed, which loca-vision 0.1.0 does not read."""
    sdxl: bool = False
    """kohya and full: the update is for Stable Diffusion XL, which a text encoder alone does not tell."""
    skip: bool = False
    """Skip tensors the target format cannot represent, and list them."""
    overwrite: bool = False
    """Replace an existing output."""

    def budget(self) -> Budget:
        """Return the budget that the options give.

        Raises:
            ValueError: not exactly one kind is given, or its amount is out of range.
        """
        given = [(kind, getattr(self, kind)) for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError("for LoCA, say how much is to be kept by one of --count, --threshold, --ratio and --energy")
        return Budget(*given[0], self.shared)

    def check(self, output: Path) -> None:
        """Raise ValueError if the options contradict each other, or the output exists."""
        if self.to == "loca":
            self.budget()
            if self.rank is not None or self.half:
                raise ValueError("--rank and --half are for LoRA: say which with --to")
        elif self.shared or any(getattr(self, kind) is not None for kind in KINDS):
            raise ValueError(f"--to {self.to}: a LoRA has a --rank, no number of components")
        if self.to != "loca" and self.dtype != "float32":
            raise ValueError(f"--to {self.to}: --dtype is for LoCA; of others --half may make smaller files")
        if self.to == "full" and self.rank is not None:
            raise ValueError("--to full: it is the whole update, which has no --rank")
        if self.half and self.to in ("lora", "peft"):
            raise ValueError(f"--to {self.to}: --half is for --to diffusers, kohya and full")
        if self.sdxl and self.to not in ("kohya", "full"):
            raise ValueError(f"--to {self.to}: --sdxl is for --to kohya and full")
        if self.to in ("kohya", "full"):
            file_to_write(output, None)
        if output.suffix in PICKLES and not output.is_dir():
            raise ValueError(f"{output}: the output is a file that ends in .safetensors, or a folder for one")
        there = output / (ADAPTER_NAME if self.to in ("loca", "lora") else DIFFUSERS_WEIGHTS) if output.is_dir() else output
        if there.is_file() and not self.overwrite:
            raise FileExistsError(f"{there}: it is there; choose another name, or say --overwrite")


@dataclass(frozen=True)
class Convert:
    """Convert a LoRA or a related adapter (of peft, diffusers, kohya, LyCORIS, ...) or any adapter of this library to LoCA or
    LoRA; print what each layer loses."""

    source: Path
    """The adapter: a file, or the folder it is in."""
    output: Path
    """A file that ends in .safetensors, or a folder; for peft a folder."""
    component: str = ""
    """The component of the pipeline, for a LoRA whose names do not tell it: unet, transformer, text_encoder."""
    base: Path | None = None
    """The weights it is for, which DoRA depends on, and which --to full needs for tensors trained as a whole: a file, an index
    of shards, or the folder of either or of a pipeline."""
    form: OutputOptions = field(default_factory=OutputOptions)
    """What to write."""


@dataclass(frozen=True)
class Extract:
    """Convert a fully fine-tuned checkpoint minus its base to LoCA or LoRA; print what each layer loses."""

    base: Path
    """Safetensors: a file, an index of shards, or the folder of either."""
    tuned: Path
    """The fine-tuned weights, likewise."""
    output: Path
    """A file that ends in .safetensors, or a folder; for peft a folder."""
    component: str = ""
    """The component of the pipeline that the weights are of: unet, transformer, text_encoder."""
    others: Literal["refuse", "skip", "whole"] = "refuse"
    """What to do with other tensors that changed: refuse, leave them out and list them, or keep them whole."""
    form: OutputOptions = field(default_factory=OutputOptions)
    """What to write."""


def convert(command: Convert) -> str:
    """Run `loca-vision convert` and return its report.

    Raises:
        ValueError, OSError: as `read_source`, `to_loca`, `to_lora`, `to_full`.
    """
    form = command.form
    form.check(command.output)
    if command.base is not None and not command.base.exists():
        raise FileNotFoundError(f"{command.base}: there is no such file or folder")
    places, base_model = model_named(form.model)
    sizes = matrices_in(command.base) if command.base is not None and not is_pipeline(command.base) else None
    source = read_source(command.source, places, skip=form.skip, component=command.component, sizes=sizes)
    if command.base is None or form.to == "full":
        return write_form(command.output, form, source, places, base_model, command.base)
    with given_weights(source, command.base) as known:
        return write_form(command.output, form, known, places, base_model)


def extract(command: Extract) -> str:
    """Run `loca-vision extract` and return its report.

    Raises:
        ValueError, OSError: as `open_difference`, `to_loca`, `to_lora`, `to_full`.
    """
    form = command.form
    form.check(command.output)
    if not command.component and form.model is None:
        raise ValueError("say which weights they are: --component of a pipeline, or --model of timm or transformers")
    places, base_model = model_named(form.model)
    modules = {place.module for place in places} if places is not None else None

    def wanted(module: str) -> bool:
        return bool(projections_of_modules([module])) if modules is None else module in modules

    of, others = command.component, command.others
    with open_difference(command.base, command.tuned, wanted, component=of, others=others, modules=modules or ()) as source:
        return write_form(command.output, form, source, places, base_model, command.base)


def write_form(
    output: Path,
    form: OutputOptions,
    source: WeightDeltas,
    places: Sequence[ProjectionRows] | None,
    base_model: str | None,
    base: Path | None = None,
) -> str:
    """Write an update in the requested format; return lines about what was left out and what is lost.

    Raises:
        ValueError, OSError: as `to_loca`, `to_lora`, `to_full`.
    """
    if not source.shapes and form.to != "full":
        raise ValueError("there is no update of a matrix in it; what is added to biases and norms can be merged")
    losses: list[LayerFidelity]
    skip, dtype = form.skip, torch.float16 if form.half else None
    if form.to == "loca":
        kept: torch.dtype = getattr(torch, form.dtype)
        losses = to_loca(source, form.budget(), output, places=places, base_model=base_model, skip=skip, dtype=kept)
    elif form.to == "lora":
        losses = to_lora_adapter(source, output, rank=form.rank, places=places, base_model=base_model, skip=skip)
    elif form.to == "full":
        losses = to_full(source, output, base=base, dtype=dtype, base_model=base_model, skip=skip, xl=form.sdxl)
    else:
        losses = to_lora(
            source,
            output,
            layout=form.to,
            rank=form.rank,
            dtype=dtype,
            base_model=f"timm/{base_model}" if base_model else None,
            overwrite=form.overwrite,
            skip=skip,
            xl=form.sdxl,
        )
    lines = [*left_out_lines(source, losses), *warnings(source, losses, form.to, xl=form.sdxl)]
    lines += [table(losses, form.to), *uncounted_lines(source, losses), *advice(source, losses, form.to, places)]
    return "\n".join([*lines, f"{output}: written, {size_of(output)}"])
