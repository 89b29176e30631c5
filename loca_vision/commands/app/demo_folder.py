"""What the demonstration stores for the page besides its adapter: how its model is built, the probe's head, some examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from loca_vision.commands.app.uploads import fitted
from loca_vision.data.images import Images, as_png, open_image
from loca_vision.messages import one_line
from loca_vision.model.heads import classifier
from loca_vision.recipes.classification.models import ModelSpec
from loca_vision.recipes.classification.trained_weights import TRAINED, save_trained
from loca_vision.recipes.reports.metrics import METRICS, read_metrics
from loca_vision.storage.atomic_file import write_atomically

PROBE, _EXAMPLES = "linear-probe", "examples"
_MOST, _LARGEST = 20, 512  # number of examples, and pixels of their longer side


@dataclass(frozen=True)
class DemoFolder:
    """The contents of a folder that the demonstration wrote.

    Args:
        spec: the specification of the model, with the number of classes.
        probe: the file with the head of the linear probe.
        examples: test images with the names of their classes.
    """

    spec: ModelSpec
    probe: Path
    examples: tuple[tuple[Image.Image, str], ...]


def write_for_the_page(
    folder: Path, probe: nn.Module, spec: ModelSpec, test: Images, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Write the head of `probe` and the first test image of each class, at most 20.

    Returns:
        What `metrics.json` must contain for `read_demo_folder` and `loca-vision predict`: classes, model, examples.

    Raises:
        OSError: a file cannot be written; an existing file is unchanged.
    """
    head = {id(parameter) for parameter in classifier(probe)}
    save_trained(probe, folder / PROBE, {name: p for name, p in probe.named_parameters() if id(p) in head}, adapter=False)
    labels = [int(label) for label in test.labels]
    examples = []
    for label in sorted(set(labels))[:_MOST]:
        name = f"{_EXAMPLES}/{label:03}.png"
        write_atomically(folder / name, as_png(fitted(test[labels.index(label)][0], _LARGEST)))
        examples.append({"file": name, "class": classes[label]})
    return {"classes": list(classes), "model": asdict(spec), "examples": examples}


def read_demo_folder(folder: Path) -> DemoFolder | None:
    """Read a folder that the demo wrote; return None for any other folder.

    Raises:
        ValueError: its metrics are not as `write_for_the_page` writes them, or an example is not an image.
        FileNotFoundError: a file that they name is missing.
    """
    if not (folder / METRICS).is_file():
        return None
    metrics = read_metrics(folder)
    if "moved_components" not in metrics:  # only the demonstration counts these
        return None
    if "model" not in metrics:
        raise ValueError(f"{folder / METRICS}: it does not say which model it is for; run loca-vision demo again")
    try:
        spec = ModelSpec(**metrics["model"])
        named = [(str(example["file"]), str(example["class"])) for example in metrics["examples"]]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / METRICS}: its model or its examples are not what the demo writes ({one_line(error)})"
        ) from None
    return DemoFolder(spec, folder / PROBE / TRAINED, tuple((_example(folder, file), name) for file, name in named[:_MOST]))


def _example(folder: Path, file: str) -> Image.Image:
    """Open an image of this folder and no other: the name comes from an untrusted file."""
    if Path(file).name != file.removeprefix(f"{_EXAMPLES}/"):
        raise ValueError(f"{folder / METRICS}: an example is {file!r}; expected {_EXAMPLES}/NAME.png")
    return fitted(open_image(folder / file), _LARGEST)
