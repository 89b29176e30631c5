"""A trained classifier on the Hugging Face hub: its files and a model card that says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loca_vision.atomic import write_atomically

CARD = "README.md"
_LICENCES = {"MIT": "mit", "CC BY-SA 4.0": "cc-by-sa-4.0", "CC BY 4.0": "cc-by-4.0"}  # as the hub names them


def push(folder: Path, metrics: Mapping[str, Any], repository: str | None, *, private: bool = False) -> str:
    """Upload a finished run, with a card; returns the address.

    Args:
        metrics: those of the run; `adapter_file` names what is uploaded beside card, metrics, settings and curves.
        repository: "user/name"; by default the folder's name, under the user who is logged in.

    Raises:
        OSError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    write_atomically(folder / CARD, model_card(metrics, repository or folder.name).encode())
    api = HfApi()
    created = api.create_repo(repository or folder.name, private=private, exist_ok=True)
    write_atomically(folder / CARD, model_card(metrics, created.repo_id).encode())
    files = [CARD, metrics["adapter_file"], "metrics.json", "config.yaml", "curves.png"]
    api.upload_folder(
        repo_id=created.repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload a fine-tuned classifier"
    )
    return str(created)


def model_card(metrics: Mapping[str, Any], repository: str) -> str:
    """What the adapter is, on which images it was trained and under which licence they are, its numbers, and how to load it."""
    config, protocol = metrics["config"], metrics["protocol"]
    model, licence = config["model"], metrics["licence"]
    sizes = protocol["sizes"]
    said = [
        "---",
        *_tags(config, licence),
        "---",
        "",
        f"# {repository.rpartition('/')[2]}",
        "",
        f"`{model}` fine-tuned on {config['dataset']} with {_method(metrics)} by loca-vision.",
        "",
        "| | |",
        "|---|---|",
        f"| test accuracy | {100 * metrics['test_accuracy']:.2f} % of {sizes['test']} images |",
        f"| validation accuracy | {100 * metrics['validation_accuracy']:.2f} % of {sizes['validation']} images |",
        f"| trained numbers | {metrics['trained_parameters']:,} and {metrics['head_parameters']:,} of the head |",
        f"| file | {metrics['adapter_bytes']:,} bytes |",
        f"| seed, steps | {metrics['seed']}, {metrics['steps']} of {config['batch_size']} images |",
        f"| images | {sizes['train']} of {protocol['image_size']} pixels a side; licence of the data: {licence} |",
        "",
        "```python",
        *_loading(metrics, repository),
        "```",
        "",
        "The weights of the base model are not in here, and have a licence of their own.",
    ]
    return "\n".join(said) + "\n"


def _method(metrics: Mapping[str, Any]) -> str:
    names = {"loca": "LoCA", "sdctft": "sDCTFT", "fourierft": "FourierFT", "lora": "LoRA", "selora": "SeLoRA"}
    others = {"full": "full training", "lp": "a linear probe"}
    method = metrics["config"]["method"]
    return names.get(method) or others[method]


def _tags(config: Mapping[str, Any], licence: str) -> list[str]:
    """The card's metadata: conventions of the hub for adapters."""
    base = f"timm/{config['model']}" if config["weights"] in (None, "hub") else None
    known = _LICENCES.get(licence)
    return [
        "library_name: loca-vision",
        "pipeline_tag: image-classification",
        *([f"base_model: {base}", "base_model_relation: adapter"] if base else []),
        *([f"license: {known}"] if known else ["license: other", f"license_name: {_quoted('data: ' + licence)}"]),
        "tags:",
        *(f"- {tag}" for tag in ("image-classification", "timm", config["method"])),
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _loading(metrics: Mapping[str, Any], repository: str) -> list[str]:
    config, size = metrics["config"], metrics["protocol"]["image_size"]
    if metrics["adapter_file"].startswith("trained_weights"):
        return [f"# trained whole, without an adapter: examples/image_classification/evaluate.py --adapter {repository}"]
    pretrained = config["weights"] in (None, "hub")
    made = f"pretrained={pretrained}, num_classes={len(metrics['classes'])}, img_size={size}"
    return [
        "import timm",
        "from loca_vision import load_adapter",
        "",
        f"model = timm.create_model({config['model']!r}, {made}).eval()",
        f"load_adapter(model, {repository!r})",
    ]
