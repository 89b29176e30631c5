"""Load an adapter in this process and compare its logits: `python -m loca_vision.commands.reload_check REQUEST.json`.

This proves that the file is all that is needed: nothing from the process that trained it is used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from loca_vision.formats.save_load import load_adapter
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors


def difference_after_reload(model: nn.Module, spec: ModelSpec, adapter: Path, images: Tensor) -> float:
    """Return the largest difference of logits between `model` and one built from `spec` and the file in another process.

    Raises:
        ValueError: the other process could not build or load it.
    """
    with torch.no_grad():
        logits = model.eval()(images.to(next(model.parameters()).device)).cpu()
    with tempfile.TemporaryDirectory() as folder:
        recorded, request = Path(folder) / "recorded.safetensors", Path(folder) / "request.json"
        write_safetensors(recorded, {"images": images.contiguous(), "logits": logits.contiguous()}, {})
        request.write_text(json.dumps({"spec": asdict(spec), "adapter": str(adapter), "recorded": str(recorded)}))
        command = [sys.executable, "-m", "loca_vision.commands.reload_check", str(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{adapter}: a new process could not load it: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(done.stdout.split()[-1])


def _compare(request: Path) -> float:
    wanted = json.loads(request.read_text())
    with open_safetensors(Path(wanted["recorded"])) as file:
        recorded = file.tensors()
    model = build_model(ModelSpec(**wanted["spec"]))
    load_adapter(model, wanted["adapter"])
    with torch.no_grad():
        return float((model(recorded["images"]) - recorded["logits"]).abs().max())


if __name__ == "__main__":
    print(_compare(Path(sys.argv[1])))
