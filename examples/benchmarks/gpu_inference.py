"""Inference on a GPU: calls with active, unfused adapters, and seconds of load, switch, hot swap and merge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from contenders import LOCA, is_of_peft, peft_lora
from gpu_session import Found, Session, tidy
from gpu_workloads import INFERENCE, job
from inference import Settings, call, handled
from loca_vision import load_adapter, remove, set_adapters
from loca_vision.model.call_scale import set_low_memory
from rounds import in_turns, seconds_of
from workloads import Job, Workload, held, on_tensors_of, workload

SECONDS = 10.0  # to make the first model, and for each contender
OTHER = "other"  # the name of the second adapter


def part(session: Session, found: Found, names: Sequence[str]) -> None:
    """Measure those of the named jobs that are part of the inference benchmark."""
    for name in [known for known in INFERENCE if known in names][: 2 if session.dry else None]:
        one = job(name, dry=session.dry)
        session.attempt(found, name, SECONDS, lambda own, one=one: _measured(session, own, one))  # type: ignore[misc]
        tidy()
        session.write()


def _measured(session: Session, found: Found, one: Job) -> None:
    settings = Settings(**asdict(one), rounds=session.rounds, loads=1 if session.dry else 3)
    work, figures = workload(settings), found.setdefault("figures", {"base": {}})
    models: dict[str, nn.Module] = {"base": work.base.eval()}
    with tempfile.TemporaryDirectory() as folder:
        for name in (LOCA, peft_lora(settings), f"LoRA r={settings.rank}"):
            shown, place = "LoCA" if name == LOCA else name, Path(folder) / name

            def load(row: Found, name: str = name, shown: str = shown, place: Path = place) -> None:
                models[shown], numbers = handled(settings, work, name, place)
                row |= numbers

            session.attempt(figures, shown, SECONDS, load)
        if not work.head and (Path(folder) / LOCA).exists():
            session.attempt(figures, "LoCA, low memory", SECONDS, lambda row: models.update(sparing(work, Path(folder) / LOCA)))
        _called(session, figures, models, work)
        for name, model in models.items():
            place = Path(folder) / (LOCA if name == "LoCA" else name)
            if place.exists():
                session.guarded(figures[name], lambda n=name, m=model, p=place: figures[n].update(verbs(work, m, p)))  # type: ignore[misc]
        if not work.head and (Path(folder) / LOCA).exists():
            session.attempt(figures, "LoCA", SECONDS, lambda row: row.update(hot_swap(work, Path(folder) / LOCA)))


def _called(session: Session, figures: Found, models: dict[str, nn.Module], work: Workload) -> None:
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():  # models that fail do not take part
        if session.guarded(figures.setdefault(name, {}), partial(call, work, model)):
            calls[name] = partial(call, work, model)
    for name, seconds in in_turns(calls, 2 * session.rounds, bar=False).items():
        figures[name] |= {"call": seconds, "MB held": held(models[name], work.base)}


def sparing(work: Workload, folder: Path) -> dict[str, nn.Module]:
    """Return a model that applies its adapter to activations and builds no weights."""
    model: nn.Module = work.model().eval()
    set_low_memory(model, True)
    load_adapter(model, folder)
    return {"LoCA, low memory": model}


def verbs(work: Workload, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Return seconds of merging into a copy, of switching between two adapters, and of the first call after a switch."""
    merged: Any = on_tensors_of(model, lambda name: "attn" in name)  # merging writes into the weights of attention
    peft = is_of_peft(model)
    merge = [seconds_of(merged.merge_and_unload if peft else partial(remove, merged, merge=True))]
    del merged
    switch = _second_adapter(model, folder)
    switches, firsts = [], []
    for name in ("default", OTHER) * 2:
        switches.append(seconds_of(partial(switch, name)))
        firsts.append(seconds_of(partial(call, work, model)))
    return {"merge": merge, "switch": switches, "call after switch": firsts}


def _second_adapter(model: Any, folder: Path) -> Callable[[str], object]:
    """Load the same file once more, and return a function that switches to an adapter by its name."""
    if is_of_peft(model):
        model.load_adapter(str(folder), OTHER)
        switch: Callable[[str], object] = model.set_adapter
        return switch
    load_adapter(model, folder, OTHER)
    return partial(set_adapters, model)


def hot_swap(work: Workload, folder: Path) -> dict[str, Any]:
    """Return seconds of replacing a pipeline's adapter in its existing tensors, and of the first call afterwards."""
    import loca_vision.diffusers as loca
    from pipeline_adapters import pipeline

    model: nn.Module = work.model().eval()
    pipe = pipeline(model)
    loca.load_loca_weights(pipe, folder, adapter_name="a")
    call(work, model)
    swaps, firsts = [], []
    for _ in range(4):
        swaps.append(seconds_of(partial(loca.load_loca_weights, pipe, folder, adapter_name="a", hotswap=True)))
        firsts.append(seconds_of(partial(call, work, model)))
    return {"hot swap": swaps, "call after hot swap": firsts}
