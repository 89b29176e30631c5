"""What the nodes for ComfyUI use of it, for tests without it: a table of weights that patches are added to and computed with.

It keeps to ComfyUI's contract: `add_patches` takes (name, part, function), a patch gets the part of a weight, and changes it in
place. Which weight a layer's name means is here what the test says.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

NODES = Path(__file__).parents[2] / "examples" / "comfyui" / "loca_comfyui" / "__init__.py"
Layer = str | tuple[str, tuple[int, int, int] | None] | tuple[str, None, Callable[[Tensor], Tensor]]


class Patcher:
    """ComfyUI's `ModelPatcher`, its `CLIP`, and the models that they hold, in one.

    Args:
        weights: by name.
        layers: the names that layers have in LoRA files, and the weight of each.
    """

    def __init__(self, weights: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> None:
        self.weights, self.layers = dict(weights), dict(layers)
        self.patches: dict[str, list[Any]] = {}
        self.model = self.cond_stage_model = self.patcher = self

    def model_state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def clone(self) -> Patcher:
        made = Patcher(self.weights, self.layers)
        made.patches = {name: list(patches) for name, patches in self.patches.items()}
        return made

    def add_patches(self, patches: Mapping[Any, Any], strength: float = 1.0) -> None:
        for (name, part, function), patch in patches.items():
            self.patches.setdefault(name, []).append((strength, patch, part, function or (lambda difference: difference)))

    def weight(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A weight with its patches."""
        result = self.weights[name].detach().to(dtype, copy=True)
        for strength, patch, part, function in self.patches.get(name, ()):
            rows = result if part is None else result.narrow(*part)
            if isinstance(patch, tuple):
                kind, (tensor,) = patch
                assert kind == "set"
                rows.copy_(tensor)
            else:
                given = rows.clone()
                assert patch.calculate_weight(given, name, strength, 1.0, part, function, dtype, None) is given
                rows.copy_(given)
        return result


def import_nodes(patch: pytest.MonkeyPatch, loras: Path) -> ModuleType:
    """The nodes, over stand-ins for the modules of ComfyUI, with a folder for LoRA files."""
    comfy, lora, adapter, paths = (ModuleType(n) for n in ("comfy", "comfy.lora", "comfy.weight_adapter", "folder_paths"))
    comfy.lora, comfy.weight_adapter = lora, adapter  # type: ignore[attr-defined]
    lora.model_lora_keys_unet = lora.model_lora_keys_clip = lambda model, known: known | model.layers  # type: ignore[attr-defined]
    adapter.WeightAdapterBase = type("WeightAdapterBase", (), {})  # type: ignore[attr-defined]
    paths.get_filename_list = lambda kind: [str(f.relative_to(loras)) for f in loras.rglob("*.safetensors")]  # type: ignore[attr-defined]
    paths.get_full_path_or_raise = lambda kind, name: str(loras / name)  # type: ignore[attr-defined]
    for module in (comfy, lora, adapter, paths):
        patch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("loca_comfyui_over_stand_ins", NODES)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
