"""The strength of one pipeline call, for components whose `forward` never hears of it: text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import nn

from loca_vision.record import record_of, unwrap
from loca_vision.root import KEYWORDS, circumstances, takes_attention_kwargs

_following: dict[type, type] = {}


class _FollowsCalls:
    """Mixed into the class of a pipeline whose text encoders are adapted."""

    stock_class: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _again, (self.stock_class,), self.__dict__


def follow_calls(pipe: Any) -> None:
    """From now on `cross_attention_kwargs={"scale": s}` of a call of this pipeline holds for its text encoders as well."""
    followed = isinstance(pipe, _FollowsCalls)
    wanted = any(record_of(model) is not None for model in _deaf(pipe))
    if wanted and not followed:
        object.__setattr__(pipe, "__class__", _following_class(type(pipe)))
    elif followed and not wanted:
        object.__setattr__(pipe, "__class__", pipe.stock_class)


def _deaf(pipe: Any) -> list[nn.Module]:
    models = [unwrap(model) for model in pipe.components.values() if isinstance(model, nn.Module)]
    return [model for model in models if not takes_attention_kwargs(model)]


def _following_class(stock: type) -> type:
    if stock not in _following:
        run: Any = stock.__call__

        @wraps(run)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            told = [circumstances(model) for model in _deaf(self) if record_of(model) is not None]
            given = [kwargs[name] for name in KEYWORDS if isinstance(kwargs.get(name), Mapping)]
            strength = next((settings["scale"] for settings in given if "scale" in settings), 1.0)
            try:
                for one in told:
                    one.set_strength(strength)
                return run(self, *args, **kwargs)
            finally:
                for one in told:
                    one.set_strength(1.0)

        body = {"stock_class": stock, "__call__": call, "__module__": stock.__module__, "__doc__": stock.__doc__}
        _following[stock] = type(stock.__name__, (_FollowsCalls, stock), body)
    return _following[stock]


def _again(stock: type) -> Any:
    return object.__new__(_following_class(stock))
