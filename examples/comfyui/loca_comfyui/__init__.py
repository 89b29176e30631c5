"""Load LoCA for ComfyUI: an adapter of loca-vision on a model and its text encoders, exactly.

The updates are not of low rank, so no LoRA file has all of one. These nodes give ComfyUI the few numbers that an adapter file
has, and build the update of a weight when ComfyUI asks for that weight, on its device. Copy this folder to `custom_nodes`.
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
"""What ComfyUI calls a pipeline's text encoders: Flux has T5 as its second, Stable Diffusion 2 OpenCLIP's H as its first."""

_SHOWN = 3
"""How many names a message has at most."""

Function = Callable[[Tensor], Tensor]


class AddedUpdate(WeightAdapterBase):  # type: ignore[misc]
    """The update of one weight, as a patch of ComfyUI's.

    Args:
        loaded_keys: the module in the file.
        weights: its `Update`. It is never moved, because clones of a model on several devices share the patch.
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
        """`weight`, with `strength` times the update added in place: computed in float32, and rounded once to its dtype.

        Args:
            weight: the rows that the update is for (ComfyUI has taken `offset` and `strength_model` into account).
            function: the order that ComfyUI has the rows in; it swaps their halves, so that it undoes itself.
            original_weight: not needed. The update of a DoRA is the first patch of its weight, which is the base's till then.
        """
        (update,) = self.weights
        base = function(weight).flatten(1) if update.needs_weight else None
        tensors = {name: tensor.to(weight.device) for name, tensor in [*update.named_parameters(), *update.named_buffers()]}
        delta = torch.func.functional_call(update, tensors, ("delta", strength, base))
        return weight.add_(function(delta.view(weight.shape)))


class Place(NamedTuple):
    """A weight of ComfyUI's, as `add_patches` takes it.

    Args:
        name: of the parameter.
        part: the axis, start and length of the part that a module of diffusers is; None for all of it.
        reordered: from the order of rows in diffusers to that in ComfyUI, which swaps halves; None where it is the same.
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
    """What patches are added to: a diffusion model, or the text encoders.

    Args:
        patched: a `ModelPatcher` or a `CLIP`.
        patcher: the `ModelPatcher`.
        layers: ComfyUI's table of the weights that layers in LoRA files mean.
    """

    def __init__(self, patched: Any, patcher: Any, layers: Mapping[str, Any]) -> None:
        self.patched, self.patches, self.layers = patched, patcher.patches, layers
        self.weights: Mapping[str, Tensor] = patcher.model_state_dict()

    def place_of(self, parameter: str) -> Place | None:
        """Where a pipeline's parameter is (`unet.conv_in.weight`); None where there is no such thing."""
        module, _, kind = parameter.rpartition(".")
        component, _, rest = module.partition(".")
        names = {"unet": [f"lora_unet_{rest.replace('.', '_')}"], "transformer": [module]}.get(component, [])
        names += [f"text_encoders.{encoder}.transformer.{rest}" for encoder in _ENCODERS.get(component, ())]
        for layer in (self.layers[name] for name in names if name in self.layers):
            place = Place(layer) if isinstance(layer, str) else Place(*layer)
            if kind != "weight":
                place = place._replace(name=f"{place.name.removesuffix('weight')}{kind}")
            if place.name in self.weights:  # the table has layers that only some models have
                return place
        return None

    def patch_of(self, module: str, place: Place, update: Update) -> AddedUpdate:
        """Raises ValueError where the update is for another weight, or for one that is no longer the base's."""
        shape = place.shape_in(self.weights)
        if (shape[0], math.prod(shape[1:])) != update.shape:
            raise ValueError(f"{module}: expected a weight of shape {update.shape}, got {shape}")
        if update.needs_weight and place.name in self.patches:
            raise ValueError(f"{module}: its DoRA depends on the weight, which a node before this one changes: load it first")
        return AddedUpdate({module}, (update,))

    def replacement_of(self, parameter: str, place: Place, tensor: Tensor) -> tuple[str, tuple[Tensor]]:
        """Raises ValueError where the tensor is for another parameter."""
        shape = place.shape_in(self.weights)
        if shape != tensor.shape:
            raise ValueError(f"{parameter}: expected the shape {tuple(tensor.shape)}, got {shape}")
        return "set", (place.reordered(tensor) if place.reordered else tensor,)

    def places_of(self, file: FileUpdates) -> dict[str, Place]:
        """Where all that a file has is. Raises ValueError where something is nowhere, or where something else is."""
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
        """A clone with all that a file has. Raises ValueError where something does not fit."""
        places = self.places_of(file)
        patches: dict[Place, Any] = {places[m]: self.patch_of(m, places[m], update) for m, update in file.updates.items()}
        patches |= {places[name]: self.replacement_of(name, places[name], tensor) for name, tensor in file.whole.items()}
        clone = self.patched.clone()
        if strength:
            clone.add_patches(patches, strength)
        return clone


def load(file: Path, model: Any, clip: Any, strength_model: float, strength_clip: float) -> tuple[Any, Any]:
    """Clones of a model and its text encoders with an adapter; without `clip`, its updates of text encoders are left out.

    Raises:
        FileNotFoundError, ValueError: the file is not there, not sound, or for other models; in one sentence.
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
    """What a file has for the text encoders, or for all else."""

    def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if (name.partition(".")[0] in _ENCODERS) is encoders}

    return FileUpdates(chosen(file.updates), chosen(file.whole), file.name, file.base_model)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


class LoadLoCA:
    """An adapter on a diffusion model and its text encoders."""

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
    """The same without text encoders."""

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
