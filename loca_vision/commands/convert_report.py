"""The report of `loca-vision convert` and `extract`: what was left out, what each layer loses, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loca_vision.formats.conversion.conversion_error import (
    LITTLE,
    MUCH,
    LayerFidelity,
    loss_table,
    rank_losing,
    total_loss,
)
from loca_vision.formats.conversion.to_adapter import components_for
from loca_vision.formats.conversion.to_lora_file import not_read_by_diffusers
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.keys import canonical
from loca_vision.formats.lora_files.stable_diffusion import family_of, is_told
from loca_vision.layers.projection_rows import ProjectionRows

_UNITS = {"loca": "components", "full": "numbers"}


def table(losses: Sequence[LayerFidelity], to: str) -> str:
    """Return a line for each layer, and one for everything in the source."""
    return loss_table(losses, _UNITS.get(to, "rank"))


def left_out_lines(source: WeightDeltas, losses: Sequence[LayerFidelity]) -> list[str]:
    """Return a line for each thing that the reader, the conversion or the writer left out."""
    gone = [*source.left_out.items(), *((loss.layer, loss.why) for loss in losses if loss.why)]
    return [f"left out: {name}: {why}" for name, why in gone]


def uncounted_lines(source: WeightDeltas, losses: Sequence[LayerFidelity]) -> list[str]:
    """Return lines about what the total does not count because the size of its update is unknown."""
    lost = len(source.left_out) + sum(bool(loss.why) and not loss.counts for loss in losses)
    kept = sum(not loss.why and not loss.counts for loss in losses)
    said = {
        f"what else was left out, whose size is not known ({lost})": lost,
        f"layers of DoRA, which are kept as they are and whose size only the weights tell ({kept})": kept,
    }
    return [f"the error of all does not count {what}" for what, count in said.items() if count]


def advice(
    source: WeightDeltas, losses: Sequence[LayerFidelity], to: str, places: Sequence[ProjectionRows] | None
) -> list[str]:
    """Return a warning if much is lost, with the rank or the number of components that would lose little."""
    total = total_loss(losses)
    if total <= MUCH:
        return []
    said = f"warning: {100 * total:.0f} % of the update is lost"
    if total_loss(loss for loss in losses if not loss.why) <= MUCH:
        return [f"{said}, by what was left out"]
    few = f"{100 * LITTLE:.0f} %"
    if to == "loca":
        count = components_for(LITTLE, source, places)
        return [f"{said}: --energy {1 - LITTLE**2:g} would lose {few} of each layer, with {count} components in all"]
    rank = rank_losing(LITTLE, losses)
    instead = (
        "" if to in ("lora", "peft") else "; --to full loses nothing" if to == "kohya" else "; so does no LoRA of low rank"
    )
    return [f"{said}: --rank {rank} would lose {few} of all{instead}"]


def warnings(source: WeightDeltas, losses: Sequence[LayerFidelity], to: str, *, xl: bool) -> list[str]:
    """Return warnings about what other programs read differently or not at all."""
    gone = {loss.layer for loss in losses if loss.why}
    shapes = {canonical(module): shape for module, shape in source.shapes.items() if module not in gone}
    found = []
    if to == "diffusers":
        why = "it is in the file, but is not read by load_lora_weights of diffusers"
        found += [f"warning: {part}: {why}, {more}" for part, more in not_read_by_diffusers(shapes).items()]
    if to in ("kohya", "full") and not is_told(shapes, family_of(shapes, source.base_model, xl=xl)):
        found.append(
            "warning: text_encoder: it is written as that of Stable Diffusion 1 or 2, for nothing tells that it is XL's, which "
            "has other names in A1111 and sd-scripts: for XL, say --sdxl"
        )
    if to == "kohya" and source.decomposed:
        found.append(
            "warning: dora_scale is one number for each row, as LyCORIS reads it; diffusers passes over it, ComfyUI and A1111 "
            "divide by other norms: for diffusers say --to diffusers, for the others --to full with --base"
        )
    whole = {*source.whole, *source.differences} - gone
    passed = sorted(name for name in (*shapes, *whole) if name.startswith(("unet.add_embedding.", "unet.conv_norm_out.")))
    if to in ("kohya", "full") and passed:
        found.append(f"warning: A1111 has no name for {passed[0]}, and passes over it; ComfyUI has one")
    weights = {f"{module}.weight" for module in source.shapes} | whole
    alone = sorted(name for name in whole if name.endswith(".bias") and f"{name[:-4]}weight" not in weights)
    if to == "full" and alone:
        found.append(f"warning: A1111 reads no file with biases whose weights do not change, as {alone[0]}; ComfyUI does")
    return found


def size_of(output: Path) -> str:
    """Return the size of the output in megabytes of 1,000,000 bytes."""
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.4g} MB"
