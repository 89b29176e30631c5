"""Checkpoints of accelerate and timm hold the adapter, and come back into an injected model bit for bit."""

import pytest
import timm
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from timm.models import load_checkpoint, resume_checkpoint, save_for_hf
from timm.utils import CheckpointSaver

from loca_vision import FourierFTConfig, LoCAConfig, LoRAConfig, SDCTFTConfig, SeLoRAConfig, inject
from loca_vision.model.traversal import all_updates
from support import transformers_models as hf
from support.timm_models import tiny

CONFIGS = [
    LoCAConfig(n_components=20),
    SDCTFTConfig(n_components=20),
    FourierFTConfig(n_components=20),
    LoRAConfig(),
    LoRAConfig(use_dora=True),
    SeLoRAConfig(),
]


def adapted(config, seed=None):
    """With a seed, every update and the head have seeded random values."""
    model = tiny("vit")
    inject(model, config)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for update in all_updates(model):
                for parameter in update.parameters():
                    parameter.copy_(torch.rand_like(parameter))
            model.head.weight.add_(torch.randn_like(model.head.weight))
    return model


def save_model(model, folder):
    Accelerator(cpu=True).save_model(model, folder)


def load_model(model, folder):
    load_checkpoint_in_model(model, str(folder), strict=True)


def save_state(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)


def load_state(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.load_state(folder)


def save_safe(model, folder):
    save_for_hf(model, folder, safe_serialization=True)


def load_safe(model, folder):
    load_checkpoint(model, str(folder / "model.safetensors"))


def save_unsafe(model, folder):
    save_for_hf(model, folder, safe_serialization=False)


def load_unsafe(model, folder):
    load_checkpoint(model, str(folder / "pytorch_model.bin"))


def save_by_timm(model, folder):
    folder.mkdir()
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters()), checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, metric=1.0)


def load_by_timm(model, folder):
    load_checkpoint(model, str(folder / "model_best.pth.tar"))


def resume_by_timm(model, folder):
    resume_checkpoint(model, str(folder / "last.pth.tar"))


SAVERS = {
    "save_model": (save_model, load_model),
    "save_state": (save_state, load_state),
    "save_for_hf": (save_safe, load_safe),
    "save_for_hf as a pickle": (save_unsafe, load_unsafe),
    "CheckpointSaver": (save_by_timm, load_by_timm),
    "CheckpointSaver, resumed": (save_by_timm, resume_by_timm),
}
every_saver = pytest.mark.parametrize(("save", "load"), SAVERS.values(), ids=SAVERS)
# accelerate's load_checkpoint_in_model fills what is missing in a checkpoint with the model's own tensors, in any model
strict_savers = pytest.mark.parametrize(
    ("save", "load"), list(SAVERS.values())[1:], ids=[name for name in SAVERS if name != "save_model"]
)


@every_saver
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}{getattr(config, 'use_dora', '')}")
def test_what_is_saved_comes_back(save, load, config, images, tmp_path):
    model = adapted(config, seed=1)
    save(model, tmp_path / "saved")
    other = adapted(config)
    before = other(images)
    load(other, tmp_path / "saved")
    assert torch.equal(other(images), model(images)) and not torch.equal(before, model(images))


@every_saver
def test_a_model_without_the_adapter_does_not_take_it(save, load, tmp_path):
    save(adapted(CONFIGS[0], seed=1), tmp_path / "saved")
    with pytest.raises(RuntimeError, match=r"(?i)unexpected.*\.loca\."):
        load(tiny("vit"), tmp_path / "saved")


def test_timm_does_not_make_a_model_of_it(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    inject(model, CONFIGS[0])
    save_for_hf(model, tmp_path, model_args={"img_size": 32}, safe_serialization=True)
    with pytest.raises(RuntimeError, match=r"(?i)unexpected.*\.loca\."):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@strict_savers
def test_a_model_with_more_than_the_adapter_does_not_take_it(save, load, tmp_path):
    save(adapted(CONFIGS[0], seed=1), tmp_path / "saved")
    other = adapted(CONFIGS[0])
    inject(other, CONFIGS[0], "second")
    with pytest.raises(RuntimeError, match=r"(?i)missing.*\.loca\."):
        load(other, tmp_path / "saved")


@strict_savers
@pytest.mark.parametrize("learns", [True, False])
def test_a_base_says_that_the_adapter_stays(save, load, learns, images, tmp_path):
    save(tiny("vit"), tmp_path / "saved")
    model = adapted(CONFIGS[0], seed=1)
    model.head.load_state_dict(tiny("vit").head.state_dict())
    if not learns:
        model.requires_grad_(False)
    before = model(images)
    with hf.Heard("loca_vision.model.state") as lines:
        load(model, tmp_path / "saved")
    assert torch.equal(model(images), before)
    assert len(lines) == learns


def test_another_adapter_is_not_a_base():
    """Its keys are of other layers: that no tensor of this one is there does not make it a base."""
    other = tiny("vit")
    inject(other, LoCAConfig(n_components=20, targets=("fc1",)))
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*\.loca\..*Unexpected.*\.loca\."):
        adapted(CONFIGS[0]).load_state_dict(other.state_dict())
