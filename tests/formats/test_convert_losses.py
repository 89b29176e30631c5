"""`loca-vision convert`: what is left out is listed and counted, and what a reader passes over is said."""

import pytest
import safetensors.torch
import torch

from loca_vision.commands.main import main
from loca_vision.formats.conversion.conversion_error import total_loss
from loca_vision.formats.conversion.to_adapter import to_lora_adapter
from loca_vision.formats.conversion.to_lora_file import to_lora
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora
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
    other = "unet.mid_block.resnets.0.conv1"
    pairs = {f"{BLOCK}.attn1.to_q": pair(0), f"{BLOCK}.ff.net.2": pair(1), other: pair(2, 32, 288)}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs, kernels={other: (3, 3)})
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "out", *to, "--skip")
    assert left_out(lines) == [other]
    norms = {name: float(of.delta().double().norm()) for name, of in pairs.items()}
    lost = norms[other] / torch.tensor(list(norms.values())).norm().item()
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


def full_rank(size=16, decay=1.0):
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return left * torch.arange(1, size + 1) ** -decay @ right


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_rank_that_loses_much_is_warned_of_with_one_that_does_not(to, tmp_path, capsys):
    file = adapter(stable_diffusion(), n=200, size=0.2).write(tmp_path / "loca.safetensors")
    lines = converted(capsys, file, tmp_path / "out.safetensors", "--to", to, "--rank", "2")
    (warning,) = [line for line in lines if "is lost" in line]
    assert warning.startswith(f"warning: {100 * error_of_all(lines):.0f} % of the update is lost: --rank ")
    assert ("--to full loses nothing" in warning) == (to == "kohya")
    rank = int(warning.split("--rank ")[1].split()[0])
    errors = []
    for tried in (rank, rank - 1):
        words = ("--to", to, "--rank", tried, "--overwrite")
        lines = converted(capsys, file, tmp_path / "out.safetensors", *words)
        errors.append(error_of_all(lines))
        assert not any("is lost" in line for line in lines)
    assert errors[0] <= 0.05 < errors[1]


def test_few_components_are_warned_of_with_how_many_lose_little(tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {f"{BLOCK}.attn1.to_q": pair(0), f"{BLOCK}.attn1.to_k": pair(1)})
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "out", "--count", "10")
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "--energy 0.9975 would lose 5 % of each layer" in warning
    count = int(warning.split("with ")[1].split()[0])
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "more", "--energy", "0.9975")
    assert next(line for line in lines if line.startswith("all")).split()[1] == str(count)
    assert 0.03 < error_of_all(lines) <= 0.05 and not any("warning" in line for line in lines)


def test_a_loss_by_what_is_left_out_is_not_blamed_on_the_rank(tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {f"{BLOCK}.attn1.to_q": pair(0), "transformer.a.to_q": pair(2)})
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "out.safetensors", "--to", "kohya", "--skip")
    assert left_out(lines) == ["transformer.a.to_q"]
    norms = [float(pair(seed).delta().norm()) for seed in (0, 2)]
    assert error_of_all(lines) == pytest.approx(norms[1] / torch.tensor(norms).norm().item(), abs=2e-4)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert warning.endswith("by what was left out")


@pytest.mark.parametrize(("to", "kept"), [("kohya", 1), ("diffusers", 2), ("lora", 1)])
def test_differences_and_convolutions_without_a_place_count(to, kept, tmp_path):
    conv, bias = full_rank()[:, :9], torch.ones(16)
    attention, layer = f"{BLOCK}.attn1.to_q", "unet.mid_block.resnets.0.conv1"
    unnamed = "transformer.x.to_q" if to == "kohya" else layer
    source = WeightDeltas(
        {attention: (16, 16), unnamed: (16, 9)},
        lambda module, _: pair(0) if module == attention else LowRankPair(conv.T @ conv, conv),
        kernels={layer: (3, 3)},
        differences={f"{layer}.bias": bias},
    )
    write = to_lora_adapter if to == "lora" else lambda *given, **more: to_lora(*given, layout=to, **more)
    with pytest.raises(ValueError, match=r"it can be left out \(skip\)"):
        write(source, tmp_path / "out.safetensors")
    losses = write(source, tmp_path / "out.safetensors", skip=True)
    norms = [float(of.double().norm()) for of in (pair(0).delta(), conv @ conv.T @ conv, bias)]
    lost = norms[kept:]
    assert total_loss(losses) == pytest.approx(torch.tensor(lost).norm().item() / torch.tensor(norms).norm().item(), rel=1e-5)
    assert [loss.layer for loss in losses if loss.why] == [unnamed, f"{layer}.bias"][kept - 1 :]


@pytest.mark.parametrize(
    ("component", "layer", "sentence"),
    [
        ("text_encoder_2", "encoder.block.0.layer.1.DenseReluDense.wi_0", "which has no loader for a T5"),
        ("text_encoder_3", "text_model.encoder.layers.0.self_attn.q_proj", "CLIP's text encoders only"),
        ("text_encoder", "model.layers.0.self_attn.q_proj", "CLIP's text encoders only"),
        ("transformer_2", "blocks.0.attn1.to_q", "load_into_transformer_2=True"),
    ],
)
def test_components_that_diffusers_has_no_reader_for_are_said(component, layer, sentence, tmp_path, capsys):
    pairs = {"transformer.a.to_q": pair(0), f"{component}.{layer}": pair(1)}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "again.safetensors", "--to", "diffusers")
    assert [line for line in lines if line.startswith(f"warning: {component}: ") and sentence in line]


def test_what_kohyas_keys_have_no_names_for_is_refused(tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {f"{BLOCK}.attn1.to_q": pair(0), T5: pair(1)})
    assert main(["convert", f"{tmp_path}/lora.safetensors", f"{tmp_path}/out.safetensors", "--to", "kohya"]) == 2
    assert f"{T5}: kohya's keys have names for the UNet and CLIP text encoders" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_layers_that_a1111_has_no_name_for_are_said(to, tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", {"unet.add_embedding.linear_1": pair(0)})
    lines = converted(capsys, tmp_path / "lora.safetensors", tmp_path / "out.safetensors", "--to", to)
    assert any("A1111 has no name for unet.add_embedding.linear_1" in line for line in lines) == (to == "kohya")
