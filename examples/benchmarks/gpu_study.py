"""The classification study at 224 pixels, for as long as there is time: only finished runs count."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_session import LEFT_OUT, Found, Session
from gpu_tests import ROOT, limited

MOST_SECONDS = 480.0
STUDY = ROOT / "examples" / "image_classification" / "study.py"
LONG = ("--image_size", "224", "--budgets", "73728", "--seeds", "0", "--test_images", "2000", "--epochs", "2")


def part(session: Session, found: Found, data: Path | None) -> None:
    """Run `study.py` on Fashion-MNIST without downloads: the images must be given, and the weights must be in the cache."""
    if data is None:
        found[LEFT_OUT] = "it needs a folder of images, Fashion-MNIST in torchvision's layout: give --study_data"
        return
    tiny = ("--train_images", "32", "--validation_images", "16", "--epochs", "1") if session.dry else ()
    jobs = str(max(1, min(4, (os.cpu_count() or 1) // 4)))
    with tempfile.TemporaryDirectory() as folder:
        options = ["--dataset", "fashion_mnist", "--root", str(data), "--output_dir", folder, "--jobs", jobs, *LONG, *tiny]
        status, output = limited([sys.executable, str(STUDY), *options], min(MOST_SECONDS, session.budget.left))
        found |= {"status": status, "options": " ".join(LONG), "runs": runs(Path(folder))}
    if status:
        raise RuntimeError(f"study.py ended with status {status}: {(output.strip().splitlines() or ['it said nothing'])[-1]}")


def runs(folder: Path) -> list[dict[str, Any]]:
    """Return the method, rate and accuracies of each finished run."""
    found = []
    for file in sorted(folder.glob("*/*/metrics.json")):
        metrics = json.loads(file.read_text())
        kept = {name: metrics.get(name) for name in ("validation_accuracy", "test_accuracy", "seconds_per_step")}
        found.append({"method": file.parents[1].name, "run": file.parent.name, **kept})
    return found
