"""The settings: presets against the paper's table, flags, contradictions, and the help."""

import dataclasses

import pytest

from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import METHODS, Recipe, adapter_config, resolve
from loca_vision.recipes.settings.command_line import as_yaml, parse
from support.scripts import main

BASE, LARGE = "vit_base_patch16_224.augreg_in21k", "vit_large_patch16_224.augreg_in21k"
# Table 9: model, method, count -> head rate, and the method's own.
TABLE_9 = {
    "vit-base-lora": (BASE, 1e-2, {"r": 16, "alpha": 16.0, "lr": 5e-3}),
    "vit-base-fourierft-3000": (BASE, 1e-2, {"n_components": 3000, "scale": 300.0, "lr": 5e-2}),
    "vit-base-fourierft-10000": (
        "vit_base_patch16_224.augreg_in21k",
        1e-2,
        {"n_components": 10000, "scale": 300.0, "lr": 5e-2},
    ),
    "vit-base-loca-3000": (BASE, 1e-2, {"n_components": 3000, "scale": 1.0, "lr": 5e-2}),
    "vit-base-loca-10000": (BASE, 1e-2, {"n_components": 10000, "scale": 0.5, "lr": 5e-2}),
    "vit-large-lora": (LARGE, 1e-3, {"r": 16, "alpha": 16.0, "lr": 5e-3}),
    "vit-large-fourierft-3000": (
        "vit_large_patch16_224.augreg_in21k",
        1e-3,
        {"n_components": 3000, "scale": 300.0, "lr": 5e-2},
    ),
    "vit-large-fourierft-10000": (LARGE, 1e-3, {"n_components": 10000, "scale": 300.0}),
    "vit-large-loca-3000": (LARGE, 1e-3, {"n_components": 3000, "scale": 1.0, "lr": 5e-2}),
    "vit-large-loca-10000": (LARGE, 1e-3, {"n_components": 10000, "scale": 0.5, "lr": 5e-2}),
}


def read(*arguments):
    parsed = parse(Recipe, ["--dataset", "dtd", "--root", "data", *arguments], prog="train.py", presets=PRESETS)
    return resolve(parsed.settings, parsed.given)


@pytest.mark.parametrize("name", TABLE_9)
def test_presets_are_the_papers_table(name):
    model, head, own = TABLE_9[name]
    recipe = read("--preset", name)
    wanted = {"model": model, "head_lr": head, "batch_size": 128, "weight_decay": 5e-5, "targets": ("q", "v")} | own
    if "loca" in name:
        wanted |= {"location_lr": 1e-4, "learning_steps": 120, "coefficient_steps": 10, "location_steps": 20}
    assert {key: getattr(recipe, key) for key in wanted} == wanted
    assert recipe.method == name.split("-")[2]


def test_flags_win_over_presets_and_files(tmp_path):
    recipe = read("--preset", "vit-large-loca-10000", "--lr", "0.1", "--epochs", "3")
    assert (recipe.lr, recipe.epochs, recipe.n_components) == (0.1, 3, 10000)
    file = tmp_path / "file.yaml"
    file.write_text("preset: vit-large-loca-10000\nlr: 2e-1\nscale: 2\n")
    recipe = read("--config", str(file), "--scale", "3")
    assert (recipe.lr, recipe.scale, recipe.n_components) == (0.2, 3.0, 10000)


@pytest.mark.parametrize("flags", ["", "--preset vit-base-full", "--method lp", "--method selora --eta 0.3"])
def test_a_file_of_all_settings_makes_equal_ones(flags, tmp_path):
    recipe = read(*flags.split())
    file = tmp_path / "file.yaml"
    file.write_text(as_yaml(recipe))
    assert read("--config", str(file)) == recipe


def test_the_table_of_fields():
    known = {field.name for field in dataclasses.fields(Recipe)}
    assert all(METHODS.of(method) <= known for method in METHODS.known())
    assert all(
        (adapter_config(read("--method", method), 0) is None) == (method in METHODS.others) for method in METHODS.known()
    )


CONTRADICTIONS = [
    (
        ("--method", "lora", "--n_components", "5"),
        "waveft, shira; the method is lora",
    ),
    (("--r", "4"), "--r is a setting of lora, selora; the method is loca"),
    (("--method", "lp", "--lr", "1"), "--lr is a setting of loca"),
    (("--method", "full", "--targets", "q"), "--targets is a setting of"),
    (("--method", "fourierft", "--together"), "--together is a setting of loca; the method is fourierft"),
    (("--method", "full", "--cache_features"), "--cache_features is a setting of loca"),
    (("--cache_features", "--checkpointing"), "--cache_features and --checkpointing contradict each other"),
    (("--cache_features", "--mixup", "0.2"), "--cache_features computes features once, and mixup=0.2 changes them"),
    (
        ("--method", "lp", "--cache_features", "--augment", "flip"),
        "--cache_features computes features once, and augment='flip'",
    ),
    (("--preset", "vit-base-lora", "--method", "loca"), "is for the method lora, and --method says loca"),
    (("--together", "--learning_steps", "0"), "--together moves locations, and learning_steps=0 keeps them from moving"),
    (("--seed", "1", "--seeds", "1", "2"), "--seed 1 and --seeds contradict each other"),
    (("--seeds", "1", "1"), "seeds=(1, 1): different whole numbers from 0 up"),
    (("--seeds", "1", "2", "--push_to_hub"), "--push_to_hub uploads one run"),
    (("--hub_model_id", "a/b"), "say --push_to_hub too"),
    (("--hub_private",), "hub_private=True: say --push_to_hub too"),
    (("--seed", "5000000000"), "seed=5000000000: expected a seed below 2^32"),
    (("--seeds", "1", "5000000000"), "below 2^32"),
    (("--accumulate", "3"), "accumulate=3: it does not divide batch_size=128"),
    (("--epochs", "0"), "epochs=0"),
    (("--lr", "-1"), "lr=-1.0: expected a finite number from 0 up"),
    (("--lr", "nan"), "lr=nan"),
    (("--clip", "0"), "clip=0.0: expected a finite number above 0"),
    (("--warmup_steps", "-1"), "warmup_steps=-1"),
    (("--scale", "0"), "scale=0.0"),
    (("--method", "selora", "--eta", "1"), "eta=1.0"),
    (("--workers", "-1"), "workers=-1"),
    (("--method", "lora", "--adapter_dtype", "int8"), "adapter_dtype='int8': lora is stored in float32 or float16"),
    (("--method", "lp", "--adapter_dtype", "int8"), "--adapter_dtype is a setting of loca"),
    (("--checkpoint_steps", "0"), "checkpoint_steps=0"),
    (("--epoch", "3"), "epoch"),
    (("--method", "locs"), "method"),
]


@pytest.mark.parametrize(
    ("flags", "sentence"), CONTRADICTIONS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_what_is_refused(flags, sentence, tmp_path, capsys):
    assert main("train", "--dataset", "dtd", "--root", tmp_path, "--output_dir", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("train.py: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "evaluate", "report", "study"])
def test_help_has_the_name_of_the_script(name, capsys):
    assert main(name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")
