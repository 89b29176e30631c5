"""The trained classifier behind the page: the base model and the adapter on one image, at the strengths of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from loca_vision.commands.app.blocks import block_groups, strength_of_each
from loca_vision.commands.app.demo_folder import DemoFolder, read_demo_folder
from loca_vision.commands.app.strengths import Acting, Strengths, acting_in
from loca_vision.formats.match_model import base_model_name
from loca_vision.model.adapters import active_adapters, adapters, disable_adapter
from loca_vision.model.state import state_of
from loca_vision.recipes.classification.predict import Predict, model_of
from loca_vision.recipes.classification.run_folder import SETTINGS, run_folder
from loca_vision.recipes.classification.task import View
from loca_vision.recipes.classification.trained_weights import load_probe
from loca_vision.recipes.settings.plugins import import_modules


@dataclass(frozen=True)
class Classifier:
    """A trained classifier with one adapter.

    Args:
        source: the adapter's file, or its folder.
        view: how the model sees images.
        classes: the names of the classes, in the order of the head.
        groups: the projections by group of blocks; {} if the model has too few blocks for groups.
        has_probe: whether the base has the head of a linear probe; otherwise it uses the adapter's.
        examples: images with the names of their classes.
    """

    source: Path
    model: nn.Module
    view: View
    classes: Sequence[str]
    groups: Mapping[str, tuple[str, ...]]
    has_probe: bool
    examples: tuple[tuple[Image.Image, str], ...]
    computing: AbstractContextManager[Any]
    acting: Acting
    adapter: str

    @property
    def base_title(self) -> str:
        """The title of the first column."""
        return "Base with a linear probe" if self.has_probe else "Base with the adapter's head"

    @property
    def summary(self) -> str:
        """The method, the model and the count of trained numbers, on one line."""
        return summary_of(self.model, self.adapter)

    def compare(self, image: Image.Image, strength: float = 1.0, by_group: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
        """Return the probabilities of the classes by the base and by the adapter, each (classes,) float32 on the CPU.

        Args:
            image: RGB, of any size.
            strength: the strength of the whole adapter, which multiplies those of the groups.
            by_group: a strength for each group, in order; by default 1 for each.
        """
        batch = self.view.plain(image)[None]
        each = by_group or [1.0] * len(self.groups)
        wanted = strength_of_each(self.groups, strength, each) if self.groups else strength
        base: Strengths = {} if self.has_probe else {self.adapter: 0.0}
        return self._probabilities(batch, base), self._probabilities(batch, {self.adapter: wanted})

    def seen(self, image: Image.Image) -> Image.Image:
        """Return what the model sees of an image: resized and cropped to a square as for the model."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.view.mean, self.view.std))
        pixels = (self.view.plain(image) * std + mean).clamp(0, 1)
        return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())

    @torch.inference_mode()
    def _probabilities(self, batch: Tensor, strengths: Strengths) -> Tensor:
        with self.acting(strengths), self.computing:
            device = next(self.model.parameters()).device
            return self.model(batch.to(device)).float().softmax(1)[0].cpu()  # type: ignore[no-any-return]


def summary_of(model: nn.Module, adapter: str) -> str:
    """Return an adapter's method, how many numbers it trained, and the model, on one line."""
    record, updates = state_of(model), adapters(model, adapter).values()
    assert record is not None
    trained = sum(parameter.numel() for update in updates for parameter in update.trainable())
    config = record.adapters[adapter].config
    return f"{config.title or config.method}, {trained:,} numbers in {len(updates)} projections of {base_model_name(model)}"


def read_classifier(settings: Predict) -> Classifier:
    """Return the classifier that `loca-vision predict` would use with these settings.

    Raises:
        FileNotFoundError, ValueError, OSError: as `predict`; or the run trained no adapter.
    """
    import_modules(settings.imports)
    place = Path(settings.adapter).expanduser()
    source = place if place.is_file() else run_folder(settings.adapter)
    demo = read_demo_folder(source.parent if source.is_file() else source)
    # the same functions as predict uses, so that there is one way to build a trained classifier
    model, view, classes, computing = model_of(_completed(settings, source, demo))
    active = list(active_adapters(model))
    if not active:
        raise ValueError(
            f"{settings.adapter}: its run trained no adapter, so there is nothing to compare; see loca-vision predict"
        )
    if demo is not None:
        _give_probe(model, demo.probe)
    return Classifier(
        source, model, view, classes, block_groups(adapters(model, active[0])), demo is not None,
        demo.examples if demo else (), computing, acting_in(model), active[0],
    )  # fmt: skip


def _completed(settings: Predict, source: Path, demo: DemoFolder | None) -> Predict:
    """Return the settings, filled in with what the demonstration recorded where the user gave nothing."""
    if demo is None or settings.model or (source / SETTINGS).is_file():
        return settings
    if demo.spec.weights == "none" and demo.spec.seed != 0:
        raise ValueError(
            f"{settings.adapter}: its base has random weights of seed {demo.spec.seed}; expected seed 0, as predict draws them"
        )
    size, weights = settings.image_size or demo.spec.image_size, settings.weights or demo.spec.weights
    return replace(settings, model=demo.spec.name, image_size=size, weights=weights)


def _give_probe(model: nn.Module, file: Path) -> None:
    """Replace the base's head, which no adapter has trained, by the probe's."""
    with disable_adapter(model):
        load_probe(model, file)
