"""Find a model's parameters in a base checkpoint: under the names of diffusers and transformers, old or new, or in the
original layout of Stable Diffusion, Flux and SD3, which has a whole pipeline in one file and some layers fused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.formats.lora_files.former_names import Spelling, similar
from loca_vision.formats.lora_files.keys import canonical, family_of, layer_of_tensor
from loca_vision.formats.lora_files.original_names import Layer
from loca_vision.storage.safetensors_file import Entry
from loca_vision.storage.sharded_weights import open_weights

# Layouts with a whole pipeline in one file: for each prefix of a part's names, its component, and whether OpenCLIP named it.
_ORIGINAL = {
    "cond_stage_model.transformer.": ("text_encoder.", False),
    "cond_stage_model.model.": ("text_encoder.", True),
    "conditioner.embedders.0.transformer.": ("text_encoder.", False),
    "conditioner.embedders.0.model.": ("text_encoder_2.", True),  # of SDXL's refiner, which has no other text encoder
    "conditioner.embedders.1.model.": ("text_encoder_2.", True),
}
_DENOISER = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")
_OPEN_CLIP = (
    (r"transformer\.resblocks\.(\d+)\.ln_([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj", r"encoder.layers.\1.self_attn.out_proj"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc", r"encoder.layers.\1.mlp.fc1"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj", r"encoder.layers.\1.mlp.fc2"),
    (r"ln_final", "final_layer_norm"),
    (r"token_embedding", "embeddings.token_embedding"),
)
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint has a parameter.

    Args:
        name: the name of the tensor in the checkpoint.
        rows: the tensor's rows that make up the parameter, in the parameter's order; None for the whole tensor.
        transposed: whether the tensor is the parameter with its axes exchanged.
    """

    name: str
    rows: Tensor | None = None
    transposed: bool = False

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """Return the parameter's shape, given the tensor's entry."""
        whole = entry.shape[::-1] if self.transposed else entry.shape
        return whole if self.rows is None else (len(self.rows), *whole[1:])

    def taken(self, tensor: Tensor) -> Tensor:
        """Return the parameter, given the tensor."""
        whole = tensor.T.contiguous() if self.transposed else tensor
        return whole if self.rows is None else whole[self.rows]


class BaseTensors:
    """The parameters of a checkpoint by the names that updates use, with or without the component of a pipeline in front.

    Args:
        entries: the checkpoint's entries.
        component: the component that the checkpoint is, "" for a single model. A checkpoint of the original layout has its
            components in its names.
        modules: the model's module names, which are used if the checkpoint has those of another version of transformers.

    Raises:
        ValueError: two tensors are the same parameter.
    """

    def __init__(self, entries: Mapping[str, Entry], component: str = "", modules: Iterable[str] = ()) -> None:
        self.entries = entries
        self.is_original = is_original(entries)
        self._exact: dict[str, Target] = {}
        self._similar: dict[str, list[Target]] = {}
        family, bare = family_of(entries), not any(name.startswith(_DENOISER[0]) for name in entries)
        before, spelling = f"{component}." if component else "", Spelling(modules)
        for name, entry in entries.items():
            if self.is_original:
                known = _original(name, entry, family, bare)
            else:
                known = [(spelling.of_parameter(canonical(before + name)), Target(name))]
            places = known or [(name, Target(name))]  # unknown, such as a VAE's
            for parameter, target in places:
                if parameter in self._exact:
                    raise ValueError(f"{self._exact[parameter].name} and {name} are both {parameter} in the base")
                self._exact[parameter] = target
                self._similar.setdefault(similar(parameter), []).append(target)

    def parameters(self) -> list[str]:
        """Return the names of all parameters."""
        return list(self._exact)

    def find(self, parameter: str) -> Target | None:
        """Return where a parameter is, or None: under its name, or else the only one in another version of transformers."""
        exact = self._exact.get(canonical(parameter))
        if exact is not None:
            return exact
        there = self._similar.get(similar(canonical(parameter)), [])
        return there[0] if len(there) == 1 else None


class _Sizes(Mapping[str, tuple[int, int]]):
    """(p, q) of weights by module, which are found in the same way as for an update."""

    def __init__(self, base: BaseTensors) -> None:
        self.base = base

    def __getitem__(self, module: str) -> tuple[int, int]:
        target = self.base.find(f"{module}.weight")
        shape = target.shape(self.base.entries[target.name]) if target else ()
        if len(shape) != 2:
            raise KeyError(module)
        return shape[0], shape[1]

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".weight") for name in self.base.parameters() if name.endswith(".weight"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def matrices_in(path: str | os.PathLike[str]) -> Mapping[str, tuple[int, int]]:
    """Return (p, q) of the weights in a checkpoint by module, under every name that an update may use for it.

    Raises:
        FileNotFoundError, ValueError: as `open_weights`.
    """
    with open_weights(path) as weights:
        return _Sizes(BaseTensors(weights.entries))


def is_original(names: Iterable[str]) -> bool:
    """Return whether a checkpoint has its authors' original layout."""
    return any(name.startswith((*_ORIGINAL, *_DENOISER)) for name in names)


def _original(name: str, entry: Entry, family: str, bare: bool) -> list[tuple[str, Target]]:
    """Return the parameters that a tensor of the original layout contains."""
    for before, (component, open_clip) in _ORIGINAL.items():
        if name.startswith(before):
            rest = name.removeprefix(before)
            return _of_open_clip(component, name, rest, entry) if open_clip else [(canonical(component + rest), Target(name))]
    module, _, parameter = name.rpartition(".")
    layer = layer_of_tensor(module, family, bare=bare)
    if not layer.modules or parameter not in ("weight", "bias"):
        return []
    return _divided(name, layer, parameter, entry)


def _divided(name: str, layer: Layer, parameter: str, entry: Entry) -> list[tuple[str, Target]]:
    columns = int(torch.Size(entry.shape[1:]).numel()) if len(entry.shape) > 1 else None
    try:
        rows = layer.rows(entry.shape[0], columns)
    except ValueError:
        return []  # another model's, or its rows are in an unknown order: an update for it finds nothing and is refused
    if len(rows) == 1 and layer.rule == "whole":
        return [(f"{layer.modules[0]}.{parameter}", Target(name))]
    return [(f"{module}.{parameter}", Target(name, of)) for module, of in rows]


def _of_open_clip(component: str, name: str, rest: str, entry: Entry) -> list[tuple[str, Target]]:
    if rest == "text_projection":
        return [(f"{component}text_projection.weight", Target(name, transposed=True))]
    if rest == "positional_embedding":
        return [(f"{component}text_model.embeddings.position_embedding.weight", Target(name))]
    fused = _FUSED.fullmatch(rest)
    if fused:
        before = f"{component}text_model.encoder.layers.{fused[1]}.self_attn."
        return _divided(name, Layer(tuple(f"{before}{part}_proj" for part in "qkv"), "equal"), fused[2], entry)
    module, _, parameter = rest.rpartition(".")
    for pattern, path in _OPEN_CLIP:
        if re.fullmatch(pattern, module):
            return [(f"{component}text_model.{re.sub(pattern, path, module)}.{parameter}", Target(name))]
    return []
