"""`loca-vision convert`: what is left out is listed and counted, and what a reader passes over is said."""

import pytest
import safetensors.torch
import torch

from loca_vision.commands.main import main
from loca_vision.formats.lora_writer import write_diffusers_lora
from loca_vision.formats.low_rank_pair import LowRankPair
from support.pipelines import stable_diffusion
from support.reference_weights import adapter

BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
T5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"


def pair(seed, rows=16, cols=16):
    generator = torch.Generator().manual_seed(seed)
    return LowRankPair(torch.randn(2, cols, generator=generator), torch.randn(rows, 2, generator=generator), 0.5)


def converted(capsys, *words):
    """What the command prints, line by line."""
    status = main(["convert", *map(str, words)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out.splitlines()


def left_out(lines):
    return [line.split(": ", 2)[1] for line in lines if line.startswith("left out: ")]


def error_of_all(lines):
    return float(next(line for line in lines if line.startswith("all")).split()[-1])


@pytest.mark.parametrize("to", [("--energy", "1.0"), ("--to", "lora")], ids=["loca", "lora"])
def test_layers_without_a_place_are_listed_and_counted(to, tmp_path, capsys):
    pairs = {f"{BLOCK}.attn1.to_q": pair(0), f"{BLOCK}.attn2.to_v": pair(1), f"{BLOCK}.ff.net.2": pair(2, 16, 64)}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "out", *to, "--skip")
    assert left_out(lines) == [f"{BLOCK}.ff.net.2"]
    norms = {name: float(of.delta().double().norm()) for name, of in pairs.items()}
    lost = norms[f"{BLOCK}.ff.net.2"] / torch.tensor(list(norms.values())).norm().item()
    assert error_of_all(lines) == pytest.approx(lost, abs=2e-4)
    assert not any("does not count" in line for line in lines)


def test_keys_that_are_not_understood_are_said_not_to_be_counted(tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {f"{BLOCK}.attn1.to_q": pair(0)})
    tensors = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    oft = {f"{BLOCK}.attn1.to_k.oft_blocks": torch.ones(2, 2, 2), f"{BLOCK}.attn1.to_k.alpha": torch.ones(())}
    safetensors.torch.save_file(tensors | oft, tmp_path / "mixed.safetensors")
    lines = converted(capsys, tmp_path / "mixed.safetensors", tmp_path / "out", "--to", "lora", "--skip")
    assert sorted(left_out(lines)) == sorted(oft)
    assert any("does not count" in line and "(2)" in line for line in lines)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_whole_tensors_without_room_are_listed(to, tmp_path, capsys):
    file = adapter(stable_diffusion(), whole=("unet.conv_in.weight",)).write(tmp_path / "loca.safetensors")
    lines = converted(capsys, file, tmp_path / "out.safetensors", "--to", to, "--rank", "2", "--skip")
    assert left_out(lines) == ["unet.conv_in.weight"]
    assert any(f"trained whole, for which {to} keys have no room" in line for line in lines)
    assert any("does not count" in line and "(1)" in line for line in lines)


def test_a_part_that_diffusers_passes_over_is_said(tmp_path, capsys):
    pairs = {"transformer.transformer_blocks.0.attn.to_q": pair(0), T5: pair(1)}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "again.safetensors", "--to", "diffusers")
    assert [line for line in lines if line.startswith("warning: text_encoder_2: ") and "not read" in line]
    assert any(key.startswith(T5) for key in safetensors.torch.load_file(tmp_path / "again.safetensors"))
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "loca", "--to", "lora")
    assert not any(line.startswith("warning") for line in lines)


def test_names_of_no_component_are_no_projections(tmp_path, capsys):
    """Of an encoder that no pipeline is known to have."""
    layer = "text_encoders.qwen.transformer.model.layers.0.self_attn.q_proj"
    halves = {f"{layer}.lora_up.weight": torch.ones(8, 2), f"{layer}.lora_down.weight": torch.ones(2, 8)}
    safetensors.torch.save_file(halves, tmp_path / "comfy.safetensors")
    words = ("convert", tmp_path / "comfy.safetensors", tmp_path / "out", "--energy", "1.0", "--skip")
    assert main(list(map(str, words))) == 2
    assert f"no module of the update is a projection that LoCA adapts; the first is {layer}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
