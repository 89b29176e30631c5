"""The small files beside a model's weights: which of them a folder of merged weights keeps, and what a new head changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loca_vision.storage.safetensors_file import may_be_read
from loca_vision.storage.sharded_weights import INDEX_SUFFIX
from loca_vision.storage.strict_json import strict_json

CONFIG = "config.json"
_LARGEST = 32 * 2**20  # bytes, enough for a tokenizer
_ENDINGS = (".json", ".txt", ".model", ".jinja")
_NOT_KEPT = {"adapter_config.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}


def files_beside(base: Path) -> dict[str, bytes]:
    """Return the files beside the weights that loading and using the model needs, by name; none without a `config.json`.

    Args:
        base: the folder, an index in it, or a file of weights in it; for the last, only `config.json` is kept.
    """
    folder = base if base.is_dir() else base.parent
    if not (folder / CONFIG).is_file():
        return {}
    alone = base.suffix == ".safetensors" and not base.is_dir()
    names = [CONFIG] if alone else sorted(file.name for file in folder.iterdir() if _is_kept(file, folder))
    return {name: (folder / name).read_bytes() for name in names}


def _is_kept(file: Path, folder: Path) -> bool:
    named = file.suffix in _ENDINGS and not file.name.endswith(INDEX_SUFFIX) and file.name not in _NOT_KEPT
    return named and file.is_file() and file.stat().st_size <= _LARGEST and may_be_read(file, folder)


def with_classes(config: bytes, before: int, after: int) -> bytes:
    """Turn the `config.json` of a classifier of `before` classes into one of `after`; that of another model is unchanged.

    The base's class names no longer fit, so the new classes have none: transformers calls them LABEL_0, LABEL_1, ...

    Raises:
        ValueError: it is not sound JSON.
    """
    fields = strict_json(config.decode("utf-8"), longest=64, nesting=32)
    if not isinstance(fields, dict) or before == after:
        return config
    changed = _of_transformers(fields, before, after) | _of_timm(fields, before, after)
    left = {name: value for name, value in fields.items() if not (changed and name in ("label_names", "label_descriptions"))}
    return json.dumps(left | changed, indent=2).encode() if changed else config


def _of_transformers(fields: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    names = fields.get("id2label")
    # Two classes are transformers' default, which its files do not write down.
    if (len(names) if isinstance(names, dict) else 2) != before or "model_type" not in fields:
        return {}
    labels = {str(number): f"LABEL_{number}" for number in range(after)}
    return {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}


def _of_timm(fields: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    if fields.get("num_classes") != before or "architecture" not in fields:
        return {}
    about = fields.get("pretrained_cfg")
    inner = {"pretrained_cfg": about | {"num_classes": after}} if isinstance(about, dict) and "num_classes" in about else {}
    return {"num_classes": after} | inner
