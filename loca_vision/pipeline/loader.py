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

    An adapter has one name throughout a pipeline and may be in several of its components. An adapter put into a component with
    `loca_vision.inject` or `load_adapter` belongs to the pipeline too.
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
        """Load an adapter; it becomes the only active one, at weight 1.0. If loading fails, the pipeline stays as it was.

        The whole file is checked, against itself and against the pipeline, before anything is touched. Adapters that were
        disabled may act again afterwards; fused adapters stay in the weights. Loaded spectra are not trained until
        `spectrum.requires_grad_(True)` for those in `loca_vision.adapters(pipe.unet, adapter_name).values()`.

        If the file has a `conv_in` for more channels than the UNet's, as an InstructPix2Pix model trained from a plain one has,
        the UNet takes that many channels until the last adapter with such a `conv_in` is removed. While that adapter is
        inactive, the extra channels have no effect. The pipeline must pass its UNet that many channels.

        Args:
            source: a folder, a file, `"user/repository"` on the hub, or a state dict (which is not changed).
            adapter_name: letters, digits, `_` and `-`; by default `default_0`, `default_1`, ...
            weight_name: the name of the file in the folder, by default `pytorch_loca_weights.safetensors`.
            subfolder: a subfolder of the folder or repository.
            revision: branch, tag or commit of the repository.
            token: a token for the hub; by default the one stored on this machine.
            cache_dir: the cache folder for the hub's files.
            local_files_only: use only cached files; by default as `HF_HUB_OFFLINE` says.
            force_download: download again even if the files are cached.
            hotswap: put it in the place of the loaded adapter `adapter_name`, without recompilation; weights and the other
                active adapters stay as they are.

        Raises:
            FileNotFoundError: there is no such file, folder or repository.
            OSError: the hub or the file cannot be read.
            ValueError: the name is in use, or the file is unsound; the error names key and rule.
            TypeError: the source is of another type.
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
        """Write one adapter, from all components it is in, to one file; a crash leaves either the old file or the new one.

        Args:
            directory: the folder; it is created if it is missing.
            adapter_name: the adapter; by default the active one.
            weight_name: the file name, by default `pytorch_loca_weights.safetensors`.
            dtype: the dtype of the stored coefficients: float32, float16 or int8, as in `save_adapter`.

        Returns:
            The path of the file.

        Raises:
            ValueError: there is no such adapter; none is named and not exactly one is active; the file name contains a folder;
                or the method does not support the dtype, or a value overflows in it.
            OSError: the file could not be written; an existing file is unchanged.
        """
        return save_pipeline_adapter(self, directory, adapter_name, weight_name, dtype)

    def unload_loca_weights(self) -> None:
        """Remove all adapters, including fused ones: the pipeline is as it was before the first, bit for bit."""
        unload_components(self)

    def delete_loca_adapters(self, names: str | Sequence[str]) -> None:
        """Remove these adapters from all components.

        Raises:
            ValueError: a name is unknown, or the adapter is fused; nothing is deleted then.
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
        """Activate these adapters and no others; adapters that were disabled act again. An empty list gives the base model.

        Args:
            names: the names of the adapters.
            weights: one weight for all, or a list with one for each. A weight is a number, None for 1.0, or a mapping from
                components to numbers or, for a UNet, to blocks:
                `{"unet": {"down": 0.5, "mid": 1, "up": {"block_1": [1, 0, 0.5]}}}`. What is not named acts at 1.0.

        Raises:
            ValueError: a name is unknown or repeated, there is no such component or block, the numbers of weights and names
                differ, or a weight is not finite. Nothing is changed then.
        """
        activate_adapters(self, names, weights)

    def get_active_loca_adapters(self) -> list[str]:
        """Return the names of the active adapters, in order, even while disabled; `fused_locas` has those in the weights."""
        return active_in(self)

    def get_loca_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters by component."""
        return {component: list(record.adapters) for component, (_, record) in adapted_in(self).items()}

    def disable_loca(self) -> None:
        """Switch all adapters off until `enable_loca`; which are active, and at what weights, is kept.

        Raises:
            ValueError: an adapter is fused.
        """
        for _, record in adapted_in(self).values():
            refuse_fused(record, record.fused.adapters)
        activate_all(self, lambda component, record: record.active, enabled=False)

    def enable_loca(self) -> None:
        """Switch the active adapters on again."""
        activate_all(self, lambda component, record: record.active, enabled=True)

    def set_loca_device(self, names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move the spectra of these adapters to a device; they keep working wherever they are.

        Raises:
            ValueError: a name is unknown.
            RuntimeError: there is no such device.
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
        """Add adapters to the weights, so that they cost nothing at inference; `unfuse_loca` restores the weights bit for bit.

        The scale of a call has no effect on fused adapters; `scale` takes its place.
        Until `unfuse_loca`, the original weights are kept in main memory: as many bytes as the adapted weights have. Adapters
        that are fused already stay as they are. Whole tensors, such as a `conv_in`, stay in the model for as long.

        Args:
            components: the components to fuse in; by default all that have adapters.
            scale: multiplies the weights set before.
            safe_fusing: refuse, before anything is written, if a weight would not be finite.
            adapter_names: the adapters to fuse; by default the active ones.

        Raises:
            ValueError: a name is unknown, there is nothing to fuse, the adapters are disabled, or a weight cannot be written
                to (for example because it is quantised).
        """
        fuse_components(self, components, scale=scale, check=safe_fusing, adapter_names=adapter_names)

    def unfuse_loca(self, components: Sequence[str] | None = None) -> None:
        """Restore the weights bit for bit; active adapters then act on them again.

        If other code has changed a weight since, as `fuse_lora` does, that change is kept, and the log says so.

        Raises:
            ValueError: a component is unknown.
        """
        unfuse_components(self, components)

    @property
    def num_fused_locas(self) -> int:
        """The number of fused adapters."""
        return len(fused_in(self))

    @property
    def fused_locas(self) -> set[str]:
        """The names of the adapters that are fused in any component."""
        return fused_in(self)

    def enable_loca_hotswap(self, max_components: int) -> None:
        """Make room for adapters that will be swapped in with `load_loca_weights(..., hotswap=True)`.

        Only needed if they have more components than the first. Call it before the first adapter is loaded.

        Args:
            max_components: the largest number of components that any of them has for one projection.

        Raises:
            ValueError: it is not a whole number from 1 up, or an adapter is loaded already.
        """
        if not isinstance(max_components, int) or isinstance(max_components, bool) or max_components < 1:
            raise ValueError(f"max_components={max_components!r}: expected a whole number from 1 up")
        if adapted_in(self):
            raise ValueError("an adapter is loaded already: call enable_loca_hotswap before the first")
        for model in models_in(self).values():
            choose(model, max_components=max_components)

    def enable_loca_low_memory(self, enabled: bool = True) -> None:
        """Apply updates to activations instead of building weights for them: less memory, more time for every call.

        Without it, the weight of every adapted projection is built at the first call and kept: as many bytes again as these
        weights have, which is 187 MB in float16 for all attention of Stable Diffusion 1.5.
        """
        for model in models_in(self).values():
            set_low_memory(model, bool(enabled))


def saved_as_stock(cls: type) -> type:
    """Give a subclass the name of the diffusers pipeline it extends, which it is saved under and AutoPipeline looks up."""
    cls.__name__ = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers."))
    return cls


METHODS = tuple(name for name, member in vars(LoCALoaderMixin).items() if callable(member) and not name.startswith("_"))
PROPERTIES = tuple(name for name, member in vars(LoCALoaderMixin).items() if isinstance(member, property))
