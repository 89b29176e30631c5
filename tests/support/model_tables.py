"""The tables of docs/guides/which_models.md, made of the zoo: `python tests/support/model_tables.py` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

from loca_vision.layers.targets import find_targets
from support import diffusers_zoo as zoo
from support import transformers_models as hf

PAGE = Path(__file__).parents[2] / "docs/guides/which_models.md"
_NAMED = ("q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out")
_TITLES = {
    "image_transformers": "Transformers for images",
    "video_transformers": "Transformers for videos",
    "audio_transformers": "Transformers for sound and proteins",
    "unets": "UNets",
    "controlnets": "ControlNets",
    "autoencoders": "Autoencoders",
    "beside_denoisers": "Models that prepare conditions",
}


def tables() -> dict[str, str]:
    """Each table by its name in the page."""
    rooms: dict[str, list[str]] = {name: [] for name in _TITLES}
    for room in zoo.ROOMS:
        rooms[room.__name__.rpartition(".")[2].removeprefix("more_")] += room.CASES
    lines = ["| model | `targets` |", "|---|---|"]
    for name, members in rooms.items():
        lines += [f"| **{_TITLES[name]}** | |", *_rows((member, zoo.model(member)) for member in sorted(members))]
    heads = ["| model | `targets` |", "|---|---|", *_rows((type(made := hf.tiny(name)).__name__, made) for name in hf.FAMILIES)]
    return {"diffusers": "\n".join(lines), "transformers": "\n".join(heads)}


def _rows(models: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    for name, model in models:
        yield f"| {name} | {_parts(model)} |"


def _parts(model: nn.Module) -> str:
    targets = find_targets(model)
    found = {target.part for target in targets if target.linear}
    named = " ".join(part for part in _NAMED if part in found)
    convolutions = any(target.part in ("q", "k", "v") and not target.linear for target in targets)
    others = "linear" if "linear" in found else ""
    return ", ".join(filter(None, (named, others, "attention of convolutions is refused" if convolutions else ""))) or "none"


def in_page(text: str) -> dict[str, str]:
    """The tables that stand in the page, between their marks."""
    return dict(re.findall(r"<!-- table: (\w+) -->\n\n(.*?)\n\n<!-- end -->", text, re.DOTALL))


def _write() -> None:
    text = PAGE.read_text()
    for name, table in tables().items():
        pattern = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    PAGE.write_text(text)


if __name__ == "__main__":
    _write()
