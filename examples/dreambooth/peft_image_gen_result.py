"""Write a run in the schema of peft's result files, so that it can be stored with theirs and included in their tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.version import __version__
from peft_image_gen_log import Log
from peft_image_gen_protocol import Protocol

_PACKAGES = ("transformers", "peft", "datasets", "diffusers", "torch")
_TRAINING = ("encode", "test", "drift")  # stages that their train_time includes in addition to the steps


def result_of(
    protocol: Protocol,
    learning_rate: float,
    *,
    name: str,
    adapter: AdapterConfig,
    projections: list[str],
    metrics: Mapping[str, Any],
    log: Log,
    base_numbers: int,
) -> dict[str, Any]:
    """Return the contents of the result file.

    Args:
        name: the name of the experiment, such as loca/first-try.
        projections: the adapted projections.
        metrics: the metrics of the finished training.
        log: the log of all starts of the run, with its test and drift.
        base_numbers: the number of parameters of the transformer without its adapter.
    """
    return {
        "run_info": {
            "created_at": log.first("started")["started"],
            "total_time": log.total() - log.seconds("samples"),  # theirs draws the samples afterwards
            "experiment_name": name,
            "peft_branch": f"loca-vision {__version__}",
            "train_config": protocol.train_config(learning_rate),
            "peft_config": adapter_of_result(adapter, projections),
            "error_msg": "",
        },
        "train_info": _train_info(protocol, metrics, log, base_numbers),
        "meta_info": {
            "model_info": _on_hub("model_info", protocol.base),
            "dataset_info": _on_hub("dataset_info", protocol.dataset),
            "package_info": _packages(),
            "system_info": _system(),
            "pytorch_info": torch.__config__.show(),
        },
    }


def _train_info(protocol: Protocol, metrics: Mapping[str, Any], log: Log, base_numbers: int) -> dict[str, Any]:
    steps = [entry for _, entry in sorted(log.by_step("reserved").items())]
    reserved = [entry["reserved"] for entry in steps]
    trained = metrics["trained_parameters"] + metrics["location_parameters"]
    return {
        "accelerator_memory_reserved_avg": int(fmean(reserved)),
        "accelerator_memory_max": max(entry["peak"] for entry in steps),
        "accelerator_memory_reserved_99th": int(np.percentile(reserved, 99)),
        "train_time": log.seconds(*_TRAINING) + fmean(entry["seconds"] for entry in steps) * metrics["steps"],
        "file_size": metrics["adapter_bytes"],
        "num_trainable_params": trained,
        "num_total_params": base_numbers + trained,
        "status": "success",
        "metrics": [*_validations(protocol, log, metrics), _last(protocol, log, metrics)],
    }


def adapter_of_result(adapter: AdapterConfig, projections: list[str]) -> dict[str, Any]:
    """Return the entry that replaces a peft configuration; their tables read its `peft_type`."""
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(adapter).items()}  # type: ignore[call-overload]
    return {
        "task_type": None,
        "peft_type": adapter.method.upper(),
        "auto_mapping": None,
        "peft_version": f"loca-vision {__version__}",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": False,
        **settings,
        "target_modules": projections,
    }


def _validations(protocol: Protocol, log: Log, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry for each complete `eval_steps`."""
    every, found = protocol.eval_steps, []
    steps, elapsed = log.by_step("reserved"), log.seconds("encode")
    for step, entry in sorted(log.by_step("similarity").items()):
        if step % every:
            continue
        window = [steps[number] for number in range(step - every + 1, step + 1) if number in steps]
        spent = every * fmean(one["seconds"] for one in window)
        elapsed += spent + entry["took"]
        found.append(
            {
                "step": step,
                "valid dino_similarity": entry["similarity"],
                "train loss": fmean(metrics["curves"]["loss"][step - every : step]),
                "train samples": step * protocol.batch_size,
                "train time": spent,
                "eval time": entry["took"],
                "mem allocated avg": float(fmean(one["allocated"] for one in window)),
                "mem reserved avg": float(fmean(one["reserved"] for one in window)),
                "elapsed time": elapsed,
            }
        )
    return found


def _last(protocol: Protocol, log: Log, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last entry, with test similarity and drift."""
    scores = log.last("test dino_similarity")
    return {
        "step": metrics["steps"],
        "test dino_similarity": scores["test dino_similarity"],
        "drift": scores["drift"],
        "train loss": fmean(metrics["curves"]["loss"][-protocol.eval_steps :]),
        "train samples": metrics["steps"] * protocol.batch_size,
    }


def _on_hub(kind: str, name: str) -> dict[str, str | None]:
    """Return commit and creation time of a hub repository; None, as in their files, for a folder or if the hub fails."""
    from huggingface_hub import HfApi

    if not Path(name).expanduser().exists():
        try:
            found = getattr(HfApi(), kind)(name)
            return {"sha": found.sha, "created_at": found.created_at.isoformat()}
        except OSError:
            pass
    return {"sha": None, "created_at": None}


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        found |= {f"{package}-version": _version(package), f"{package}-commit-hash": None}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _system() -> dict[str, str]:
    parts = ("system", "release", "version", "machine", "processor")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {part: getattr(platform, part)() for part in parts} | {"accelerator": gpu}
