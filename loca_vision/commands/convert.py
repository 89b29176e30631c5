"""`loca-vision convert`, `extract` and `merge`: adapters and weights from one form into another, and what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from loca_vision.commands.convert_report import advice, left_out_lines, size_of, table, uncounted_lines, warnings
from loca_vision.formats.adapter_file import FILE_NAME as ADAPTER_NAME
from loca_vision.formats.conversion.conversion_error import LayerFidelity
from loca_vision.formats.conversion.dct_truncation import Budget, BudgetRule
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.to_adapter import to_loca, to_lora_adapter
from loca_vision.formats.conversion.to_full_file import to_full
from loca_vision.formats.conversion.to_lora_file import to_lora
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, open_difference, read_source
from loca_vision.formats.lora_reader import DIFFUSERS_WEIGHTS
from loca_vision.formats.lora_tensors import file_to_write
from loca_vision.layers.projection_rows import ProjectionRows, projections_in, projections_of_modules

KINDS: tuple[BudgetRule, ...] = ("count", "threshold", "ratio", "energy")


@dataclass(frozen=True)
class OutputOptions:
    """The form of the output, and how much of the updates to keep."""

    to: Literal["loca", "lora", "diffusers", "kohya", "peft", "full"] = "loca"
    """LoCA or LoRA, as adapters of this library; a LoRA file of others, where kohya is for ComfyUI and A1111 (and is read by
    diffusers too) and diffusers is for diffusers alone; or full, the whole update without loss, for ComfyUI and A1111."""
    count: int | None = None
    """LoCA: this many components."""
    threshold: float | None = None
    """LoCA: the components of at least this magnitude."""
    ratio: float | None = None
    """LoCA: this share of all cells."""
    energy: float | None = None
    """LoCA: as few components as hold this share of the squared norm."""
    shared: bool = False
    """LoCA: one such budget over all layers, instead of one for each."""
    rank: int | None = None
    """LoRA: of every module; by default the factors stay as they are."""
    model: str | None = None
    """timm's name of the model, for updates of a timm model."""
    half: bool = False
    """LoRA and full: numbers in float16."""
    sdxl: bool = False
    """kohya and full: it is for Stable Diffusion XL, where a text encoder alone does not tell."""
    skip: bool = False
    """Skip tensors the target format cannot represent, and list them."""
    overwrite: bool = False
    """Replace an existing output."""

    def budget(self) -> Budget:
        """
        Raises:
            ValueError: not exactly one kind is given, or its amount is out of range.
        """
        given = [(kind, getattr(self, kind)) for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError("for LoCA, say how much is to be kept by one of --count, --threshold, --ratio and --energy")
        return Budget(*given[0], self.shared)

    def check(self, output: Path) -> None:
        """Raise where the options do not go together, or the output is there."""
        if self.to == "loca":
            self.budget()
            if self.rank is not None or self.half:
                raise ValueError("--rank and --half are for LoRA: say which with --to")
        elif self.shared or any(getattr(self, kind) is not None for kind in KINDS):
            raise ValueError(f"--to {self.to}: a LoRA has a --rank, no number of components")
        if self.to == "full" and self.rank is not None:
            raise ValueError("--to full: it is the whole update, which has no --rank")
        if self.half and self.to in ("lora", "peft"):
            raise ValueError(f"--to {self.to}: --half is for --to diffusers, kohya and full")
        if self.sdxl and self.to not in ("kohya", "full"):
            raise ValueError(f"--to {self.to}: --sdxl is for --to kohya and full")
        if self.to in ("kohya", "full"):
            file_to_write(output, None)
        there = output / (ADAPTER_NAME if self.to in ("loca", "lora") else DIFFUSERS_WEIGHTS) if output.is_dir() else output
        if there.is_file() and not self.overwrite:
            raise FileExistsError(f"{there}: it is there; choose another name, or say --overwrite")


@dataclass(frozen=True)
class Convert:
    """A LoRA (of peft, diffusers or kohya) or any adapter of this library into LoCA or LoRA; prints what each layer loses."""

    source: Path
    """The adapter: a file, or the folder it is in."""
    output: Path
    """A file that ends in .safetensors, or a folder; for peft a folder."""
    base: Path | None = None
    """full: the weights the adapter is for, or the folder of their pipeline; needed for tensors trained whole, and DoRA."""
    form: OutputOptions = field(default_factory=OutputOptions)
    """What is to be made of it."""


@dataclass(frozen=True)
class Extract:
    """A fully fine-tuned checkpoint minus its base into LoCA or LoRA; prints what each layer loses."""

    base: Path
    """Safetensors: a file, an index of shards, or the folder of either."""
    tuned: Path
    """The fine-tuned weights, likewise."""
    output: Path
    """A file that ends in .safetensors, or a folder; for peft a folder."""
    component: str = ""
    """Of the pipeline whose weights they are: unet, transformer, text_encoder."""
    others: Literal["refuse", "skip", "whole"] = "refuse"
    """Other tensors that changed: refuse, leave them out and list them, or keep them whole."""
    form: OutputOptions = field(default_factory=OutputOptions)
    """What is to be made of it."""


@dataclass(frozen=True)
class Merge:
    """Fold an adapter or a LoRA into weights: weights in, weights out, sharded as need be."""

    base: Path
    """Safetensors: a file, an index of shards, or the folder of either."""
    adapter: Path
    """The adapter or LoRA: a file, or the folder it is in."""
    output: Path
    """A file that ends in .safetensors, or a folder."""
    component: str = ""
    """Of the pipeline whose weights they are: unet, transformer, text_encoder."""
    model: str | None = None
    """timm's name of the model, for adapters of a timm model."""
    strength: float = 1.0
    """Times the update."""
    shard_size: float = 5.0
    """Gigabytes of a shard at most."""
    skip: bool = False
    """Leave out what of a LoRA is not understood, and list it."""
    overwrite: bool = False
    """Replace an output that is there and was written so."""


def convert(command: Convert) -> str:
    """
    Raises:
        ValueError, OSError: as `read_source`, `to_loca`, `to_lora`, `to_full`.
    """
    form = command.form
    form.check(command.output)
    if command.base is not None and form.to != "full":
        raise ValueError(f"--to {form.to}: --base is for --to full")
    places, base_model = _model(form.model)
    source = read_source(command.source, places, skip=form.skip)
    return _write(command.output, form, source, places, base_model, command.base)


def extract(command: Extract) -> str:
    """
    Raises:
        ValueError, OSError: as `open_difference`, `to_loca`, `to_lora`, `to_full`.
    """
    form = command.form
    form.check(command.output)
    if not command.component and form.model is None:
        raise ValueError("say which weights they are: --component of a pipeline, or --model of timm")
    places, base_model = _model(form.model)
    modules = {place.module for place in places} if places is not None else None

    def wanted(module: str) -> bool:
        return bool(projections_of_modules([module])) if modules is None else module in modules

    with open_difference(command.base, command.tuned, wanted, component=command.component, others=command.others) as source:
        return _write(command.output, form, source, places, base_model, command.base)


def merged(command: Merge) -> str:
    """
    Raises:
        ValueError, OSError: as `read_source`, `merge`.
    """
    places, _ = _model(command.model)
    source = read_source(command.adapter, places, skip=command.skip)
    components = sorted({place.module.partition(".")[0] for place in projections_of_modules(source.shapes).values()})
    component = command.component or (components[0] if len(components) == 1 else "")
    if len(components) > 1 and not component:
        raise ValueError(f"the adapter is for {', '.join(components)}: say which of them the base is with --component")
    written = merge(
        command.base,
        source,
        command.output,
        component=component,
        strength=command.strength,
        shard_size=int(command.shard_size * 1e9),
        overwrite=command.overwrite,
    )
    return "\n".join([*left_out_lines(source, ()), f"{written}: the merged weights"])


def _model(name: str | None) -> tuple[list[ProjectionRows] | None, str | None]:
    """The projections of a timm model, which is built without any weights, and its full name."""
    if name is None:
        return None, None
    import timm

    from loca_vision.formats.match_model import base_model_name
    from loca_vision.recipes.classification.models import check_model_name

    check_model_name(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    return projections_in(model), base_model_name(model)


def _write(
    output: Path,
    form: OutputOptions,
    source: WeightDeltas,
    places: Sequence[ProjectionRows] | None,
    base_model: str | None,
    base: Path | None,
) -> str:
    losses: list[LayerFidelity]
    skip, dtype = form.skip, torch.float16 if form.half else None
    if form.to == "loca":
        losses = to_loca(source, form.budget(), output, places=places, base_model=base_model, skip=skip)
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
