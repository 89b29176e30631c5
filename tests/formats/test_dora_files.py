"""A DoRA of this library written for peft, diffusers and LyCORIS: theirs computes what ours does."""

import pytest
import safetensors.torch
import timm
import torch
from peft import PeftModel
from torch import nn

from loca_vision import LoRAConfig, SeLoRAConfig, adapters, inject, remove, save_adapter
from loca_vision.commands.main import main
from loca_vision.diffusers import load_loca_weights, save_loca_weights
from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from support.formulas import stir
from support.pipelines import output_of, picture, stable_diffusion

NAME = "test_vit"
ALL = ("q", "k", "v", "out", "fc1")


def vit_model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).eval()


@torch.no_grad()
def trained(model, config):
    inject(model, config)
    generator = torch.Generator().manual_seed(3)
    for update in adapters(model).values():
        for parameter in update.trainable():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(r=3, alpha=6, use_dora=True, targets=ALL), SeLoRAConfig(use_dora=True, targets=ALL)],
    ids=lambda config: config.method,
)
def test_peft_computes_alike(config, tmp_path, capsys):
    model = trained(vit_model(), config)
    save_adapter(model, tmp_path / "dora")
    assert main(f"convert {tmp_path}/dora {tmp_path}/peft --model {NAME} --to peft".split()) == 0
    assert "layers of DoRA, which are kept as they are" in capsys.readouterr().out
    theirs = PeftModel.from_pretrained(vit_model(), tmp_path / "peft").eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), atol=2e-4, rtol=1e-4)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(merged(images), model(images), atol=2e-4, rtol=1e-4)


def test_rows_without_a_magnitude_are_refused_or_listed(tmp_path, capsys):
    """Of a fused query, key and value, where the key is not adapted."""
    save_adapter(trained(vit_model(), LoRAConfig(r=2, use_dora=True, targets=("q", "v", "fc1"))), tmp_path / "dora")
    words = f"convert {tmp_path}/dora {tmp_path}/peft --model {NAME} --to peft".split()
    assert main(words) == 2
    assert "attn.qkv: its update (DoRA) depends on the weight; name the weights" in capsys.readouterr().err
    assert main([*words, "--skip"]) == 0
    said = capsys.readouterr().out
    assert "left out: blocks.0.attn.qkv: " in said and "whose size is not known" in said
    keys = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert any("fc1.lora_magnitude_vector" in key for key in keys) and not any("qkv" in key for key in keys)


def test_a_pipeline_computes_alike(tmp_path, capsys):
    pipe = stable_diffusion()
    trained(pipe.unet, LoRAConfig(r=2, use_dora=True, targets=("q", "k", "v", "out")))
    save_loca_weights(pipe, tmp_path / "dora")
    out = tmp_path / "dora.safetensors"
    assert main(f"convert {tmp_path}/dora {out} --to diffusers".split()) == 0
    assert "warning" not in capsys.readouterr().out
    theirs = stable_diffusion()
    theirs.load_lora_weights(out)
    torch.testing.assert_close(output_of(theirs.unet), output_of(pipe.unet), atol=1e-4, rtol=1e-4)


def test_kohyas_magnitudes_give_the_weights_that_lycoris_computes(tmp_path, capsys):
    """LyCORIS divides by the norm of each row, with a tiny number added. The others do not, which is said."""
    pipe = stable_diffusion()
    trained(pipe.unet, LoRAConfig(r=2, alpha=3, use_dora=True, targets=("q", "v")))
    save_loca_weights(pipe, tmp_path / "dora")
    assert main(f"convert {tmp_path}/dora {tmp_path}/dora.safetensors --to kohya".split()) == 0
    assert "warning: dora_scale" in capsys.readouterr().out
    tensors = safetensors.torch.load_file(tmp_path / "dora.safetensors")
    base = stable_diffusion().unet
    remove(pipe.unet, merge=True)
    layers = {key.removesuffix(".dora_scale") for key in tensors if key.endswith(".dora_scale")}
    assert layers
    for name, module in base.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if key in layers:
            up, down, alpha = (tensors[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            moved = module.weight + alpha / len(down) * up @ down
            made = moved * tensors[f"{key}.dora_scale"] / (moved.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps)
            torch.testing.assert_close(made, pipe.unet.get_parameter(f"{name}.weight"), atol=1e-5, rtol=1e-5)


def test_peft_reads_the_magnitudes_of_convolutions(tmp_path):
    path = "unet.mid_block.attentions.0.proj_in"
    pipe = stable_diffusion()
    weight = pipe.unet.mid_block.attentions[0].proj_in.weight.detach().clone()
    pair = LowRankPair(torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2))
    magnitude = torch.rand(len(weight)) + 0.5
    write_diffusers_lora(tmp_path / "x.safetensors", {path: pair}, kernels={path: (1, 1)}, magnitudes={path: magnitude})
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    moved = weight.flatten(1) + pair.delta()
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(pipe.unet.mid_block.attentions[0].proj_in.weight.flatten(1), expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_exact_is_refused(tmp_path, capsys):
    layers = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{part}" for part in ("to_q", "to_k")]
    pairs = {layer: LowRankPair(torch.ones(2, 32), torch.ones(32, 2)) for layer in layers}
    with pytest.raises(ValueError, match=r"attn1.to_k is not a DoRA where others are"):
        write_diffusers_lora(tmp_path / "x.safetensors", pairs, magnitudes={layers[0]: torch.ones(32)})
    pipe = stable_diffusion()
    trained(pipe.unet, LoRAConfig(r=3, use_dora=True))
    save_loca_weights(pipe, tmp_path / "dora")
    assert main(f"convert {tmp_path}/dora {tmp_path}/x.safetensors --to kohya --rank 2".split()) == 2
    assert "is a DoRA of rank 3, whose factors are kept as they are" in capsys.readouterr().err
    assert main(f"convert {tmp_path}/dora {tmp_path}/loca --energy 0.9".split()) == 2
    assert "its update (DoRA) depends on the weight; name the weights" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dora"]


def test_no_zeros_stand_beside_a_dora(tmp_path):
    """A layer without an update has magnitudes even so, which only its weight tells."""
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    pair = LowRankPair(torch.ones(2, 8), torch.ones(8, 2))
    write_kohya_lora(tmp_path / "x.safetensors", {layer: pair}, magnitudes={layer: torch.ones(8)})
    assert {key.partition(".")[0] for key in safetensors.torch.load_file(tmp_path / "x.safetensors")} == {
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    }


def test_magnitudes_stay_float32(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    magnitudes = nn.functional.softplus(torch.randn(32))
    pair = LowRankPair(torch.ones(2, 32), torch.ones(32, 2))
    file = write_diffusers_lora(tmp_path / "x.safetensors", {layer: pair}, magnitudes={layer: magnitudes}, dtype=torch.float16)
    tensors = safetensors.torch.load_file(file)
    assert torch.equal(tensors[f"{layer}.lora_magnitude_vector"], magnitudes)
    assert tensors[f"{layer}.lora_A.weight"].dtype == torch.float16


def test_components_are_given_the_weights_of_a_pipelines_folder(tmp_path):
    """To LoCA, where the update of DoRA has to be a matrix."""
    pipe = stable_diffusion()
    for model in (pipe.unet, pipe.text_encoder):
        inject(model, LoRAConfig(r=2, use_dora=True, targets=("q",)))
        stir(model)
    save_loca_weights(pipe, tmp_path / "dora", "default")
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    words = f"convert {tmp_path}/dora {tmp_path}/out --energy 1.0 --base"
    assert main([*words.split(), f"{tmp_path}/pipe/unet"]) == 2
    assert main([*words.split(), f"{tmp_path}/pipe"]) == 0
    fresh = stable_diffusion()
    load_loca_weights(fresh, tmp_path / "out")
    assert (picture(fresh) - picture(pipe)).abs().max() < 1e-4
