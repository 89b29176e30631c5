"""Random adapters for a model with random weights, and the answers that each gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from load_clients import Outcome
from loca_vision import LoCAConfig, adapters, inject, load_adapter, remove, save_adapter
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.recipes.classification.task import view_of
from serving_settings import Settings

_IMAGES = 4
TOLERANCE = 1e-5  # of a probability


def write_adapters(folder: Path, settings: Settings, count: int, n_components: int) -> list[str]:
    """Write adapters with heads of 3 to 7 classes and return their names."""
    names = [f"customer-{index}" for index in range(count)]
    for index, name in enumerate(names):
        model: Any = _model(settings, 3 + index % 5)
        inject(model, LoCAConfig(n_components=n_components))
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for update in adapters(model).values():
                update.coefficients.normal_(0, 1, generator=generator)
            model.get_classifier().weight.normal_(0, 0.1, generator=generator)
        save_adapter(model, folder / f"{name}.safetensors")
    return names


class Oracle:
    """The answers of every adapter to some images, from a model with only that adapter.

    Raises:
        ValueError: two adapters give the same answers, so that mixing them up would go unnoticed.
    """

    def __init__(self, settings: Settings, names: Sequence[str]) -> None:
        self.names = names
        assert settings.model is not None
        photos = [_photo(index) for index in range(_IMAGES)]
        self.bodies = [_png(photo) for photo in photos]
        see = view_of(settings.model, "none", settings.image_size).plain
        pixels = torch.stack([see(photo) for photo in photos])
        model = _model(settings, 2)
        self.shares = {name: _alone(model, settings.adapters / f"{name}.safetensors", pixels) for name in names}
        _check_apart(list(self.shares.values()))

    def agrees(self, outcome: Outcome) -> bool:
        """Return whether an answer is that of the right adapter to the right image."""
        expected = self.shares[outcome.name][outcome.image]
        found = {one["class"]: one["probability"] for one in outcome.answer["classes"]}
        if outcome.answer["adapter"] != outcome.name or found.keys() != {str(index) for index in range(len(expected))}:
            return False
        return all(abs(found[str(index)] - share) <= TOLERANCE for index, share in enumerate(expected.tolist()))


def _model(settings: Settings, classes: int) -> Any:
    assert settings.model is not None
    return build_model(ModelSpec(settings.model, classes, settings.image_size, "none"))


@torch.no_grad()
def _alone(model: Any, file: Path, pixels: torch.Tensor) -> torch.Tensor:
    load_adapter(model, file, trainable=False)
    shares: torch.Tensor = model(pixels).softmax(1)
    remove(model)
    return shares


def _check_apart(answers: Sequence[torch.Tensor]) -> None:
    for index, one in enumerate(answers):
        for other in answers[:index]:
            if one.shape == other.shape and (one - other).abs().amax(1).min() < 10 * TOLERANCE:
                raise ValueError("two adapters answer alike: make them stronger")


def _photo(seed: int) -> Image.Image:
    """Return an image of coloured blocks, so that images still differ after scaling."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(32, 0).repeat(32, 1))


def _png(photo: Image.Image) -> bytes:
    data = BytesIO()
    photo.save(data, "PNG")
    return data.getvalue()
