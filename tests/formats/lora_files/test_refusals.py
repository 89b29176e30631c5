"""LoRA files of diffusers, peft and kohya: files that are refused."""

import json
import random
import re

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.formats.lora_files.writer import write_diffusers_lora, write_peft_lora
from support.lora_files import made_up
from support.pipelines import stable_diffusion


def state_of(**more):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(3, 2)}
    tensors |= {key.replace("LAYER", layer): value for key, value in more.items()}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"LAYER.lora_B.weight": None}, r"attn1.to_q.lora_A.weight: the up half of unet.*attn1.to_q is missing"),
        ({"LAYER.lora_A.weight": None}, r"attn1.to_q.lora_B.weight: the down half"),
        ({"other.alpha": torch.ones(())}, r"other.alpha: the down half of other is missing"),
        ({"LAYER.lora_B.weight": torch.ones(3, 3)}, r"lora_A.weight: down \(2, 4\), up \(3, 3\): expected"),
        ({"LAYER.lora_B.weight": torch.ones(3, 0)}, r"expected"),
        ({"LAYER.lora_B.weight": torch.ones(3, 2, 1)}, r"expected|convolution"),
        ({"LAYER.lora_B.weight": torch.ones(3, 2, dtype=torch.int8)}, r"has dtype I8"),
        ({"LAYER.lora_B.weight": torch.full((3, 2), torch.nan)}, r"lora_B.weight holds NaN"),
        ({"LAYER.alpha": torch.tensor(torch.inf)}, r"alpha holds NaN or infinity"),
        ({"LAYER.alpha": torch.ones(2)}, r"expected one number"),
        ({"LAYER.lora.down.weight": torch.ones(2, 4)}, r"has that part twice, in .*lora.down.weight as well"),
        ({"LAYER.hada_w1_a": torch.ones(2)}, r"to_q has down, hada_w1_a, up, which are not exactly one whole update"),
        ({"other.lokr_w1": torch.ones(2, 2)}, r"other.lokr_w1: the lokr_w2 of other is missing"),
        (
            {"LAYER.lora_magnitude_vector": torch.ones(2)},
            r"magnitude \(2,\): expected the norms of 3 rows or of 4 input channels",
        ),
        ({"LAYER.dora_scale": torch.ones(1, 0, 1, 1)}, r"dora_scale \(1, 0, 1, 1\): expected the norms of 3 rows"),
        ({"LAYER.dora_scale": torch.ones(2)}, r"dora_scale \(2,\): expected the norms of 3 rows"),
        ({"LAYER.lora_A.bias": torch.ones(2)}, r"lora_A.bias: a bias in the middle of a LoRA; only updates"),
        ({"LAYER.diff": torch.ones(3, 4)}, r"to_q has diff, down, up, which are not exactly one whole update"),
        ({"emb_params": torch.ones(3)}, r"emb_params: a textual inversion"),
        ({"lora_unet_foo.lora_down.weight": torch.ones(3)}, r"a name with its dots lost"),
        ({"unet.conv_in.weight": torch.ones(3)}, r"unet.conv_in.weight: no part of a LoRA"),
        ({".lora_A.weight": torch.ones(3)}, r"\.lora_A.weight: no part of a LoRA"),
        ({"x" * 600: torch.ones(3)}, r"a key of 600 characters"),
        ({"c.lora_A.weight": torch.ones(2, 4, 1, 1), "c.lora_B.weight": torch.ones(3, 2, 3, 3)}, r"\(p, r, 1, 1\)"),
    ],
)
def test_a_file_that_is_no_sound_lora_is_refused(more, sentence, tmp_path):
    safetensors.torch.save_file(state_of(**more), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{sentence}") as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_listed_with_the_whole_of_its_layer(tmp_path):
    halves = {"d.lora_A.weight": torch.ones(2, 4), "d.lora_B.weight": torch.ones(3, 2), "d.lora_A.bias": torch.ones(2)}
    more = {"emb_params": torch.ones(2), "h.oft_blocks": torch.ones(2), "h.alpha": torch.ones(())}
    safetensors.torch.save_file(state_of(**halves, **more), tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", skip=True)
    assert list(found.pairs) == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert found.skipped.keys() == {*halves, *more}
    safetensors.torch.save_file(halves, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no update of a matrix"):
        read_lora(tmp_path / "x.safetensors", skip=True)


def test_convolutions_of_one_pixel_are_matrices(tmp_path):
    tensors = {"c.lora_down.weight": torch.randn(2, 4, 1, 1), "c.lora_up.weight": torch.randn(3, 2, 1, 1)}
    safetensors.torch.save_file(tensors | {"c.alpha": torch.tensor(1)}, tmp_path / "x.safetensors")
    pair = read_lora(tmp_path / "x.safetensors").pairs["c"]
    expected = torch.einsum("prab,rqab->pq", tensors["c.lora_up.weight"], tensors["c.lora_down.weight"]) / 2
    assert torch.allclose(pair.delta(), expected)


def peft_folder(path, **fields):
    tensors = {"base_model.model.a.lora_A.weight": torch.ones(2, 4), "base_model.model.a.lora_B.weight": torch.ones(3, 2)}
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields
    (path / "adapter_config.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"peft_type": "OFT"}, "peft_type='OFT': it rotates the weights; expected LORA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"r": 3}, "a has rank 2, where its configuration says 3"),
        ({"r": "2"}, "a whole number"),
        ({"lora_alpha": None}, "a finite number"),
        ({"alpha_pattern": {"(a+)+": 3}}, "is a regular expression"),
        ({"alpha_pattern": {"a": "3"}}, "finite numbers"),
        ({"rank_pattern": [1]}, "finite numbers"),
        ({"modules_to_save": [1]}, "list of names"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(fields, sentence, tmp_path):
    assert read_lora(peft_folder(tmp_path)).pairs["a"].scale == 2
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_lora(peft_folder(tmp_path, **fields))


def test_no_alpha_is_guessed_for_peft(tmp_path):
    (peft_folder(tmp_path) / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"alpha in adapter_config.json: that file is missing from the folder"):
        read_lora(tmp_path)


def test_what_is_no_file_of_a_lora(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_lora(tmp_path / "x.safetensors")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no LoRA is in it; adapter_model.bin is there, but a pickle"):
        read_lora(tmp_path)
    with pytest.raises(ValueError, match="ends like a pickle"):
        read_lora(tmp_path / "adapter_model.bin")
    for name in "ab":
        safetensors.torch.save_file(state_of(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"as a.safetensors: name one"):
        read_lora(tmp_path)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    pair = LowRankPair(torch.ones(1, 2), torch.ones(2, 1))
    for write in (write_diffusers_lora, write_kohya_lora):
        with pytest.raises(ValueError, match="no update"):
            write(tmp_path / "x.safetensors", {})
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: it begins with no component"):
            write(tmp_path / "x.safetensors", {"blocks.0.attn.qkv": pair})
        with pytest.raises(ValueError, match=r"ends in .safetensors"):
            write(tmp_path / "x.bin", {"unet.mid_block.proj_in": pair})
    with pytest.raises(ValueError, match="Stable Diffusion only"):
        write_kohya_lora(tmp_path / "x.safetensors", {"transformer.blocks.0.to_q": pair})
    with pytest.raises(ValueError, match="Stable Diffusion only"):
        write_kohya_lora(tmp_path / "x.safetensors", {"unet.something_else": pair})
    with pytest.raises(ValueError, match="no update"):
        write_peft_lora(tmp_path / "lora", {})
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_without_text_encoder_two_calls_its_own_te(tmp_path):
    pipe = stable_diffusion()
    keys = safetensors.torch.load_file(write_kohya_lora(tmp_path / "x.safetensors", made_up(pipe)))
    assert any(key.startswith("lora_te_text_model_encoder_layers_0") for key in keys)
    assert isinstance(pipe, StableDiffusionPipeline)


def test_any_soup_of_keys_is_read_or_refused_in_one_line(tmp_path):
    """Whatever keys and shapes meet: pairs that are sound, or a sentence."""
    generator = random.Random(0)
    layers = [
        "unet.a.to_q",
        "lora_unet_conv_in",
        "base_model.model.b",
        "x.processor.to_out",
        "",
        "lora_te_text_model",
        "..",
        "é\n",
    ]
    endings = [
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_down.weight",
        ".lora_up.weight",
        "_lora.up.weight",
        "_lora.down.weight",
    ]
    endings += [".alpha", ".lora_A.x.weight", ".dora_scale", ".hada_w1_a", ".weight", ".lora_B.bias", ".lora_mid.weight"]
    endings += [".diff", ".diff_b", ".lokr_w1", ".lokr_w2", ".set_weight", ".lora_magnitude_vector", ".fourierft_spectrum"]
    shapes = [(), (1,), (2,), (0, 2), (2, 2), (2, 0), (2, 2, 1, 1), (2, 2, 3, 3), (2, 2, 1)]
    outcomes = {"read": 0, "refused": 0}
    for trial in range(500):
        keys = {
            generator.choice(layers[: 1 + trial % 8]) + generator.choice(endings[: 2 + trial % (12 if trial % 4 else 19)])
            for _ in range(1 + trial % 5)
        }
        tensors = {key: torch.ones(generator.choice(shapes if trial % 2 else [(2, 2)])) for key in keys if key}
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
        try:
            found = read_lora(tmp_path / "x.safetensors", skip=bool(trial % 3))
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert found.updates or found.whole or found.differences
            assert all(torch.isfinite(pair.delta()).all() for pair in found.pairs.values())
            outcomes["read"] += 1
    assert min(outcomes.values()) > 10, outcomes


# What a file of a few kilobytes could ask for


@pytest.mark.parametrize(
    "shapes",
    [
        {"lokr_w1_a": (50_000, 1), "lokr_w1_b": (1, 50_000), "lokr_w2": (1, 1)},
        {"lokr_w1": (1, 1), "lokr_w2_a": (50_000, 1), "lokr_w2_b": (1, 50_000)},
        {"lokr_w1": (1, 1), "lokr_w2_a": (1, 50_000), "lokr_w2_b": (1, 50_000), "lokr_t2": (1, 1, 1, 1)},
        {"lora_down.weight": (1, 50_000, 1, 1), "lora_up.weight": (1, 1, 1, 1), "lora_mid.weight": (1, 1, 1, 50_000)},
    ],
)
def test_no_product_is_made_of_factors_that_ask_for_too_much_memory(shapes, tmp_path):
    safetensors.torch.save_file(
        {f"lora_unet_conv_in.{k}": torch.ones(s) for k, s in shapes.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=r"x.safetensors: .*more than 2\*\*31 cells"):
        read_lora(tmp_path / "x.safetensors")


def test_products_are_made_layer_by_layer(tmp_path):
    sizes = {"lokr_w1_a": (40_000, 1), "lokr_w1_b": (1, 40_000), "lokr_w2": (1, 1)}
    numbers = {f"lora_unet_down_blocks_{i}_x.{key}": torch.ones(size) for i in range(50) for key, size in sizes.items()}
    names = {key.replace("_x.", "_resnets_0_conv1."): value for key, value in numbers.items()}
    safetensors.torch.save_file(names, tmp_path / "x.safetensors")
    assert len(read_lora(tmp_path / "x.safetensors").updates) == 50  # 320 GB, if they were held


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"LAYER.set_weight": torch.tensor(1.0)}, r"set_weight|weight \(\): expected one number for each row"),
        ({"LAYER.diff_b": torch.tensor(1.0)}, r"bias \(\): expected one number for each row"),
        ({"LAYER.diff_b": torch.ones(0)}, r"bias \(0,\): expected one number for each row"),
    ],
)
def test_numbers_without_rows_are_refused(more, sentence, tmp_path):
    safetensors.torch.save_file(state_of(**more), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*({sentence})"):
        read_lora(tmp_path / "x.safetensors")


def test_a_core_without_numbers_is_refused(tmp_path):
    hada = {"hada_w1_a": (2, 6), "hada_w1_b": (2, 4), "hada_w2_a": (2, 6), "hada_w2_b": (2, 4)}
    shapes = hada | {"hada_t1": (2, 2, 0, 3), "hada_t2": (2, 2, 0, 3), "dora_scale": (6, 1)}
    safetensors.torch.save_file(
        {f"lora_unet_conv_in.{k}": torch.ones(s) for k, s in shapes.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=r"x.safetensors: .*expected no empty tensor"):
        read_lora(tmp_path / "x.safetensors")
