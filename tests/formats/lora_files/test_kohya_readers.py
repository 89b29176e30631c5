"""Files with kohya's keys are what A1111, sd-scripts and ComfyUI expect: names of text encoders, zeros, header."""

import pytest
import torch

from loca_vision.commands.main import main
from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.stable_diffusion import family_of
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from loca_vision.storage.safetensors_file import open_safetensors

LAYER = "text_model.encoder.layers.{}.self_attn.{}"
FIRST, SECOND = f"text_encoder.{LAYER}", f"text_encoder_2.{LAYER}"
ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.{}.{}"


def pair(cols=8, rows=8):
    return LowRankPair(torch.ones(2, cols), torch.ones(rows, 2))


def written(path, pairs, **about):
    with open_safetensors(write_kohya_lora(path / "lora.safetensors", pairs, **about)) as file:
        return file.tensors(), file.metadata


TELLING = {
    "depth": ({ATTENTION.format(1, "attn1.to_q"): pair()}, {}),
    "width": ({ATTENTION.format(0, "attn2.to_k"): pair(2048)}, {}),
    "size": ({"unet.add_embedding.linear_1": pair()}, {}),
    "second": ({SECOND.format(0, "q_proj"): pair()}, {}),
    "name": ({}, {"base_model": "stabilityai/stable-diffusion-xl-base-1.0"}),
    "said": ({}, {"xl": True}),
}


@pytest.mark.parametrize("case", TELLING)
def test_the_first_text_encoder_of_xl_is_te1_and_the_header_says_xl(case, tmp_path):
    pairs, about = TELLING[case]
    tensors, header = written(tmp_path, {FIRST.format(0, "q_proj"): pair(), **pairs}, **about)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    assert not any(key.startswith("lora_te_") for key in tensors)
    assert header["ss_base_model_version"] == "sdxl_base_v1-0" and header["ss_v2"] == "False"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize(
    ("width", "base_model", "version", "v2", "architecture"),
    [
        (768, "unknown", "sd_v1", "False", "stable-diffusion-v1/lora"),
        (1024, "unknown", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        (1024, "stabilityai/stable-diffusion-2-1", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        (1024, "stabilityai/stable-diffusion-2-1-base", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
    ],
)
def test_the_header_tells_the_other_stable_diffusions(width, base_model, version, v2, architecture, tmp_path):
    pairs = {ATTENTION.format(0, "attn2.to_v"): pair(width), FIRST.format(0, "out_proj"): pair()}
    tensors, header = written(tmp_path, pairs, base_model=base_model)
    assert "lora_te_text_model_encoder_layers_0_self_attn_out_proj.alpha" in tensors
    said = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    assert tuple(header[key] for key in said) == (version, v2, architecture)


def test_where_nothing_tells_the_header_says_nothing(tmp_path):
    """A1111 takes a file with any field in its header, and none of these, for one of Stable Diffusion 1."""
    _, header = written(tmp_path, {FIRST.format(0, "out_proj"): pair()})
    assert header == {}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd1"),
        ("timbrooks/instruct-pix2pix", "sd1"),
        ("stabilityai/stable-diffusion-2-base", "sd2"),
        ("SG161222/RealVisXL_V4.0", "sdxl"),
        ("unknown", None),
    ],
)
def test_names_of_base_models(name, family):
    assert family_of({}, name) == family


def test_xl_is_not_said_of_another_model(tmp_path):
    with pytest.raises(ValueError, match="sdxl=True: by its modules the adapter is for stable-diffusion-v1"):
        write_kohya_lora(tmp_path / "x.safetensors", {ATTENTION.format(0, "attn2.to_k"): pair(768)}, xl=True)
    assert not list(tmp_path.iterdir())


def parts(tensors, start):
    return {key.removeprefix(start).partition(".")[0] for key in tensors if key.startswith(start)}


def test_open_clip_layers_have_all_four_projections(tmp_path):
    """A1111 keeps them in one module, and passes over a layer that lacks one."""
    xl = {SECOND.format(1, "q_proj"): pair(), SECOND.format(1, "v_proj"): pair()}
    tensors, _ = written(tmp_path, xl | {FIRST.format(0, "q_proj"): pair(), FIRST.format(1, "q_proj"): pair()})
    attention = "lora_te2_text_model_encoder_layers_1_self_attn_"
    assert parts(tensors, attention) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    for part, zero in (("k_proj", True), ("out_proj", True), ("q_proj", False)):
        up, down = (tensors[f"{attention}{part}.lora_{half}.weight"] for half in ("up", "down"))
        assert (up @ down).shape == (8, 8) and (not (up @ down).any()) == zero and len(down) == (1 if zero else 2)
    assert not parts(tensors, "lora_te2_text_model_encoder_layers_0_")
    assert parts(tensors, "lora_te1_text_model_encoder_layers_0_self_attn_") == {"q_proj", "out_proj"}  # for diffusers
    assert parts(tensors, "lora_te1_text_model_encoder_layers_1_self_attn_") == {"q_proj"}


def test_so_has_the_encoder_of_stable_diffusion_2(tmp_path):
    tensors, _ = written(tmp_path, {FIRST.format(0, "q_proj"): pair(), ATTENTION.format(0, "attn2.to_k"): pair(1024)})
    assert parts(tensors, "lora_te_text_model_encoder_layers_0_self_attn_") == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_the_command_says_where_it_cannot_tell(tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {FIRST.format(0, "q_proj"): pair()})
    words = f"convert {tmp_path}/lora.safetensors {tmp_path}/out.safetensors --to kohya".split()
    assert main(words) == 0
    assert "for XL, say --sdxl" in capsys.readouterr().out
    assert main([*words, "--sdxl", "--overwrite"]) == 0
    assert "warning" not in capsys.readouterr().out
    with open_safetensors(tmp_path / "out.safetensors") as file:
        assert any(key.startswith("lora_te1_") for key in file.entries)
