"""The random generators as tensors and JSON, for a checkpoint from which a run goes on with the same numbers. No pickle.

The tensors' names begin with "generator.", so that they can lie in one checkpoint with others.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_PREFIX = "generator."
_NUMPY_WORDS = 624  # of its Mersenne twister; it checks no position against it


def generator_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of torch's generators (CPU, and every CUDA device), Python's, and numpy's where that is imported."""
    version, words, spare = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = {f"{_PREFIX}torch": torch.get_rng_state()}
    tensors |= {f"{_PREFIX}cuda.{i}": state for i, state in enumerate(cuda)}
    numpy = sys.modules.get("numpy")
    theirs = _plain(numpy.random.get_state(legacy=False)) if numpy else None
    return tensors, {"python": [version, list(words), spare], "numpy": theirs, "cuda": len(cuda)}


def restore_generators(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Set every generator that was saved; what the others are does not matter to a run that had none.

    Raises:
        ValueError: one cannot be restored, as with another number of CUDA devices; all are as they were.
        ModuleNotFoundError: the run used numpy, which is not installed.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if state.get("cuda") != devices:
        raise ValueError(f"generators: the checkpoint has those of {state.get('cuda')} CUDA devices, here are {devices}")
    settings = [
        _trial("python", _python, state),
        _trial("torch", _torch, torch.default_generator, tensors, "torch"),
        *(_trial(f"cuda.{i}", _torch, torch.cuda.default_generators[i], tensors, f"cuda.{i}") for i in range(devices)),
    ]
    if state.get("numpy") is not None:
        settings.append(_trial("numpy", _numpy, state["numpy"]))
    for setting in settings:
        setting()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _trial(name: str, prepare: Callable[..., Callable[[], object]], *arguments: Any) -> Callable[[], object]:
    """Try a state on a generator of no account; what sets it on the real one is for later."""
    try:
        return prepare(*arguments)
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise ValueError(f"generator.{name}: it cannot be restored ({error})") from error


def _python(saved: Mapping[str, Any]) -> Callable[[], object]:
    version, words, spare = saved["python"]
    state = (version, tuple(words), spare)
    random.Random().setstate(state)
    if spare is not None and not isinstance(spare, float):
        raise TypeError("the second normal number is none")
    return lambda: random.setstate(state)


def _torch(generator: torch.Generator, tensors: Mapping[str, Tensor], name: str) -> Callable[[], object]:
    state = tensors[f"{_PREFIX}{name}"]
    torch.Generator(generator.device).set_state(state)
    return lambda: generator.set_state(state)


def _numpy(saved: Any) -> Callable[[], object]:
    numpy: Any = importlib.import_module("numpy")
    kind = numpy.random.get_bit_generator()
    if saved["bit_generator"] != type(kind).__name__:
        raise ValueError(f"the checkpoint has {saved['bit_generator']}, here it is {type(kind).__name__}")
    if "pos" in saved["state"] and not 0 <= saved["state"]["pos"] <= _NUMPY_WORDS:
        raise ValueError(f"position {saved['state']['pos']} of {_NUMPY_WORDS}")
    numpy.random.RandomState(type(kind)()).set_state(saved)
    return lambda: numpy.random.set_state(saved)
