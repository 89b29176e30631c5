"""Turn the tensors of one layer of a file into updates of a model's modules, differences of parameters and whole tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.module_update import ModuleUpdate
from loca_vision.formats.lora_files.original_names import Layer
from loca_vision.formats.lora_files.peft_fourierft import fourier_update
from loca_vision.formats.lora_files.scales import FourierSettings, Scales
from loca_vision.formats.lora_files.update_kinds import update_of

# The 3 x 3 convolutions in diffusers' UNets, for which LyCORIS may have flat factors.
_CONVOLUTION = re.compile(r"unet\..*\b(conv_in|conv_out|conv1|conv2|(down|up)samplers\.0\.conv)")


@dataclass(frozen=True)
class LoraFile:
    """The contents of a LoRA file, or of a file by LyCORIS or peft's other methods.

    Args:
        updates: the updates by module path, in the file's order; in a pipeline, paths begin with the component:
            `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`. A text encoder's paths contain `text_model`.
        whole: tensors that replace those of the model (`modules_to_save` of peft), by the parameter's name.
        differences: what is added to other parameters, such as biases, by name.
        skipped: the keys left out, with what they are.
    """

    updates: dict[str, ModuleUpdate]
    whole: dict[str, Tensor] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> dict[str, LowRankPair]:
        """The updates that consist of two factors and nothing else."""
        made = {path: update.make() for path, update in self.updates.items() if update.kind.startswith("LoRA")}
        return {p: m for p, m in made.items() if isinstance(m, LowRankPair) and not self.updates[p].needs_weight}


@dataclass(frozen=True)
class FileLayer:
    """One layer of a file.

    Args:
        path: as in `Key`.
        in_file: its name in the file, without peft's prefix, which is what peft's configuration calls it.
        layer: the modules that make up the layer, and their rows.
    """

    path: str
    in_file: str
    layer: Layer


def add_layer(
    read: LoraFile, of: FileLayer, parts: Mapping[str, Tensor], scales: Scales, sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Add one layer of a file to what was read.

    Args:
        read: what was read so far.
        of: the layer.
        parts: its tensors by role: floating-point numbers, all finite.
        sizes: as in `read_lora`.

    Raises:
        ValueError: the tensors do not make a whole update, or the rows are not those of the layer's modules.
    """
    rest, layer, columns = dict(parts), of.layer, None
    if "set_weight" in rest:
        _divide(read.whole, layer, rest.pop("set_weight"), "weight", None)
    if "diff" in rest and rest["diff"].dim() == 1:
        _divide(read.differences, layer, rest.pop("diff"), "weight", None)
    bias, of_lora = rest.pop("diff_b", None), rest.pop("bias", None)
    if rest or of_lora is not None:
        update = _update(of, rest, scales, sizes)
        columns = update.shape[1]
        for module, rows in layer.rows(update.shape[0], columns):
            _put(read.updates, module, update.part(rows))
    if of_lora is not None:
        made = update.make()
        if not isinstance(made, LowRankPair):
            raise ValueError(f"{of.path} has a bias of LoRA, and no LoRA")
        bias = made.scale * of_lora if bias is None else bias + made.scale * of_lora
    if bias is not None:
        _divide(read.differences, layer, bias, "bias", columns)


def _update(of: FileLayer, parts: Mapping[str, Tensor], scales: Scales, sizes: Mapping[str, tuple[int, int]]) -> ModuleUpdate:
    if "spectrum" in parts:
        if not isinstance(scales.in_folder, FourierSettings):
            raise ValueError("a spectrum of FourierFT, for which adapter_config.json of peft's type FOURIERFT is needed")
        return fourier_update(of.in_file, parts["spectrum"], scales.in_folder, sizes.get(of.path))
    update = update_of(of.path, parts, scales.of_layer(of.path, of.in_file, parts.get("alpha")))
    if update.kernel is None and update.shape[1] % 9 == 0 and _CONVOLUTION.fullmatch(of.path):
        return replace(update, kernel=(3, 3))
    return update


def _divide(into: dict[str, Tensor], layer: Layer, tensor: Tensor, parameter: str, columns: int | None) -> None:
    if not tensor.numel() or not tensor.dim():
        raise ValueError(f"{parameter} {tuple(tensor.shape)}: expected one number for each row")
    for module, rows in layer.rows(len(tensor), columns):
        _put(into, f"{module}.{parameter}", tensor[rows])


def _put(into: dict[str, Any], name: str, value: object) -> None:
    if name in into:
        raise ValueError(f"there is an update of {name} already, by a layer of another name")
    into[name] = value
