"""Time a batch in which every sample has its own adapter: `per_sample` and peft's `adapter_names`, on one ViT.

Contenders are the base, LoCA and peft's LoRA with each number of different adapters, with turns in every round. Before anything
is timed, samples of a mixed batch must get the same answers as with their adapters alone. `--store` also measures the cost of
loading that many adapters into an `AdapterStore` and holding them.

    python examples/benchmarks/mixed_batch.py --rounds 5 --store 1000 --output mixed-batch.json
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from contenders import is_of_peft
from loca_vision import AdapterStore, LoCAConfig, adapters, inject, per_sample, remove, save_adapter, set_adapters
from rounds import check_positive, in_turns, report, run, seconds_of, write
from table_rows import shown
from workloads import Job, Workload, precision, settled, workload

SCRIPT = "mixed_batch.py"
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2  # of the largest logit, in float32 and in half precision


@dataclass(frozen=True)
class Settings(Job):
    """Time batches that mix adapters."""

    batch_size: int | None = 32
    """Images in the batch."""
    different: tuple[int, ...] = (1, 4, 32)
    """Numbers of adapters in one batch."""
    store: int = 0
    """How many adapter files to load into an AdapterStore."""
    rounds: int = 5
    """Turns of each contender, after a warm-up turn."""
    threads: int | None = None
    """Torch threads; by default torch's own choice."""
    output: Path | None = None
    """JSON file for settings and figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "different", "rounds", "threads")
        if self.workload != "vit" or self.store < 0:
            raise ValueError(f"workload={self.workload!r}, store={self.store}: expected vit, and a whole number from 0 up")


Call = Callable[[Sequence[str | None]], Tensor]  # of a mixed batch


def ours(settings: Settings, work: Workload, names: Sequence[str]) -> tuple[nn.Module, Call]:
    """Return a model with adapters of these names, and a function that calls it with one adapter per sample."""
    model: nn.Module = work.model().eval()
    for name in names:
        inject(model, LoCAConfig(n_components=int(settings.n_components or 0), seed=int(name[1:])), name)
        for spectrum in adapters(model, name).values():
            nn.init.normal_(spectrum.coefficients, std=0.03)

    def call(of_samples: Sequence[str | None]) -> Tensor:
        with per_sample(model, of_samples):
            return logits(settings, model, work.inputs)

    return model, call


def peft_model(settings: Settings, work: Workload, names: Sequence[str]) -> tuple[nn.Module, Call]:
    """Return the same for peft's LoRA."""
    from peft import LoraConfig, get_peft_model

    def config() -> LoraConfig:
        return LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=list(work.layers), init_lora_weights=False)

    model: Any = get_peft_model(work.model(), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    model.eval()

    def call(of_samples: Sequence[str | None]) -> Tensor:
        return logits(settings, model, work.inputs, adapter_names=["__base__" if name is None else name for name in of_samples])

    return model, call


@torch.inference_mode()
def logits(job: Job, model: nn.Module, images: Tensor, **more: Any) -> Tensor:
    with precision(job, images.device):
        result: Tensor = model(images, **more)
        return result


def spread(names: Sequence[str], samples: int, count: int) -> list[str]:
    """Assign the first `count` names to the samples in turn."""
    return [names[sample % count] for sample in range(samples)]


def check(settings: Settings, name: str, call: Call, alone: Callable[[str], Tensor], names: Sequence[str]) -> None:
    """Raise RuntimeError unless samples of a mixed batch get the same answers as with their adapters alone."""
    own = spread(names, settings.batch_size or 0, max(settings.different))
    mixed, allowed = call(own), TOLERANCE if settings.autocast == "none" else HALF_TOLERANCE
    for sample in sorted({0, 1 % len(own), len(own) - 1}):
        wanted = alone(own[sample])[sample]
        if not (mixed[sample] - wanted).abs().max() <= allowed * wanted.abs().max():
            raise RuntimeError(f"{name}: sample {sample} of the mixed batch is not what {own[sample]} answers alone")


def held_bytes(model: nn.Module, base: nn.Module) -> int:
    shared = {tensor.data_ptr() for tensor in base.parameters()}
    return sum(tensor.nbytes for tensor in model.parameters() if tensor.data_ptr() not in shared)


def file_bytes(model: Any, name: str) -> int:
    """Return the size of one saved adapter."""
    with tempfile.TemporaryDirectory() as folder:
        if is_of_peft(model):
            model.save_pretrained(folder, selected_adapters=[name])
        else:
            save_adapter(model, folder, name)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


def measure(settings: Settings) -> dict[str, Any]:
    work = workload(settings)
    work.base.eval()
    store = {"store": stored(settings, work)} if settings.store else {}  # first: memory that was used before counts as its own
    names = [f"a{number}" for number in range(max(settings.different))]
    loca, mixed = ours(settings, work, names)
    theirs, peft_mixed = peft_model(settings, work, names)

    def loca_alone(name: str) -> Tensor:
        set_adapters(loca, name)
        return logits(settings, loca, work.inputs)

    def peft_alone(name: str) -> Tensor:
        theirs.set_adapter(name)  # type: ignore[operator]
        return logits(settings, theirs, work.inputs)

    check(settings, "LoCA", mixed, loca_alone, names)
    check(settings, "peft", peft_mixed, peft_alone, names)
    set_adapters(loca, [])
    calls: dict[str, Callable[[], object]] = {"base": partial(logits, settings, work.base, work.inputs)}
    for count in settings.different:
        own = spread(names, settings.batch_size or 0, count)
        calls[f"LoCA, {count} different"] = partial(mixed, own)
        calls[f"LoRA r={settings.rank}, peft, {count} different"] = partial(peft_mixed, own)
    figures: dict[str, Any] = {name: {"call": own} for name, own in in_turns(calls, settings.rounds).items()}
    for name in figures:
        model = loca if name.startswith("LoCA") else theirs if "peft" in name else work.base
        figures[name]["bytes an adapter"] = held_bytes(model, work.base) // len(names)
        if model is not work.base:
            figures[name]["file bytes"] = file_bytes(model, names[0])
    return {"figures": figures, **store}


def stored(settings: Settings, work: Workload) -> dict[str, Any]:
    """Return milliseconds to load each adapter into a store, the bytes that it counts, and the growth of the process."""
    model: nn.Module = work.model().eval()
    inject(model, LoCAConfig(n_components=int(settings.n_components or 0)))
    for spectrum in adapters(model).values():
        nn.init.normal_(spectrum.coefficients, std=0.03)
    with tempfile.TemporaryDirectory() as folder:
        first = save_adapter(model, Path(folder) / "a0.safetensors")
        for number in range(1, settings.store):
            (Path(folder) / f"a{number}.safetensors").write_bytes(first.read_bytes())
        remove(model)
        store = AdapterStore(folder, capacity_bytes=2**40, base=model)
        store.load("a0")
        before = resident_bytes()
        each = [seconds_of(partial(store.load, f"a{number}")) for number in range(1, settings.store)]
        grown = resident_bytes() - before
        found = {"adapters": settings.store, "ms to load one": 1e3 * median(each or [0.0])}
        return found | {"bytes held": store.held_bytes, "bytes grown": grown, "bytes of a file": first.stat().st_size}


def resident_bytes() -> int:
    """Return the resident memory of this process, or 0 if the system does not provide it."""
    about = Path("/proc/self/statm")
    return int(about.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if about.exists() else 0


def benchmark(given: Settings) -> None:
    settings = settled(given)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    found = report(SCRIPT, settings, given, **measure(settings))
    write(settings.output, found)
    print(shown(found))
    for name, value in found.get("store", {}).items():
        print(f"{name}: {value:,.2f}" if isinstance(value, float) else f"{name}: {value:,}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
