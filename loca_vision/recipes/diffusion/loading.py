"""A pipeline from a folder or the hub, from safetensors files alone, or a sentence that says why not."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from huggingface_hub import hf_hub_download

from loca_vision.data.pair_sources import is_missing
from loca_vision.recipes.diffusion.families.family import Family
from loca_vision.recipes.diffusion.quantised import Quantization, quantized
from loca_vision.recipes.diffusion.settings import BaseModel
from loca_vision.storage.strict_json import read_json

INDEX = "model_index.json"
_FAULTS = (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError)  # in which diffusers tells what is wrong


class Source:
    """Where a pipeline is.

    Args:
        place: a folder, or a name on the hub.
        revision: of the repository on the hub.
        variant: of the files, such as fp16.
        cache_dir: of what comes from the hub.
        what: the pipeline should be, for sentences.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(
        self,
        place: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: Path | None = None,
        what: str = "a pipeline",
    ) -> None:
        self.what = what
        self.name, self.place = place, str(Path(place).expanduser()) if place.startswith("~") else place
        if is_missing(self.place):
            raise OSError(
                f"{place}: it cannot be loaded as a pipeline: there is no such folder, and the hub names them user/name"
            )
        wanted = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
        self.wanted = {name: value for name, value in wanted.items() if value is not None}

    def class_name(self) -> str:
        """The class of pipeline that model_index.json names.

        Raises:
            OSError: there is no such file, or it names none.
        """
        try:
            found = read_json(self._index())["_class_name"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OSError(f"{self.name}: it cannot be loaded as {self.what} ({_reason(error)})") from error
        return str(found[-1] if isinstance(found, list) else found)

    def _index(self) -> Path:
        """The file that says what the pipeline consists of."""
        if Path(self.place).is_dir():
            return Path(self.place) / INDEX
        wanted = {name: value for name, value in self.wanted.items() if name != "variant"}
        return Path(hf_hub_download(self.place, INDEX, **wanted))

    def load(
        self, cls: Any, family: type[Family], dtype: torch.dtype, quantization: Quantization | None = None, **more: Any
    ) -> Any:
        """The pipeline, on the CPU, in a dtype; an autoencoder that must be exact in float32.

        Without a safety checker, which would replace pictures by black ones, though nobody publishes them.

        Args:
            cls: of the pipeline.
            family: of the class.
            quantization: of the denoiser.
            more: arguments of `from_pretrained`.

        Raises:
            OSError: it is not available, or is not such a pipeline in safetensors files.
            ValueError: this version of diffusers cannot quantise.
        """
        if "safety_checker" in inspect.signature(cls.__init__).parameters:
            more |= {"safety_checker": None, "requires_safety_checker": False}
        if dtype != torch.float32 or quantization is not None:
            more["torch_dtype"] = {"vae": torch.float32, "default": dtype} if family.keeps_vae_exact else dtype
        if quantization is not None:
            more["quantization_config"] = quantized(quantization, family.denoiser, dtype)
        try:
            with catch_warnings():  # of a name of an argument that newer versions give up
                simplefilter("ignore", FutureWarning)
                return cls.from_pretrained(self.place, **self.wanted, use_safetensors=True, **more)
        except _FAULTS as error:
            raise OSError(f"{self.name}: it cannot be loaded as {self.what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def source_of(recipe: BaseModel, what: str) -> Source:
    """Where the base of a recipe is.

    Args:
        what: the pipeline should be, for sentences.

    Raises:
        OSError: there is no such folder.
    """
    of = recipe
    return Source(of.pretrained_model_name_or_path, revision=of.revision, variant=of.variant, cache_dir=of.cache_dir, what=what)
