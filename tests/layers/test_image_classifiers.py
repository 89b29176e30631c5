"""Image classifiers of transformers: which layers are found, by the names of either major version, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision import LoCAConfig, adapters, inject, remove
from loca_vision.layers.targets import find_targets
from support import transformers_models as hf
from support.formulas import stir

PARTS = ("q", "k", "v", "out", "fc1", "fc2")


@torch.no_grad()
def written(model: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """The oracle: the weights, with the updates added to them."""
    for target in find_targets(model):
        if target.name in deltas:
            weight: Any = target.layer.weight
            weight += deltas[target.name]
    return model


@pytest.mark.parametrize("targets", (PARTS, ("linear",)), ids=("named", "linear"))
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_output_is_that_of_merged_weights(family: str, targets: tuple[str, ...]) -> None:
    model = hf.tiny(family)
    first = hf.logits(model)
    names = inject(model, LoCAConfig(n_components=4, targets=targets))
    assert not any("classifier" in name for name in names)
    assert torch.equal(hf.logits(model), first)
    stir(model)
    found, deltas = hf.logits(model), {name: update.delta().detach() for name, update in adapters(model).items()}
    wanted = hf.logits(written(hf.tiny(family), deltas))
    assert (wanted - first).abs().max() > 1e-3
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    remove(model, merge=True)
    assert (hf.logits(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_every_layer_in_attention_is_a_named_projection(family: str) -> None:
    others = {target.layer_path.rpartition(".")[2] for target in find_targets(hf.tiny(family)) if target.part == "linear"}
    # of the pooling, which is torch's attention; the patches of Siglip 2; the merging of Swin's; the biases of Swin V2
    assert others <= {"classifier", "out_proj", "patch_embedding", "reduction", "0", "2"}


def test_dinov3() -> None:
    transformers: Any = pytest.importorskip("transformers")
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("transformers has none yet")
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**hf.VISION)).eval()
    names = inject(model, LoCAConfig(n_components=4, targets=PARTS))
    assert {name.rpartition(".")[2] for name in names} == {"q", "k", "v", "out", "up_proj", "down_proj"}


class ViTSelfAttention(nn.Module):
    """As in transformers 4, where it stands in a `ViTAttention` beside a `ViTSelfOutput`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)


class ViTSelfOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class ViTIntermediate(ViTSelfOutput):
    pass


class ViTOutput(ViTSelfOutput):
    pass


class ViTLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"attention": ViTSelfAttention(), "output": ViTSelfOutput()})
        self.intermediate, self.output = ViTIntermediate(), ViTOutput()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention["output"](self.attention["attention"](x))
        return x + self.output(self.intermediate(x).relu())


for cls in (ViTSelfAttention, ViTSelfOutput, ViTIntermediate, ViTOutput, ViTLayer):
    cls.__module__ = "transformers.models.vit.modeling_vit"


def test_the_names_of_transformers_4() -> None:
    torch.manual_seed(0)
    model, other, x = ViTLayer(), ViTLayer(), torch.randn(2, 3, 8)
    other.load_state_dict(model.state_dict())
    paths = [f"attention.attention.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]
    for targets, names in ((("q", "k", "v", "out"), paths), (("fc1", "fc2"), ["intermediate.dense", "output.dense"])):
        assert inject(model, LoCAConfig(n_components=4, targets=targets)) == tuple(names)
        stir(model)
        deltas = {name: update.delta().detach() for name, update in adapters(model).items()}
        assert torch.allclose(model(x), written(other, deltas)(x), atol=1e-5)
        remove(model, merge=True)
