"""Merging into what transformers saves: names that changed with its versions, another head, and the files beside."""

import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from loca_vision import LoCAConfig, inject, load_adapter, remove, save_adapter
from loca_vision.commands.main import main
from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, read_source
from loca_vision.layers.projection_rows import projections_in
from support.pipelines import text_encoder
from support.timm_models import randomise
from support.timm_models import tiny as tiny_timm
from support.transformers_models import logits, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it

FAMILIES = {
    "vit": "query",
    "deit": "query",
    "beit": "query",
    "dinov2": "query",
    "dinov2_reg": "query",
    "siglip": "q_proj",
    "clip": "q_proj",
    "swin": "query",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_peft_is_merged_into_the_names_on_disk(family, tmp_path):
    """And what transformers loads from there computes as peft's model does."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    on_disk = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    assert any(FAMILIES[family] in name for name in on_disk)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1", "fc2", "o_proj", "out_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    merge(tmp_path / "base", read_source(tmp_path / "lora"), tmp_path / "out")
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == on_disk.keys()
    loaded = type(tiny(family)).from_pretrained(tmp_path / "out")
    expected = logits(adapted)
    assert torch.allclose(logits(loaded), expected, atol=1e-4) and not torch.allclose(logits(tiny(family)), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"])
def test_former_names_and_present_ones_are_of_one_tensor(name, tmp_path):
    delta = torch.randn(48, 48)
    source = WeightDeltas({name: (48, 48)}, lambda module, _: delta)
    model = tiny()
    model.save_pretrained(tmp_path / "former")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "present.safetensors")
    for base in (tmp_path / "former" / "model.safetensors", tmp_path / "present.safetensors"):
        before = safetensors.torch.load_file(base)
        after = safetensors.torch.load_file(merge(base, source, tmp_path / "out.safetensors", overwrite=True))
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(changed) == 1 and changed[0].rsplit(".", 2)[1] in ("query", "q_proj")
        assert torch.allclose(after[changed[0]], before[changed[0]] + delta)


@pytest.mark.parametrize(
    "module", ["text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder.encoder.layers.0.mlp.fc1"]
)
@pytest.mark.parametrize("level", ["", "text_model."])
def test_text_encoders_with_and_without_a_level(module, level, tmp_path):
    state = {f"{level}{k.removeprefix('text_model.')}": v for k, v in text_encoder().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "base.safetensors")
    delta = torch.randn(32, 24)
    source = WeightDeltas({module: (32, 24)}, lambda module, _: delta)
    out = safetensors.torch.load_file(merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors"))
    name = f"{level}encoder.layers.0.mlp.fc1.weight"
    assert torch.allclose(out[name], state[name] + delta)
    assert all(torch.equal(out[key], tensor) for key, tensor in state.items() if key != name)


def trained(model, folder):
    inject(model, LoCAConfig(n_components=40))
    randomise(model)
    save_adapter(model, folder)
    return remove(model, merge=True)


def test_a_head_of_other_classes_replaces_that_of_the_base(tmp_path, capsys):
    base = tiny_timm("vit")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "num_classes": 3, "label_names": ["a", "b", "c"]}))
    tuned = tiny_timm("vit")
    tuned.reset_classifier(7)
    trained(tuned, tmp_path / "adapter")
    source = read_source(tmp_path / "adapter", projections_in(base))
    said = []
    out = merge(tmp_path / "base.safetensors", source, tmp_path / "out", say=said.append)
    assert said == ["head: replaced by the adapter's, of 7 classes for 3"]
    merged = safetensors.torch.load_file(out / "base.safetensors")
    assert merged.keys() == tuned.state_dict().keys()
    for name, tensor in tuned.state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    assert json.loads((out / "config.json").read_text()) == {"architecture": "vit", "num_classes": 7}


def test_half_a_head_is_refused(tmp_path):
    base = tiny_timm("vit")
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    module = "blocks.0.attn.qkv"
    for whole, sentence in (
        (
            {"head.weight": torch.ones(7, 48)},
            "head.weight is for 7 classes, and the adapter does not bring head.bias for as many",
        ),
        ({"head.weight": torch.ones(3, 40)}, r"head.weight is \(3, 40\), and in the base F32 \(3, 48\)"),
        ({"head.weight": torch.ones(7, 48), "head.bias": torch.ones(6)}, "does not bring head"),
        ({"cls_token": torch.ones(1, 2, 48)}, "cls_token is"),
    ):
        source = WeightDeltas({module: (144, 48)}, lambda name, _: torch.ones(144, 48), whole)
        with pytest.raises(ValueError, match=sentence):
            merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_merged_folder_is_a_classifier_for_a_pipeline(tmp_path, capsys):
    """With the preprocessor's settings, and the labels of a new head counted."""
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "trainer_state.json").write_text("{}")
    kind = type(base)
    tuned = kind.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    adapted = peft.get_peft_model(tuned, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    assert main(f"merge {tmp_path}/base {tmp_path}/lora {tmp_path}/out".split()) == 0
    assert "classifier: replaced by the adapter's, of 5 classes for 3" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(n): f"LABEL_{n}" for n in range(5)} and config["label2id"]["LABEL_4"] == 4
    assert torch.allclose(logits(kind.from_pretrained(tmp_path / "out")), logits(adapted), atol=1e-4)
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
    assert {answer["label"] for answer in classify(Image.new("RGB", (32, 32)), top_k=9)} == {f"LABEL_{n}" for n in range(5)}


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_a_lora_of_an_image_classifier_becomes_an_adapter(family, former, tmp_path):
    """Of modules as the installed version names them, and as the one before did."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "fc2"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    if former:
        file = tmp_path / "lora" / "adapter_model.safetensors"
        names = {"attention.q_proj": "attention.attention.query", "mlp.fc2": "output.dense", "vit.layers": "vit.encoder.layer"}
        names = names if family == "vit" else {"attention.q_proj": "attention.attention.query"}
        state = {}
        for key, tensor in safetensors.torch.load_file(file).items():
            for present, past in names.items():
                key = key.replace(present, past)
            state[key] = tensor
        safetensors.torch.save_file(state, file)
    assert main(f"convert {tmp_path}/lora {tmp_path}/loca --ratio 1.0 --model {tmp_path}/base".split()) == 0
    fresh = tiny(family)
    load_adapter(fresh, tmp_path / "loca")
    assert torch.allclose(logits(fresh), logits(adapted), atol=1e-4)


def test_a_fine_tuned_image_classifier_is_extracted_by_the_names_of_its_modules(tmp_path):
    base, tuned = tiny(), tiny()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(("q_proj.weight", "fc1.weight")):
                parameter += 0.1 * torch.randn(parameter.shape)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    assert main(f"extract {tmp_path}/base {tmp_path}/tuned {tmp_path}/loca --ratio 1.0 --model {tmp_path}/base".split()) == 0
    load_adapter(base, tmp_path / "loca")
    assert torch.allclose(logits(base), logits(tuned), atol=1e-4)


def test_an_adapter_of_this_library_is_merged_with_its_head(tmp_path, capsys):
    """Trained on the modules that the installed version has, into the names that its files have."""
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    model.classifier = torch.nn.Linear(48, 5)
    inject(model, LoCAConfig(n_components=40, targets=("q", "fc1")), modules_to_save=["classifier"])
    randomise(model)
    save_adapter(model, tmp_path / "loca")
    words = f"merge {tmp_path}/base {tmp_path}/loca {tmp_path}/out --model {tmp_path}/base"
    assert main(words.split()) == 0
    assert "classifier: replaced by the adapter's, of 5 classes for 3" in capsys.readouterr().out
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


def test_one_module_by_both_its_names_is_refused(tmp_path, capsys):
    names = ("vit.layers.0.attention.q_proj", "vit.encoder.layer.0.attention.attention.query")
    state = {f"{name}.diff": torch.ones(48, 48) for name in names}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    tiny().save_pretrained(tmp_path / "base")
    assert main(f"convert {tmp_path}/x.safetensors {tmp_path}/out --ratio 1.0 --model {tmp_path}/base".split()) == 2
    assert "a module comes twice, under names that it had in different versions" in capsys.readouterr().err
    assert main(f"merge {tmp_path}/base {tmp_path}/x.safetensors {tmp_path}/out".split()) == 2
    assert "query.weight has two updates" in capsys.readouterr().err


def test_a_folder_of_no_model(tmp_path, capsys):
    assert main(f"convert {tmp_path} {tmp_path}/out --ratio 1.0 --model {tmp_path}".split()) == 2
    assert "it is not a folder of a transformers model: it has no config.json" in capsys.readouterr().err
