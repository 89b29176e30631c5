"""Make InstructPix2Pix pairs from a folder of photographs: (photograph, instruction, cartoon), with a fixed OpenCV filter.

    python examples/instruct_pix2pix/build_pairs.py photographs pairs --size 256 --crops 4

The result is what the datasets library calls an imagefolder: load_dataset("pairs") has the columns original_image, edit_prompt
and cartoonized_image, in the splits train, validation and test. When started again, the script resumes where it was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from cartoon import VERSION, cartoon, opencv
from loca_vision.checks import check_count, check_share
from loca_vision.data.images import as_png
from loca_vision.data.photographs import Photograph, photographs_in
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim
from photo_pairs import INSTRUCTIONS, SPLITS, crops_of, instruction_for, split_of

PROG = "build_pairs.py"
SETTINGS, METADATA, CARD = "build_pairs.json", "metadata.jsonl", "README.md"


@dataclass(frozen=True)
class Pairs:
    """Make pairs of a photograph and a cartoon, with an instruction, from a folder of photographs."""

    photographs: Annotated[Path, tyro.conf.Positional]
    """Folder of photographs, searched recursively for images in every format that PIL reads."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set. Pairs whose photograph is gone stay in the folder, but are removed from the tables."""
    size: int = 256
    """Pixels per side. Smaller photographs are left out."""
    crops: int = 4
    """Pairs per photograph: the largest central crop, and others drawn with the seed."""
    validation_share: float = 0.1
    """Share of the photographs for validation, chosen by file hash: adding photographs moves none to another part."""
    test_share: float = 0.1
    """Share of the photographs for testing, chosen in the same way."""
    seed: int = 0
    """Seed of the parts, the crops and the instructions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data set according to the command line and return the exit status."""
    return run_command(PROG, Pairs, build, arguments, extra="pairs")


def build(wanted: Pairs) -> dict[str, list[dict[str, str]]]:
    """Make the missing parts of the data set, rewrite its tables and card, and return the rows of every split.

    Raises:
        ValueError: a setting is out of range or differs from the one the folder was started with, or a file is not an image.
        FileNotFoundError: there are no photographs.
        OSError: a file cannot be written.
    """
    _check(wanted)
    opencv()
    photographs = photographs_in(wanted.photographs)
    _claim(wanted)
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for photograph in tqdm(photographs, desc="photographs", dynamic_ncols=True, disable=None):
        split = split_of(photograph, wanted.seed, wanted.validation_share, wanted.test_share)
        rows[split] += _pairs_of(photograph, wanted, wanted.output / split)
    if not any(rows.values()):
        raise ValueError(f"size={wanted.size}: of {len(photographs)} photographs none is that large")
    for split, found in rows.items():
        if found:
            write_atomically(wanted.output / split / METADATA, "".join(json.dumps(row) + "\n" for row in found).encode())
    write_atomically(wanted.output / CARD, _card(wanted, rows).encode())
    counts = ", ".join(f"{len(found)} {split}" for split, found in rows.items())
    small = len(photographs) - sum(map(len, rows.values())) // wanted.crops
    print(
        f"{wanted.output}: {counts}"
        + (f"; {small} of the photographs smaller than {wanted.size} pixels, left out" if small else "")
    )
    return rows


def _check(wanted: Pairs) -> None:
    for name, least in {"size": 16, "crops": 1, "seed": 0}.items():
        check_count(name, getattr(wanted, name), least)
    for name in ("validation_share", "test_share"):
        check_share(name, getattr(wanted, name), open_end=True)
    if wanted.validation_share + wanted.test_share >= 1:
        raise ValueError(
            f"test_share={wanted.test_share}: with validation_share={wanted.validation_share} none is left to train"
        )
    if (
        wanted.output.resolve() == wanted.photographs.resolve()
        or wanted.photographs.resolve() in wanted.output.resolve().parents
    ):
        raise ValueError(f"output={str(wanted.output)!r}: it lies among the photographs, and would be taken for some of them")


def _claim(wanted: Pairs) -> None:
    """Claim the folder for this data set, so that pairs made in another way are not mixed with these."""
    about = {name: value for name, value in asdict(wanted).items() if name not in ("photographs", "output")}
    about |= {"filter": VERSION, "opencv": opencv().__version__, "instructions": len(INSTRUCTIONS)}
    claim(wanted.output, SETTINGS, about, "pairs")


def _pairs_of(photograph: Photograph, wanted: Pairs, folder: Path) -> list[dict[str, str]]:
    """Make the missing pairs of one photograph and return its rows; if all files exist, they are complete and are kept."""
    names = [f"{photograph.name}-{crop:02d}" for crop in range(wanted.crops)]
    files = [(f"{name}-original.png", f"{name}-cartoon.png") for name in names]
    if not all((folder / file).exists() for pair in files for file in pair):
        made = list(crops_of(photograph, wanted.seed, wanted.size, wanted.crops))
        if not made:
            return []
        for pair, crop in zip(files, made, strict=True):
            for file, image in zip(pair, (crop, cartoon(crop)), strict=True):
                write_atomically(folder / file, as_png(image))
    prompts = [instruction_for(photograph, wanted.seed, crop) for crop in range(wanted.crops)]
    return [_row(*pair, prompt) for pair, prompt in zip(files, prompts, strict=True)]


def _row(original: str, edited: str, prompt: str) -> dict[str, str]:
    """Return a row as imagefolder expects it: it turns `X_file_name` into an image column X."""
    return {"original_image_file_name": original, "edit_prompt": prompt, "cartoonized_image_file_name": edited}


def _card(wanted: Pairs, rows: dict[str, list[Any]]) -> str:
    numbers = [f"| {split} | {len(found) // wanted.crops} | {len(found)} |" for split, found in rows.items()]
    said = [
        "---",
        "license: other",
        "license_name: as-the-photographs",
        "task_categories:",
        "- image-to-image",
        "tags:",
        "- instruct-pix2pix",
        "---",
        "",
        "# Photographs, instructions and cartoons",
        "",
        f"Pairs of {wanted.size} x {wanted.size} pixels: `original_image`, `edit_prompt`, `cartoonized_image`.",
        "",
        f"The cartoons are targets made by a fixed OpenCV filter (version {VERSION}, OpenCV {opencv().__version__}):",
        "flat paints of fixed lightness and hue, ink between those that differ much. No artist and no network drew them.",
        f"The {len(INSTRUCTIONS)} instructions were written for this purpose.",
        f"Parts were split by photograph (seed {wanted.seed}): crops of one are never in two of them.",
        "",
        "| part | photographs | pairs |",
        "|---|---|---|",
        *numbers,
        "",
        "The licences are those of the photographs, of the cartoons too, which are works derived from them.",
    ]
    return "\n".join(said) + "\n"


if __name__ == "__main__":
    sys.exit(main())
