"""`loca-vision combine`: combine several adapters or LoRA files, each times its strength, into one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loca_vision.commands.convert import KINDS, OutputOptions, write_form
from loca_vision.commands.named_model import model_named
from loca_vision.formats.conversion.combine_adapters import Spectra, combine_spectra, combined, read_spectra
from loca_vision.formats.conversion.conversion_error import loss_table
from loca_vision.formats.conversion.weight_deltas import file_of, read_source
from loca_vision.storage.safetensors_file import PICKLES


@dataclass(frozen=True)
class Combine:
    """Combine several adapters or LoRA files, each times its strength, into one; without loss for LoCA adapters."""

    paths: tuple[str, ...]
    """The adapters: files or the folders they are in, each with its strength after a colon (cartoon-loca:0.8), or 1. The last
    path is the output: a file that ends in .safetensors, or a folder."""
    component: str = ""
    """The component of the pipeline, for a LoRA whose names do not tell it: unet, transformer, text_encoder."""
    form: OutputOptions = field(default_factory=OutputOptions)
    """What to write."""


def combine(command: Combine) -> str:
    """Run the command and return its report.

    Raises:
        ValueError, OSError: as `read_source`, `combine_spectra`, `to_loca`, `to_lora`.
    """
    form, given, output = command.form, [_with_strength(text) for text in command.paths[:-1]], Path(*command.paths[-1:])
    if len(given) < 2:
        raise ValueError(f"expected two adapters or more and the output, got {len(command.paths)} paths")
    if form.to == "loca" and form.rank is None and all(getattr(form, kind) is None for kind in KINDS):
        return _without_loss(given, output, getattr(torch, form.dtype), overwrite=form.overwrite)
    form.check(output)
    places, base_model = model_named(form.model)
    sources = [(read_source(path, places, skip=form.skip, component=command.component), strength) for path, strength in given]
    lines = _warning([source.base_model for source, _ in sources])
    return "\n".join([*lines, write_form(output, form, combined(sources), places, base_model)])


def _without_loss(given: list[tuple[Path, float]], output: Path, dtype: torch.dtype, *, overwrite: bool) -> str:
    if output.suffix in PICKLES and not output.is_dir():
        raise ValueError(f"{output}: the output is a file that ends in .safetensors, or a folder for one")
    written = file_of(output, new=True)
    if written.exists() and not overwrite:
        raise FileExistsError(f"{written}: it is there; choose another name, or say --overwrite")
    sources: list[tuple[Spectra, float]] = []
    for path, strength in given:
        spectra = read_spectra(path)
        if spectra is None:
            raise ValueError(
                f"{path}: its updates are not cosines, so that the sum is only close to LoCA: say how much to keep by one "
                "of --count, --threshold, --ratio and --energy, or --to lora"
            )
        sources.append((spectra, strength))
    losses = combine_spectra(sources, output, dtype=dtype)
    lines = _warning([source.about.base_model for source, _ in sources])
    return "\n".join([*lines, loss_table(losses, "components"), f"{output}: written"])


def _warning(base_models: list[str]) -> list[str]:
    known = dict.fromkeys(name for name in base_models if name != "unknown")
    return [f"warning: the adapters say that they are for different models: {', '.join(known)}"] if len(known) > 1 else []


def _with_strength(text: str) -> tuple[Path, float]:
    """Return the path and the number after the last colon, or 1 if there is none."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise ValueError(f"{text}: its strength is {number}, expected a finite number")
    return Path(path), strength
