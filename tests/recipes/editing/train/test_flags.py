"""examples/instruct_pix2pix/train.py: flags."""

import dataclasses
from pathlib import Path

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.recipes.editing.presets import EDIT_PRESETS
from loca_vision.recipes.editing.recipe import EditRecipe, resolve
from loca_vision.recipes.settings.command_line import parse
from support.edit_training import TRAIN
from support.scripts import main

STOCK = {
    "revision": None, "variant": None, "dataset_name": None, "train_data_dir": None, "original_image_column": "input_image",
    "edited_image_column": "edited_image", "edit_prompt_column": "edit_prompt", "val_image_url": None,
    "validation_prompt": None, "dataset_config_name": None,
    "num_validation_images": 4, "validation_epochs": 1, "max_train_samples": None, "output_dir": "instruct-pix2pix-model",
    "cache_dir": None, "seed": None, "resolution": 256, "center_crop": False, "random_flip": False, "train_batch_size": 16,
    "num_train_epochs": 100, "max_train_steps": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "learning_rate": 1e-4, "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500,
    "conditioning_dropout_prob": None, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False,
    "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "push_to_hub": False, "hub_token": None, "hub_model_id": None, "logging_dir": "logs",
    "mixed_precision": None, "report_to": "tensorboard", "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "enable_xformers_memory_efficient_attention": False,
}  # fmt: skip


def test_flags_and_defaults_of_the_stock_script(capsys, monkeypatch):
    """As DIFFUSERS' train_instruct_pix2pix.py has them (0.42); every one is in --help."""
    settings = EditRecipe("base")
    found = {name: getattr(settings, name) for name in STOCK}
    assert found | {name: str(found[name]) for name in ("output_dir", "logging_dir")} == STOCK
    monkeypatch.setenv("COLUMNS", "200")
    assert main(TRAIN, "--help-all") == 0
    said = capsys.readouterr().out
    assert all(
        f"--{'import' if name == 'imports' else name}" in said
        for name in (field.name for field in dataclasses.fields(EditRecipe))
    )


def test_home(monkeypatch, tmp_path):
    """As in a file of settings, where no shell reads it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = resolve(EditRecipe("base", dataset_name="a/b", output_dir=Path("~/out"), cache_dir=Path("~/c")), ())
    assert (recipe.output_dir, recipe.cache_dir, recipe.latents_dir) == (tmp_path / "out", tmp_path / "c", None)


def test_the_paper_s_table(base, data):
    """LoCA, Table 11."""
    needed = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(data)]
    for name, more in (("cartoonization", ("loca", 1e-4, 1.0)), ("cartoonization-fourierft", ("fourierft", 1e-3, 64.0))):
        parsed = parse(EditRecipe, [*needed, "--preset", name], prog="", presets=EDIT_PRESETS)
        of = resolve(parsed.settings, parsed.given)
        assert (of.method, of.learning_rate, of.loca_scale) == more
        assert (of.train_batch_size, of.gradient_accumulation_steps, of.max_train_steps) == (2, 4, 10000)
        assert (of.adam_weight_decay, of.targets, of.learning_steps) == (1e-2, ("q", "k", "v", "out"), 1200)
        assert of.validation_steps == 500
        parsed = parse(EditRecipe, [*needed, "--preset", name, "--validation_epochs", "2"], prog="", presets=EDIT_PRESETS)
        of = resolve(parsed.settings, parsed.given)
        assert (of.validation_steps, of.validation_epochs) == (None, 2)  # a flag is not passed over for a preset
