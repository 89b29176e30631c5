"""Files that other programs wrote, and the weights they made of them (`tests/golden/README.md`)."""

import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from loca_vision.commands import convert
from loca_vision.commands.main import main
from loca_vision.formats.conversion.base_tensors import matrices_in
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.keys import unflattened
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.layers.projection_rows import ProjectionRows

GOLDEN = Path(__file__).parents[2] / "golden"


def expected_of(file):
    """The weights before and after, by name."""
    tensors = safetensors.torch.load_file(file)
    return tuple({k.removesuffix(end): v for k, v in tensors.items() if k.endswith(end)} for end in (".before", ".after"))


def merged_into(before, source_of, tmp_path, **settings):
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in before.items()}, base)
    source = source_of(base)
    return source, safetensors.torch.load_file(merge(base, source, tmp_path / "out.safetensors", **settings))


def lycoris_weights():
    before, after = expected_of(GOLDEN / "lycoris-expected.safetensors")
    return tuple({f"{unflattened(name)}.weight": tensor for name, tensor in of.items()} for of in (before, after))


def test_every_kind_of_lycoris_is_merged_as_it_does_itself(tmp_path):
    before, after = lycoris_weights()
    bias = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias"
    added = next(
        v for k, v in safetensors.torch.load_file(GOLDEN / "lycoris-expected.safetensors").items() if k.endswith("bias")
    )
    source, merged = merged_into(
        before | {bias: torch.ones(8)}, lambda _: read_source(GOLDEN / "lycoris.safetensors"), tmp_path, component="unet"
    )
    assert len(source.shapes) == len(after) == 18
    for name, weight in after.items():
        assert torch.allclose(merged[name], weight, atol=2e-6), name
        assert not torch.allclose(before[name], weight, atol=1e-2), name
    assert torch.allclose(merged[bias], 1 + added, atol=1e-6) and added.abs().max() > 0.1


def test_what_is_a_convolution_is_told():
    source = read_source(GOLDEN / "lycoris.safetensors")
    assert source.kernels == {name: (3, 3) for name in source.shapes if ".resnets." in name}
    assert {name.rpartition(".")[2] for name in source.needs_weight} == {"to_k", "to_v", "to_q", "2", "conv1", "conv2"}
    assert len(source.needs_weight) == 6


def test_only_what_does_not_depend_on_the_weight_is_read_without():
    before, after = lycoris_weights()
    source = read_source(GOLDEN / "lycoris.safetensors")
    for module, shape in source.shapes.items():
        if module in source.needs_weight:
            with pytest.raises(ValueError, match=r"DoRA\) depends on the weight, which is not given"):
                source.matrix(module)
        else:
            name = f"{module.removeprefix('unet.')}.weight"
            assert torch.allclose(source.matrix(module), (after[name] - before[name]).flatten(1), atol=2e-6)
            assert source.matrix(module).shape == shape


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("peft-*")), ids=lambda folder: folder.name)
def test_what_peft_writes_is_merged_as_it_does_itself(folder, tmp_path):
    before, after = expected_of(folder / "expected.safetensors")
    source, merged = merged_into(before, lambda base: read_source(folder, sizes=matrices_in(base)), tmp_path)
    assert merged.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.allclose(merged[name], tensor, atol=3e-6), name
    changed = {name for name in after if not torch.allclose(before[name], after[name], atol=1e-3)}
    assert {f"{module}.weight" for module in source.shapes} <= changed


def test_cells_of_fourierft_need_the_size_of_the_weight():
    with pytest.raises(ValueError, match=r"fc1.* has a spectrum of FourierFT, whose cells only the weight's size tells"):
        read_lora(GOLDEN / "peft-fourierft")
    with pytest.raises(ValueError, match=r"fourierft_spectrum \(9,\): expected \(9,\), of the 6 cells"):
        read_lora(GOLDEN / "peft-fourierft", sizes={"fc1": (3, 2), "fc2": (12, 8)})


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_diffusers_saves_is_merged_as_it_fuses(component, tmp_path):
    before, after = expected_of(GOLDEN / "diffusers-expected.safetensors")
    mine = [
        {name.removeprefix(f"{component}."): v for name, v in of.items() if name.startswith(f"{component}.")}
        for of in (before, after)
    ]
    assert mine[0]
    _, merged = merged_into(mine[0], lambda _: read_source(GOLDEN / "diffusers.safetensors"), tmp_path, component=component)
    for name, tensor in mine[1].items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name


def test_dora_is_converted_given_the_weights(tmp_path, capsys):
    """To matrices of full rank, which the merged weights show; peft's folder is of a model by itself."""
    before, after = lycoris_weights()
    names = [name for name in before if ".attn" in name]
    safetensors.torch.save_file({name: before[name] for name in names}, tmp_path / "base.safetensors")
    tensors = safetensors.torch.load_file(GOLDEN / "lycoris.safetensors")
    safetensors.torch.save_file({k: v for k, v in tensors.items() if "_attn" in k}, tmp_path / "lora.safetensors")
    words = f"convert {tmp_path}/lora.safetensors {tmp_path}/out.safetensors --to diffusers --rank 8"
    assert main(words.split()) == 2 and "name the weights (--base), or merge it" in capsys.readouterr().err
    assert main([*words.split(), "--base", f"{tmp_path}/base.safetensors"]) == 0
    pairs = read_lora(tmp_path / "out.safetensors").pairs
    assert {f"{module.removeprefix('unet.')}.weight" for module in pairs} == set(names)
    for module, pair in pairs.items():
        name = f"{module.removeprefix('unet.')}.weight"
        assert torch.allclose(pair.delta(), after[name] - before[name], atol=1e-5), name
    del before[next(name for name in names if name.endswith("attn1.to_k.weight"))]
    safetensors.torch.save_file({name: before[name] for name in names if name in before}, tmp_path / "less.safetensors")
    assert main([*words.split(), "--overwrite", "--base", f"{tmp_path}/less.safetensors"]) == 2
    assert "less.safetensors: it has no weight of unet.mid_block" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--model test_vit", "--base {}/base.safetensors"])
def test_fourierft_of_peft_is_converted_given_the_sizes(words, tmp_path, monkeypatch):
    before, after = expected_of(GOLDEN / "peft-fourierft" / "expected.safetensors")
    safetensors.torch.save_file(before, tmp_path / "base.safetensors")
    places = [ProjectionRows(name, name, size=tuple(before[f"{name}.weight"].shape)) for name in ("fc1", "fc2")]
    monkeypatch.setattr(convert, "model_named", lambda name: (places if name else None, None))
    line = f"convert {GOLDEN}/peft-fourierft {tmp_path}/out --to peft --rank 8 {words.format(tmp_path)}"
    assert main(line.split()) == 0
    for module, pair in read_lora(tmp_path / "out").pairs.items():
        name = f"{module}.weight"
        assert torch.allclose(pair.delta(), after[name] - before[name], atol=1e-5), name


def test_inspect_measures_what_peft_writes(tmp_path, capsys):
    for folder in sorted(GOLDEN.glob("peft-*")):
        before, after = expected_of(folder / "expected.safetensors")
        safetensors.torch.save_file(before, tmp_path / "base.safetensors")
        assert main(f"inspect {folder} --base {tmp_path}/base.safetensors".split()) == 0
        rows = {
            line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line[:3] in ("fc1", "fc2", "con")
        }
        for module, row in rows.items():
            norm = float((after[f"{module}.weight"] - before[f"{module}.weight"]).norm())
            assert row[5] == "-" if folder.name == "peft-dora" else float(row[5]) == pytest.approx(norm, rel=1e-3)
        assert rows.keys() >= {"fc1"}


def damaged(tensors, generator):
    """Another shape, dtype, number or set of tensors."""
    key = generator.choice(sorted(tensors))
    tensor, rest = tensors[key], {name: value for name, value in tensors.items() if name != key}
    shape = list(tensor.shape) or [1]
    shape[generator.randrange(len(shape))] = generator.choice((0, 1, 2, 3, 5))
    other = generator.choice(sorted(rest))
    return rest | generator.choice(
        [
            {},
            {key: torch.ones(shape)},
            {key: torch.ones([*shape, generator.choice((1, 2))])},
            {key: torch.ones(shape[1:] or [2])},
            {key: tensor.to(generator.choice((torch.int32, torch.float8_e5m2, torch.bool)))},
            {key: torch.full_like(tensor, generator.choice((torch.nan, 3e38, 0.0)))},
            {f"{key.partition('.')[0]}.{other.partition('.')[2]}": rest[other].clone()},
        ]
    )


def test_any_damage_is_read_or_refused_in_one_line(tmp_path):
    generator, outcomes = random.Random(0), {"read": 0, "refused": 0}
    whole = safetensors.torch.load_file(GOLDEN / "lycoris.safetensors")
    layers = sorted({key.partition(".")[0] for key in whole})
    for trial in range(600):
        layer = layers[trial % len(layers)]
        tensors = {key: value for key, value in whole.items() if key.startswith((layer, layers[0]))}
        safetensors.torch.save_file(damaged(tensors, generator), tmp_path / "x.safetensors")
        try:
            source = read_source(tmp_path / "x.safetensors", skip=bool(trial % 2))
            for module, shape in source.shapes.items():
                assert source.matrix(module, torch.ones(shape)).shape == shape
            outcomes["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_sd_scripts_saves_is_merged_as_it_merges(component, tmp_path):
    """Linear layers, 1 x 1 and 3 x 3 convolutions, of other ranks and alphas."""
    tensors = safetensors.torch.load_file(GOLDEN / "sd-scripts-expected.safetensors")
    added = {name.removeprefix(f"{component}."): v for name, v in tensors.items() if name.startswith(f"{component}.")}
    assert {tensor.dim() for tensor in added.values()} == ({2, 4} if component == "unet" else {2})
    _, merged = merged_into(
        {name: torch.zeros_like(tensor) for name, tensor in added.items()},
        lambda _: read_source(GOLDEN / "sd-scripts.safetensors"),
        tmp_path,
        component=component,
    )
    for name, tensor in added.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name


@pytest.mark.parametrize(
    ("name", "module"),
    [("sd-scripts-flux", "single_transformer_blocks.0.attn.to_q"), ("xlabs", "transformer_blocks.0.attn.add_k_proj")],
)
def test_of_flux_it_is_merged_as_the_program_adds_it(name, module, tmp_path):
    """Into the layout of its authors; the modules of diffusers, that are rows of it, put together again."""
    added = safetensors.torch.load_file(GOLDEN / f"{name}-expected.safetensors")
    source, merged = merged_into(
        {name: torch.zeros_like(tensor) for name, tensor in added.items()},
        lambda _: read_source(GOLDEN / f"{name}.safetensors"),
        tmp_path,
    )
    assert f"transformer.{module}" in source.shapes
    for name, tensor in added.items():
        assert tensor.any() and torch.allclose(merged[name], tensor, atol=1e-6), name
