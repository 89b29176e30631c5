"""The diffusers pipeline behind the page: pictures of the base, of each adapter and of their mix, from one seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from loca_vision.commands.app.strengths import Acting, Strengths
from loca_vision.commands.app.uploads import fitted
from loca_vision.data.pair_sources import is_missing
from loca_vision.messages import one_line
from loca_vision.pipeline.components import adapted_in
from loca_vision.pipeline.loader import LoCALoaderMixin

_LONGEST = 768  # pixels of the longer side of a photograph
_NOT_GIVEN = ("mask_image", "control_image", "video", "frames", "pose", "mask")
"""Inputs that this page has no control for, and without which the pipelines that take them cannot run."""

Told = Callable[[int, int], None]
"""Called with the number of finished steps and the total number of steps."""


@dataclass(frozen=True)
class Wanted:
    """A visitor's request.

    Args:
        prompt, image: used if the pipeline takes them.
        seed: the seed of the noise, the same for every picture.
        strengths: strengths by adapter.
        settings: other arguments of the pipeline's call.
    """

    prompt: str
    seed: int
    strengths: Mapping[str, float]
    image: Image.Image | None = None
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Generator:
    """A pipeline with adapters.

    Args:
        sources: the file or folder of each adapter, by its name in the pipeline.
        takes: the parameters of the pipeline's call, with their defaults.
        summary: the pipeline and its adapters, on one line.
    """

    pipe: Any
    sources: Mapping[str, Path]
    takes: Mapping[str, Any]
    acting: Acting
    summary: str

    @property
    def takes_image(self) -> bool:
        """Whether the pipeline starts from a photograph."""
        return "image" in self.takes

    def columns(self, strengths: Mapping[str, float]) -> list[tuple[str, Strengths]]:
        """Return a title and the active adapters for each picture: none, each alone and, if there are several, all."""
        each: list[tuple[str, Strengths]] = [(f"{name} at {value:g}", {name: value}) for name, value in strengths.items()]
        mix: list[tuple[str, Strengths]] = [("Mix of all", dict(strengths))] if len(strengths) > 1 else []
        return [("Base", {}), *each, *mix]

    def pictures(self, wanted: Wanted, told: Told = lambda done, of: None) -> Iterator[tuple[Image.Image, str]]:
        """Yield a picture with its title for each column, as they are made.

        Args:
            told: called after every step, counted over all pictures.

        Raises:
            ValueError: there is no prompt or no photograph, and the pipeline takes one; raised before the first picture.
        """
        given = self._arguments(wanted)
        columns = self.columns(wanted.strengths)
        steps = int(given.get("num_inference_steps") or self.takes.get("num_inference_steps") or 1)
        for place, (title, strengths) in enumerate(columns):
            watched = self._watching(told, place * steps, len(columns) * steps)
            noise = torch.Generator("cpu").manual_seed(wanted.seed)
            with self.acting(strengths):  # a pipeline stores much of a call on itself, so only one call may run at a time
                picture = self.pipe(**given, **watched, generator=noise, output_type="pil").images[0]
            yield picture, title

    def _arguments(self, wanted: Wanted) -> dict[str, Any]:
        given: dict[str, Any] = {name: value for name, value in wanted.settings.items() if name in self.takes}
        if "prompt" in self.takes:
            if not wanted.prompt.strip():
                raise ValueError("Expected a prompt, got none.")
            given["prompt"] = wanted.prompt
        if self.takes_image:
            if wanted.image is None:
                raise ValueError(f"{type(self.pipe).__name__} starts from a photograph: upload one.")
            given["image"] = fitted(wanted.image, _LONGEST)
        return given

    def _watching(self, told: Told, before: int, of: int) -> dict[str, Any]:
        """Return arguments that make a call report its steps to `told`, if the pipeline supports it."""
        if "callback_on_step_end" not in self.takes:
            return {}

        def after(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            told(before + step + 1, of)
            return tensors

        return {"callback_on_step_end": after}


def read_generator(source: str, adapters: Mapping[str, str], scratch: Path) -> Generator:
    """Load a pipeline, only from safetensors files, and load adapters into it.

    Args:
        source: the pipeline: a folder or a repository on the hub.
        adapters: a folder, a file or a repository for each adapter, by the name it will have.
        scratch: a folder for copies of adapters from the hub.

    Raises:
        OSError, ValueError: something cannot be loaded, or the pipeline needs what the page cannot provide.
    """
    return generator_of(_loaded(source), adapters, scratch)


def generator_of(pipe: Any, adapters: Mapping[str, str], scratch: Path) -> Generator:
    """Load adapters into a loaded pipeline.

    Raises:
        ValueError, OSError: as `read_generator`.
    """
    takes = inputs_of(pipe)
    sources = {}
    for name, place in adapters.items():
        LoCALoaderMixin.load_loca_weights(pipe, place, name)
        there = Path(place).expanduser()
        sources[name] = there if there.exists() else LoCALoaderMixin.save_loca_weights(pipe, scratch / name, name)
    pipe.set_progress_bar_config(disable=True)

    def choose(strengths: Strengths) -> None:
        LoCALoaderMixin.set_loca_adapters(pipe, list(strengths), list(strengths.values()))

    summary = f"{type(pipe).__name__}, with adapters in {', '.join(adapted_in(pipe))}"
    return Generator(pipe, sources, takes, Acting(choose), summary)


def inputs_of(pipe: Any) -> dict[str, Any]:
    """Return the parameters of the pipeline's call with their defaults, or None for a parameter without one.

    Raises:
        ValueError: it needs an input that the page has no control for.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in _NOT_GIVEN:
        if name in parameters:
            raise ValueError(f"{type(pipe).__name__}: it takes {name!r}, which this page cannot give")
    if "prompt" not in parameters and "image" not in parameters:
        raise ValueError(f"{type(pipe).__name__}: it takes neither a prompt nor an image; expected one of them")
    return {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in parameters.items()
        if name != "self"
    }


def _loaded(source: str) -> Any:
    from diffusers import DiffusionPipeline

    place = str(Path(source).expanduser()) if source.startswith("~") else source
    if is_missing(place):
        raise FileNotFoundError(f"pipeline={source!r}: there is no such folder, and the hub names its repositories user/name")
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # diffusers raises many kinds of errors
        raise OSError(f"pipeline={source!r}: it cannot be loaded as a pipeline ({one_line(error, 300)})") from error
    return pipe.to("cuda", torch.float16) if torch.cuda.is_available() else pipe
