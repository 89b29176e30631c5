"""Load a pipeline from a folder or the hub, only from safetensors files, or explain in a sentence why that fails."""

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
_FAULTS = (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError)  # raised by diffusers when loading fails


class Source:
    """The source of a pipeline.

    Args:
        place: a folder, or a name on the hub.
        revision: revision of the repository on the hub.
        variant: variant of the files, such as fp16.
        cache_dir: cache folder for files from the hub.
        what: what the pipeline should be, for error messages.

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
        """Return the pipeline class that model_index.json names.

        Raises:
            OSError: there is no such file, or it names none.
        """
        try:
            found = read_json(self._index())["_class_name"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OSError(f"{self.name}: it cannot be loaded as {self.what} ({_reason(error)})") from error
        return str(found[-1] if isinstance(found, list) else found)

    def _index(self) -> Path:
        """Return the file that lists the pipeline's components."""
        if Path(self.place).is_dir():
            return Path(self.place) / INDEX
        wanted = {name: value for name, value in self.wanted.items() if name != "variant"}
        return Path(hf_hub_download(self.place, INDEX, **wanted))

    def load(
        self, cls: Any, family: type[Family], dtype: torch.dtype, quantization: Quantization | None = None, **more: Any
    ) -> Any:
        """Load the pipeline on the CPU, in a dtype, except that an autoencoder that must be exact is in float32.

        It has no safety checker, which would replace pictures by black ones although nobody publishes them.

        Args:
            cls: the pipeline's class.
            family: the family of that class.
            quantization: quantisation of the denoiser.
            more: further arguments of `from_pretrained`.

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
            with catch_warnings():  # about the name of an argument that newer versions deprecate
                simplefilter("ignore", FutureWarning)
                return cls.from_pretrained(self.place, **self.wanted, use_safetensors=True, **more)
        except _FAULTS as error:
            raise OSError(f"{self.name}: it cannot be loaded as {self.what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def source_of(recipe: BaseModel, what: str) -> Source:
    """Return the source of a recipe's base.

    Args:
        what: what the pipeline should be, for error messages.

    Raises:
        OSError: there is no such folder.
    """
    of = recipe
    return Source(of.pretrained_model_name_or_path, revision=of.revision, variant=of.variant, cache_dir=of.cache_dir, what=what)
