"""Hand-made adapters of pipelines: files written key by key, updates computed by scipy, weights with the updates in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from scipy.fft import idctn
from torch import Tensor, nn

from loca_vision.diffusers import LoCALoaderMixin
from support.pipelines import picture, stable_diffusion

FILE_NAME = "pytorch_loca_weights.safetensors"
METADATA_KEY = "loca_adapter_metadata"
_LAYERS = {
    "q": ("to_q", "q_proj"),
    "k": ("to_k", "k_proj"),
    "v": ("to_v", "v_proj"),
    "out": ("to_out.0", "out_proj"),
}

Strength = float | Callable[[str], float]  # of an adapter: one number, or one for each projection by its full name


def layers(model: nn.Module, targets: Sequence[str] = ("q", "k", "v", "out")) -> Iterator[tuple[str, nn.Linear]]:
    """The projections of a model without adapters, by the names they have in an adapter file."""
    lost = "text_model." if hasattr(model, "embeddings") and not hasattr(model, "text_model") else ""  # with transformers 4
    for path, attention in model.named_modules():
        if hasattr(attention, "to_q") or hasattr(attention, "q_proj"):
            children = dict(attention.named_modules())
            for part in targets:
                yield from ((f"{lost}{path}.{part}", children[name]) for name in _LAYERS[part] if name in children)


@dataclass(frozen=True)
class Made:
    """The content of an adapter file.

    Args:
        tensors: by key.
        about: the metadata.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @cached_property
    def updates(self) -> dict[str, Tensor]:
        """scale * C^T S D of every projection by its full name, (p, q)."""
        return {name: self._update(name) for name in self.about["shapes"]}

    @property
    def whole(self) -> dict[str, Tensor]:
        """The tensors trained whole, by the full name of the parameter."""
        return {name: self.tensors[f"full.{name}"] for name in self.about["whole"]}

    def _update(self, name: str) -> Tensor:
        rows, cols = self.about["shapes"][name]
        config = self.about["config"]
        config = config if "scale" in config else config[name.partition(".")[0]]
        spectrum = torch.zeros(rows * cols, dtype=torch.float64)
        values = self.tensors[f"{name}.coefficients"].double()
        spectrum.index_add_(0, self.tensors[f"{name}.locations"].long(), values)
        return config["scale"] * torch.from_numpy(idctn(spectrum.view(rows, cols).numpy(), norm="ortho"))

    def but(self, **fields: Any) -> Made:
        """A copy with some fields of the metadata replaced."""
        return replace(self, about=self.about | fields)

    def with_tensors(self, **tensors: Tensor | None) -> Made:
        """A copy with some tensors replaced, or removed where the value is None."""
        changed: dict[str, Any] = self.tensors | tensors
        return replace(self, tensors={key: value for key, value in changed.items() if value is not None})

    def state(self) -> dict[str, Any]:
        """As a state dict with its metadata."""
        return {key: value.clone() for key, value in self.tensors.items()} | {METADATA_KEY: json.dumps(self.about)}

    def write(self, path: Path) -> Path:
        """As a file, or in a folder under the usual name."""
        file = path if path.suffix == ".safetensors" else path / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(self.tensors, file, {METADATA_KEY: json.dumps(self.about)})
        return file


def adapter(
    pipe: Any,
    parts: Mapping[str, Sequence[str]] | None = None,
    *,
    seed: int = 1,
    n: int | Callable[[str], int] = 12,
    scale: float = 2.0,
    size: float = 1.0,
    name: str = "default",
    whole: Sequence[str] = (),
) -> Made:
    """An adapter with random components for a pipeline that has no adapters yet.

    Args:
        parts: the targets in each component.
        n: components of each projection, or how many one has by its full name.
        size: of the coefficients.
        whole: full names of parameters trained whole, which get other values.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    configs: dict[str, Any] = {}
    for component, targets in (parts or {"unet": ("q", "k", "v", "out"), "text_encoder": ("q", "v")}).items():
        counts: dict[str, int] = {}
        for projection, layer in layers(getattr(pipe, component), targets):
            full, cells = f"{component}.{projection}", layer.weight.numel()
            counts[projection] = n if isinstance(n, int) else n(full)
            shapes[full] = list(layer.weight.shape)
            tensors[f"{full}.coefficients"] = torch.randn(counts[projection], generator=generator) * size
            tensors[f"{full}.locations"] = torch.randperm(cells, generator=generator)[: counts[projection]].int()
        configs[component] = config(n if isinstance(n, int) else counts, targets, scale)
    for key in whole:
        component, _, parameter = key.partition(".")
        value = getattr(pipe, component).get_parameter(parameter).detach()
        tensors[f"full.{key}"] = value.float() + torch.randn(value.shape, generator=generator) * 0.05
    return Made(tensors, metadata(configs, shapes, name=name, whole=list(whole)))


def config(n: Any, targets: Sequence[str], scale: float) -> dict[str, Any]:
    fixed = {"location_init": "uniform", "location_gradient": "central", "seed": 0}
    return {"n_components": n, "scale": scale, "targets": list(targets)} | fixed


def metadata(configs: dict[str, Any], shapes: dict[str, list[int]], **fields: Any) -> dict[str, Any]:
    about = {"format_version": 1, "method": "loca", "config": configs, "shapes": shapes, "whole": []}
    return about | {"name": "default", "base_model": "somebody/something", "library_version": "1.0.0"} | fields


@torch.no_grad()
def write_updates(model: nn.Module, component: str, *terms: tuple[Made, Strength]) -> None:
    """Write W + the updates at their strengths, rounded once, and the whole tensors of the last adapter into a plain model."""
    for projection, layer in layers(model):
        full, total = f"{component}.{projection}", torch.zeros_like(layer.weight, dtype=torch.float64)
        for made, strength in terms:
            if full in made.about["shapes"]:
                total += (strength(full) if callable(strength) else strength) * made.updates[full].to(total.device)
        layer.weight.copy_((layer.weight.double() + total).to(layer.weight.dtype))
    for made, _ in terms:
        for key, value in made.whole.items():
            if key.startswith(f"{component}."):
                model.get_parameter(key.partition(".")[2]).copy_(value)


def merged(*terms: tuple[Made, Strength], make: Callable[[], Any] = stable_diffusion) -> Any:
    """A new pipeline with the updates in its weights."""
    pipe = make()
    for component, model in models(pipe).items():
        write_updates(model, component, *terms)
    return pipe


def expected(*terms: tuple[Made, Strength], make: Callable[[], Any] = stable_diffusion, **call: Any) -> Tensor:
    """The picture of such a pipeline; the pipeline is built once, and its weights are restored after each picture."""
    pipe, stock = _stock(make)
    try:
        for component, model in models(pipe).items():
            write_updates(model, component, *terms)
        return picture(pipe, **call)
    finally:
        for component in {name for made, _ in terms for name in made.about["config"]}:
            getattr(pipe, component).load_state_dict(stock[component])


@lru_cache(maxsize=8)
def _stock(make: Callable[[], Any]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    pipe = make()
    return pipe, {c: {key: value.clone() for key, value in model.state_dict().items()} for c, model in models(pipe).items()}


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape and found.isfinite().all()
    difference = float((found - wanted).abs().max())
    assert difference < tolerance, difference


def assert_far(one: Tensor, other: Tensor) -> None:
    """Check that the two differ by far more than rounding."""
    assert float((one - other).abs().max()) > 2e-4


def listed(components: Iterable[str], *names: str) -> dict[str, list[str]]:
    """The result of `get_loca_adapters` for components that have these adapters."""
    return {component: list(names) for component in components}


def models(pipe: Any) -> dict[str, nn.Module]:
    return {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}


def facts(pipe: Any) -> dict[str, Any]:
    """A full description of a pipeline; `assert_same` compares a pipeline with it."""
    shown = picture(pipe)  # first of all: transformers puts hooks of its own in at the first call
    modules = {f"{c}.{path}": module for c, model in models(pipe).items() for path, module in model.named_modules()}
    parameters = {f"{c}.{key}": p for c, model in models(pipe).items() for key, p in model.named_parameters()}
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
    return {
        "tensors": {f"{c}.{k}": value.clone() for c, model in models(pipe).items() for k, value in model.state_dict().items()},
        "buffers": {f"{c}.{k}" for c, model in models(pipe).items() for k, _ in model.named_buffers()},
        "classes": {path: type(module) for path, module in modules.items()} | {"pipeline": type(pipe)},
        "hooks": {path: [len(getattr(module, name)) for name in hooks] for path, module in modules.items()},
        "methods": {path: [name for name in vars(module) if hasattr(type(module), name)] for path, module in modules.items()},
        "trainable": {key: parameter.requires_grad for key, parameter in parameters.items()},
        "objects": {key: id(parameter) for key, parameter in parameters.items()},
        "adapters": LoCALoaderMixin.get_loca_adapters(pipe),
        "active": LoCALoaderMixin.get_active_loca_adapters(pipe),
        "fused": LoCALoaderMixin.fused_locas.__get__(pipe),
        "picture": shown,
    }


def assert_same(pipe: Any, before: dict[str, Any]) -> None:
    """Check that the pipeline still matches the description, bit for bit."""
    after = facts(pipe)
    for fact in before:
        if fact not in ("tensors", "picture"):
            assert after[fact] == before[fact], fact
    assert list(after["tensors"]) == list(before["tensors"])
    for key, value in before["tensors"].items():
        assert after["tensors"][key].dtype == value.dtype and torch.equal(after["tensors"][key], value), key
    assert torch.equal(after["picture"], before["picture"])
