"""Load LoCA for ComfyUI: apply an adapter of loca-vision exactly to a model and its text encoders.

The updates do not have low rank, so a LoRA file cannot represent them exactly. These nodes give ComfyUI the few numbers in an
adapter file, and build the update of a weight on its device when ComfyUI needs that weight. Copy this folder to `custom_nodes`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora  # type: ignore[import-not-found]
import folder_paths  # type: ignore[import-not-found]
import torch
from comfy.weight_adapter import WeightAdapterBase  # type: ignore[import-not-found]
from torch import Tensor

from loca_vision import FileUpdates, Update, read_updates

_ENCODERS = {
    "text_encoder": ("clip_l", "clip_h", "t5xxl"),
    "text_encoder_2": ("clip_g", "t5xxl"),
    "text_encoder_3": ("t5xxl",),
}
"""ComfyUI's names for a pipeline's text encoders: Flux has T5 as its second, Stable Diffusion 2 OpenCLIP's H as its first."""

_SHOWN = 3
"""The maximum number of names in a message."""

Function = Callable[[Tensor], Tensor]


class AddedUpdate(WeightAdapterBase):  # type: ignore[misc]
    """The update of one weight, as a ComfyUI patch.

    Args:
        loaded_keys: the name of the module in the file.
        weights: the module's `Update`. It is never moved, because clones of a model on several devices share the patch.
    """

    name = "loca"

    def __init__(self, loaded_keys: set[str], weights: tuple[Update]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @torch.no_grad()
    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Function,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Add `strength` times the update to `weight` in place, computed in float32 and rounded once to the weight's dtype.

        Args:
            weight: the rows that the update is for (ComfyUI has already applied `offset` and `strength_model`).
            function: converts rows to ComfyUI's order; it swaps their halves, so it is its own inverse.
            original_weight: not needed. A DoRA update is the first patch of its weight, which is still the base's.
        """
        (update,) = self.weights
        base = function(weight).flatten(1) if update.needs_weight else None
        tensors = {name: tensor.to(weight.device) for name, tensor in [*update.named_parameters(), *update.named_buffers()]}
        delta = torch.func.functional_call(update, tensors, ("delta", strength, base))
        return weight.add_(function(delta.view(weight.shape)))


class Place(NamedTuple):
    """A ComfyUI weight, in the form that `add_patches` expects.

    Args:
        name: the name of the parameter.
        part: the axis, start and length of the part that corresponds to a diffusers module; None for the whole weight.
        reordered: converts rows from diffusers' order to ComfyUI's by swapping halves; None if the orders are the same.
    """

    name: str
    part: tuple[int, int, int] | None = None
    reordered: Function | None = None

    def shape_in(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        shape = list(weights[self.name].shape)
        if self.part is not None:
            axis, _, length = self.part
            shape[axis] = length
        return tuple(shape)


class Host:
    """The target of patches: a diffusion model, or the text encoders.

    Args:
        patched: a `ModelPatcher` or a `CLIP`.
        patcher: the `ModelPatcher`.
        layers: ComfyUI's table from the layer names in LoRA files to weights.
    """

    def __init__(self, patched: Any, patcher: Any, layers: Mapping[str, Any]) -> None:
        self.patched, self.patches, self.layers = patched, patcher.patches, layers
        self.weights: Mapping[str, Tensor] = patcher.model_state_dict()

    def place_of(self, parameter: str) -> Place | None:
        """Return the place of a pipeline's parameter, such as `unet.conv_in.weight`, or None if there is none."""
        module, _, kind = parameter.rpartition(".")
        component, _, rest = module.partition(".")
        names = {"unet": [f"lora_unet_{rest.replace('.', '_')}"], "transformer": [module]}.get(component, [])
        names += [f"text_encoders.{encoder}.transformer.{rest}" for encoder in _ENCODERS.get(component, ())]
        for layer in (self.layers[name] for name in names if name in self.layers):
            place = Place(layer) if isinstance(layer, str) else Place(*layer)
            if kind != "weight":
                place = place._replace(name=f"{place.name.removesuffix('weight')}{kind}")
            if place.name in self.weights:  # the table includes layers that only some models have
                return place
        return None

    def patch_of(self, module: str, place: Place, update: Update) -> AddedUpdate:
        """Return the patch for an update; raise ValueError if it is for another weight, or for one no longer the base's."""
        shape = place.shape_in(self.weights)
        if (shape[0], math.prod(shape[1:])) != update.shape:
            raise ValueError(f"{module}: expected a weight of shape {update.shape}, got {shape}")
        if update.needs_weight and place.name in self.patches:
            raise ValueError(f"{module}: its DoRA depends on the weight, which a node before this one changes: load it first")
        return AddedUpdate({module}, (update,))

    def replacement_of(self, parameter: str, place: Place, tensor: Tensor) -> tuple[str, tuple[Tensor]]:
        """Return the patch that replaces a parameter; raise ValueError if the tensor is for another parameter."""
        shape = place.shape_in(self.weights)
        if shape != tensor.shape:
            raise ValueError(f"{parameter}: expected the shape {tuple(tensor.shape)}, got {shape}")
        return "set", (place.reordered(tensor) if place.reordered else tensor,)

    def places_of(self, file: FileUpdates) -> dict[str, Place]:
        """Return the place of everything in a file; raise ValueError if something has none, or two things have the same."""
        parameters = {module: f"{module}.weight" for module in file.updates} | {name: name for name in file.whole}
        places = {name: place for name, parameter in parameters.items() if (place := self.place_of(parameter))}
        if missing := [name for name in parameters if name not in places]:
            raise ValueError(f"expected a model with all its layers ({file.base_model}), got one without {_listed(missing)}")
        there: dict[Place, str] = {}
        for name, place in places.items():
            if place in there:
                raise ValueError(f"{name}: expected one change of each weight, got that of {there[place]} as well")
            there[place] = name
        return places

    def with_patches(self, file: FileUpdates, strength: float) -> Any:
        """Return a clone with everything in a file; raise ValueError if something does not fit."""
        places = self.places_of(file)
        patches: dict[Place, Any] = {places[m]: self.patch_of(m, places[m], update) for m, update in file.updates.items()}
        patches |= {places[name]: self.replacement_of(name, places[name], tensor) for name, tensor in file.whole.items()}
        clone = self.patched.clone()
        if strength:
            clone.add_patches(patches, strength)
        return clone


def load(file: Path, model: Any, clip: Any, strength_model: float, strength_clip: float) -> tuple[Any, Any]:
    """Return clones of a model and its text encoders with an adapter; without `clip`, updates of text encoders are left out.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, or for other models; the message is one sentence.
    """
    read = read_updates(file)
    for_model, for_clip = _part(read, encoders=False), _part(read, encoders=True)
    if clip is None and (left := [*for_clip.updates, *for_clip.whole]):
        logging.info("%s: left out, for want of text encoders: %s", file.name, _listed(left))
    try:
        layers = comfy.lora.model_lora_keys_unet(model.model, {})
        patched = Host(model, model, layers).with_patches(for_model, strength_model)
        if clip is not None:
            layers = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
            clip = Host(clip, clip.patcher, layers).with_patches(for_clip, strength_clip)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return patched, clip


def _part(file: FileUpdates, *, encoders: bool) -> FileUpdates:
    """Return the part of a file for the text encoders, or for everything else."""

    def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if (name.partition(".")[0] in _ENCODERS) is encoders}

    return FileUpdates(chosen(file.updates), chosen(file.whole), file.name, file.base_model)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


class LoadLoCA:
    """Apply an adapter to a diffusion model and its text encoders."""

    CATEGORY = "loaders"
    DESCRIPTION = (
        "Add an adapter of loca-vision exactly: LoCA, sDCT-FT, FourierFT, SeLoRA, LoRA, DoRA. The nodes can be linked."
    )
    FUNCTION = "load"
    RETURN_TYPES: tuple[str, ...] = ("MODEL", "CLIP")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "An adapter file in models/loras. A tensor trained whole replaces the model's at every strength but 0."
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "adapter": (folder_paths.get_filename_list("loras"), {"tooltip": tip}),
                "strength_model": ("FLOAT", _STRENGTH),
                "strength_clip": ("FLOAT", _STRENGTH),
            }
        }

    def load(self, model: Any, clip: Any, adapter: str, strength_model: float, strength_clip: float) -> tuple[Any, ...]:
        file = Path(folder_paths.get_full_path_or_raise("loras", adapter))
        return load(file, model, clip, strength_model, strength_clip)


class LoadLoCAModelOnly(LoadLoCA):
    """Apply an adapter to a diffusion model only."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        every = super().INPUT_TYPES()["required"]
        return {"required": {name: every[name] for name in ("model", "adapter", "strength_model")}}

    def load_model(self, model: Any, adapter: str, strength_model: float) -> tuple[Any, ...]:
        return self.load(model, None, adapter, strength_model, 0.0)[:1]


NODE_CLASS_MAPPINGS = {"LoadLoCA": LoadLoCA, "LoadLoCAModelOnly": LoadLoCAModelOnly}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadLoCA": "Load LoCA", "LoadLoCAModelOnly": "Load LoCA (Model Only)"}
