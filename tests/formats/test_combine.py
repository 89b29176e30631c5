"""`loca-vision combine`: the sum of updates, which a model computes with as with both adapters active."""

import re

import pytest
import safetensors.torch
import torch

from loca_vision import LoCAConfig, LoRAConfig, SDCTFTConfig, adapters, inject, load_adapter, save_adapter
from loca_vision.commands import combine
from loca_vision.commands.main import main
from loca_vision.diffusers import load_loca_weights
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from loca_vision.layers.projection_rows import projections_in
from support.lora_files import made_up, plain
from support.pipelines import stable_diffusion
from support.reference_weights import adapter
from support.timm_models import tiny


def saved(config, folder, seed=0):
    """An adapter of random numbers, and its updates by projection."""
    model = tiny("vit")
    inject(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in adapters(model).values():
            for parameter in update.trainable():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for parameter in model.head.parameters():
            parameter.zero_()
    save_adapter(model, folder)
    return {name: update.delta().detach() for name, update in adapters(model).items()}


def updates_in(folder):
    model = tiny("vit")
    load_adapter(model, folder, "default")
    return adapters(model, "default")


def check_sum(folder, parts):
    """Every update is the sum of strength times the parts' own."""
    got = updates_in(folder)
    assert got.keys() == {name for deltas, _ in parts for name in deltas}
    for name, update in got.items():
        expected = sum(strength * deltas[name] for deltas, strength in parts if name in deltas)
        torch.testing.assert_close(update.delta(), expected, rtol=1e-4, atol=1e-5)
    return got


def test_spectra_are_summed_at_the_cells_of_all(tmp_path, capsys):
    """Also of another method with the same atoms, of other projections, and of a scale of its own."""
    a = saved(LoCAConfig(n_components=40, targets=("q", "v"), scale=3.0, seed=1), tmp_path / "a")
    b = saved(LoCAConfig(n_components=2000, targets=("q", "fc1"), seed=2), tmp_path / "b", 1)
    c = saved(SDCTFTConfig(n_components=60, targets=("k",), scale=0.5), tmp_path / "c", 2)
    assert main(f"combine {tmp_path}/a:0.8 {tmp_path}/b:-0.5 {tmp_path}/c {tmp_path}/out".split()) == 0
    got = check_sum(tmp_path / "out", [(a, 0.8), (b, -0.5), (c, 1.0)])
    assert {update.scale for update in got.values()} == {1.0}
    shared = len(got["blocks.0.attn.q"].coefficients)
    assert 2000 < shared < 2040  # some cells are of both
    assert re.search(r"^all +\d+ +[\d.]+ +0 *$", capsys.readouterr().out, re.M)


def test_components_of_a_pipeline(tmp_path):
    pipe = stable_diffusion()
    made = [adapter(pipe, n=6, size=0.1), adapter(stable_diffusion(), n=4, size=0.2)]
    for name, one in zip("ab", made, strict=True):
        one.write(tmp_path / f"{name}.safetensors")
    assert main(f"combine {tmp_path}/a.safetensors {tmp_path}/b.safetensors:0.25 {tmp_path}/out.safetensors".split()) == 0
    load_loca_weights(pipe, tmp_path / "out.safetensors", "default")
    for name, delta in made[0].updates.items():
        component, _, projection = name.partition(".")
        update = adapters(getattr(pipe, component), "default")[
            projection.removeprefix("text_model.")
        ]  # as transformers 5 has it
        expected = delta.float() + 0.25 * made[1].updates[name].float()
        torch.testing.assert_close(update.delta(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("int8", 1e-2)])
def test_packed_adapters_are_read_and_written(dtype, error, tmp_path, capsys, caplog):
    a = saved(LoCAConfig(n_components=400, targets=("q", "v"), seed=1), tmp_path / "a")
    b = saved(LoCAConfig(n_components=400, targets=("q", "fc1"), seed=2), tmp_path / "b", 1)
    assert main(f"combine {tmp_path}/a {tmp_path}/b:0 {tmp_path}/whole".split()) == 0
    assert main(f"combine {tmp_path}/a {tmp_path}/b:0 {tmp_path}/packed --dtype {dtype}".split()) == 0
    assert ("in 8 bits the coefficients differ" in caplog.text) == (dtype == "int8")
    sizes = [(tmp_path / name / "pytorch_loca_weights.safetensors").stat().st_size for name in ("whole", "packed")]
    assert sizes[0] > 2 * sizes[1]
    assert main(f"combine {tmp_path}/packed {tmp_path}/b:-0.5 {tmp_path}/both".split()) == 0
    got, zeros = updates_in(tmp_path / "both"), torch.zeros(1)
    for name, update in got.items():
        wanted = a.get(name, zeros) - 0.5 * b.get(name, zeros)
        assert (update.delta() - wanted).norm() < error * wanted.norm()
    assert main(f"inspect {tmp_path}/packed".split()) == 0
    assert f" components in {dtype}, " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_lora_converted_to_packed_components(dtype, tmp_path, caplog):
    write_diffusers_lora(tmp_path / "lora.safetensors", made_up(stable_diffusion()))
    for name, more in (("whole", ""), ("packed", f" --dtype {dtype}")):
        assert main(f"convert {tmp_path}/lora.safetensors {tmp_path}/{name}.safetensors --count 200{more}".split()) == 0
    whole, packed = (read_source(tmp_path / f"{name}.safetensors") for name in ("whole", "packed"))
    assert whole.shapes == packed.shapes and whole.shapes
    for module in whole.shapes:
        difference = whole.matrix(module) - packed.matrix(module)
        assert 0 < difference.norm() < (0.02 if dtype == "int8" else 1e-3) * whole.matrix(module).norm()
    assert len(caplog.records) == (dtype == "int8")


@pytest.mark.parametrize("to", ["--to lora", "--ratio 1.0"])
def test_others_are_summed_as_matrices(to, tmp_path, monkeypatch):
    a = saved(LoCAConfig(n_components=5, targets=("q", "v")), tmp_path / "a")
    b = saved(LoRAConfig(r=2, alpha=6, targets=("q", "v")), tmp_path / "b", 1)
    words = f"combine {tmp_path}/a:2 {tmp_path}/b:0.5 {tmp_path}/out --model test_vit {to}"
    assert main(words.split()) == 2  # of other sizes
    rank = " --rank 48" if "lora" in to else ""
    monkeypatch.setattr(combine, "model_named", lambda name: (projections_in(tiny("vit")), None))
    assert main((words + rank).split()) == 0
    check_sum(tmp_path / "out", [(a, 2.0), (b, 0.5)])


def test_loras_are_put_side_by_side(tmp_path):
    """Of other programs: ranks add up, and nothing is lost."""
    pairs = [made_up(stable_diffusion(), ranks=(2, 3), scales=(0.5,)), made_up(stable_diffusion(), seed=1)]
    write_diffusers_lora(tmp_path / "a.safetensors", pairs[0])
    write_kohya_lora(tmp_path / "b.safetensors", pairs[1])
    words = f"combine {tmp_path}/a.safetensors:0.5 {tmp_path}/b.safetensors:2 {tmp_path}/out.safetensors --to diffusers"
    assert main(words.split()) == 0
    read = {plain(name): pair for name, pair in read_lora(tmp_path / "out.safetensors").pairs.items()}
    for name, pair in pairs[0].items():
        one = next(other for path, other in pairs[1].items() if plain(path) == plain(name))
        expected = 0.5 * pair.delta() + 2 * one.delta()
        torch.testing.assert_close(read[plain(name)].delta(), expected, rtol=1e-4, atol=1e-4)
        assert read[plain(name)].rank == pair.rank + one.rank


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("combine {}/a {}/out", "expected two adapters or more and the output, got 2 paths"),
        ("combine {}/a {}/b {}/out", "b: its updates are not cosines, so that the sum is only close to LoCA: say how much"),
        ("combine {}/a:nan {}/a {}/out", "its strength is nan, expected a finite number"),
        ("combine {}/a {}/none {}/out", "no such file"),
        ("combine {}/a {}/a {}/a", "it is there; choose another name, or say --overwrite"),
        ("combine {}/a {}/a {}/out --rank 2", "one of --count"),
        ("combine {}/a {}/wide {}/out", "blocks.0.attn.q is (48, 48) in one of the adapters and (32, 32) in another"),
        ("combine {}/a {}/pipe.safetensors {}/out", "some of the adapters are of a pipeline's components, and some of a model"),
        ("combine {}/a {}/head {}/out", "head.bias was trained whole in two of the adapters, to different values"),
        ("combine {}/a:1e38 {}/a:1e38 {}/out", "combined, its coefficients are not finite in float32"),
    ],
)
def test_mistakes(words, sentence, tmp_path, capsys):
    saved(LoCAConfig(n_components=5), tmp_path / "a")
    saved(LoRAConfig(r=2), tmp_path / "b")
    adapter(stable_diffusion(), n=2).write(tmp_path / "pipe.safetensors")
    change(tmp_path / "a", tmp_path / "head", lambda tensors: tensors | {"full.head.bias": torch.ones(3)})
    change(tmp_path / "a", tmp_path / "wide", lambda tensors: tensors, "[48, 48]", "[32, 32]")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(words.replace("{}", str(tmp_path)).split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and sentence in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def change(folder, new, tensors, old="", by=""):
    """A copy of an adapter with other tensors or another word in its header."""
    new.mkdir()
    name = "pytorch_loca_weights.safetensors"
    with safetensors.safe_open(folder / name, "pt") as file:
        about = {key: value.replace(old, by) if old else value for key, value in file.metadata().items()}
    state = tensors(safetensors.torch.load_file(folder / name))
    state = {key: value % (32 * 32) if key.endswith("locations") and old else value for key, value in state.items()}
    safetensors.torch.save_file(state, new / name, about)


def test_strength_is_what_follows_the_last_colon(tmp_path, monkeypatch):
    with_strength = combine._with_strength
    assert [(str(path), strength) for path, strength in map(with_strength, ["a", "a:0.5", "C:/a", "b:c:-2"])] == [
        ("a", 1.0),
        ("a", 0.5),
        ("C:/a", 1.0),
        ("b:c", -2.0),
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").touch()
    assert with_strength("a:2")[1] == 1.0
