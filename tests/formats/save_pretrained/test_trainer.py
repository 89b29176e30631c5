"""transformers' Trainer and what it saves: the best model, a resumed run, the folder at the end."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from loca_vision import AlternatingSchedule, LoCAConfig, LoRAConfig, inject, load_adapter, parameter_groups
from support import transformers_models as hf

CONFIGS = {"loca": LoCAConfig(n_components=40), "lora": LoRAConfig()}


class Step(TrainerCallback):
    def __init__(self, schedule):
        self.schedule = schedule

    def on_step_end(self, *arguments, **more):
        self.schedule.step()


class Wrapped(nn.Module):
    """A model of one's own round one of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        return self.model(pixel_values=pixel_values, labels=labels)


def trainer(folder, family, method, wrap=lambda model: model, **settings):
    torch.manual_seed(0)
    model = wrap(hf.tiny(family))
    inject(model, CONFIGS[method])
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=5e-2, head_lr=1e-2))
    schedule = AlternatingSchedule(model, coefficient_steps=2, location_steps=1, learning_steps=6)
    return hf.trainer(model, folder, optimizer, callbacks=[Step(schedule)], **settings)


def losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["vit", "clip"])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["itself", "wrapped"])
def test_the_best_model_is_the_one_that_was_best(method, family, wrap, tmp_path):
    training = trainer(tmp_path, family, method, wrap, load_best_model_at_end=True, greater_is_better=True)
    training.train()  # the first epoch is the "best", as the loss falls
    history = losses(training)
    best = max(history)
    assert best == history[0] > history[-1]
    assert training.evaluate()["eval_loss"] == best


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["vit", "clip"])
def test_a_run_resumed_from_its_end_gives_the_same_evaluation(method, family, tmp_path):
    first = trainer(tmp_path, family, method)
    first.train()
    again = trainer(tmp_path, family, method)
    again.train(resume_from_checkpoint=True)
    assert again.evaluate()["eval_loss"] == losses(first)[-1] != losses(first)[0]


def test_the_folder_at_the_end_loads_into_a_new_model(tmp_path):
    training = trainer(tmp_path, "vit", "loca")
    training.train()
    training.save_model(tmp_path / "end")
    other = type(training.model).from_pretrained(tmp_path / "end")
    load_adapter(other, tmp_path / "end")
    assert torch.equal(hf.logits(other), hf.logits(training.model))


def test_a_checkpoint_of_the_base_says_what_it_leaves(tmp_path):
    hf.tiny().save_pretrained(tmp_path, **({"save_original_format": False}))
    training = trainer(tmp_path / "out", "vit", "loca")
    with hf.Heard("loca_vision.model.state") as lines:
        training._load_from_checkpoint(str(tmp_path))
    assert len(lines) == 1 and "keep the values" in lines[0]


def test_a_model_without_the_adapter_is_told_of_it(tmp_path):
    trainer(tmp_path / "out", "vit", "loca").save_model(tmp_path)
    plain = hf.trainer(hf.tiny(), tmp_path / "out")
    with hf.Heard("transformers.trainer") as lines:
        plain._load_from_checkpoint(str(tmp_path))
    assert any("unexpected keys" in line and ".loca." in line for line in lines)
