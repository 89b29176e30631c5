"""Mistakes on the command line of `convert`, `extract` and `merge`: one sentence, and nothing touched."""

import pytest
import torch

from loca_vision.commands.main import main
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("convert {}/lora.safetensors {}/out", "one of --count, --threshold, --ratio and --energy"),
        ("convert {}/lora.safetensors {}/out --count 3 --ratio 0.1", "one of --count"),
        ("convert {}/lora.safetensors {}/out --count 3 --rank 2", "--rank and --half are for LoRA"),
        ("convert {}/lora.safetensors {}/out --to peft --count 3", "a LoRA has a --rank"),
        ("convert {}/lora.safetensors {}/lora.safetensors --count 3", "it is there; choose another name, or say --overwrite"),
        ("convert {}/none {}/out --count 3", "no such file"),
        ("convert {}/lora.safetensors {}/out --count 3 --model vit_smol", "timm has no model of that name"),
        ("convert {}/lora.safetensors {}/out --count 10000000", "cells"),
        ("convert {}/lora.safetensors {}/out.safetensors --to full --rank 3", "it is the whole update, which has no --rank"),
        ("convert {}/lora.safetensors {}/out --to lora --half", "--half is for --to diffusers, kohya and full"),
        ("convert {}/lora.safetensors {}/out --to lora --dtype int8", "--to lora: --dtype is for LoCA; of others --half"),
        ("convert {}/lora.safetensors {}/out --to diffusers --sdxl", "--sdxl is for --to kohya and full"),
        ("convert {}/lora.safetensors {}/out.safetensors --to kohya --base {}/b", "b: there is no such file"),
        ("convert {}/lora.safetensors {}/out --to full", "a file that ends in .safetensors"),
        ("convert {}/lora.safetensors {}/out.safetensors --to full --base {}/b", "b: there is no such file"),
        ("convert {}/lora.safetensors {}/out --to lora --component unet.", "component='unet.': expected one of a pipeline"),
        ("convert {}/lora.safetensors {}/out --to lora --component vae", "by the names in the file it is for unet"),
        ("convert {}/lora.safetensors {}/out.bin --to lora", "a file that ends in .safetensors, or a folder"),
        ("convert {}/lora.safetensors {}/out.ckpt --to peft", "a file that ends in .safetensors, or a folder"),
        (
            "combine {}/lora.safetensors {}/lora.safetensors {}/out.pt --to lora",
            "a file that ends in .safetensors, or a folder",
        ),
        ("combine {}/lora.safetensors {}/lora.safetensors {}/out.pt", "a file that ends in .safetensors, or a folder"),
        ("extract {}/lora.safetensors {}/lora.safetensors {}/out --count 3", "say which weights they are"),
        ("merge {}/lora.safetensors {}/lora.safetensors {}/out --component unet", "the base has no tensor"),
    ],
)
def test_mistakes_on_the_command_line(words, sentence, tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {LAYER: LowRankPair(torch.randn(2, 32), torch.randn(32, 2))})
    before = (tmp_path / "lora.safetensors").read_bytes()
    assert main(words.replace("{}", str(tmp_path)).split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and sentence in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    assert (tmp_path / "lora.safetensors").read_bytes() == before
