"""Merging into single files of the original layout; diffusers' own conversion of them is the oracle."""

import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint

from loca_vision.commands.main import main
from loca_vision.formats.conversion.base_tensors import BaseTensors
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, read_source
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from loca_vision.storage.safetensors_file import Entry
from support.pipelines import flux, text_encoder, unet

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
TOPS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
TOPS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
TOPS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def original_name(module, attention):
    """Of a module of a UNet with two resnets a level; `attention`: the up blocks that have some."""
    if module in TOPS:
        return TOPS[module]
    side, rest = re.match(r"(down_blocks|mid_block|up_blocks)\.(.+)", module).groups()
    if side == "mid_block":
        kind, number, inner = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{RESNET.get(inner, inner)}"
    level, kind, number, inner = rest.split(".", 3)
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.{2 if int(level) in attention else 1}.conv"
    place = 3 * int(level) + int(number) + (1 if side == "down_blocks" else 0)
    side = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{side}.{place}.{1 if kind == 'attentions' else 0}.{RESNET.get(inner, inner)}"


def unet_checkpoint(settings):
    """A UNet, its weights in the original layout, and diffusers' way back, which shows that the layout is right."""
    ups = settings.get("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"))
    model = unet(layers_per_block=2, **settings)
    attention = {number for number, kind in enumerate(ups) if kind.startswith("Cross")}
    checkpoint = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        checkpoint[f"model.diffusion_model.{original_name(module, attention)}.{parameter}"] = tensor

    def back(state):
        return convert_ldm_unet_checkpoint(dict(state), dict(model.config))

    assert back(checkpoint).keys() == model.state_dict().keys()
    found = model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in back(checkpoint).items())
    return model, checkpoint, back


def lora_of(model, component, kinds=(torch.nn.Linear, torch.nn.Conv2d)):
    """A pair for every linear layer and convolution."""
    generator = torch.Generator().manual_seed(0)
    pairs, kernels = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            rows, columns = module.weight.flatten(1).shape
            down = 0.1 * torch.randn(2, columns, generator=generator)
            pairs[f"{component}.{path}"] = LowRankPair(down, torch.randn(rows, 2, generator=generator), 0.5)
            if isinstance(module, torch.nn.Conv2d):
                kernels[f"{component}.{path}"] = module.kernel_size
    return WeightDeltas({name: pair.shape for name, pair in pairs.items()}, lambda name, _: pairs[name], kernels=kernels)


def check_merged(before, after, source, strength=1.0):
    assert after.keys() == before.keys()
    changed = {f"{module.partition('.')[2]}.weight": module for module in source.shapes}
    for name, weight in before.items():
        delta = source.matrix(changed[name]).view(weight.shape) if name in changed else torch.zeros(())
        assert torch.allclose(after[name], weight + strength * delta, atol=1e-6), name


ARCHITECTURES = {
    "sd": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "sd2": {"use_linear_projection": True},
    "sdxl": XL | {"use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_of_a_unet(architecture, tmp_path):
    model, checkpoint, back = unet_checkpoint(ARCHITECTURES[architecture])
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.randn(4, 4),
        "model_ema.decay": torch.ones((), dtype=torch.int32),
    }
    safetensors.torch.save_file(checkpoint | others, tmp_path / "base.safetensors")
    source = lora_of(model, "unet")
    out = safetensors.torch.load_file(merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors", strength=0.5))
    assert list(out.keys() ^ (checkpoint | others).keys()) == []
    assert all(torch.equal(out[name], tensor) and out[name].dtype == tensor.dtype for name, tensor in others.items())
    check_merged(model.state_dict(), back(out), source, 0.5)


def open_clip(model, prefix):
    """The weights of a text encoder as OpenCLIP has them."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    found = {"token_embedding.weight": state["embeddings.token_embedding.weight"]}
    found["positional_embedding"] = state["embeddings.position_embedding.weight"]
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T.contiguous()
    for layer in range(2):
        inner, before = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            found |= {f"{inner}{theirs}.{kind}": state[f"{before}{ours}.{kind}"] for ours, theirs in names.items()}
            found[f"{inner}attn.in_proj_{kind}"] = torch.cat([state[f"{before}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            found[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
    return {prefix + name: tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("prefix", "component"), [("cond_stage_model.model.", "text_encoder"), ("conditioner.embedders.1.model.", "text_encoder_2")]
)
def test_every_layer_of_an_open_clip_text_encoder(prefix, component, tmp_path):
    # As wide as its projection, which diffusers takes for granted; of SD 2.x it leaves that out.
    model = text_encoder(3, projection=component == "text_encoder_2", hidden=16)
    checkpoint = open_clip(model, prefix)
    before = {name.replace("text_model.", ""): tensor for name, tensor in model.state_dict().items()}

    def back(state):
        theirs = convert_open_clip_checkpoint(SimpleNamespace(config=model.config), dict(state), prefix)
        return {name.replace("text_model.", ""): tensor for name, tensor in theirs.items() if "position_ids" not in name}

    assert all(torch.equal(tensor, before[name]) for name, tensor in back(checkpoint).items())
    safetensors.torch.save_file(checkpoint, tmp_path / "base.safetensors")
    source = lora_of(model, component)
    out = safetensors.torch.load_file(merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors"))
    plain = {
        f"{c}.{path.replace('text_model.', '')}": path for path, c in ((m.partition(".")[2], component) for m in source.shapes)
    }
    renamed = WeightDeltas(
        {name: source.shapes[f"{component}.{path}"] for name, path in plain.items()},
        lambda name, _: source.read(f"{component}.{plain[name]}", None),
    )
    check_merged(before, back(out), renamed)


def test_a_whole_pipeline_in_one_file_is_merged_by_one_command(tmp_path, capsys):
    model, checkpoint, back = unet_checkpoint(ARCHITECTURES["sd"])
    encoder = text_encoder()
    plain = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    checkpoint |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in plain.items()}
    safetensors.torch.save_file(checkpoint, tmp_path / "base.safetensors")
    pairs = {}
    for component, of in (("unet", model), ("text_encoder", encoder)):
        source = lora_of(of, component, torch.nn.Linear)
        pairs |= {name: source.read(name, None) for name in source.shapes}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    words = f"merge {tmp_path}/base.safetensors {tmp_path}/lora.safetensors {tmp_path}/out.safetensors"
    assert main(words.split()) == 0
    out = safetensors.torch.load_file(tmp_path / "out.safetensors")
    check_merged(model.state_dict(), back(out), lora_of(model, "unet", torch.nn.Linear))
    of_text = lora_of(encoder, "text_encoder", torch.nn.Linear)
    for module in of_text.shapes:
        name = module.removeprefix("text_encoder.").removeprefix("text_model.")
        merged = out[f"cond_stage_model.transformer.text_model.{name}.weight"]
        assert torch.allclose(merged, plain[f"{name}.weight"] + of_text.matrix(module), atol=1e-6), name
    assert main([*words.split(), "--component", "text_encoder", "--overwrite"]) == 0
    alone = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(alone[name], checkpoint[name]) for name in checkpoint if name.startswith("model."))
    fc1 = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(alone[fc1], out[fc1]) and not torch.equal(alone[fc1], checkpoint[fc1])


@pytest.mark.parametrize("tuned_as", ["original", "folder"])
def test_a_fine_tuned_single_file_is_extracted(tuned_as, tmp_path, capsys):
    """Against a base of either layout; what else the file holds is left alone where a component is named."""
    model, checkpoint, _ = unet_checkpoint(ARCHITECTURES["sd2"])
    safetensors.torch.save_file(checkpoint | {"first_stage_model.x.weight": torch.ones(2, 2)}, tmp_path / "base.safetensors")
    expected = {}
    with torch.no_grad():
        for path, module in model.named_modules():
            if re.fullmatch(r".*attn\d\.(to_q|to_k|to_v|to_out\.0)", path):
                expected[f"unet.{path}"] = 0.1 * torch.randn(module.weight.shape)
                module.weight += expected[f"unet.{path}"]
    tuned = tmp_path / "tuned"
    if tuned_as == "folder":
        model.save_pretrained(tuned)
    else:
        tuned = tmp_path / "tuned.safetensors"
        names = {f"model.diffusion_model.{original_name(p, {0})}": m for p, m in model.named_modules() if hasattr(m, "weight")}
        state = {f"{name}.{kind}": v.detach() for name, m in names.items() for kind, v in m.named_parameters(recurse=False)}
        assert state.keys() == checkpoint.keys()
        safetensors.torch.save_file(state, tuned)
    words = f"extract {tmp_path}/base.safetensors {tuned} {tmp_path}/lora.safetensors --component unet --to kohya --rank 64"
    assert main(words.split()) == 0
    read = read_source(tmp_path / "lora.safetensors")
    assert read.shapes.keys() == expected.keys()
    assert all(torch.allclose(read.matrix(module), delta, atol=1e-5) for module, delta in expected.items())


def test_layers_of_flux_that_are_one_in_its_own_file(tmp_path):
    """q, k and v, and the MLP beside them in single blocks: each module's update lands in its rows."""
    width = 4
    sizes = {"double_blocks.0.img_attn.qkv": (12, 4), "single_blocks.0.linear1": (28, 4), "double_blocks.0.txt_mlp.0": (16, 4)}
    sizes |= {"final_layer.adaLN_modulation.1": (8, 4)}
    base = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
    safetensors.torch.save_file(base, tmp_path / "base.safetensors")
    names = {f"transformer_blocks.0.attn.to_{part}": width for part in "qkv"}
    names |= {f"single_transformer_blocks.0.attn.to_{part}": width for part in "qkv"}
    names |= {
        "single_transformer_blocks.0.proj_mlp": 16,
        "transformer_blocks.0.ff_context.net.0.proj": 16,
        "norm_out.linear": 8,
    }
    assert {name for name, module in flux().named_modules() if isinstance(module, torch.nn.Linear)} >= names.keys()
    deltas = {f"transformer.{name}": torch.randn(rows, 4) for name, rows in names.items()}
    source = WeightDeltas({name: tuple(delta.shape) for name, delta in deltas.items()}, lambda name, _: deltas[name])
    out = safetensors.torch.load_file(merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors"))
    values = list(deltas.values())
    shift, scale = values[8].chunk(2)[::-1]
    added = [torch.cat(values[:3]), torch.cat(values[3:7]), values[7], torch.cat([shift, scale])]
    for name, delta in zip(sizes, added, strict=True):
        assert torch.allclose(out[f"{name}.weight"], base[f"{name}.weight"] + delta, atol=1e-6), name


def entries(*names):
    return {name: Entry("F32", (8, 4), 0, 128) for name in names}


def test_names_of_a_whole_pipeline_of_sd3():
    base = BaseTensors(
        entries(
            "model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
            "first_stage_model.decoder.conv_in.weight",
        )
    )
    assert base.parameters() == [
        "transformer.transformer_blocks.0.attn.to_out.0.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.weight",
        "first_stage_model.decoder.conv_in.weight",
    ]


def test_two_tensors_of_one_parameter_are_refused():
    names = ("text_model.encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc1.weight")
    with pytest.raises(ValueError, match=r"cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight are both text_encoder"):
        BaseTensors(entries(*(f"cond_stage_model.transformer.{name}" for name in names)))


def test_a_name_of_any_length_is_looked_at_in_no_time():
    name = "model.diffusion_model.input_blocks.1.1." + "attn1_" * 500_000
    assert BaseTensors(entries(f"{name}.weight")).parameters() == [f"{name}.weight"]


def test_what_the_file_has_not_is_refused(tmp_path):
    _, checkpoint, _ = unet_checkpoint(ARCHITECTURES["sd"])
    safetensors.torch.save_file(checkpoint, tmp_path / "base.safetensors")
    state = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 4)}
    state["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(4, 1)
    safetensors.torch.save_file(state, tmp_path / "lora.safetensors")
    source = read_source(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"the base has no tensor text_encoder_2.*fc1.weight, for which there is an update"):
        merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert BaseTensors({}).find("unet.conv_in.weight") is None
