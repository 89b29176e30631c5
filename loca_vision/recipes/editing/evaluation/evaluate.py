"""Evaluate adapters that edit photographs: edits by the base and by each adapter, their measures, and a sheet of pictures."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loca_vision.data.images import as_png
from loca_vision.data.pairs import read_pairs
from loca_vision.messages import aligned
from loca_vision.pipeline.components import models_in
from loca_vision.recipes.editing.evaluation.editors import (
    Editor,
    columns_of,
    files_of,
    load_all,
    make_edits,
    named,
    pictures_of,
)
from loca_vision.recipes.editing.evaluation.measures import Measures, Tools, measures_of, summary, tools
from loca_vision.recipes.editing.evaluation.photos import EditCase, from_folder, from_pairs
from loca_vision.recipes.editing.evaluation.settings import EditEvaluation, checked, kept
from loca_vision.recipes.editing.pipeline import pipeline_of
from loca_vision.recipes.reports.contact_sheet import contact_sheet
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim

SETTINGS, RESULT, SHEET, EDITS = "settings.json", "evaluation.json", "contact_sheet.png", "edits"
MOST_ROWS, MOST_SIDE = 12, 384  # rows of the contact sheet, and pixels of its cells

Made = Mapping[Editor, Mapping[str, Path]]


def evaluate(wanted: EditEvaluation, given: Collection[str] = ()) -> dict[str, Any]:
    """Make the missing edits, measure, write all results and print a table; return the contents of evaluation.json.

    Args:
        given: the fields that the user has set.

    Raises:
        ValueError: a setting is out of range, settings contradict each other, something cannot be read or edited, or the folder
            contains edits with other settings.
        FileNotFoundError, OSError: something is missing, or cannot be read or written.
        ModuleNotFoundError: a library is missing.
    """
    device = checked(wanted, given)
    subjects = _subjects(wanted)
    sources = named((wanted.adapter, *wanted.other))
    files = files_of(sources)
    using = _tools(wanted, device)
    pipe = pipeline(wanted, device)
    loaded = load_all(pipe, sources)
    _check_entrance(pipe, wanted)
    first, *others = sources
    columns = columns_of(first, others, wanted.scales)
    claim(wanted.output_dir, SETTINGS, kept(wanted, files, device), "edits")
    made = make_edits(pipe, subjects, columns, wanted.sampling, wanted.output_dir / EDITS)
    measured = _measured(subjects, made, using)
    adapters = {name: files[name] | facts for name, facts in loaded.items()}
    return _written(wanted, subjects, made, measured, {"adapters": adapters, "unavailable": using.unavailable})


def pipeline(wanted: EditEvaluation, device: torch.device) -> Any:
    """Return the base, in its dtype on its device.

    Raises:
        OSError: it is not available, or is not such a pipeline in safetensors files.
    """
    source = wanted.pretrained_model_name_or_path
    pipe = pipeline_of(source, revision=wanted.revision, variant=wanted.variant)
    for model in models_in(pipe).values():  # from_pretrained's argument for the dtype has another name in other versions
        torch.nn.Module.to(model, wanted.torch_dtype)
    return pipe.to(device)


def _subjects(wanted: EditEvaluation) -> list[EditCase]:
    size: dict[str, Any] = {"resolution": wanted.resolution, "seed": wanted.seed}
    if wanted.photographs is not None:
        folder = wanted.photographs.expanduser()
        return from_folder(folder, str(wanted.prompt), most=wanted.max_photographs, **size)
    pairs = read_pairs(
        str(wanted.pairs), columns=wanted.columns, split=wanted.split, max_samples=wanted.max_photographs, seed=wanted.seed
    )
    return from_pairs(pairs, wanted.prompt, **size)


def _tools(wanted: EditEvaluation, device: torch.device) -> Tools:
    using = tools(lpips=wanted.lpips, clip_model=wanted.clip_model, resolution=wanted.resolution, device=device)
    for measure, reason in using.unavailable.items():
        print(f"{measure} is not measured: {reason}")
    return using


def _check_entrance(pipe: Any, wanted: EditEvaluation) -> None:
    """Check the UNet's channels after loading the adapters, which may widen it."""
    takes, needed = pipe.unet.config.in_channels, 2 * pipe.vae.config.latent_channels
    if takes != needed:
        raise ValueError(
            f"{wanted.pretrained_model_name_or_path}: its UNet takes {takes} channels, and to edit photographs it takes "
            f"{needed}; no adapter here brings such a conv_in along"
        )


def _measured(subjects: Sequence[EditCase], made: Made, using: Tools) -> list[dict[str, Measures]]:
    shown = tqdm(subjects, desc="measures", unit="photograph", dynamic_ncols=True, disable=None)
    return [measures_of(dict(pictures_of(one, made)), one.prompt, using) for one in shown]


def _written(
    wanted: EditEvaluation,
    subjects: Sequence[EditCase],
    made: Made,
    measured: Sequence[Mapping[str, Measures]],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write the picture and, last, the numbers, which mark the evaluation as finished."""
    means = summary(measured)
    entries = [_entry(wanted.output_dir, *each) for each in zip(subjects, measured, [made] * len(subjects), strict=True)]
    settings = {name: value for name, value in as_json_dict(wanted).items() if name != "config"}
    result = {"settings": settings, **more, "means": means, "photographs": entries, "environment": environment()}
    write_atomically(wanted.output_dir / SHEET, as_png(_sheet(wanted, subjects, made, measured)))
    write_atomically(wanted.output_dir / RESULT, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    print(table(means))
    print(f"{wanted.output_dir}: {len(subjects)} photographs, {len(made)} edits of each")
    return result


def _entry(folder: Path, one: EditCase, measures: Mapping[str, Measures], made: Made) -> dict[str, Any]:
    edits = {column.title: files[one.name].relative_to(folder).as_posix() for column, files in made.items()}
    about = {"name": one.name, "label": one.label, "prompt": one.prompt, "seed": one.seed}
    return about | {"edits": edits, "measures": measures}


def _sheet(wanted: EditEvaluation, subjects: Sequence[EditCase], made: Made, measured: Sequence[Mapping[str, Measures]]) -> Any:
    """Return the sheet of the first photographs, with each edit's similarity to its target if there is one."""
    pictures = [dict(pictures_of(one, made)) for one in subjects[:MOST_ROWS]]
    captions = [[_caption(row[name]) for name in row] for row in measured[:MOST_ROWS]]
    return contact_sheet(
        [list(row.values()) for row in pictures],
        columns=list(pictures[0]),
        labels=[one.label for one in subjects[:MOST_ROWS]],
        captions=captions,
        side=MOST_SIDE if wanted.resolution > MOST_SIDE else None,
    )


def _caption(measures: Measures) -> str:
    values = (measures.get("psnr_to_target"), measures.get("ssim_to_target"))
    return "" if None in values else "PSNR {:.1f}, SSIM {:.2f}".format(*values)


def table(means: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return means by editor and measure, as lines for a terminal; what is not measured is left out."""
    every = max(means.values(), key=len)  # photograph and target are not compared with themselves
    names = [name for name in every if any(measures.get(name, {}).get("mean") is not None for measures in means.values())]
    rows = [("", *(name.replace("_", " ") for name in names))]
    for title, measures in means.items():
        values = (measures.get(name, {}).get("mean") for name in names)
        rows.append((title, *("-" if value is None else f"{value:.4g}" for value in values)))
    return aligned(rows, str.ljust)
