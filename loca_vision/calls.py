"""The strength of one pipeline call, for components that never hear of it: text encoders, ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import nn

from loca_vision.record import record_of, unwrap
from loca_vision.root import KEYWORDS, check_strength, circumstances

_HEARING = ("unet", "transformer", "transformer_2")  # pipelines pass on to these what a call says
_following: dict[type, type] = {}


class _FollowsCalls:
    """Mixed into the class of a pipeline that has adapters in other components than those that hear of a call's strength."""

    stock_class: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _again, (self.stock_class,), self.__dict__


def follow_calls(pipe: Any) -> None:
    """From now on `cross_attention_kwargs={"scale": s}` of a call of this pipeline holds for all its adapted components."""
    followed = isinstance(pipe, _FollowsCalls)
    wanted = bool(_deaf(pipe))
    if wanted and not followed:
        object.__setattr__(pipe, "__class__", _following_class(type(pipe)))
    elif followed and not wanted:
        object.__setattr__(pipe, "__class__", pipe.stock_class)


def _deaf(pipe: Any) -> list[nn.Module]:
    models = {name: unwrap(model) for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    return [model for name, model in models.items() if name not in _HEARING and record_of(model) is not None]


def _following_class(stock: type) -> type:
    if stock not in _following:
        run: Any = stock.__call__

        @wraps(run)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = [kwargs[name] for name in KEYWORDS if isinstance(kwargs.get(name), Mapping)]
            strength = next((settings["scale"] for settings in given if "scale" in settings), 1.0)
            check_strength(strength)
            told = [circumstances(model) for model in _deaf(self)]
            try:
                for one in told:
                    one.usual = strength
                    one.set_strength(strength)
                return run(self, *args, **kwargs)
            finally:
                for one in told:
                    one.usual = 1.0
                    one.set_strength(1.0)

        body = {"stock_class": stock, "__call__": call, "__module__": stock.__module__, "__doc__": stock.__doc__}
        _following[stock] = type(stock.__name__, (_FollowsCalls, stock), body)
    return _following[stock]


def _again(stock: type) -> Any:
    return object.__new__(_following_class(stock))
