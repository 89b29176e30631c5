"""A stand-in for an accelerator: the library takes the branches for one, on the CPU.

It asks where it is by comparing a device's type with "cpu". Inside `pretended`, every such comparison says "elsewhere". What
only a real device shows (its kernels, copies between devices, races) takes one: see `LOCA_TEST_DEVICE` in `tests/conftest.py`.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from loca_vision.functional import cost_model, dct

_ELSEWHERE = "not the cpu"
_active = False


@contextmanager
def pretended(on: bool = True) -> Iterator[None]:
    """Inside, the library computes as on an accelerator; with `on=False`, as on the CPU again."""
    global _active
    before = _active
    _switch(on)
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    global _active
    if on != _active:
        for function, there, elsewhere in _branching():
            function.__code__ = elsewhere if on else there
        for known in _by_device():
            if on:
                known[_ELSEWHERE] = known.pop("cpu")
            else:
                known["cpu"] = known.pop(_ELSEWHERE)
        _active = on


def _by_device() -> list[dict[str, Any]]:
    """What is known of devices by their type: nothing, of an accelerator."""
    return [cost_model.COSTS, dct._FAST_FROM]


@cache
def _branching() -> list[tuple[FunctionType, CodeType, CodeType]]:
    """The functions that compare something with "cpu", their code, and the same code that finds it unequal."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("loca_vision."):
            for function in _functions(vars(module).values(), name):
                elsewhere = _changed(function.__code__)
                if elsewhere is not function.__code__:
                    found[id(function)] = function, function.__code__, elsewhere
    return list(found.values())


def _functions(values: Any, module: str) -> Iterator[FunctionType]:
    for value in values:
        if getattr(value, "__module__", None) == module and isinstance(value, type):
            yield from _functions(list(vars(value).values()), module)
        elif isinstance(value, property):
            yield from _functions([value.fget, value.fset], module)
        elif isinstance(value, (staticmethod, classmethod)):
            yield from _functions([value.__func__], module)
        elif isinstance(value, FunctionType) and value.__module__ == module:
            yield value
            yield from _functions([getattr(value, "__wrapped__", None)], module)


def _changed(code: CodeType) -> CodeType:
    """The code with its constants "cpu" replaced, if it compares with them, and that of the functions inside it."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    compares = any(
        step.opname.startswith("LOAD_CONST") and step.argval == "cpu" and after.opname == "COMPARE_OP"
        for step, after in pairwise(steps)
    )
    constants = tuple(
        _changed(value) if isinstance(value, CodeType) else _ELSEWHERE if compares and value == "cpu" else value
        for value in code.co_consts
    )
    same = all(one is other for one, other in zip(constants, code.co_consts, strict=True))
    return code if same else code.replace(co_consts=constants)


def branches() -> set[str]:
    """Where the library treats accelerators in another way."""
    return {f"{function.__module__}.{function.__qualname__}" for function, _, _ in _branching()}
