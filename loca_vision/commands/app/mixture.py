"""The mix on a page as one file: an adapter of this library, or a LoRA for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from loca_vision.formats.conversion.combine_adapters import combine_spectra, combined, read_spectra
from loca_vision.formats.conversion.conversion_error import total_loss
from loca_vision.formats.conversion.to_adapter import to_lora_adapter
from loca_vision.formats.conversion.to_lora_file import to_lora
from loca_vision.formats.conversion.weight_deltas import read_source

FORMS: dict[str, Literal["loca", "diffusers", "kohya"]] = {
    "Adapter of loca-vision": "loca",
    "LoRA for diffusers": "diffusers",
    "LoRA for ComfyUI and A1111": "kohya",
}


def write_mix(
    sources: Mapping[str, Path], strengths: Mapping[str, float], form: str, rank: int, folder: Path
) -> tuple[Path, str]:
    """Write the sum of strength times each adapter.

    Args:
        sources: the files or folders of the adapters, by name.
        form: one of `FORMS`.
        rank: the rank of a LoRA, from 1 up. An adapter of this library is a LoRA if some update is not a sum of cosines.
        folder: the folder for the file.

    Returns:
        The file, and a sentence about what is lost.

    Raises:
        ValueError, OSError: as `combine_spectra`, `read_source` and `to_lora`; or no adapter is active.
    """
    there = {sources[name]: strength for name, strength in strengths.items() if strength}
    if not there:
        raise ValueError("Every strength is 0: there is nothing to write.")
    spectra = {place: read_spectra(place) for place in there} if FORMS[form] == "loca" else {}
    file = folder / "mix.safetensors"
    if spectra and all(spectra.values()):
        combine_spectra([(made, there[place]) for place, made in spectra.items() if made is not None], file)
        return file, "One LoCA adapter, whose update is that of the mix without loss."
    mixed = combined([(read_source(place), strength) for place, strength in there.items()])
    layout = FORMS[form]
    losses = to_lora_adapter(mixed, file, rank=rank) if layout == "loca" else to_lora(mixed, file, layout=layout, rank=rank)
    return file, f"A LoRA of rank {rank}: {100 * total_loss(losses):.2g} % of the update is lost."
