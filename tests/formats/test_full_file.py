"""`convert --to full`: all of an update, as the differences that ComfyUI and A1111 add to the weights."""

import pytest
import safetensors.torch
import torch
from torch import nn

from loca_vision import LoRAConfig, adapters, inject, remove
from loca_vision.commands.main import main
from loca_vision.diffusers import save_loca_weights
from loca_vision.formats.conversion.conversion_error import total_loss
from loca_vision.formats.conversion.to_full_file import to_full
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, read_source
from loca_vision.layers.projection_rows import rows_of_target
from support.pipelines import stable_diffusion, stable_diffusion_xl, unet
from support.reference_weights import adapter

CONV_IN = "unet.conv_in.weight"


def added(model, file, prefix="lora_unet_"):
    """As ComfyUI and A1111 add a file to a model's weights and biases, by the names of diffusers' modules."""
    tensors = safetensors.torch.load_file(file)
    names = {f"{prefix}{name.replace('.', '_')}": name for name, _ in model.named_modules()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            layer, _, kind = key.rpartition(".")
            if layer in names and kind in ("diff", "diff_b"):
                parameter = model.get_parameter(f"{names[layer]}.{'weight' if kind == 'diff' else 'bias'}")
                assert parameter.shape == tensor.shape
                parameter += tensor.float()
    return tensors


def check_equal(model, expected, atol=1e-6):
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=atol, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("words", "atol"), [("", 1e-6), ("--half", 1e-3)])
def test_a_loca_arrives_whole(words, atol, tmp_path, capsys):
    pipe = stable_diffusion()
    made = adapter(pipe, n=40, size=0.5)
    made.write(tmp_path / "loca.safetensors")
    out = tmp_path / "full.safetensors"
    assert main(f"convert {tmp_path}/loca.safetensors {out} --to full {words}".split()) == 0
    *_, all_line, last = capsys.readouterr().out.splitlines()
    assert (
        float(all_line.split()[-1]) < (1e-3 if words else 1e-9) and last == f"{out}: written, {out.stat().st_size / 1e6:.4g} MB"
    )
    expected = unet()
    with torch.no_grad():
        for name, delta in made.updates.items():
            module = rows_of_target(name).module
            if module.startswith("unet."):
                expected.get_parameter(f"{module.removeprefix('unet.')}.weight").add_(delta)
    model = unet()
    tensors = added(model, out)
    check_equal(model, expected, atol)
    assert {tensor.dtype for key, tensor in tensors.items() if key.endswith(".diff")} == {
        torch.float16 if words else torch.float32
    }
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.diff") for key in tensors)


def test_a_tensor_trained_whole_is_a_difference_from_the_base(tmp_path, capsys):
    pipe = stable_diffusion()
    made = adapter(pipe, whole=(CONV_IN,))
    made.write(tmp_path / "loca.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    words = f"convert {tmp_path}/loca.safetensors {tmp_path}/full.safetensors --to full".split()
    assert main(words) == 2
    assert "unet.conv_in.weight: it was trained whole, and what it adds only the base's tells" in capsys.readouterr().err
    assert main([*words, "--skip"]) == 0
    assert f"left out: {CONV_IN}: it was trained whole" in capsys.readouterr().out
    assert main([*words, "--overwrite", "--base", str(tmp_path / "base")]) == 0
    model = unet()
    added(model, tmp_path / "full.safetensors")
    torch.testing.assert_close(model.conv_in.weight, made.whole[CONV_IN], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("base", ["base", "base/unet"])
def test_a_dora_is_a_difference_with_the_base(base, tmp_path):
    pipe, plain = stable_diffusion(), stable_diffusion()
    plain.save_pretrained(tmp_path / "base")
    inject(pipe.unet, LoRAConfig(r=2, use_dora=True, targets=("q", "v")))
    with torch.no_grad():
        for update in adapters(pipe.unet).values():
            nn.init.normal_(update.up, std=0.1)
            update.magnitude.mul_(1.5)
    save_loca_weights(pipe, tmp_path / "dora")
    assert main(f"convert {tmp_path}/dora {tmp_path}/full.safetensors --to full --base {tmp_path}/{base}".split()) == 0
    with torch.no_grad():
        remove(pipe.unet, merge=True)
    added(plain.unet, tmp_path / "full.safetensors")
    check_equal(plain.unet, pipe.unet, atol=1e-5)


def test_a_fine_tuned_unet_arrives_whole_with_its_biases_norms_and_convolutions(tmp_path, capsys):
    base, tuned = unet(), unet()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    words = f"extract {tmp_path}/base {tmp_path}/tuned {tmp_path}/full.safetensors --component unet --to full --others whole"
    assert main(words.split()) == 0, capsys.readouterr().err
    model = unet()
    added(model, tmp_path / "full.safetensors")
    check_equal(model, tuned)


def test_convolutions_and_differences_without_a_base(tmp_path):
    conv, bias = torch.randn(32, 32 * 9), torch.randn(32)
    layer = "unet.mid_block.resnets.0.conv1"
    source = WeightDeltas({layer: (32, 32 * 9)}, lambda *_: conv, kernels={layer: (3, 3)}, differences={f"{layer}.bias": bias})
    assert total_loss(to_full(source, tmp_path / "x.safetensors")) == 0
    model = unet()
    before = {name: parameter.clone() for name, parameter in model.mid_block.resnets[0].conv1.named_parameters()}
    added(model, tmp_path / "x.safetensors")
    after = model.mid_block.resnets[0].conv1
    torch.testing.assert_close(after.weight, before["weight"] + conv.reshape(32, 32, 3, 3))
    torch.testing.assert_close(after.bias, before["bias"] + bias)


def test_what_has_no_name_is_refused_or_listed(tmp_path):
    shapes = {"transformer.transformer_blocks.0.attn.to_q": (4, 4), "unet.mid_block.attentions.0.proj_in": (4, 4)}
    source = WeightDeltas(shapes, lambda *_: torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match=r"transformer.*attn.to_q: kohya's keys have no name for it.*\(skip\)"):
        to_full(source, tmp_path / "x.safetensors")
    kept, dropped = to_full(source, tmp_path / "x.safetensors", skip=True)
    assert kept.error == 0 and dropped.relative == 1 and total_loss([kept, dropped]) == pytest.approx(0.5**0.5)


def test_text_encoders_of_xl_have_their_names_and_all_four_parts(tmp_path):
    made = adapter(stable_diffusion_xl(), {"text_encoder": ("q",), "text_encoder_2": ("q",)}, n=5)
    made.write(tmp_path / "loca.safetensors")
    to_full(read_source(tmp_path / "loca.safetensors"), tmp_path / "x.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    layer = "lora_te2_text_model_encoder_layers_0_self_attn_"
    assert {key.removeprefix(layer).partition(".")[0] for key in tensors if key.startswith(layer)} == {
        *("q_proj", "k_proj", "v_proj", "out_proj"),
    }
    assert any(key.startswith("lora_te1_") for key in tensors) and not any(key.startswith("lora_te_") for key in tensors)


def test_biases_whose_weights_stay_are_warned_of(tmp_path, capsys):
    """A1111 knows a difference of a bias only beside one of the weight."""
    base, tuned = unet(), unet()
    with torch.no_grad():
        tuned.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight += 0.1
        tuned.mid_block.resnets[0].conv1.bias += 0.1
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    words = f"extract {tmp_path}/base {tmp_path}/tuned {tmp_path}/x.safetensors --component unet --to full --others whole"
    assert main(words.split()) == 0
    assert "warning: A1111 reads no file with biases" in capsys.readouterr().out
    with torch.no_grad():
        tuned.mid_block.resnets[0].conv1.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    assert main([*words.split(), "--overwrite"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_base_that_is_not_the_base_is_refused(tmp_path, capsys):
    made = adapter(stable_diffusion(), whole=(CONV_IN,))
    made.write(tmp_path / "loca.safetensors")
    unet(channels=8).save_pretrained(tmp_path / "wide")
    safetensors.torch.save_file({"other.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    words = f"convert {tmp_path}/loca.safetensors {tmp_path}/x.safetensors --to full --base {tmp_path}/".split()
    for base, sentence in {
        "wide": "unet.conv_in.weight is (16, 8, 3, 3) in the base, and (16, 4, 3, 3) in the adapter",
        "other.safetensors": "it has no tensor conv_in.weight, for which there is an update",
        "none": "none",
    }.items():
        assert main([*words[:-1], words[-1] + base]) == 2
        said = capsys.readouterr().err
        assert sentence in said and len(said.splitlines()) == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_a_base_of_several_components_is_the_folder_of_the_pipeline(tmp_path, capsys):
    pipe = stable_diffusion()
    pipe.unet.save_pretrained(tmp_path / "unet")
    whole = ("unet.conv_in.weight", "text_encoder.encoder.layers.0.mlp.fc1.weight")
    made = adapter(pipe, whole=whole)
    made.write(tmp_path / "loca.safetensors")
    words = f"convert {tmp_path}/loca.safetensors {tmp_path}/x.safetensors --to full --base".split()
    assert main([*words, str(tmp_path / "unet")]) == 2
    assert "it has no folder text_encoder, and the adapter is for text_encoder, unet" in capsys.readouterr().err
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "pipe")
    assert main([*words, str(tmp_path / "pipe")]) == 0
    added(pipe.text_encoder, tmp_path / "x.safetensors", "lora_te_text_model_")
    fc1 = pipe.text_encoder.encoder.layers[0].mlp.fc1.weight
    torch.testing.assert_close(fc1, made.whole[whole[1]], atol=1e-6, rtol=1e-6)
