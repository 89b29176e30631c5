"""`loca-vision convert` and `extract`: adapters and weights from one form into another, and what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from loca_vision.commands.named_model import model_named
from loca_vision.formats.adapter_file import FILE_NAME as ADAPTER_NAME
from loca_vision.formats.conversion.base_tensors import matrices_in
from loca_vision.formats.conversion.checkpoint_difference import open_difference
from loca_vision.formats.conversion.conversion_error import LayerFidelity, loss_table
from loca_vision.formats.conversion.dct_truncation import Budget, BudgetRule
from loca_vision.formats.conversion.given_weights import given_weights
from loca_vision.formats.conversion.to_adapter import to_loca, to_lora_adapter, without_place
from loca_vision.formats.conversion.to_lora_file import not_read_by_diffusers, to_lora
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, read_source
from loca_vision.formats.lora_reader import DIFFUSERS_WEIGHTS
from loca_vision.layers.projection_rows import ProjectionRows, projections_of_modules

KINDS: tuple[BudgetRule, ...] = ("count", "threshold", "ratio", "energy")


@dataclass(frozen=True)
class OutputOptions:
    """The form of the output, and how much of the updates to keep."""

    to: Literal["loca", "lora", "diffusers", "kohya", "peft"] = "loca"
    """LoCA or LoRA, as adapters of this library; or a LoRA file of others. ComfyUI reads kohya's."""
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
    """timm's name of the model, or a folder of transformers, for updates of an image classifier."""
    half: bool = False
    """LoRA: factors in float16."""
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
        there = output / (ADAPTER_NAME if self.to in ("loca", "lora") else DIFFUSERS_WEIGHTS) if output.is_dir() else output
        if there.is_file() and not self.overwrite:
            raise FileExistsError(f"{there}: it is there; choose another name, or say --overwrite")


@dataclass(frozen=True)
class Convert:
    """A LoRA or its kin (of peft, diffusers, kohya, LyCORIS, ...) or any adapter of this library into LoCA or LoRA; prints
    what each layer loses."""

    source: Path
    """The adapter: a file, or the folder it is in."""
    output: Path
    """A file that ends in .safetensors, or a folder; for peft a folder."""
    component: str = ""
    """Of the pipeline, for a LoRA whose names tell none: unet, transformer, text_encoder."""
    base: Path | None = None
    """The weights it is for, where the update depends on them (DoRA): a file, an index of shards, or the folder of either."""
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


def convert(command: Convert) -> str:
    """
    Raises:
        ValueError, OSError: as `read_source`, `to_loca`, `to_lora`.
    """
    form = command.form
    form.check(command.output)
    places, base_model = model_named(form.model)
    sizes = matrices_in(command.base) if command.base else None
    source = read_source(command.source, places, skip=form.skip, component=command.component, sizes=sizes)
    with given_weights(source, command.base) if command.base else nullcontext(source) as whole:
        return write_form(command.output, form, _without_differences(whole, skip=form.skip), places, base_model)


def _without_differences(source: WeightDeltas, *, skip: bool) -> WeightDeltas:
    """An update without what is added to biases and norms, for which adapters have no room.

    Raises:
        ValueError: there is such a thing, and no `skip`; or the update depends on the weights.
    """
    for module in source.needs_weight:
        raise ValueError(f"{module}: its update (DoRA) depends on the weight; name the weights (--base), or merge it into them")
    if not source.shapes:
        raise ValueError("there is no update of a matrix in it; what is added to biases and norms can be merged")
    for name in () if skip else source.differences:
        raise ValueError(f"{name}: what is added to it is no update of a matrix; merge it, or leave it out (--skip)")
    left = dict.fromkeys(source.differences, "what is added to it is no update of a matrix")
    return replace(source, differences={}, left_out={**source.left_out, **left})


def extract(command: Extract) -> str:
    """
    Raises:
        ValueError, OSError: as `open_difference`, `to_loca`, `to_lora`.
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
        return write_form(command.output, form, source, places, base_model)


def write_form(
    output: Path, form: OutputOptions, source: WeightDeltas, places: Sequence[ProjectionRows] | None, base_model: str | None
) -> str:
    dropped: list[LayerFidelity] = []
    if form.to == "loca":
        losses = to_loca(source, form.budget(), output, places=places, base_model=base_model, skip=form.skip)
    elif form.to == "lora":
        losses = to_lora_adapter(source, output, rank=form.rank, places=places, base_model=base_model, skip=form.skip)
    else:
        losses = to_lora(
            source,
            output,
            layout=form.to,
            rank=form.rank,
            dtype=torch.float16 if form.half else None,
            base_model=base_model,
            overwrite=form.overwrite,
            skip=form.skip,
        )
    if form.skip:
        source = replace(source, left_out={**source.left_out, **_whole_left_out(source, form)})
        dropped = without_place(source, places) if form.to in ("loca", "lora") else []
    table = loss_table([*losses, *dropped], "components" if form.to == "loca" else "rank")
    lines = [f"left out: {loss.layer}: no projection that LoCA adapts" for loss in dropped]
    return "\n".join(
        [*lines_left_out(source), *lines, *_not_read(source, form), table, *_uncounted(source), f"{output}: written"]
    )


def lines_left_out(source: WeightDeltas) -> list[str]:
    return [f"left out: {key}: {why}" for key, why in source.left_out.items()]


def _whole_left_out(source: WeightDeltas, form: OutputOptions) -> dict[str, str]:
    why = f"it was trained whole, for which {form.to} keys have no room"
    return dict.fromkeys(source.whole, why) if form.to in ("diffusers", "kohya") else {}


def _not_read(source: WeightDeltas, form: OutputOptions) -> list[str]:
    why = "it is in the file, but is not read by load_lora_weights of diffusers, which has no loader for a T5"
    return [f"warning: {component}: {why}" for component in not_read_by_diffusers(source)] if form.to == "diffusers" else []


def _uncounted(source: WeightDeltas) -> list[str]:
    """What the line for all layers does not count, because the size of its update is not known."""
    count = len(source.left_out)
    return (
        [f"the error of all does not count what else was left out: tensors that are no matrix of an update ({count})"]
        if count
        else []
    )
