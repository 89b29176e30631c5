"""`loca-vision merge`: merge an adapter or a LoRA into weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loca_vision.commands.convert_report import left_out_lines
from loca_vision.commands.named_model import model_named
from loca_vision.formats.conversion.base_tensors import matrices_in
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import read_source


@dataclass(frozen=True)
class Merge:
    """Merge an adapter or a LoRA into weights: weights in, weights out, sharded if necessary."""

    base: Path
    """Safetensors: a file, an index of shards, or the folder of either."""
    adapter: Path
    """The adapter or LoRA: a file, or the folder it is in."""
    output: Path
    """A file that ends in .safetensors, or a folder."""
    component: str = ""
    """The component of the pipeline that the weights are of: unet, transformer, text_encoder."""
    model: str | None = None
    """timm's name of the model, or a folder of transformers, for adapters of an image classifier."""
    strength: float = 1.0
    """Factor of the update."""
    shard_size: float = 5.0
    """Largest size of a shard in gigabytes."""
    skip: bool = False
    """Leave out the parts of a LoRA that are not understood, and list them."""
    overwrite: bool = False
    """Replace an existing output that this command wrote."""


def merged(command: Merge) -> str:
    """Run the command and return its report.

    Raises:
        ValueError, OSError: as `read_source`, `merge`.
    """
    places, _ = model_named(command.model)
    sizes = matrices_in(command.base)
    source = read_source(command.adapter, places, skip=command.skip, component=command.component, sizes=sizes)
    said: list[str] = []
    written = merge(
        command.base,
        source,
        command.output,
        component=command.component,
        strength=command.strength,
        shard_size=int(command.shard_size * 1e9),
        overwrite=command.overwrite,
        say=said.append,
    )
    return "\n".join([*left_out_lines(source, ()), *said, f"{written}: the merged weights"])
