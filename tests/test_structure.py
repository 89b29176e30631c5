"""What keeps the library light and its parts in order."""

import ast
import subprocess
import sys
from pathlib import Path

import loca_vision

PACKAGE = Path(loca_vision.__file__).parent

# Each layer may import those before it, and nothing after it.
LAYERS = (
    {"version", "dct", "config", "atomic", "data", "rows", "tables", "projections", "offload", "classes", "calls", "sampling"}
    | {"console", "settings_value", "optimizer_state", "presets", "evaluation", "cartoon", "encoders", "discreet"}
    | {"contact_sheet", "image_quality", "linear_start", "cosines", "snapshot"},
    {"frequencies"},
    {"paths", "cell_products"},
    {"token_spectrum"},
    {"cosine_sum", "safefile", "update", "haar", "atomic_folder", "settings_file", "augmentation", "published", "hub_datasets"}
    | {"photographs", "pairs", "diffusion_loss", "environment", "edit_measures", "edit_pipeline", "small_pipeline"},
    {"kinds", "manifest", "catalogue", "settings", "tensor_store", "pair_views", "claimed_folder", "spectral_rows", "workload"},
    {"approximation", "factors", "lora_names", "lora_scales", "diffusion_cache", "photo_batches"},
    {"spectrum", "low_rank", "checkpoint_folder", "datasets"},
    {"sparse", "pretraining"},
    {"loca", "sdctft", "fourierft"},
    {"selora", "adapter_file"},
    {"methods"},
    {"recipe", "edit_recipe"},
    {"targets", "updates"},
    {"places", "lora_files", "sharded"},
    {"lora_writing", "exchange_source", "losses"},
    {"layer", "attention"},
    {"record"},
    {"conv_in"},
    {"weights", "root", "ema"},
    {"inject", "fusing", "blocks", "sources", "explanation"},
    {"schedule", "checkpoint", "swap", "processor", "components", "trained"},
    {"loading", "stepper", "edits"},
    {"loader", "edit_models", "edit_data", "edit_card", "edit_subjects", "edit_choices"},
    {"edit_validation"},
    {"edit_fit"},
    {"diffusers", "edit_columns"},
    {"inspection", "img_focus", "training"},
    {"exchange", "exchange_lora", "merging", "edit_evaluation"},
    {"vit", "plots"},
    {"spectrum_picture", "exchange_commands", "edit_study"},
    {"classification"},
    {"run_report", "study_report"},
    {"fit", "evaluate", "hub", "classifier_card"},
    {"reload", "demo_report"},
    {"demo"},
    {"cli"},
)
LIGHT = {"torch", "safetensors", "loca_vision"}
NEEDS_MORE = {
    *("diffusers", "sources", "img_focus", "vit", "plots", "demo", "demo_report", "cli", "reload"),
    *("data", "published", "catalogue", "hub_datasets", "datasets", "augmentation"),
    *("settings", "settings_file", "settings_value", "console"),
    *("recipe", "classification", "evaluation", "evaluate", "fit", "run_report", "study_report", "classifier_card", "hub"),
    *("exchange", "exchange_lora", "exchange_commands", "spectrum_picture"),
    *("cartoon", "photographs", "pairs", "pair_views", "diffusion_cache", "stepper"),
    *("edit_recipe", "edit_pipeline", "edit_models", "edit_data", "edit_validation", "edit_fit", "edit_card"),
    *("edits", "contact_sheet", "image_quality", "edit_measures", "edit_subjects", "edit_choices", "edit_columns"),
    "edit_evaluation",
    "edit_study",
    *("linear_start", "small_pipeline", "photo_batches", "pretraining"),
}


def imported(file):
    """The modules a file imports, at the top or anywhere."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module == "loca_vision" else [node.module])


def test_every_module_has_its_layer():
    assert {f.stem for f in PACKAGE.glob("*.py")} - {"__init__"} == set().union(*LAYERS)


def test_imports_go_one_way():
    for height, layer in enumerate(LAYERS):
        below = set().union(*LAYERS[:height])
        for name in layer:
            mine = {m.split(".")[1] for m in imported(PACKAGE / f"{name}.py") if m.startswith("loca_vision.")}
            assert mine <= below, f"{name} imports {mine - below}"


def test_the_core_needs_torch_and_safetensors_only():
    for file in PACKAGE.glob("*.py"):
        if file.stem not in NEEDS_MORE:
            outside = {m.split(".")[0] for m in imported(file)} - LIGHT - set(sys.stdlib_module_names)
            assert not outside, f"{file.name} imports {outside}"


def test_importing_the_library_pulls_nothing_heavy():
    code = "import sys, loca_vision; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {
        "timm",
        "torchvision",
        "diffusers",
        "transformers",
        "accelerate",
        "matplotlib",
        "sklearn",
        "tyro",
        "yaml",
    }


def test_importing_the_library_does_not_import_the_compiler():
    """Which takes a second, and which `import torch` leaves alone."""
    code = "import sys, torch; there = set(sys.modules); import loca_vision; print(*(set(sys.modules) - there))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "loca_vision.attention" in loaded and "torch._dynamo" not in loaded
