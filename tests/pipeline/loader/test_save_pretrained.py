"""LoCA methods of a pipeline: save_pretrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from support.pipelines import picture, quiet
from support.reference_weights import (
    Made,
    assert_near,
    models,
)


@pytest.mark.parametrize("fused", [False, True], ids=["beside the weights", "fused"])
def test_a_pipeline_saved_with_adapters_is_the_stock_one(
    fused: bool, pipe: Any, base: Tensor, first: Made, tmp_path: Path
) -> None:
    keys = {c: set(model.state_dict()) for c, model in models(pipe).items()}
    pipe.load_loca_weights(first.state())
    shown = picture(pipe)
    if fused:
        pipe.fuse_loca()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert torch.equal(picture(pipe), shown) or fused
    for cls in (StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        again = quiet(cls.from_pretrained(tmp_path, safety_checker=None))
        assert type(again) is StableDiffusionPipeline
        assert {c: set(model.state_dict()) for c, model in models(again).items()} == keys
        assert again.get_loca_adapters() == {}
        if fused:
            assert_near(picture(again), shown)
        else:
            assert torch.equal(picture(again), base)
            again.load_loca_weights(first.state())
            assert torch.equal(picture(again), shown)
