"""Conversion of adapters and weights: printed errors are the measured ones, and nothing is lost silently."""

import json
import re

import pytest
import safetensors.torch
import timm
import torch
from peft import LoraConfig, get_peft_model

from loca_vision import LoCAConfig, adapters, inject, load_adapter, remove, save_adapter
from loca_vision.commands.inspect_file import describe
from loca_vision.commands.main import main
from loca_vision.diffusers import load_loca_weights
from loca_vision.formats.conversion.checkpoint_difference import open_difference
from loca_vision.formats.conversion.conversion_error import loss_table, total_loss
from loca_vision.formats.conversion.dct_truncation import Budget
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.to_adapter import to_loca, to_lora_adapter
from loca_vision.formats.conversion.to_lora_file import to_lora
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.keys import canonical
from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from loca_vision.layers.projection_rows import projections_in, projections_of_modules, rows_of_target
from loca_vision.methods.fourierft import FourierFTConfig
from loca_vision.methods.lora import LoRAConfig
from loca_vision.methods.selora import SeLoRAConfig
from loca_vision.storage.safetensors_file import open_safetensors
from support.lora_files import made_up, modules, plain, weights_of
from support.pipelines import output_of, stable_diffusion, stable_diffusion_xl
from support.reference_weights import adapter
from support.timm_models import randomise, tiny

NAME = "test_vit"  # timm's own tiny one
DENOISER = re.compile(r"unet\..*attn.*(to_q|to_k|to_v|to_out\.0)|text_encoder.*(q_proj|k_proj|v_proj|out_proj)")


def norm(tensors):
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


def attention_lora(pipe, ranks=(4,)):
    """A LoRA of every attention projection of the UNet and the first text encoder, by the names that files have."""
    generator = torch.Generator().manual_seed(0)
    return {
        canonical(path): low_rank(module, ranks[i % len(ranks)], generator)
        for i, (path, module) in enumerate((p, m) for p, m in modules(pipe) if DENOISER.fullmatch(p) and "encoder_2" not in p)
    }


def low_rank(module, rank, generator):
    down = torch.randn(rank, module.in_features, generator=generator)
    return LowRankPair(down, torch.randn(module.out_features, rank, generator=generator), 0.1)


def check_told(losses, before, after):
    """Each relative error told, and the total, against the measured ones."""
    for loss in losses:
        measured = norm([before[loss.layer] - after[loss.layer]]) / (norm([before[loss.layer]]) or 1.0)
        assert loss.relative == pytest.approx(measured, rel=1e-4, abs=1e-5), loss.layer
    total = norm([before[loss.layer] - after[loss.layer] for loss in losses])
    assert total_loss(losses) == pytest.approx(total / norm([before[loss.layer] for loss in losses]), rel=1e-4, abs=1e-5)


# LoRA to LoCA


@pytest.mark.parametrize("write", [write_diffusers_lora, write_kohya_lora])
@pytest.mark.parametrize("budget", [Budget("count", 20), Budget("energy", 0.6, shared=True), Budget("ratio", 1.0)], ids=str)
def test_a_pipeline_loads_what_a_lora_was_converted_to(budget, write, tmp_path):
    pipe = stable_diffusion()
    pairs = {path: pair for path, pair in attention_lora(pipe).items() if path.startswith("unet.")}
    write(tmp_path / "lora.safetensors", pairs)
    losses = to_loca(read_source(tmp_path / "lora.safetensors"), budget, tmp_path / "loca")
    load_loca_weights(pipe, tmp_path / "loca", "default")
    got = {f"unet.{name}": update.delta().detach() for name, update in adapters(pipe.unet, "default").items()}
    expected = {projections_of_modules([path])[path].projection: pair.delta() for path, pair in pairs.items()}
    assert got.keys() == expected.keys()
    check_told(losses, expected, got)
    if budget.kind == "ratio":
        assert total_loss(losses) < 1e-6


@pytest.mark.parametrize("to", [lambda *w: to_loca(w[0], Budget("ratio", 1.0), w[1]), to_lora_adapter], ids=["loca", "lora"])
def test_text_encoders_have_the_names_of_files_whatever_transformers_has(to, tmp_path):
    pairs = attention_lora(stable_diffusion())
    write_kohya_lora(tmp_path / "lora.safetensors", pairs)
    to(read_source(tmp_path / "lora.safetensors"), tmp_path / "own")
    read = read_source(tmp_path / "own")
    assert read.shapes.keys() == pairs.keys() and any(".text_model.encoder." in path for path in pairs)
    for path, pair in pairs.items():
        torch.testing.assert_close(read.matrix(path), pair.delta(), rtol=1e-4, atol=1e-5)
    with open_safetensors(tmp_path / "own" / "pytorch_loca_weights.safetensors") as file:
        assert all(".text_model." in key for key in file.entries if key.startswith("text_encoder."))


@pytest.mark.parametrize("ranks", [(4,), (4, 2, 7)], ids=str)
def test_a_lora_of_a_pipeline_becomes_an_adapter_of_this_library(ranks, tmp_path):
    """One rank for all of them, the largest; to the last bit but the scale's rounding."""
    pipe = stable_diffusion()
    pairs = {path: pair for path, pair in attention_lora(pipe, ranks).items() if path.startswith("unet.")}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    losses = to_lora_adapter(read_source(tmp_path / "lora.safetensors"), tmp_path / "own")
    assert total_loss(losses) == 0 and {loss.kept for loss in losses} == set(ranks)
    load_loca_weights(pipe, tmp_path / "own", "default")
    got = adapters(pipe.unet, "default")
    assert {update.up.shape[1] for update in got.values()} == {max(ranks)}
    for path, pair in pairs.items():
        update = got[projections_of_modules([path])[path].projection.removeprefix("unet.")]
        torch.testing.assert_close(update.delta(), pair.delta(), rtol=1e-5, atol=1e-5)


def test_a_timm_model_computes_alike_with_the_lora_that_peft_trained(tmp_path, capsys):
    """A fused qkv: each part has its own rows of B, and the same A."""
    images = torch.randn(2, 3, 160, 160)
    adapted = peft_of(vit_model(), tmp_path, target_modules=["qkv", "fc2"])
    assert main(f"convert {tmp_path / 'peft'} {tmp_path / 'own'} --model {NAME} --to lora".split()) == 0
    model = vit_model()
    load_adapter(model, tmp_path / "own")
    with torch.no_grad():
        torch.testing.assert_close(model(images), adapted(images), atol=1e-4, rtol=1e-4)
    assert main(f"convert {tmp_path / 'own'} {tmp_path / 'cut'} --model {NAME} --to lora --rank 2".split()) == 0
    assert "relative error" in capsys.readouterr().out
    load_adapter(model, tmp_path / "cut", "cut")
    assert {update.up.shape[1] for update in adapters(model, "cut").values()} == {2}


@pytest.mark.parametrize("to", ["--count 30", "--to lora", "--ratio 1.0"])
def test_parts_of_a_fused_projection_that_nothing_changes_are_left_out(to, tmp_path):
    source = vit_model()
    inject(source, LoRAConfig(r=2))
    for update in adapters(source).values():
        torch.nn.init.normal_(update.up)
    save_adapter(source, tmp_path / "lora")
    assert main(f"convert {tmp_path / 'lora'} {tmp_path / 'out'} --model {NAME} {to}".split()) == 0
    model = vit_model()
    load_adapter(model, tmp_path / "out", "default")
    assert adapters(model).keys() == adapters(source).keys()
    if "count" not in to:
        for name, update in adapters(model).items():
            torch.testing.assert_close(update.delta(), adapters(source)[name].delta(), rtol=1e-4, atol=1e-5)


def test_zeros_for_the_sake_of_diffusers_are_no_target(tmp_path):
    pipe = stable_diffusion()
    pairs = {path: pair for path, pair in attention_lora(pipe).items() if not path.endswith(("out_proj", "k_proj"))}
    write_kohya_lora(tmp_path / "lora.safetensors", pairs)
    to_loca(read_source(tmp_path / "lora.safetensors"), Budget("count", 5), tmp_path / "loca")
    encoder = {path for path in read_source(tmp_path / "loca").shapes if path.startswith("text_encoder.")}
    assert {path.rpartition(".")[2] for path in encoder} == {"q_proj", "v_proj"}


def test_what_is_there_is_replaced_on_request_only(tmp_path, capsys):
    write_diffusers_lora(tmp_path / "lora.safetensors", attention_lora(stable_diffusion()))
    words = f"convert {tmp_path}/lora.safetensors {tmp_path}/out --count 3".split()
    assert [main(words), main(words), main([*words, "--overwrite"])] == [0, 2, 0]
    assert "say --overwrite" in capsys.readouterr().err


def peft_of(model, tmp_path, **settings):
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, modules_to_save=["head"], **settings))
    for module in adapted.modules():
        if isinstance(module, torch.nn.Module) and hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    torch.nn.init.normal_(adapted.base_model.model.head.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "peft")
    return adapted.eval()


def vit_model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).eval()


def test_a_timm_model_computes_alike_after_peft_was_converted_without_loss(tmp_path, capsys):
    images = torch.randn(2, 3, 160, 160)
    adapted = peft_of(vit_model(), tmp_path, target_modules=["qkv", "fc1"])
    line = f"convert {tmp_path / 'peft'} {tmp_path / 'loca'} --model {NAME} --ratio 1.0"
    assert main(line.split()) == 0
    model = vit_model()
    names = load_adapter(model, tmp_path / "loca")
    assert any(name.endswith(".q") for name in names) and any(name.endswith("fc1") for name in names)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), adapted(images), atol=1e-4)
    assert re.search(r"^all .*\d+ +[\d.e-]+ *$", capsys.readouterr().out, re.M)


def test_projections_that_the_lora_leaves_alone_are_not_in_the_file(tmp_path):
    adapted = peft_of(vit_model(), tmp_path, target_modules=r"blocks\.0\.attn\.qkv")
    places = projections_in(vit_model())
    source = read_source(tmp_path / "peft", places)
    losses = to_loca(source, Budget("count", 30), tmp_path / "x.safetensors", places=places, base_model=NAME)
    parts = ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v")
    assert tuple(loss.layer for loss in losses) == parts
    delta = adapted.base_model.model.blocks[0].attn.qkv.get_delta_weight("default").detach()
    got = read_source(tmp_path / "x.safetensors", places)
    assert set(got.shapes) == {"blocks.0.attn.qkv"}
    check_told(losses, *(dict(zip(parts, of.chunk(3), strict=True)) for of in (delta, got.matrix("blocks.0.attn.qkv"))))


def test_modules_that_loca_does_not_adapt_are_refused_or_left_out(tmp_path):
    pipe = stable_diffusion()
    other = "unet.mid_block.resnets.0.conv1"
    pairs = attention_lora(pipe) | {other: LowRankPair(torch.randn(2, 288), torch.randn(32, 2))}
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs, kernels={other: (3, 3)})
    source = read_source(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"conv1: a convolution of 3 x 3 is not a projection that LoCA adapts.*\(skip\)"):
        to_loca(source, Budget("count", 3), tmp_path / "loca")
    assert not (tmp_path / "loca").exists()
    losses = to_loca(source, Budget("count", 3), tmp_path / "loca", skip=True)
    (left,) = [loss for loss in losses if "conv1" in loss.layer]
    assert left.kept == 0 and left.relative == 1 and left.norm == pytest.approx(norm([pairs[other].delta()]), rel=1e-5)


# Any adapter to LoRA


CONFIGS = [
    LoCAConfig(n_components=200, targets=("q", "v", "out", "fc1")),
    FourierFTConfig(n_components=200, targets=("q", "k")),
    SeLoRAConfig(targets=("q", "v")),
    LoRAConfig(r=3, targets=("out", "fc2")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_any_adapter_becomes_a_lora_of_peft(config, tmp_path):
    model = vit_model()
    inject(model, config)
    fill(model)
    before = module_deltas(model)
    save_adapter(model, tmp_path / "x.safetensors")
    source = read_source(tmp_path / "x.safetensors", projections_in(vit_model()))
    losses = to_lora(source, tmp_path / "peft", layout="peft", rank=5)
    found = read_lora(tmp_path / "peft")
    check_told(losses, before, {module: pair.delta() for module, pair in found.pairs.items()})
    best = {module: torch.linalg.svdvals(delta.double())[5:].norm() for module, delta in before.items()}
    assert all(loss.error == pytest.approx(float(best[loss.layer]), rel=1e-3, abs=1e-4) for loss in losses)
    assert {"head.weight", "head.bias"} <= found.whole.keys()


@torch.no_grad()
def fill(model):
    generator = torch.Generator().manual_seed(3)
    for update in adapters(model).values():
        for parameter in update.trainable():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def module_deltas(model):
    """The update of every module that has one, by merging into a copy of the base."""
    updates = {name: update.delta().detach() for name, update in adapters(model).items()}
    found = {}
    for place in projections_in(vit_model()):
        if place.projection in updates:
            delta = found.setdefault(place.module, torch.zeros(place.size))
            delta[slice(None) if place.rows is None else place.rows] += updates[place.projection]
    return found


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_a_pipeline_takes_the_lora_that_a_loca_became(make, layout, tmp_path):
    pipe = make()
    made = adapter(pipe, n=6, size=0.1)
    file, base = made.write(tmp_path / "loca.safetensors"), weights_of(pipe)
    losses = to_lora(read_source(file), tmp_path / "lora.safetensors", layout=layout, rank=6)
    assert total_loss(losses) < 1e-5  # six atoms have rank six
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = {plain(rows_of_target(name).module): delta.float() for name, delta in made.updates.items()}
    for path, weight in weights_of(pipe).items():
        assert torch.allclose(weight, base[path] + expected.get(plain(path), 0), atol=1e-5), path


def test_a_lora_changes_its_keys_without_loss(tmp_path):
    pairs = made_up(stable_diffusion(), ranks=(4, 2))
    write_kohya_lora(tmp_path / "kohya.safetensors", pairs)
    line = f"convert {tmp_path / 'kohya.safetensors'} {tmp_path / 'lora.safetensors'} --to diffusers"
    assert main(line.split()) == 0
    before, after = (read_lora(tmp_path / f"{name}.safetensors").pairs for name in ("kohya", "lora"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[path].delta(), pair.delta(), atol=1e-6) for path, pair in before.items())


def test_what_a_lora_cannot_hold_is_refused(tmp_path):
    model = vit_model()
    inject(model, LoRAConfig(r=2, use_dora=True))
    save_adapter(model, tmp_path / "dora.safetensors")
    source = read_source(tmp_path / "dora.safetensors", projections_in(vit_model()))
    with pytest.raises(ValueError, match=r"DoRA\) depends on the weight; name the weights"):
        to_lora(source, tmp_path / "peft", layout="peft", rank=2)
    with pytest.raises(ValueError, match="which rows of which weight it is only the model tells"):
        read_source(tmp_path / "dora.safetensors")
    pipe = stable_diffusion()
    file = adapter(pipe, whole=("unet.conv_in.weight",)).write(tmp_path / "loca.safetensors")
    with pytest.raises(ValueError, match=r"unet.conv_in.weight: it was trained whole, for which kohya keys have no room"):
        to_lora(read_source(file), tmp_path / "x.safetensors", layout="kohya", rank=2)
    with pytest.raises(ValueError, match="no factors yet"):
        to_lora(read_source(file), tmp_path / "x.safetensors", layout="kohya", skip=True)
    with pytest.raises(ValueError, match="one model, and this update is for text_encoder, unet"):
        to_lora(read_source(file), tmp_path / "x", layout="peft", rank=2, skip=True)
    assert {path.name for path in tmp_path.iterdir()} == {"dora.safetensors", "loca.safetensors"}


# Two checkpoints


def checkpoints(tmp_path, change):
    base = vit_model()
    tuned = vit_model()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if change(name):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for name, model in (("base", base), ("tuned", tuned)):
        safetensors.torch.save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    return base, tuned


def test_a_fine_tuned_model_is_extracted_without_loss(tmp_path):
    images = torch.randn(2, 3, 160, 160)
    _, tuned = checkpoints(tmp_path, lambda name: "qkv.weight" in name or "norm" in name or "fc2.weight" in name)
    words = f"extract {tmp_path}/base.safetensors {tmp_path}/tuned.safetensors {tmp_path}/loca --model {NAME} --ratio 1.0"
    assert main(words.split()) == 2
    assert main([*words.split(), "--others", "whole"]) == 0
    model = vit_model()
    load_adapter(model, tmp_path / "loca")
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), tuned(images), atol=1e-4)


@pytest.mark.parametrize("form", ["--ratio 1.0", "--to kohya --rank 16"])
def test_a_fine_tuned_component_of_a_pipeline_is_extracted(form, tmp_path):
    base, tuned = stable_diffusion(), stable_diffusion()
    with torch.no_grad():
        for path, module in tuned.unet.named_modules():
            if re.fullmatch(r".*attn\d\.(to_q|to_k|to_v|to_out\.0)", path):
                module.weight += 0.05 * torch.randn(module.weight.shape)
    base.unet.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    tuned.unet.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out.safetensors"
    words = f"extract {tmp_path}/base {tmp_path}/tuned {out} --component unet {form}"
    assert main(words.split()) == 0
    if "kohya" in form:
        base.load_lora_weights(out)
    else:
        load_loca_weights(base, out)
    if "kohya" not in form:
        assert torch.allclose(output_of(base.unet), output_of(tuned.unet), atol=1e-5)
    else:  # rank 16 is all there is of the layers 16 wide
        assert not torch.allclose(output_of(base.unet), output_of(stable_diffusion().unet), atol=1e-4)


def test_other_changes_are_refused_or_listed(tmp_path, capsys):
    checkpoints(tmp_path, lambda name: "qkv" in name)
    words = (
        f"extract {tmp_path}/base.safetensors {tmp_path}/tuned.safetensors {tmp_path}/peft --model {NAME} --to peft --rank 3"
    )
    assert main(words.split()) == 2
    assert "blocks.0.attn.qkv.bias changed as well, and 5 more" in capsys.readouterr().err
    assert main([*words.split(), "--others", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("left out: ") for line in lines) == 6
    assert any(line.endswith("whose size is not known (6)") for line in lines)
    assert all(pair.rank == 3 for pair in read_lora(tmp_path / "peft").pairs.values())
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == f"timm/{NAME}.r160_in1k"


def test_checkpoints_that_do_not_belong_together_are_refused(tmp_path):
    state = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}
    names = {
        "base": state,
        "same": state,
        "less": {"a.weight": torch.ones(2, 2)},
        "nan": state | {"a.weight": torch.full((2, 2), torch.nan)},
    }
    for name, tensors in names.items():
        safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    for name, sentence in {"same": "no weight of a projection differs", "less": "it lacks the tensor b.weight"}.items():
        with (
            pytest.raises(ValueError, match=sentence),
            open_difference(tmp_path / "base.safetensors", tmp_path / f"{name}.safetensors", lambda _: True),
        ):
            pass
    with (
        pytest.raises(ValueError, match=r"a.weight holds NaN"),
        open_difference(tmp_path / "base.safetensors", tmp_path / "nan.safetensors", lambda _: True) as source,
    ):
        source.matrix("a")


# Weights in, weights out


@pytest.mark.parametrize(
    "config", [*CONFIGS, LoRAConfig(r=2, use_dora=True, targets=("q", "fc1"))], ids=lambda c: f"{c.method}"
)
def test_merged_weights_are_those_that_remove_merges(config, tmp_path):
    model = vit_model()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base.safetensors")
    inject(model, config)
    fill(model)
    save_adapter(model, tmp_path / "x.safetensors")
    with torch.no_grad():
        remove(model, merge=True)
    source = read_source(tmp_path / "x.safetensors", projections_in(vit_model()))
    folder = merge(tmp_path / "base.safetensors", source, tmp_path / "out", shard_size=100_000)
    merged = {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}
    assert merged.keys() == model.state_dict().keys() and (folder / "base.safetensors.index.json").exists()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name


def test_a_component_of_a_pipeline_is_merged_into_shards_that_diffusers_reads(tmp_path, capsys):
    pipe = stable_diffusion()
    made = adapter(pipe, whole=("unet.conv_in.weight",))
    made.write(tmp_path / "loca.safetensors")
    pipe.unet.save_pretrained(tmp_path / "unet", max_shard_size="50KB")
    words = f"merge {tmp_path}/unet {tmp_path}/loca.safetensors {tmp_path}/out --shard-size 5e-5"
    assert main(words.split()) == 2
    assert "say which of them the base is with --component" in capsys.readouterr().err
    assert main([*words.split(), "--component", "unet", "--strength", "0.5"]) == 0
    loaded = type(pipe.unet).from_pretrained(tmp_path / "out")
    expected = {rows_of_target(name).module: delta.float() for name, delta in made.updates.items()}
    for name, weight in pipe.unet.state_dict().items():
        delta = expected.get(f"unet.{name.removesuffix('.weight')}")
        after = loaded.state_dict()[name]
        if name == "conv_in.weight":
            assert torch.equal(after, made.whole["unet.conv_in.weight"])
        elif delta is None:
            assert torch.equal(after, weight)
        else:
            assert torch.allclose(after, weight + 0.5 * delta, atol=1e-6)


def test_a_merge_that_cannot_be_is_refused(tmp_path):
    pairs = attention_lora(stable_diffusion())
    write_diffusers_lora(tmp_path / "lora.safetensors", pairs)
    source = read_source(tmp_path / "lora.safetensors")
    state = stable_diffusion().unet.state_dict()
    safetensors.torch.save_file(state, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="the base has no tensor"):
        merge(tmp_path / "base.safetensors", source, tmp_path / "out", component="text_encoder")
    with pytest.raises(ValueError, match="for text_encoder, unet: say which of them the base is with --component"):
        merge(tmp_path / "base.safetensors", source, tmp_path / "out")
    with pytest.raises(ValueError, match="no update for the component 'transformer'"):
        merge(tmp_path / "base.safetensors", source, tmp_path / "out", component="transformer")
    with pytest.raises(ValueError, match=r"not be finite in torch.float16"):
        safetensors.torch.save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
        merge(tmp_path / "half.safetensors", source, tmp_path / "out", component="unet", strength=1e6)
    with pytest.raises(ValueError, match="the base itself is not overwritten"):
        merge(tmp_path / "base.safetensors", source, tmp_path / "base.safetensors", component="unet", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "half.safetensors", "lora.safetensors"}


# What is said


def test_the_table_ends_with_all_layers():
    table = loss_table([], "rank").splitlines()
    assert table[0].split()[:3] == ["layer", "shape", "rank"] and table[-1].startswith("all")


def test_inspect_tells_energy_of_adapters_and_loras(tmp_path, capsys):
    model = tiny("vit")
    inject(model, LoCAConfig(n_components=40))
    randomise(model)
    save_adapter(model, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--picture", str(tmp_path / "x.png")]) == 0
    said = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"([\d.]+) %  ", said)]
    norms = {name: float(update.delta().detach().norm()) for name, update in adapters(model).items()}
    total = sum(value**2 for value in norms.values())
    assert shares == pytest.approx([100 * value**2 / total for value in norms.values()], abs=0.06)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    write_kohya_lora(tmp_path / "lora.safetensors", made_up(stable_diffusion()))
    assert "ranks" in describe(tmp_path / "lora.safetensors")
