"""LoRA files of diffusers, peft and kohya: key names."""

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)

from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.keys import parse_key, unflattened
from loca_vision.formats.lora_files.kohya_writer import flattened
from loca_vision.formats.lora_files.reader import read_lora
from support.lora_files import check_merged, modules, plain, weights_of
from support.pipelines import stable_diffusion, stable_diffusion_xl


def test_former_names_of_diffusers(tmp_path):
    """As `StableDiffusionPipeline` reads them: attention processors with layers of their own, and what came after."""
    generator = torch.Generator().manual_seed(0)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    names = {
        f"unet.{block}.attn1.processor.to_q_lora": f"unet.{block}.attn1.to_q",
        f"unet.{block}.attn1.processor.to_out_lora": f"unet.{block}.attn1.to_out.0",
        f"unet.{block}.attn2.to_v.lora": f"unet.{block}.attn2.to_v",
    }
    clip = "text_encoder.text_model.encoder.layers.0.self_attn"
    names |= {f"{clip}.to_k_lora": f"{clip}.k_proj", f"{clip}.to_out_lora": f"{clip}.out_proj"}
    pipe = stable_diffusion()
    sizes = {path: tuple(m.weight.shape) for path, m in modules(pipe)}
    tensors = {}
    for old, new in names.items():
        rows, cols = sizes[plain(new)]
        tensors[f"{old}.down.weight"] = torch.randn(2, cols, generator=generator)
        tensors[f"{old}.up.weight"] = torch.randn(rows, 2, generator=generator)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors").pairs
    assert set(read) == set(names.values())
    base = weights_of(pipe)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    check_merged(pipe, base, {plain(path): pair for path, pair in read.items()})


def test_names_between_the_former_and_the_present():
    clip = "text_encoder.text_model.encoder.layers.0"
    assert parse_key(f"{clip}.mlp.fc1.lora_linear_layer.down.weight").path == f"{clip}.mlp.fc1"
    assert parse_key(f"{clip}.self_attn.q_proj.lora_linear_layer.up.weight").role == "up"
    assert parse_key("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight").path == f"{clip}.mlp.fc1"
    assert parse_key("base_model.model.blocks.0.attn.qkv.lora_A.mine.weight").path == "blocks.0.attn.qkv"


def original_names():
    """kohya's names of the attention layers, and a few others, of SDXL's original UNet."""
    depth = {4: 2, 5: 2, 7: 3, 8: 3}
    for number, blocks in depth.items():
        for block in range(blocks):
            for rest in ("attn1_to_q", "attn2_to_k", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2"):
                yield f"input_blocks_{number}_1_transformer_blocks_{block}_{rest}"
        yield from (f"input_blocks_{number}_1_proj_in", f"input_blocks_{number}_0_in_layers_2")
    for number in range(6):
        yield f"output_blocks_{number}_1_transformer_blocks_1_attn2_to_v"
        yield f"output_blocks_{number}_0_skip_connection"
        yield f"output_blocks_{number}_0_emb_layers_1"
    yield from ("middle_block_1_transformer_blocks_9_attn1_to_v", "middle_block_0_in_layers_2", "middle_block_2_out_layers_3")
    yield from ("input_blocks_3_0_op", "output_blocks_2_2_conv", "time_embed_0", "label_emb_0_2", "input_blocks_0_0", "out_2")


def test_names_of_the_original_unet_are_understood_as_diffusers_does(recwarn):
    class Settings:
        layers_per_block = 2

    for name in original_names():
        ends = ("lora_down.weight", "lora_up.weight")
        state = {f"lora_unet_{name}.{end}": torch.zeros(1) for end in ends}
        theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, Settings))
        (path,) = {parse_key(key).path for key in theirs}
        assert f"unet.{unflattened(name)}" == path, name


def test_every_name_of_a_unet_has_its_dots_back():
    for pipe in (stable_diffusion(), stable_diffusion_xl()):
        for path, module in pipe.unet.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                assert unflattened(path.replace(".", "_")) == path
                assert parse_key(f"{flattened(f'unet.{path}', xl=False)}.alpha").path == f"unet.{path}"


@pytest.mark.parametrize(
    "name", ["foo", "down_blocks_0_foo", "input_blocks_4", "input_blocks_4_7_x", "input_blocks_0_1_proj_in", "", "_", "to_q_"]
)
def test_unknown_names_stay_unknown(name):
    assert parse_key(f"lora_unet_{name}.lora_down.weight").role == "foreign"


@pytest.mark.parametrize("prefix", ["lora_unet_", "unet."])
def test_convolutions_are_merged_as_diffusers_fuses_them(prefix, tmp_path):
    """LoCon of kohya's, and of diffusers' own names, in every linear layer and convolution."""
    pipe, generator = stable_diffusion(), torch.Generator().manual_seed(0)
    base = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    tensors = {}
    for path, module in pipe.unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not path.startswith("conv_in"):
            key = prefix + (path.replace(".", "_") if "lora" in prefix else path)
            sizes = (1, 1) if isinstance(module, torch.nn.Conv2d) else ()
            down, up = ("lora_down", "lora_up") if "lora" in prefix else ("lora_A", "lora_B")
            tensors[f"{key}.{down}.weight"] = 0.2 * torch.randn(2, *module.weight.shape[1:], generator=generator)
            tensors[f"{key}.{up}.weight"] = torch.randn(len(module.weight), 2, *sizes, generator=generator)
            if "lora" in prefix:
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    safetensors.torch.save_file(base, tmp_path / "base.safetensors")
    source = read_source(tmp_path / "x.safetensors")
    merged = safetensors.torch.load_file(merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors"))
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-4), name
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert (
        len(changed) == len(source.shapes) == len([k for k in tensors if k.endswith((".lora_down.weight", ".lora_A.weight"))])
    )
