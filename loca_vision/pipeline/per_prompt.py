"""`pipe(prompts, loca_adapters=[...])`: each prompt of a pipeline call has its own adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from loca_vision.layers.mixtures import Mixture, mixing
from loca_vision.messages import nearest
from loca_vision.model.adapter_sources import Taken, has_adapter, held_adapters, names_for, source_of
from loca_vision.model.per_sample import checked_entries, mixtures_for, names_in
from loca_vision.model.state import state_of
from loca_vision.pipeline.components import models_in

KEYWORD = "loca_adapters"
_IMAGES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@contextmanager
def per_prompt(pipe: Any, names: Any, arguments: Mapping[str, Any], signature: inspect.Signature) -> Iterator[None]:
    """Make all components of the pipeline follow `loca_adapters` inside the `with`.

    Args:
        names: one entry for each prompt, as in `loca_vision.per_sample`.
        arguments: the arguments of the call, by name.

    Raises:
        ValueError: a name is unknown, the numbers of entries and prompts differ, or an adapter is fused.
        TypeError: an entry has another type.
    """
    try:
        entries = checked_entries(names)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("names", KEYWORD, 1).replace("sample", "prompt")) from None
    prompts, images = _prompts(arguments), _images(arguments, signature)
    if prompts is not None and prompts != len(entries):
        raise ValueError(f"{KEYWORD} has {len(entries)} entries for {prompts} prompt{'s' * (prompts != 1)}")
    models = list(models_in(pipe).values())
    known = {name: _models_with(name, models) for name in names_in(entries)}
    mixtures: dict[int, Mixture] = {}
    taken: dict[tuple[int, str], Taken] = {}
    for model in (model for model in models if state_of(model) is not None or source_of(model) is not None):
        own = [{name: weight for name, weight in entry.items() if model in known[name]} for entry in entries]
        expand = _expansion(model, len(entries), images)
        mixtures |= mixtures_for(model, own, held_adapters(model, names_in(own), taken), expand)
    with mixing(mixtures):
        yield


def _models_with(name: str, models: Sequence[nn.Module]) -> list[nn.Module]:
    found = [model for model in models if has_adapter(model, name)]
    if not found:
        every = list(dict.fromkeys(name for model in models for name in names_for(model)))
        shown = ", ".join(map(repr, every[:8])) or "none"
        raise ValueError(f"{KEYWORD}: no adapter {name!r} in the pipeline; it has {shown}{nearest(name, every)}")
    return found


def _prompts(arguments: Mapping[str, Any]) -> int | None:
    prompt = arguments.get("prompt")
    if isinstance(prompt, str):
        return 1
    for given in (prompt, arguments.get("prompt_embeds"), arguments.get("class_labels")):
        if given is not None and hasattr(given, "__len__"):
            return len(given)
    batch = arguments.get("batch_size")  # of an unconditional pipeline
    return batch if isinstance(batch, int) else None


def _images(arguments: Mapping[str, Any], signature: inspect.Signature) -> int:
    """Return the number of images for each prompt."""
    for name in _IMAGES:
        if name in signature.parameters or name in arguments:
            default = signature.parameters[name].default if name in signature.parameters else None
            value = arguments.get(name, default)
            return value if isinstance(value, int) and value > 0 else 1
    return 1


def _expansion(model: nn.Module, prompts: int, images: int) -> Callable[[int], Sequence[int]]:
    """Return a function from the size of a component's batch to the prompt of each of its samples.

    Text encoders see the prompts. Other components see the images of each prompt one after the other, and all of these once
    for each branch of classifier-free guidance.
    """
    reads_text = type(model).__module__.startswith("transformers.")
    once = list(range(prompts)) if reads_text else [prompt for prompt in range(prompts) for _ in range(images)]
    called = type(model).__name__  # not the model itself, which the mixture of its last call must not keep alive

    def expand(batch: int) -> Sequence[int]:
        if batch % len(once):
            raise ValueError(
                f"{KEYWORD} has {prompts} entries, and {called} was called with a batch of {batch}, "
                f"which is not a multiple of {len(once)}"
            )
        return once * (batch // len(once))

    return expand
