"""The names of linear layers outside attention: feed-forward layers and projections of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# The feed-forward layer of diffusers; its projections are named like those of an MLP, `<feed-forward>.fc1`.
FEED_FORWARD = {"fc1": "net.0.proj", "fc2": "net.2"}
# Other feed-forward layers have their own names; two parallel layers (a gate and what it gates) are both "fc1".
_OTHERS: tuple[Mapping[str, str], ...] = (
    {"linear_1": "fc1", "linear_2": "fc1", "out_projection": "fc2"},
    {"gate_proj": "fc1", "up_proj": "fc1", "linear_fc2": "fc2"},
    {"gate_up_proj": "fc1", "down_proj": "fc2"},
    {"gate": "fc1", "up": "fc1", "down": "fc2"},
    {"gate_layer": "fc1", "proj": "fc1", "out": "fc2"},
    {"w_gate": "fc1", "w_up": "fc1", "w_down": "fc2"},
    {"w0": "fc1", "w1": "fc1", "w2": "fc2"},
    {"ff_in": "fc1", "ff_out": "fc2"},
    {"ffn.0": "fc1", "ffn.2": "fc2"},
    {"ff.0": "fc1", "ff.3": "fc2"},
    {"c_fc": "fc1", "c_proj": "fc2"},
    {"dense1": "fc1", "dense2": "fc2"},
    {"linear_in": "fc1", "linear_out": "fc2"},
    {"w1": "fc1", "w3": "fc1", "w2": "fc2"},
    {"linear_1": "fc1", "linear_3": "fc1", "linear_2": "fc2"},
    {"gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2"},
    {"up_proj": "fc1", "down_proj": "fc2"},
    {"wi_0": "fc1", "wi_1": "fc1", "wo": "fc2"},
    {"wi": "fc1", "wo": "fc2"},
)
# Names that other modules use as well, so they count only in classes that are called "FeedForward".
_OF_FEED_FORWARD = {"in_layer": "fc1", "out_layer": "fc2"}
# The modules of transformers that hold a single layer, `dense`, by the ending of their class name.
_DENSE = {"SelfOutput": "out", "Intermediate": "fc1", "Output": "fc2"}
_AROUND = ("proj_in", "proj_out")


def feed_forward(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (part, path, layer) for a feed-forward layer of diffusers; nothing for other modules."""
    net = module._modules.get("net")
    if not isinstance(net, nn.ModuleList) or len(net) < 3:
        return
    first, last = net[0]._modules.get("proj"), net[2]
    if first is not None and features(first) and features(last):
        yield "fc1", FEED_FORWARD["fc1"], first
        yield "fc2", FEED_FORWARD["fc2"], last


def named_alike(module: nn.Module, *, root: bool) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (part, child, layer) for feed-forward layers with their own names, and `proj_in` and `proj_out` below the root."""
    if not module._modules:
        return
    for names in (*_OTHERS, *([_OF_FEED_FORWARD] if "FeedForward" in type(module).__name__ else ())):
        layers = {path: layer for path in names if (layer := below(module, path)) is not None and features(layer)}
        if len(layers) == len(names):
            yield from ((names[path], path, layer) for path, layer in layers.items())
            break
    children = {name: child for name, child in module._modules.items() if child is not None and features(child)}
    if "dense" in children and type(module).__module__.startswith("transformers."):
        ends = [part for end, part in _DENSE.items() if type(module).__name__.endswith(end)]
        yield from ((part, "dense", children["dense"]) for part in ends[:1])
    if "proj_mlp" in children:  # a block that computes attention and feed-forward in parallel
        yield "fc1", "proj_mlp", children["proj_mlp"]
    yield from ((name, name, children[name]) for name in _AROUND if name in children and not root)


def below(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path such as `ffn.0`, or None if there is none."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = found._modules.get(name) if found is not None else None
    return found


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Return (p, q), outputs and inputs, of a layer that maps vectors to vectors, or None for any other module.

    This includes quantised layers and 1 x 1 convolutions.
    """
    if isinstance(layer, nn.Conv2d):
        pointwise = layer.kernel_size == layer.stride == layer.dilation == (1, 1) and layer.groups == 1
        return (layer.out_channels, layer.in_channels) if pointwise and layer.padding in (0, (0, 0), "valid") else None
    sizes: list[Any] = [getattr(layer, name, None) for name in ("out_features", "in_features")]
    return (sizes[0], sizes[1]) if all(type(size) is int for size in sizes) else None
