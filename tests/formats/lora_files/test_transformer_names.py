"""Names of Flux and SD3 in files of kohya, XLabs, ComfyUI, OneTrainer and LyCORIS; diffusers' converters are the oracle."""

import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from transformers import T5Config, T5EncoderModel

from loca_vision.formats.lora_files.keys import parse_key, unflattened
from loca_vision.formats.lora_files.reader import read_lora
from support.pipelines import flux, pixart, sd3

WIDTH = 3072  # which diffusers' converter takes for granted
DOUBLE = {
    "img_attn_qkv": (3, 1),
    "txt_attn_qkv": (3, 1),
    "img_attn_proj": (1, 1),
    "txt_attn_proj": (1, 1),
    "img_mlp_0": (4, 1),
    "img_mlp_2": (1, 4),
    "txt_mlp_0": (4, 1),
    "txt_mlp_2": (1, 4),
    "img_mod_lin": (6, 1),
    "txt_mod_lin": (6, 1),
}
SINGLE = {"linear1": (7, 1), "linear2": (1, 5), "modulation_lin": (3, 1)}
FLUX = {f"double_blocks_3_{name}": size for name, size in DOUBLE.items()} | {
    f"single_blocks_20_{name}": size for name, size in SINGLE.items()
}
OTHERS = ("img_in", "txt_in", "time_in_in_layer", "time_in_out_layer", "vector_in_in_layer", "vector_in_out_layer")
OTHERS = (*OTHERS, "guidance_in_in_layer", "guidance_in_out_layer", "final_layer_linear", "final_layer_adaLN_modulation_1")


def lora(names, down="lora_down", up="lora_up", rank=2, alphas=True):
    """Random factors for layers of (p, q) in units of WIDTH."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (name, (p, q)) in enumerate(names.items()):
        state[f"{name}.{down}.weight"] = torch.randn(rank, q * WIDTH, generator=generator)
        state[f"{name}.{up}.weight"] = torch.randn(p * WIDTH, rank, generator=generator)
        if alphas:
            state[f"{name}.alpha"] = torch.tensor(1.0 + number % 3)
    return state


def check(state, theirs, tmp_path):
    """Products of the factors, at some rows and columns, of what is read here and what diffusers makes of it."""
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors").pairs
    expected = {}
    for key, down in theirs.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            name = name if name.startswith(("transformer.", "text_encoder")) else f"transformer.{name}"
            expected[name] = (down, theirs[key.replace("lora_A", "lora_B")])
    assert read.keys() == expected.keys()
    for name, (down, up) in expected.items():
        pair = read[name]
        assert pair.shape == (len(up), down.shape[1])
        part = pair.scale * pair.up[::97] @ pair.down[:, ::89]
        assert torch.allclose(part, up[::97] @ down[:, ::89], rtol=1e-4, atol=1e-4), name


def flux_layers(prefix):
    small = {name: (2 if "adaLN" in name else 1, 1) for name in OTHERS}
    return {prefix + name: size for name, size in (FLUX | small).items()}


def test_kohya(tmp_path):
    state = lora(flux_layers("lora_unet_"))
    for name in ("final_layer_linear", "final_layer_adaLN_modulation_1"):  # of which diffusers loses the alpha
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    check(state, FluxPipeline.lora_state_dict(dict(state)), tmp_path)


@pytest.mark.parametrize("halves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_comfyui(halves, tmp_path):
    dotted = {
        name.replace("double_blocks_3_", "double_blocks.3.").replace("single_blocks_20_", "single_blocks.20."): size
        for name, size in FLUX.items()
    }
    for part in ("attn", "mlp", "mod"):
        dotted = {name.replace(f"_{part}_", f"_{part}."): size for name, size in dotted.items()}
    dotted = {f"diffusion_model.{name.replace('modulation_', 'modulation.')}": size for name, size in dotted.items()}
    state = lora(dotted, *halves, alphas=halves[0] == "lora_down")
    kohya = {
        key.replace("diffusion_model.", "lora_unet_").replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
        for key, value in state.items()
    }
    kohya = {".".join([k.split(".lora_")[0].split(".alpha")[0].replace(".", "_"), *ending(k)]): v for k, v in kohya.items()}
    check(state, FluxPipeline.lora_state_dict(kohya), tmp_path)


def test_text_encoders_of_comfyui():
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    for name, component in {
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "text_encoders.clip_g": "text_encoder_2",
    }.items():
        assert parse_key(f"{name}.transformer.{layer}.lora_up.weight").path == f"{component}.{layer}"
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    assert parse_key(f"text_encoders.t5xxl.transformer.{t5}.lora_A.weight", "sd3").path == f"text_encoder_3.{t5}"


def ending(key):
    return ["alpha"] if key.endswith(".alpha") else key.split(".")[-2:]


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(prefix, tmp_path):
    layers = {"double_blocks.3.processor.qkv_lora1": (3, 1), "double_blocks.3.processor.qkv_lora2": (3, 1)}
    layers |= {"double_blocks.3.processor.proj_lora1": (1, 1), "double_blocks.3.processor.proj_lora2": (1, 1)}
    layers |= {"single_blocks.20.processor.qkv_lora": (3, 1), "single_blocks.20.processor.proj_lora": (1, 5)}
    state = lora({prefix + name: size for name, size in layers.items()}, "down", "up", alphas=False)
    check(state, _convert_xlabs_flux_lora_to_diffusers(dict(state)), tmp_path)


def test_onetrainer(tmp_path):
    block, single = "lora_transformer_transformer_blocks_3_", "lora_transformer_single_transformer_blocks_20_"
    names = ("attn_to_q", "attn_to_k", "attn_to_v", "attn_to_out_0", "attn_to_add_out", "attn_add_q_proj", "attn_add_v_proj")
    layers = {block + name: (1, 1) for name in names} | {single + name: (1, 1) for name in names[:3]}
    layers |= {f"lora_transformer_{name}": (1, 1) for name in ("context_embedder", "x_embedder", "proj_out", "norm_out_linear")}
    layers["lora_transformer_time_text_embed_guidance_embedder_linear_1"] = (1, 1)
    layers |= {f"lora_te1_text_model_encoder_layers_0_{name}": (1, 1) for name in ("self_attn_q_proj", "mlp_fc1")}
    state = lora(layers)
    check(state, FluxPipeline.lora_state_dict(dict(state)), tmp_path)


def test_sd3_of_kohya(tmp_path):
    """Of full rank, so that the update of a checkpoint's every weight is the weight itself, which diffusers converts."""
    generator = torch.Generator().manual_seed(0)
    checkpoint = {}
    for number, last in ((0, False), (1, True)):
        sizes = {
            "attn.qkv": (12, 4),
            "attn.proj": (4, 4),
            "mlp.fc1": (16, 4),
            "mlp.fc2": (4, 16),
            "adaLN_modulation.1": (24, 4),
        }
        context = sizes if not last else {"attn.qkv": (12, 4), "adaLN_modulation.1": (8, 4)}
        for stream, of in (
            ("x_block", sizes | ({} if last else {"attn2.qkv": (12, 4), "attn2.proj": (4, 4)})),
            ("context_block", context),
        ):
            checkpoint |= {f"joint_blocks.{number}.{stream}.{name}": size for name, size in of.items()}
    checkpoint |= dict.fromkeys(("context_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0"), (4, 4))
    checkpoint |= {"y_embedder.mlp.2": (4, 4), "final_layer.linear": (4, 4), "final_layer.adaLN_modulation.1": (8, 4)}
    weights = {name: torch.randn(size, generator=generator) for name, size in checkpoint.items()}
    theirs = {f"{name}.weight": weight for name, weight in weights.items()} | {
        f"{name}.bias": torch.zeros(len(weight)) for name, weight in weights.items()
    }
    theirs |= {"pos_embed": torch.zeros(1), "x_embedder.proj.weight": torch.zeros(1), "x_embedder.proj.bias": torch.zeros(1)}
    expected = convert_sd3_transformer_checkpoint_to_diffusers(theirs)
    expected = {f"transformer.{key.removesuffix('.weight')}": w for key, w in expected.items() if w.dim() == 2}
    state = {}
    for name, weight in weights.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": torch.eye(weight.shape[1]), f"{key}.lora_up.weight": weight}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors").pairs
    assert read.keys() == expected.keys() and len(read) > 30
    for name, weight in expected.items():
        assert torch.equal(read[name].delta(), weight), name


def test_lokr_of_a_fused_layer_is_its_rows(tmp_path):
    w1, w2, key = torch.randn(3, 2), torch.randn(4, 2), "diffusion_model.double_blocks.0.img_attn.qkv"
    safetensors.torch.save_file({f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2}, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors").updates
    attention = "transformer.transformer_blocks.0.attn"
    assert list(read) == [f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"]
    for update, rows in zip(read.values(), torch.kron(w1, w2).chunk(3), strict=True):
        assert torch.allclose(update.read(None), rows)


def test_layers_of_another_model_with_the_same_names_are_refused(tmp_path):
    """Flux 2 has six times as many rows as columns there."""
    key = "diffusion_model.single_blocks.0.linear1"
    state = {f"{key}.lora_A.weight": torch.ones(1, 2), f"{key}.lora_B.weight": torch.ones(18, 1)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"linear1.*: transformer.single.*to_q: 18 rows for 2 columns, where the layer has 7 times"
    ):
        read_lora(tmp_path / "x.safetensors")


def test_every_name_of_a_transformer_has_its_dots_back():
    tiny = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 5}
    t5 = T5EncoderModel(T5Config(**tiny, feed_forward_proj="gated-gelu"))
    for prefix, model in (("lycoris_", flux()), ("lora_transformer_", sd3()), ("lycoris_", pixart()), ("lora_te3_", t5)):
        component = "text_encoder_3" if model is t5 else "transformer"
        for path, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                assert unflattened(path.replace(".", "_")) == path
                assert parse_key(f"{prefix}{path.replace('.', '_')}.alpha").path == f"{component}.{path}"


def test_the_third_text_encoder_is_the_second_of_flux():
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha"
    assert parse_key(key).path == "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
    assert parse_key(key, "flux").path == "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, SD3Transformer2DModel])
def test_every_name_of_a_transformer_of_full_size(kind):
    settings = {"guidance_embeds": True} if kind is FluxTransformer2DModel else {"dual_attention_layers": (0, 1)}
    with torch.device("meta"):
        model = kind(**settings)
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            assert parse_key(f"lycoris_{path.replace('.', '_')}.alpha").path == f"transformer.{path}"
