"""Kinds of updates and the forms of numbers they come in, beside those of the golden files."""

import json

import pytest
import safetensors.torch
import torch

from loca_vision.commands.inspect_file import describe
from loca_vision.commands.main import main
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.reader import read_lora

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
RESNET = "lora_unet_mid_block_resnets_0"


def written(path, tensors):
    safetensors.torch.save_file(tensors, path)
    return path


# Numbers


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("halves", [("lora_down.weight", "lora_up.weight"), ("lokr_w1", "lokr_w2"), ("diff",)])
def test_no_digit_of_a_stored_number_is_lost(halves, dtype, tmp_path):
    values = [torch.randn(3, 4), torch.randn(5, 3)]
    stored = {f"{FLAT}_attn1_to_q.{half}": value.to(dtype) for half, value in zip(halves, values, strict=False)}
    (update,) = read_lora(written(tmp_path / "x.safetensors", stored)).updates.values()
    first, *second = [value.to(dtype).double() for value in values[: len(halves)]]
    expected = {2: lambda: second[0] @ first if "lora" in halves[0] else torch.kron(first, second[0]), 1: lambda: first}
    made = update.make()
    delta = made if isinstance(made, torch.Tensor) else made.delta()
    assert torch.allclose(delta.double(), expected[len(halves)](), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_merging_into_weights_of_few_bits_rounds_once(dtype, tmp_path):
    weight, (up, down) = torch.randn(6, 4).to(dtype), (torch.randn(6, 2), torch.randn(2, 4))
    pair = {f"{FLAT}_attn1_to_q.lora_up.weight": up, f"{FLAT}_attn1_to_q.lora_down.weight": down}
    source = read_source(written(tmp_path / "lora.safetensors", pair))
    base = written(tmp_path / "base.safetensors", {f"{BLOCK}.attn1.to_q.weight": weight})
    out = safetensors.torch.load_file(merge(base, source, tmp_path / "out.safetensors", component="unet"))
    merged = out[f"{BLOCK}.attn1.to_q.weight"]
    assert merged.dtype == dtype and torch.equal(merged.float(), (weight.float() + up @ down).to(dtype).float())


def test_eight_bits_that_are_scaled_are_refused(tmp_path):
    name = f"{BLOCK}.attn1.to_q"
    tensors = {f"{name}.weight": torch.ones(6, 4).to(torch.float8_e4m3fn), f"{name}.scale_weight": torch.ones(1)}
    source = read_source(written(tmp_path / "x.safetensors", {f"{FLAT}_attn1_to_q.diff": torch.ones(6, 4)}))
    with pytest.raises(ValueError, match=r"to_q.weight has a scale of its own in the base, .*to_q.scale_weight: merge into"):
        merge(written(tmp_path / "base.safetensors", tensors), source, tmp_path / "out.safetensors", component="unet")
    tensors[f"{name}.weight"] = torch.full((6, 4), 448.0).to(torch.float8_e4m3fn)
    del tensors[f"{name}.scale_weight"]
    with pytest.raises(ValueError, match=r"would not be finite in torch.float8_e4m3fn"):
        merge(
            written(tmp_path / "base.safetensors", tensors),
            source,
            tmp_path / "out.safetensors",
            component="unet",
            strength=100,
        )


def test_adapters_of_this_library_have_no_eight_bits(tmp_path, capsys):
    about = {"loca_adapter_metadata": "{}"}
    safetensors.torch.save_file({"full.head.bias": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "x.safetensors", about)
    for words in ("inspect {}", "convert {} {}.out --ratio 1.0", "combine {0} {0} {0}.out"):
        assert main(words.format(*[tmp_path / "x.safetensors"] * 2).split()) == 2
        assert "dtype 'F8_E5M2' is not one of" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_the_difference_of_checkpoints_of_few_bits(dtype, tmp_path):
    before, after = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
    for name, weight in (("base", before), ("tuned", after)):
        written(tmp_path / f"{name}.safetensors", {f"{BLOCK}.attn1.to_q.weight": weight})
    words = f"extract {tmp_path}/base.safetensors {tmp_path}/tuned.safetensors {tmp_path}/out.safetensors --component unet"
    assert main([*words.split(), "--to", "diffusers", "--rank", "4"]) == 0
    (pair,) = read_lora(tmp_path / "out.safetensors").pairs.values()
    assert torch.allclose(pair.delta(), after.float() - before.float(), atol=1e-5)


def test_alphas_of_some_layers_and_not_of_others(tmp_path):
    names = ("to_q", "to_k", "to_v")
    tensors = {}
    for name, rank in zip(names, (1, 2, 4), strict=True):
        tensors[f"{FLAT}_attn1_{name}.lora_down.weight"] = torch.randn(rank, 4)
        tensors[f"{FLAT}_attn1_{name}.lora_up.weight"] = torch.randn(6, rank)
    tensors[f"{FLAT}_attn1_to_k.alpha"] = torch.tensor(0.5, dtype=torch.bfloat16)
    tensors[f"{FLAT}_attn1_to_v.alpha"] = torch.tensor([8], dtype=torch.int64)
    pairs = read_lora(written(tmp_path / "x.safetensors", tensors)).pairs
    scales = {name.rpartition(".")[2]: pair.scale for name, pair in pairs.items()}
    assert scales == {"to_q": 1.0, "to_k": 0.25, "to_v": 2.0}


# What is added to biases and norms, or replaces them


def test_biases_and_norms_are_merged(tmp_path):
    """LyCORIS' `full` and `norm`, and ComfyUI's `diff_b` and `set_weight`."""
    values = {
        f"{FLAT}_norm1.w_norm": ("norm1.weight", torch.randn(4)),
        f"{FLAT}_norm1.b_norm": ("norm1.bias", torch.randn(4)),
        f"diffusion_model.{BLOCK}.norm2.diff": ("norm2.weight", torch.randn(4)),
        f"{FLAT}_attn1_to_out_0.diff_b": ("attn1.to_out.0.bias", torch.randn(4)),
        f"{FLAT}_attn1_to_q.diff": ("attn1.to_q.weight", torch.randn(4, 4)),
        f"diffusion_model.{BLOCK}.norm3.set_weight": ("norm3.weight", torch.randn(4)),
    }
    base = {f"{BLOCK}.{name}": torch.randn(value.shape) for name, value in values.values()}
    file = written(tmp_path / "x.safetensors", {key: value for key, (_, value) in values.items()})
    source = read_source(file)
    out = merge(
        written(tmp_path / "base.safetensors", base), source, tmp_path / "o.safetensors", component="unet", strength=0.5
    )
    merged = safetensors.torch.load_file(out)
    for name, value in values.values():
        full = f"{BLOCK}.{name}"
        assert torch.allclose(merged[full], value if name.startswith("norm3") else base[full] + 0.5 * value), name
    with pytest.raises(ValueError, match=r"the base has no tensor .*to_out.0.bias, to which the update adds"):
        del base[f"{BLOCK}.attn1.to_out.0.bias"]
        merge(written(tmp_path / "base.safetensors", base), source, tmp_path / "other.safetensors", component="unet")


def test_biases_of_a_fused_layer_are_divided_as_its_rows(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.diff": torch.randn(6, 2), f"{key}.diff_b": torch.arange(6.0)}
    read = read_lora(written(tmp_path / "x.safetensors", tensors))
    assert [tensor.tolist() for tensor in read.differences.values()] == [[0, 1], [2, 3], [4, 5]]
    assert list(read.differences) == [f"transformer.transformer_blocks.0.attn.to_{part}.bias" for part in "qkv"]


def test_what_has_no_place_in_an_adapter_is_refused_or_listed(tmp_path, capsys):
    tensors = {f"{FLAT}_attn1_to_q.diff": torch.randn(4, 4), f"{FLAT}_norm1.w_norm": torch.randn(4)}
    words = f"convert {written(tmp_path / 'x.safetensors', tensors)} {tmp_path}/out --ratio 1.0".split()
    assert main(words) == 2
    assert "norm1.weight: it is the difference of a parameter that is not a matrix" in capsys.readouterr().err
    assert main([*words, "--skip"]) == 0
    assert f"left out: unet.{BLOCK}.norm1.weight: it is the difference" in capsys.readouterr().out
    magnitude = {f"{FLAT}_attn1_to_k.dora_scale": torch.ones(4, 1), f"{FLAT}_attn1_to_k.lora_up.weight": torch.ones(4, 1)}
    magnitude[f"{FLAT}_attn1_to_k.lora_down.weight"] = torch.ones(1, 4)
    words[1:3] = str(written(tmp_path / "dora.safetensors", magnitude)), f"{tmp_path}/other"
    assert (
        main(words) == 2
        and "its update (DoRA) depends on the weight; name the weights (--base), or merge it into them"
        in capsys.readouterr().err
    )


def test_a_file_of_biases_alone_is_merged_and_not_converted(tmp_path, capsys):
    file = written(tmp_path / "x.safetensors", {f"{FLAT}_norm1.b_norm": torch.ones(4)})
    base = written(tmp_path / "base.safetensors", {f"{BLOCK}.norm1.bias": torch.ones(4)})
    assert main(f"convert {file} {tmp_path}/out --ratio 1.0 --skip".split()) == 2
    assert "there is no update of a matrix in it" in capsys.readouterr().err
    assert main(f"merge {base} {file} {tmp_path}/out.safetensors".split()) == 0
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")[f"{BLOCK}.norm1.bias"], torch.full((4,), 2.0))


def test_patterns_of_peft_name_layers_as_the_file_does(tmp_path):
    """A fused layer of Flux, by the name that it had where it was trained."""
    layer = "double_blocks.0.img_attn.qkv"
    tensors = {f"base_model.model.{layer}.lora_A.weight": torch.ones(1, 2)}
    tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.ones(6, 1)
    written(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1, "alpha_pattern": {layer: 5}}))
    pairs = read_lora(tmp_path).pairs
    assert len(pairs) == 3 and {pair.scale for pair in pairs.values()} == {5.0}


# Names without a component


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model."])
def test_the_component_of_names_without_one(prefix, tmp_path):
    layer = "transformer_blocks.0.attn.to_q"
    tensors = {f"{prefix}{layer}.lora_A.weight": torch.ones(1, 2), f"{prefix}{layer}.lora_B.weight": torch.ones(3, 1)}
    file = written(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    assert list(read_source(file, component="transformer").shapes) == [f"transformer.{layer}"]
    assert list(read_source(file).shapes) == [f"transformer.{layer}" if "diffusion" in prefix else layer]


# What is made of small files


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"lokr_w1": (50_000, 1), "lokr_w2": (1, 50_000)}, "is 50000 x 50000, more than 2**31 cells"),
        ({"lora_down.weight": (1, 50_000), "lora_up.weight": (50_000, 1)}, "is 50000 x 50000, more than 2**31 cells"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2)}, "expected lokr_w2_a of (p, r), lokr_w2_b of (r, q)"),
        ({"lokr_w1": (2, 2, 2), "lokr_w2": (2, 2)}, "expected lokr_w1 a matrix, lokr_w2 of 2 or 4 axes"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2)}, "the hada_w2_b of"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)}, "expected (p, r), (r, q)"),
        (
            {"lora_down.weight": (2, 4, 1, 1), "lora_up.weight": (4, 2, 1, 1), "lora_mid.weight": (2, 3, 3, 3)},
            "a core of (r, r",
        ),
        ({"lora_down.weight": (2, 4, 3), "lora_up.weight": (4, 2, 1)}, "expected (r, q) and (p, r), or (r, q, kh, kw)"),
        ({"diff": (2, 4, 3)}, "expected (p, q) or (p, q, kh, kw)"),
        ({"diff": (2, 0)}, "expected (p, q)"),
        ({"oft_blocks": (2, 2, 2)}, "OFT, which rotates the weights; only updates that are added to a weight are read"),
        ({"a1.weight": (2, 2)}, "GLoRA, which transforms the weights"),
        ({"lora_embedding_A": (2, 2)}, "LoRA of an embedding"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "lora_B.bias": (4,)}, "has a bias of LoRA, and no LoRA"),
        ({"fourierft_spectrum": (5,)}, "a spectrum of FourierFT, for which adapter_config.json of peft's type FOURIERFT"),
    ],
    ids=str,
)
def test_shapes_that_fit_no_update_are_refused(parts, sentence, tmp_path):
    tensors = {f"{FLAT}_attn1_to_q.{role}": torch.ones(shape) for role, shape in parts.items()}
    with pytest.raises(ValueError, match=r"x\.safetensors: ") as caught:
        read_lora(written(tmp_path / "x.safetensors", tensors))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_zero_row_has_no_direction_for_dora(tmp_path):
    tensors = {f"{FLAT}_attn1_to_q.dora_scale": torch.ones(4, 1), f"{FLAT}_attn1_to_q.diff": torch.zeros(4, 4)}
    source = read_source(written(tmp_path / "x.safetensors", tensors))
    with pytest.raises(ValueError, match=r"to_q: a row or column of the updated weight is zero"):
        source.read(f"unet.{BLOCK}.attn1.to_q", torch.zeros(4, 4))


def test_one_module_by_two_names_is_refused(tmp_path):
    tensors = {f"{FLAT}_attn1_to_q.diff": torch.ones(4, 4), f"unet.{BLOCK}.attn1.to_q.diff": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=r"to_q has that part twice"):
        read_lora(written(tmp_path / "x.safetensors", tensors))
    fused = {"diffusion_model.double_blocks.0.img_attn.qkv.diff": torch.ones(6, 2)}
    fused["transformer.transformer_blocks.0.attn.to_q.diff"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"an update of transformer.transformer_blocks.0.attn.to_q already"):
        read_lora(written(tmp_path / "x.safetensors", fused))


def test_inspect_tells_the_kinds(tmp_path):
    tensors = {f"{FLAT}_attn1_to_q.lokr_w1": torch.ones(2, 2), f"{FLAT}_attn1_to_q.lokr_w2": torch.ones(2, 2)}
    tensors |= {f"{FLAT}_attn1_to_k.dora_scale": torch.ones(4, 1), f"{FLAT}_attn1_to_k.diff": torch.ones(4, 4)}
    tensors |= {f"{RESNET}_conv1.lora_down.weight": torch.ones(2, 4, 3, 3), f"{FLAT}_norm1.b_norm": torch.ones(4)}
    tensors |= {f"{RESNET}_conv1.lora_up.weight": torch.ones(4, 2, 1, 1), "emb_params": torch.ones(2)}
    said = describe(written(tmp_path / "x.safetensors", tensors))
    assert "LoKr of 1 modules" in said and "full with DoRA of 1 modules" in said and "LoRA of 1 modules, ranks 2" in said
    assert f"added to: unet.{BLOCK}.norm1.bias (4,)" in said and "not understood: emb_params: a textual inversion" in said
    rows = {line.split()[0].rpartition(".")[2]: line.split() for line in said.splitlines() if line.startswith("unet.")}
    assert rows["to_q"][1:6] == ["4", "x", "4", "8", "4"] and rows["to_k"][5:7] == ["-", "-"]
    assert rows["conv1"][1:5] == ["4", "x", "36", "80"]


# Factors in forms of their own


def test_a_kronecker_product_of_a_core_and_a_larger_factor(tmp_path):
    w1, a, b, core = torch.randn(2, 2), torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 2, 3, 3)
    factors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
    tensors = {f"{RESNET}_conv1.{name}": factor for name, factor in factors.items()}
    (update,) = read_lora(written(tmp_path / "x.safetensors", tensors)).updates.values()
    second = torch.einsum("ijhw,ip,jq->pqhw", core, a, b).contiguous()
    assert torch.allclose(update.make(), torch.kron(w1[:, :, None, None], second).flatten(1), atol=1e-6)


@pytest.mark.parametrize("kind", ["lokr", "loha", "cores"])
def test_factors_in_different_dtypes_are_computed_in_the_wider(kind, tmp_path):
    a, b, c, d = (
        torch.randn(3, 3, dtype=torch.float64),
        torch.randn(3, 3),
        torch.randn(3, 3).half(),
        torch.randn(3, 3).bfloat16(),
    )
    names = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b") if kind == "lokr" else ()
    names = names or ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = dict(zip(names, (a, b, c, d), strict=True))
    first, second = a @ b.double(), c.double() @ d.double()
    if kind == "cores":
        t1, t2 = torch.randn(3, 3, 2, 2), torch.randn(3, 3, 2, 2).half()
        tensors |= {"hada_t1": t1, "hada_t2": t2}
        first = torch.einsum("ijhw,ip,jq->pqhw", t1.double(), a, b.double()).flatten(1)
        second = torch.einsum("ijhw,ip,jq->pqhw", t2.double(), c.double(), d.double()).flatten(1)
    stored = {f"{RESNET}_conv1.{name}": tensor for name, tensor in tensors.items()}
    (update,) = read_lora(written(tmp_path / "x.safetensors", stored)).updates.values()
    assert torch.allclose(update.make(), torch.kron(first, second) if kind == "lokr" else first * second)


def test_a_file_of_biases_alone_converts_to_no_adapter(tmp_path):
    from loca_vision.formats.conversion.to_adapter import to_lora_adapter

    source = read_source(written(tmp_path / "x.safetensors", {f"{FLAT}_attn1_to_out_0.diff_b": torch.ones(4)}))
    with pytest.raises(ValueError, match="no update of a matrix"):
        to_lora_adapter(source, tmp_path / "out.safetensors", skip=True)
