"""A pipeline from a folder or the hub, from safetensors files alone, or a sentence that says why not."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from loca_vision.data.pair_sources import is_missing
from loca_vision.recipes.diffusion.quantised import Quantization, loading_quantised
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

    def load_quantised(self, cls: Any, kind: Quantization | None, component: str, dtype: torch.dtype, **more: Any) -> Any:
        """The pipeline, one component of it quantised unless `kind` is None; as `load` otherwise."""
        if kind is None:
            return self.load(cls, **more)
        with loading_quantised(kind, component, dtype) as how:
            return self.load(cls, **how, **more)

    def load(self, cls: Any, **more: Any) -> Any:
        """The pipeline, on the CPU.

        Without a safety checker, which would put black pictures among those that nobody shows to anybody.

        Args:
            cls: of the pipeline.
            more: arguments of `from_pretrained`, such as torch_dtype.

        Raises:
            OSError: it cannot be had, or is no such pipeline in safetensors files.
        """
        unsafe = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in _parts(cls) else {}
        try:
            return cls.from_pretrained(self.place, **self.wanted, **unsafe, use_safetensors=True, **more)
        except (
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            ImportError,
        ) as error:  # diffusers tells a fault in several ways
            raise OSError(f"{self.name}: it cannot be loaded as {self.what} ({_reason(error)})") from error


def _parts(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
