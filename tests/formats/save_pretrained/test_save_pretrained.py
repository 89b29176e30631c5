"""`save_pretrained` of an adapted model: the folder holds the adapter, and loads everywhere."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from loca_vision import (
    LoCAConfig,
    adapters,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    set_adapters,
)
from support import attention, pipelines
from support import transformers_models as hf
from support.timm_models import randomise

CONFIG = LoCAConfig(n_components=40)
FILE = "pytorch_loca_weights.safetensors"


def trained(model, name="default", config=CONFIG):
    """Adapted, with an effect, and a head that has moved."""
    inject(model, config, name, modules_to_save=["classifier"])
    randomise(model, name)
    with torch.no_grad():
        model.classifier.weight.add_(0.3)
    return model


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_the_model_file_loads_into_an_injected_model(family, loaded, tmp_path):
    """As `Trainer` loads it: transformers may have other names in its files than in its models."""
    model = hf.tiny(family)
    if loaded:
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
    trained(model)
    model.save_pretrained(tmp_path / "out")
    other = hf.tiny(family)
    inject(other, CONFIG, modules_to_save=["classifier"])
    missing, unexpected = other.load_state_dict(weights(tmp_path / "out"), False)
    assert not missing and not unexpected
    assert torch.equal(hf.logits(other), hf.logits(model))
    assert not torch.equal(hf.logits(other), hf.logits(hf.tiny(family)))


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("learns", [True, False])
def test_a_new_model_and_the_adapter_beside_it(family, learns, tmp_path):
    model = trained(hf.tiny(family))
    if not learns:
        model.requires_grad_(False)
    model.save_pretrained(tmp_path)
    other, about = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"]
    assert bool(about["unexpected_keys"]) == learns  # which transformers reports
    if not learns:
        assert torch.equal(hf.logits(other), hf.logits(hf.tiny(family)))
    load_adapter(other, tmp_path)
    assert torch.equal(hf.logits(other), hf.logits(model))


def test_a_state_dict_of_the_caller_is_written_as_it_is(tmp_path):
    model = trained(hf.tiny())
    given = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(given))
    written = weights(tmp_path)
    assert written.keys() == given.keys() and all(torch.equal(written[key], given[key]) for key in given)


def test_what_a_schedule_has_paused_counts_as_trained(tmp_path):
    from loca_vision import AlternatingSchedule

    model = trained(hf.tiny())
    AlternatingSchedule(model, learning_steps=0)
    for spectrum in adapters(model).values():
        spectrum.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert set(weights(tmp_path)) == set(model.state_dict())


def test_updates_of_linear_layers_alone(tmp_path):
    """No attention layer is adapted: there is no other place in the model that hears of its calls."""
    model = hf.tiny()
    config = LoCAConfig(n_components=10, targets=("fc1",))
    inject(model, config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).exists() and set(weights(tmp_path)) == set(model.state_dict())
    remove(model)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("names", [("default",), ("one",), ("default", "one"), ("one", "two")])
def test_several_adapters_have_folders_of_their_names(names, tmp_path):
    model = hf.tiny()
    for name in names:
        trained(model, name)
    model.save_pretrained(tmp_path)
    for name in names:
        alone = name == "default" or len(names) == 1
        assert (tmp_path / ("" if alone else name) / FILE).exists()
        other = hf.tiny()
        load_adapter(other, tmp_path / ("" if alone else name))
        set_adapters(model, name)
        assert torch.equal(hf.logits(other), hf.logits(model))


def test_a_unet_has_the_adapter_beside_the_base(tmp_path):
    model = attention.adapted("unet", learned=True)
    model.save_pretrained(tmp_path)
    other, about = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    load_adapter(other, tmp_path)
    assert torch.equal(attention.output(other), attention.output(model))


def test_a_wider_conv_in(tmp_path):
    from loca_vision.model.conv_in import widen_conv_in

    wide = pipelines.unet()
    widen_conv_in(wide)
    inject(wide, attention.CONFIG, modules_to_save=["conv_in"])
    attention.shown(wide)
    wide.save_pretrained(tmp_path)
    other = UNet2DConditionModel.from_pretrained(tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(attention.output(other), attention.output(wide))


def test_fused_adapters_are_in_the_weights_already(tmp_path):
    import loca_vision.diffusers  # noqa: F401

    pipe = pipelines.stable_diffusion()
    inject(pipe.unet, attention.CONFIG)
    attention.shown(pipe.unet)
    pipe.fuse_loca()
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob(FILE))


def test_other_processes_write_no_adapter(tmp_path):
    model = trained(hf.tiny())
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / FILE).exists()


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    model = trained(hf.tiny())
    with torch.no_grad():
        next(iter(adapters(model).values())).coefficients[0] = torch.nan
    with pytest.raises(ValueError, match="coefficients"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [hf.tiny, pipelines.unet], ids=["transformers", "diffusers"])
def test_what_is_pushed_has_the_adapter(make, tmp_path, monkeypatch):
    """Both ways go through `push_to_hub`, which uploads what `save_pretrained` wrote to a folder of its own."""
    model = make()
    inject(model, CONFIG)
    pushed = {}

    def push(self, repo_id, *, commit_message=None, token=None):
        self.save_pretrained(tmp_path / "uploaded")
        pushed.update(repo_id=repo_id, message=commit_message)

    monkeypatch.setattr(type(model), "push_to_hub", push)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="better")
    assert (tmp_path / "mine" / FILE).exists() and (tmp_path / "uploaded" / FILE).exists()
    assert pushed == {"repo_id": "mine", "message": "better"}


def test_a_copy_writes_its_own(tmp_path):
    model = trained(hf.tiny())
    twin = copy.deepcopy(model)
    randomise(twin, size=0.7)
    twin.save_pretrained(tmp_path)
    other = hf.tiny()
    load_adapter(other, tmp_path)
    assert torch.equal(hf.logits(other), hf.logits(twin)) and not torch.equal(hf.logits(other), hf.logits(model))


def test_shards(tmp_path):
    model = trained(hf.tiny())
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(written) == set(model.state_dict()) and len(set(written.values())) > 1


def test_training_goes_on_after_saving(tmp_path):
    model = trained(hf.tiny())
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    answer = hf.logits(model)
    groups = [[id(p) for p in group["params"]] for group in parameter_groups(model, lr=1.0)]
    model.save_pretrained(tmp_path)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert [[id(p) for p in group["params"]] for group in parameter_groups(model, lr=1.0)] == groups
    assert torch.equal(hf.logits(model), answer)
