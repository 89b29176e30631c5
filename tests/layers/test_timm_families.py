"""Every supported family of timm: where its projections are, that they adapt, and that the base comes back.

Which rows of which weight make queries, keys and values is found here by watching the models multiply them, without the
tables of the library.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import scipy.fft
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loca_vision import LoCAConfig, Spectrum, adapters, inject, remove
from loca_vision.layers.targets import find_targets
from support.timm_models import FAMILIES, batch, randomise, tiny

Rows = dict[str, tuple[str, list[int]]]  # by part: the weight, and those of its rows that make up the part

# Their output projection has a name of its own (attn_out_proj), is one with the MLP's, or is the classifier.
WITHOUT_OUT = {"parallel_scaling", "differential_parallel", "clip_resnet"}

# What an attention layer without `scaled_dot_product_attention` multiplies: both operands of its first product, and one
# of its last, with the index of that one. Usually q k^T and a v; in two classes of DaViT and CoaT, k^T v and then q.
USUAL_ROLES = ("q", "k", "v", 1)
ROLES = {"ChannelAttention": ("k", "v", "q", 1), "FactorAttnConvRelPosEnc": ("k", "v", "q", 0)}

# Families in which a scale does not move between q and k, or does not show in v. The first test covers their layouts.
WITHOUT_RESCALING = {
    "davit": "its channel attention is softmax(k^T v) q^T",
    "coat_lite": "its attention is q (softmax(k)^T v)",
    "coat": "its attention is q (softmax(k)^T v)",
    "mvitv2": "it normalises q, k and v alike, so that no scale shows",
    "differential": "it normalises what attention gives, so that no scale of v shows",
    "differential_parallel": "it normalises what attention gives, so that no scale of v shows",
    "gcvit": "every other layer takes its queries from outside",
}

# Families whose layers called fc1 and fc2 are not simply those of their blocks' MLPs.
WITHOUT_PLAIN_MLP = {
    "parallel_scaling": "its first layer is part of in_proj",
    "differential_parallel": "its first layer is part of in_proj",
    "vitamin": "its gated MLP calls its layers w0, w1 and w2",
    "clip_resnet": "it has none",
    "relpos": "another MLP makes its position biases",
    "swinv2_cr": "another MLP makes its position biases",
    **dict.fromkeys(
        ("efficientformer", "maxvit", "maxvit_tf", "maxxvit", "caformer", "fastvit", "nextvit", "gcvit"),
        "it has convolutions called fc1 besides, or instead",
    ),
}

every_family = pytest.mark.parametrize("family", FAMILIES)


def families_without(left_out: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", [family for family in FAMILIES if family not in left_out])


@every_family
def test_finds_every_projection_and_its_rows(family: str) -> None:
    found: dict[str, Rows] = defaultdict(dict)
    for target in find_targets(tiny(family), ("q", "k", "v")):
        rows = torch.arange(target.layer.out_features)[slice(None) if target.rows is None else target.rows]
        found[target.name.rpartition(".")[0]][target.part] = f"{target.layer_path}.weight", rows.tolist()
    assert found == attention_rows(family)


@every_family
def test_injection_changes_nothing_but_what_is_trainable(family: str) -> None:
    model = tiny(family)
    before = snapshot(model)
    names = inject(model, config(family))
    assert set(names) == set(projections(family))
    assert torch.equal(output(model, family), base_output(family))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in (*spectrum_parameters(model), *head_parameters(model))}


@every_family
def test_adapts_as_the_dense_update_does_and_merges_to_it(family: str) -> None:
    model = tiny(family)
    inject(model, config(family))
    randomise(model)
    adapted = output(model, family)
    assert not torch.allclose(adapted, base_output(family), rtol=1e-3)

    merged = copy.deepcopy(model)
    remove(merged, merge=True)
    assert_close(output(merged, family), adapted)

    by_hand = tiny(family)
    add_updates(by_hand, adapters(model), projections(family))
    assert_close(output(by_hand, family), adapted)


@every_family
def test_training_moves_the_rows_of_q_and_v_only(family: str) -> None:
    model = tiny(family)
    before = snapshot(model)
    inject(model, config(family, ("q", "v")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(family)), torch.tensor([0, 1])).backward()
        assert [name for name, spectrum in adapters(model).items() if not spectrum.coefficients.grad.any()] == []
        optimizer.step()
    remove(model, merge=True)

    after = model.state_dict()
    for weight, rows in (place for name, place in projections(family).items() if name.endswith((".q", ".v"))):
        assert not torch.equal(after[weight][rows], before[weight][rows])
        after[weight][rows] = before[weight][rows]
    head = {key for key, p in model.named_parameters() if any(p is q for q in head_parameters(model))}
    assert [key for key in before.keys() - head if not torch.equal(after[key], before[key])] == []


@every_family
def test_removal_is_bit_exact(family: str) -> None:
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    inject(model, config(family))
    randomise(model)
    with torch.no_grad():
        for parameter in head_parameters(model):
            parameter += 1
    output(model, family)
    remove(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(output(model, family), base_output(family, trainable=True))


@families_without(WITHOUT_RESCALING)
def test_attention_does_not_see_a_scale_moved_from_keys_to_queries(family: str) -> None:
    model = without_what_is_not_bilinear(tiny(family))
    reference = output(model, family)
    assert_close(output(rescaled(model, q=2, k=0.5), family), reference)
    assert not torch.allclose(output(rescaled(model, v=2), family), reference, rtol=1e-3)


@families_without(WITHOUT_PLAIN_MLP)
def test_adapts_the_layers_of_an_mlp(family: str) -> None:
    model = tiny(family)
    expected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("fc1", "fc1_g", "fc1_x", "fc2")}
    names = inject(model, config(family, ("fc1", "fc2")))
    assert set(names) == expected
    assert torch.equal(output(model, family), base_output(family))

    randomise(model)
    logits = model(batch(family))
    logits.square().sum().backward()
    assert all(spectrum.coefficients.grad.any() for spectrum in adapters(model).values())
    by_hand = tiny(family)
    add_updates(by_hand, adapters(model), {name: (f"{name}.weight", ...) for name in names})
    assert_close(output(by_hand, family), logits.detach())
    assert not torch.allclose(logits, base_output(family), rtol=1e-3)


@pytest.mark.parametrize("family", ["eva02_separate", "aimv2", "dinov3", "grouped_query"])
def test_a_gated_mlp_has_its_first_layer_in_two(family: str) -> None:
    names = inject(tiny(family), config(family, ("fc1",)))
    assert {name.rpartition(".")[2] for name in names} == {"fc1_g", "fc1_x"}


REFUSED = {
    "convolutions": ("test_resnet", {}, "q", ValueError, "ResNet has no 'q' projection"),
    "mlp_mixer": ("mixer_s32_224", {}, "q", ValueError, "MlpMixer has no 'q' projection .* it has fc1, fc2"),
    "coatnet": ("test_coatnet", {}, "q", TypeError, r"attn\.q is a Conv2d"),
    "levit": ("levit_128s", {}, "v", TypeError, r"attn\.v is a LinearNorm"),
    "halonet": ("halonet26t", {}, "q", TypeError, r"self_attn\.q is a Conv2d"),
    "visformer": ("visformer_tiny", {"embed_dim": 24, "depth": (1, 1, 1)}, "k", TypeError, r"attn\.k is a Conv2d"),
    "conv_mlp": ("efficientformer_l1", {"depths": (1, 1, 1, 1)}, "fc1", TypeError, r"mlp\.fc1 is a Conv2d"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_adapt_and_leaves_it_alone(case: str) -> None:
    name, kwargs, part, error, sentence = REFUSED[case]
    model = timm.create_model(name, **kwargs)
    next(model.parameters()).requires_grad_(False)
    before, values = shape_of(model), snapshot(model)
    with pytest.raises(error, match=sentence):
        inject(model, LoCAConfig(n_components=6, targets=(part,)))
    assert shape_of(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


# --- what the tests above compare with


class Products(TorchFunctionMode):
    """What each attention layer multiplies: its operands by the path of the innermost module at work.

    Linear layers multiply in `F.linear`, which is not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.at_work: list[str] = []
        self.operands: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
        for path, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, path))
            module.register_forward_hook(self._leave)

    def _enter(self, path: str, *_: Any) -> None:
        self.at_work.append(path)

    def _leave(self, *_: Any) -> None:
        self.at_work.pop()

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = {"scaled_dot_product_attention": 3, "matmul": 2, "__matmul__": 2}.get(function.__name__, 0)
        if count:
            self.operands[self.at_work[-1]].append(args[:count])
        return function(*args, **(kwargs or {}))


@cache
def attention_rows(family: str) -> dict[str, Rows]:
    """By attention layer: the rows of its weights on which its queries, keys and values depend, found by their gradients."""
    model = tiny(family)
    with Products(model) as products:
        model(batch(family))
    found: dict[str, Rows] = defaultdict(dict)
    for path, operands in products.operands.items():
        layer = model.get_submodule(path)
        weights = {f"{path}.{name}.weight": m.weight for name, m in layer.named_children() if isinstance(m, nn.Linear)}
        for part, tensors in roles(layer, operands).items() if weights else ():
            seen = sum((tensor * torch.randn_like(tensor)).sum() for tensor in tensors)
            gradients = torch.autograd.grad(seen, list(weights.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None and gradient.any():
                    assert part not in found[path]
                    found[path][part] = name, gradient.any(1).nonzero().flatten().tolist()
    return found


def roles(layer: nn.Module, operands: list[tuple[Tensor, ...]]) -> dict[str, list[Tensor]]:
    """The operands that are queries, keys and values; none for a layer that does less than two products."""
    fused = [triple for triple in operands if len(triple) == 3]
    if fused:  # several in differential attention
        return dict(zip("qkv", map(list, zip(*fused, strict=True)), strict=True))
    if len(operands) < 2:  # outlook attention, which computes its attention without queries and keys
        return {}
    left, right, other, side = ROLES.get(type(layer).__name__, USUAL_ROLES)
    return {left: [operands[0][0]], right: [operands[0][1]], other: [operands[-1][side]]}


@cache
def projections(family: str) -> dict[str, tuple[str, Any]]:
    """By the name of the projection: its weight and the rows of it, those of the output projection among them."""
    model, found = tiny(family), {}
    for path, rows in attention_rows(family).items():
        found |= {f"{path}.{part}": place for part, place in rows.items()}
        outs = [name for name, _ in model.get_submodule(path).named_children() if name in ("proj", "out_proj", "o_proj")]
        if family not in WITHOUT_OUT:
            found[f"{path}.out"] = f"{path}.{outs[0]}.weight", ...
    return found


@torch.no_grad()
def add_updates(model: nn.Module, spectra: dict[str, Spectrum], places: dict[str, tuple[str, Any]]) -> None:
    """W[rows] += scale * C^T S D, the dense matrix by scipy in float64."""
    for name, spectrum in spectra.items():
        sparse = np.zeros(spectrum.shape)
        np.add.at(sparse, tuple(spectrum.cells.numpy().T), spectrum.coefficients.detach().double().numpy())
        weight, rows = places[name]
        model.get_parameter(weight)[rows] += torch.from_numpy(0.5 * scipy.fft.idctn(sparse, norm="ortho")).float()


@torch.no_grad()
def without_what_is_not_bilinear(model: nn.Module) -> nn.Module:
    """No biases, which the rows of the weight do not scale, and no relative positions that multiply queries alone."""
    for target in find_targets(model, ("q", "k", "v")):
        owner = model.get_submodule(target.name.rpartition(".")[0])
        own = dict(owner.named_parameters(recurse=False)) | {"bias": target.layer.bias}
        for name in own.keys() & {"bias", "q_bias", "v_bias", "rel_pos_h", "rel_pos_w"}:
            if own[name] is not None:
                own[name].zero_()
    return model


@torch.no_grad()
def rescaled(model: nn.Module, **factors: float) -> nn.Module:
    """A copy with the rows of these parts, as the library finds them, multiplied."""
    model = copy.deepcopy(model)
    for target in find_targets(model, tuple(factors)):
        target.layer.weight[slice(None) if target.rows is None else target.rows] *= factors[target.part]
    return model


@torch.no_grad()
def output(model: nn.Module, family: str) -> Tensor:
    return model(batch(family))


@cache
def base_output(family: str, trainable: bool = False) -> Tensor:
    """Of the base, frozen as `inject` leaves it or all of it trainable.

    PyTorch chooses the kernel of some products by whether the weight requires a gradient, which shows in the last bit.
    """
    return output(tiny(family).requires_grad_(trainable), family)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def config(family: str, targets: tuple[str, ...] = ()) -> LoCAConfig:
    parts = ("q", "k", "v") if family in WITHOUT_OUT else ("q", "k", "v", "out")
    return LoCAConfig(n_components=6, scale=0.5, targets=targets or parts)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def shape_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a refused call must not change, values aside: modules, their classes, parameters and what is trainable."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [*modules, *((name, id(p), p.requires_grad) for name, p in model.named_parameters()), *model.state_dict()]


def spectrum_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for spectrum in adapters(model).values() for p in spectrum.parameters()]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    head = model.get_classifier()
    heads = head if isinstance(head, tuple) else (head,)
    return [p for module in heads for p in module.parameters()]
