"""The projections of a model that can be adapted, found by structure without importing timm or diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from loca_vision.functional.row_linear import Rows
from loca_vision.layers.attention_layouts import CALLED_BY_BLOCK, Naming, base_of, naming_of, target_of
from loca_vision.layers.attention_layouts import child as genuine_child
from loca_vision.layers.called_layouts import called_projections
from loca_vision.layers.linear_layouts import features, feed_forward, named_alike
from loca_vision.layers.model_walk import Place, places
from loca_vision.layers.plain_weight import as_matrix
from loca_vision.layers.timm_layouts import _attention, _mlp
from loca_vision.offload import stored


@dataclass(frozen=True)
class Target:
    """One projection: the rows of one linear layer that make up a part of an attention layer or an MLP.

    Args:
        name: path of the attention layer or MLP, a dot, and the part: `blocks.0.attn.q`; of layers that are named otherwise
            their own path, and of rows of one that holds several, a name such as `fused_q` in its place.
        part: "q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear" for any other linear layer, or "conv" for a
            1 x 1 convolution.
        layer_path, layer: the module that holds the weight.
        rows: a slice or an index (int64) of the weight's rows; None for all of them.
        attention: the attention layer, where it is adapted as a whole (diffusers, transformers).
        called: whether the layer is called by its owner, as those of diffusers and transformers are, or its weight may be read.
    """

    name: str
    part: str
    layer_path: str
    layer: nn.Module
    rows: Rows = None
    attention: nn.Module | None = None
    called: bool = False

    @property
    def linear(self) -> bool:
        """Whether the layer is linear, quantised or not, and no convolution."""
        return features(self.layer) is not None and not isinstance(self.layer, nn.Conv2d)

    @property
    def convolution(self) -> bool:
        """Whether the layer is a 1 x 1 convolution, whose weight is (p, q, 1, 1)."""
        return isinstance(self.layer, nn.Conv2d)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of the projection. The layer must be linear, or a 1 x 1 convolution."""
        sizes = features(self.layer)  # the weight may be quantised, or offloaded
        assert sizes is not None
        rows, cols = sizes
        if isinstance(self.rows, slice):
            return len(range(*self.rows.indices(rows))), cols
        return (rows if self.rows is None else len(self.rows)), cols

    def weight(self) -> Tensor:
        """(p, q), these rows of the weight before any update, wherever it is kept.

        Raises:
            ValueError: it is not a matrix of floating-point numbers, or has none yet.
        """
        weight = readable_weight(self.layer, self.name).detach()
        if weight.device.type == "meta":
            raise ValueError(f"{self.name}: its weight has no values yet, which the adapter would start from")
        return weight if self.rows is None else weight[self.rows]


def readable_weight(layer: Any, name: str) -> Tensor:
    """The weight of a layer, past the wrappers that peft puts around it, for those updates that depend on it.

    Raises:
        ValueError: it is not a matrix of floating-point numbers.
    """
    layer = base_of(layer)
    weight = as_matrix(stored(layer, "weight") if "weight" in layer._parameters else None)
    if weight is None:
        raise ValueError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__}: its weight is not a plain floating-point matrix, "
            "on which the adapter depends"
        )
    return weight


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(path: str) -> str:
    """A module's or parameter's path without the wrappers of compilation, checkpointing and sharding, as files name it."""
    return ".".join(name for name in path.split(".") if name not in _WRAPPERS)


def find_targets(model: nn.Module, parts: Sequence[str] | None = None) -> list[Target]:
    """Every target of the wanted parts, in the order of the model's modules, linear or not.

    Args:
        parts: as in `targets` of an `AdapterConfig`; None: every projection and linear layer of the model, also what only a
            name pattern reaches, such as 1 x 1 convolutions.

    Raises:
        ValueError: a fused projection whose rows do not divide into its parts.
    """
    attention_paths: list[str] = []
    found: list[Target] = []
    known: set[int] = set()
    outside: set[int] = set()
    order: dict[int, int] = {}  # of the modules that compute with updates
    for place in places(model):
        order[id(place.module)] = len(order)
        outside |= _called_by_block(place.module)
        inside = [_outside(target) if id(target.layer) in outside else target for target in _of_module(place, attention_paths)]
        known |= {id(base_of(target.layer)) for target in inside}
        if id(place.module) not in known and place.path and features(place.module):
            part, path = "conv" if isinstance(place.module, nn.Conv2d) else "linear", canonical(place.path)
            inside.append(Target(path, part, path, place.module, called=place.called))
        found += [target for target in inside if parts is None or target.part in parts or _is_linear(target, parts)]
    return sorted(found, key=lambda target: order[id(target.attention or target.layer)])


def with_whole_layers(targets: Sequence[Target]) -> dict[str, Target]:
    """Targets by name, and the layers that are called and hold several by their own paths: so a LoRA of theirs is converted."""
    several = {target.layer_path: target for target in targets if target.called and target.rows is not None}
    whole = {path: replace(target, name=path, part="linear", rows=None) for path, target in several.items()}
    return whole | {target.name: target for target in targets}


def _called_by_block(block: nn.Module) -> set[int]:
    """Layers that an attention layer holds and the block around it calls."""
    attention, path = CALLED_BY_BLOCK.get(type(block).__name__, ("", ""))
    holder = block._modules.get(attention)
    return set() if holder is None else {id(base_of(genuine_child(holder, path)))}


def _outside(target: Target) -> Target:
    return replace(target, layer=base_of(target.layer), attention=None, called=True)


def _is_linear(target: Target, parts: Sequence[str]) -> bool:
    return "linear" in parts and target.linear


def _of_module(place: Place, attention_paths: list[str]) -> Iterator[Target]:
    """The targets that are children of one module."""
    path, module = canonical(place.path), place.module
    naming = naming_of(module)
    if naming is not None:
        yield from _of_attention(path, module, naming)
        return
    where = f"{path}." if path else ""
    several = list(called_projections(module))
    for name, part, child, layer, rows in several:
        yield Target(f"{where}{name}", part, f"{where}{child}", layer, rows, called=place.called)
    if several:
        return
    if place.called:
        for part, child, layer in feed_forward(module):
            yield Target(f"{where}{part}", part, f"{where}{child}", base_of(layer), called=True)
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    attention = _attention(place.path, module, children)
    if attention:
        attention_paths.append(f"{place.path}.")
    mlp = _mlp(children, inside_attention=place.path.startswith(tuple(attention_paths)))
    for name, child, rows in (*attention, *mlp):
        yield Target(f"{where}{name}", target_of(name), f"{where}{child}", base_of(children[child]), rows, called=place.called)
    if place.called:
        for part, child, layer in named_alike(module, root=not place.path):
            yield Target(f"{where}{child}", part, f"{where}{child}", base_of(layer), called=True)


def _of_attention(path: str, attention: nn.Module, naming: Naming) -> Iterator[Target]:
    where = f"{path}." if path else ""
    for part in naming.present(attention):
        child_path = naming.parts[part]
        layer = genuine_child(attention, child_path)
        assert layer is not None
        yield Target(f"{where}{part}", target_of(part), f"{where}{child_path}", layer, attention=attention)
