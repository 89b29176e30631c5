"""LoCA on a diffusers pipeline: the methods that load, save, weight, fuse and swap adapters in all its components."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loca_vision.formats.sources import Request
from loca_vision.model.adapters import adapters
from loca_vision.model.atomic import atomic_all
from loca_vision.model.call_scale import set_low_memory
from loca_vision.model.options import choose
from loca_vision.model.remove import remove
from loca_vision.model.state import refuse_fused
from loca_vision.pipeline.activation import activate_adapters, activate_all
from loca_vision.pipeline.call_entry import tell_scale
from loca_vision.pipeline.components import active_in, adapted_in, check_names, fused_in, models_in
from loca_vision.pipeline.fuse import fuse_components, unfuse_components, unload_components
from loca_vision.pipeline.load import load
from loca_vision.pipeline.save import save_pipeline_adapter


class LoCALoaderMixin:
    """The methods that `import loca_vision.diffusers` adds to `diffusers.DiffusionPipeline`.

    An adapter has one name throughout a pipeline and may be in several of its components. One that was put into a component
    with `loca_vision.inject` or `load_adapter` is one of the pipeline's.
    """

    components: dict[str, Any]

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        tell_scale(cls, alone=True)

    def load_loca_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool | None = None,
        force_download: bool = False,
        hotswap: bool = False,
    ) -> None:
        """Load an adapter; it becomes the only active one, at weight 1.0. What fails leaves the pipeline as it was.

        The file is checked as a whole, against itself and against the pipeline, before anything is touched. Adapters that
        were disabled may act again afterwards; fused adapters stay in the weights. Loaded spectra do
        not learn until `spectrum.requires_grad_(True)` for those in `loca_vision.adapters(pipe.unet, adapter_name).values()`.

        Where the file has a `conv_in` for more channels than the UNet's, as that of an InstructPix2Pix model trained from a
        plain one has, the UNet takes as many until the last adapter with such a `conv_in` is taken out. While it does not act,
        the new channels have no effect. The pipeline must be one that passes its UNet that many channels.

        Args:
            source: a folder, a file, `"user/repository"` on the hub, or a state dict (which is not changed).
            adapter_name: letters, digits, `_` and `-`; by default `default_0`, `default_1`, ...
            weight_name: of the file in the folder, by default `pytorch_loca_weights.safetensors`.
            subfolder: of the folder or repository.
            revision: branch, tag or commit of the repository.
            token: for the hub; by default the one that is stored on this machine.
            cache_dir: of the hub's files.
            local_files_only: take them from the cache alone; by default as `HF_HUB_OFFLINE` says.
            force_download: do not take them from the cache.
            hotswap: put it in the place of the loaded adapter `adapter_name`, without anything being compiled anew; weights and
                what else is active stay as they are.

        Raises:
            FileNotFoundError: there is no such file, folder or repository.
            OSError: the hub or the file cannot be read.
            ValueError: a name in use, or anything in the file that is not as it must be: the sentence names key and rule.
            TypeError: another kind of source.
        """
        request = Request(weight_name, subfolder, revision, token, cache_dir, local_files_only, force_download)
        load(self, source, request, adapter_name, hotswap=hotswap)

    def save_loca_weights(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write one adapter, of all components it is in, as one file; a crash leaves the old file or the new one.

        Args:
            directory: made where it is missing.
            adapter_name: by default the active one.
            weight_name: by default `pytorch_loca_weights.safetensors`.
            dtype: of the stored coefficients: float32, float16 or int8, as in `save_adapter`.

        Returns:
            The path of the file.

        Raises:
            ValueError: no such adapter, or none or several active where none is named; a name with a folder in it; a dtype
                that its method does not have, or that overflows.
            OSError: the file could not be written; what was there is as it was.
        """
        return save_pipeline_adapter(self, directory, adapter_name, weight_name, dtype)

    def unload_loca_weights(self) -> None:
        """Take all adapters out, fused ones too: the pipeline is as it was before the first, bit for bit."""
        unload_components(self)

    def delete_loca_adapters(self, names: str | Sequence[str]) -> None:
        """Take these adapters out of all components.

        Raises:
            ValueError: an unknown name, or one that is fused; nothing is deleted then.
        """
        names = check_names(self, names)
        for _, record in adapted_in(self).values():
            refuse_fused(record, names)
        records = dict(adapted_in(self).values())
        with atomic_all(records, lambda model: records[model].first.values()):
            for model, record in records.items():
                for name in [name for name in names if name in record.adapters]:
                    remove(model, name)

    def set_loca_adapters(self, names: str | Sequence[str], weights: Any = None) -> None:
        """Let these adapters act, and no others; adapters that were disabled act again. An empty list: the base model.

        Args:
            names: of adapters.
            weights: one weight for all, or a list with one for each: a number, None for 1.0, or a mapping from components to
                numbers or, for a UNet, to blocks: `{"unet": {"down": 0.5, "mid": 1, "up": {"block_1": [1, 0, 0.5]}}}`. What
                is not named acts at 1.0.

        Raises:
            ValueError: an unknown or repeated name, a component or block there is not, another number of weights than names,
                or a weight that is not finite. Nothing is changed then.
        """
        activate_adapters(self, names, weights)

    def get_active_loca_adapters(self) -> list[str]:
        """The names of the active adapters, in order, also while they are disabled; `fused_locas` has those in the weights."""
        return active_in(self)

    def get_loca_adapters(self) -> dict[str, list[str]]:
        """The names of all adapters by component."""
        return {component: list(record.adapters) for component, (_, record) in adapted_in(self).items()}

    def disable_loca(self) -> None:
        """Let no adapter act until `enable_loca`; which are active, and how strongly, stays.

        Raises:
            ValueError: an adapter is fused.
        """
        for _, record in adapted_in(self).values():
            refuse_fused(record, record.fused.adapters)
        activate_all(self, lambda component, record: record.active, enabled=False)

    def enable_loca(self) -> None:
        """Let the active adapters act again."""
        activate_all(self, lambda component, record: record.active, enabled=True)

    def set_loca_device(self, names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move the spectra of these adapters; wherever they are, they go on working.

        Raises:
            ValueError: an unknown name.
            RuntimeError: no such device.
        """
        names, device = check_names(self, names), torch.device(device)
        present = [(model, name) for model, record in adapted_in(self).values() for name in names if name in record.adapters]
        updates = [update for model, name in present for update in adapters(model, name).values()]
        before = [(update, next(iter(update.tensors())).device) for update in updates]
        try:
            for update in updates:
                update.to(device)
        except BaseException:
            for update, was_on in before:
                update.to(was_on)
            raise

    def fuse_loca(
        self,
        components: Sequence[str] | None = None,
        *,
        scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Write adapters into the weights, which costs nothing at inference; `unfuse_loca` brings the weights back bit for bit.

        The scale of a call has no effect on what is fused: that is `scale` here.
        The weights as they were are kept in main memory until then: as many bytes as the adapted weights have. What is fused
        already stays as it is. Whole tensors, such as a `conv_in`, stay in the model as long.

        Args:
            components: by default all with adapters.
            scale: multiplies the weights set before.
            safe_fusing: refuse, before anything is written, where a weight would not be finite.
            adapter_names: by default the active ones.

        Raises:
            ValueError: an unknown name, nothing to fuse, adapters that are disabled, or a weight that nothing can be written
                into (quantised).
        """
        fuse_components(self, components, scale=scale, check=safe_fusing, adapter_names=adapter_names)

    def unfuse_loca(self, components: Sequence[str] | None = None) -> None:
        """Put the weights back as they were, bit for bit; active adapters then act on them again.

        If other code has changed a weight since, as `fuse_lora` does, that change stays, and the log says so.

        Raises:
            ValueError: an unknown component.
        """
        unfuse_components(self, components)

    @property
    def num_fused_locas(self) -> int:
        """How many adapters are fused."""
        return len(fused_in(self))

    @property
    def fused_locas(self) -> set[str]:
        """The names of the adapters that are fused, in whichever component."""
        return fused_in(self)

    def enable_loca_hotswap(self, max_components: int) -> None:
        """Make room for adapters that will be swapped in with `load_loca_weights(..., hotswap=True)`.

        Only needed where they have more components than the first. To be called before the first adapter is loaded.

        Args:
            max_components: the most components of one projection of any of them.

        Raises:
            ValueError: it is no whole number from 1 up, or an adapter is loaded already.
        """
        if not isinstance(max_components, int) or isinstance(max_components, bool) or max_components < 1:
            raise ValueError(f"max_components={max_components!r}: expected a whole number from 1 up")
        if adapted_in(self):
            raise ValueError("an adapter is loaded already: call enable_loca_hotswap before the first")
        for model in models_in(self).values():
            choose(model, max_components=max_components)

    def enable_loca_low_memory(self, enabled: bool = True) -> None:
        """Apply updates to activations, and never build weights for them: less memory, more time for every call.

        Without it the weight of every adapted projection is built at the first call and kept: as many bytes again as these
        weights have, 187 MB in float16 for all attention of Stable Diffusion 1.5.
        """
        for model in models_in(self).values():
            set_low_memory(model, bool(enabled))


def saved_as_stock(cls: type) -> type:
    """Let a subclass go by the name of the diffusers pipeline it extends: what it saves, and what AutoPipeline looks up."""
    cls.__name__ = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers."))
    return cls


METHODS = tuple(name for name, member in vars(LoCALoaderMixin).items() if callable(member) and not name.startswith("_"))
PROPERTIES = tuple(name for name, member in vars(LoCALoaderMixin).items() if isinstance(member, property))
