"""What `loca-vision demo` writes, of a tiny model after two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from loca_vision.commands import demo

SPEC = {"name": "test_vit", "classes": 10, "image_size": 160, "weights": "none", "seed": 0}
_SETTINGS = {"model": "test_vit", "weights": "none", "image_size": 160, "batch_size": 4, "n_components": 20, "lr": 0.5}


def write_demo(folder: Path, **more: object) -> Path:
    """The folder of a demonstration on the digits; its adapter is not checked by another process, as its own test does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "difference_after_reload", lambda *given: 0.0)
        demo.run(demo.Demo(output=folder, steps=2, max_test_images=64, **_SETTINGS | more))
    return folder
