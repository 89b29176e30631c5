"""Refuse calls in which diffusers copies weights of one model into another, because adapters would be lost.

`from_unet` and similar constructors make a ControlNet or a motion model from another model, as `AnimateDiffPipeline.from_pipe`
does, and FreeNoise replaces blocks of a motion model. They copy `state_dict()` of parts, where the keys of adapters are
unexpected or, if keys are not compared, dropped.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from torch import nn

from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.model.state import state_of
from loca_vision.model.traversal import unwrap
from loca_vision.pipeline.class_wrapping import Method, wrap_methods

CONSTRUCTORS = ("from_unet", "from_unet2d", "from_transformer")
FREE_NOISE = ("enable_free_noise", "disable_free_noise")
_COPY_NOTHING = ("ControlNetXSAdapter", "ZImageControlNetModel")  # these only read the configuration, or share modules


def refuse_adapted_models(cls: type) -> None:
    """Make a diffusers model's constructors that copy from another model refuse a model with adapters."""
    if cls.__name__ not in _COPY_NOTHING:
        wrap_methods(cls, CONSTRUCTORS, _refusing_adapted_models)


def refuse_adapted_blocks(cls: type) -> None:
    """Make a pipeline refuse to replace blocks that have adapters."""
    wrap_methods(cls, FREE_NOISE, _refusing_adapted_blocks)


def _refusing_adapted_models(constructor: Method) -> Method:
    signature = inspect.signature(constructor)

    @wraps(constructor)
    def refusing(cls: type, *inputs: Any, **named: Any) -> Any:
        if _copies_weights(signature, cls, *inputs, **named):
            for model in (*inputs, *named.values()):
                _refuse(model, f"{cls.__name__}.{constructor.__name__}")
        return constructor(cls, *inputs, **named)

    return refusing


def _copies_weights(signature: inspect.Signature, *inputs: Any, **named: Any) -> bool:
    """Return whether the call copies weights, i.e. no argument such as `load_weights_from_unet` turns that off."""
    try:
        arguments = signature.bind_partial(*inputs, **named).arguments
    except TypeError:  # the constructor will say what is wrong with them
        return False
    return all(value for name, value in arguments.items() if name.startswith("load_weights"))


def _refuse(model: Any, where: str) -> None:
    state = state_of(unwrap(model)) if isinstance(model, nn.Module) else None
    if state is not None:
        raise ValueError(
            f"{where} copies the weights of {type(unwrap(model)).__name__} without its adapters ({', '.join(state.adapters)}): "
            f"take them out first (unload_loca_weights, or remove) and load them again afterwards, "
            f"or fold them into the weights (remove with merge=True)"
        )


def _refusing_adapted_blocks(method: Method) -> Method:
    disabling = method.__name__.startswith("disable")

    @wraps(method)
    def refusing(self: Any, *inputs: Any, **named: Any) -> Any:
        for path, block in unwrap(self.unet).named_modules():
            replaced = path.rpartition(".")[0].endswith("transformer_blocks") and ".motion_modules." in f".{path}"
            if replaced and (type(block).__name__ == "FreeNoiseTransformerBlock") == disabling and _is_adapted(block):
                raise ValueError(
                    f"{method.__name__} replaces {path}, which has an adapter: unload it first, and load it again afterwards"
                )
        return method(self, *inputs, **named)

    return refusing


def _is_adapted(block: nn.Module) -> bool:
    return any(isinstance(module, EffectiveWeight) for module in block.modules())
