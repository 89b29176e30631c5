"""Measure an adapter's cost at inference: LoCA and peft's LoRA on the UNet of Stable Diffusion 1.5, in one process.

The UNet has the published configuration and random weights, which cost the same; all contenders share its tensors. Loading and
switching go through the pipeline, as for users. Every contender takes a turn in every round of calls; the table shows medians,
and the median of the ratios to the base model without an adapter.

    python examples/benchmarks/pipeline_adapters.py --output pipeline.json
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, adapters, inject, remove
from rounds import check_positive, in_turns, report, run, seconds_of, write
from table_rows import shown
from workloads import WIDTHS, held, on_tensors_of, unet

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SCRIPT = "pipeline_adapters.py"


@dataclass(frozen=True)
class Settings:
    """Time loading, calling and switching adapters on the UNet of Stable Diffusion 1.5."""

    batch_size: int = 2
    """Latents per call; two correspond to one picture with guidance."""
    size: int = 32
    """Height and width of the latents; 64 is a picture of 512 pixels."""
    rounds: int = 5
    """Turns of each contender, after a warm-up turn."""
    n_components: int = 1000
    """Number of LoCA components B for each projection."""
    rank: int = 16
    """Rank r of LoRA."""
    widths: tuple[int, int, int, int] = WIDTHS
    """Channels of the UNet's blocks; multiples of 32."""
    dtype: str = "float32"
    """Data type of the UNet."""
    threads: int | None = None
    """Torch threads; by default torch's own choice."""
    output: Path | None = None
    """JSON file for settings and figures."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "size", "rounds", "n_components", "rank", "widths", "threads")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype={self.dtype}: expected float32, float16 or bfloat16")


def pipeline(model: nn.Module) -> Any:
    """Return the UNet in a pipeline whose other parts are as small as possible."""
    text = CLIPTextConfig(hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)
    return StableDiffusionPipeline(
        unet=model,
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_loca(pipe: Any, folder: Path, settings: Settings, seed: int) -> None:
    inject(pipe.unet, LoCAConfig(n_components=settings.n_components, targets=("q", "k", "v", "out"), seed=seed), name="a")
    for spectrum in adapters(pipe.unet, "a").values():
        nn.init.normal_(spectrum.coefficients, std=1e-2)
    loca.save_loca_weights(pipe, folder, "a")
    remove(pipe.unet)


def save_lora(pipe: Any, folder: Path, settings: Settings, seed: int) -> None:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS, init_lora_weights=False)
    pipe.unet.add_adapter(config, "a")
    state = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet, adapter_name="a"))
    pipe.save_lora_weights(folder, unet_lora_layers=state)
    pipe.unload_lora_weights()


def handling(load: Callable[[str], Any], unload: Callable[[], Any], switch: Callable[[str], Any], call: Any) -> dict[str, Any]:
    """Return seconds of loading, switching, and the first call after each. This leaves two adapters, one of them active."""
    loads, firsts, switches, seconds_after = [], [], [], []
    for _ in range(3):
        unload()
        loads.append(seconds_of(partial(load, "a")))
        firsts.append(seconds_of(call))
    load("b")
    for name in ("a", "b") * 2:
        switches.append(seconds_of(partial(switch, name)))
        seconds_after.append(seconds_of(call))
    return {"load": loads, "first call": firsts, "switch": switches, "call after switch": seconds_after}


def measure(settings: Settings, folder: Path) -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    base = unet(settings.widths).to(getattr(torch, settings.dtype)).eval()
    call = calls_of(settings)
    mine, theirs = pipeline(on_tensors_of(base)), pipeline(on_tensors_of(base))
    for name, seed in (("a", 1), ("b", 2)):
        save_loca(mine, folder / "loca" / name, settings, seed)
        save_lora(theirs, folder / "lora" / name, settings, seed)
    sparing = pipeline(on_tensors_of(base))
    loca.enable_loca_low_memory(sparing)
    loca.load_loca_weights(sparing, folder / "loca" / "b")
    lora = f"LoRA r={settings.rank}"
    figures = {
        "base": {},
        "LoCA": of_loca(mine, folder / "loca", call),
        lora: of_lora(theirs, folder / "lora", call),
        "LoCA, low memory": {},
    }
    _check(call(mine.unet), call(sparing.unet))
    models = {"base": base, "LoCA": mine.unet, "LoCA, low memory": sparing.unet, lora: theirs.unet}
    for name, own in in_turns({name: partial(call, model) for name, model in models.items()}, settings.rounds).items():
        figures[name] |= {"call": own, "MB held": held(models[name], base)}
    return figures


def calls_of(settings: Settings) -> Callable[[nn.Module], Tensor]:
    """Return a function that calls a UNet as pipelines do, with the same inputs every time."""
    generator, dtype = torch.Generator().manual_seed(1), getattr(torch, settings.dtype)
    latents = torch.randn(settings.batch_size, 4, settings.size, settings.size, generator=generator).to(dtype)
    text = torch.randn(settings.batch_size, 77, 768, generator=generator).to(dtype)

    @torch.no_grad()
    def call(model: nn.Module) -> Tensor:
        result: Tensor = model(latents, 500, text).sample
        return result

    return call


def of_loca(pipe: Any, folder: Path, call: Callable[[nn.Module], Tensor]) -> dict[str, Any]:
    found = handling(
        lambda name: loca.load_loca_weights(pipe, folder / name, name),
        lambda: loca.unload_loca_weights(pipe),
        lambda name: loca.set_loca_adapters(pipe, name),
        lambda: call(pipe.unet),
    )
    return found | {"file bytes": _bytes(folder / "a")}


def of_lora(pipe: Any, folder: Path, call: Callable[[nn.Module], Tensor]) -> dict[str, Any]:
    found = handling(
        lambda name: pipe.load_lora_weights(folder / name, adapter_name=name),
        lambda: pipe.unload_lora_weights(),
        lambda name: pipe.set_adapters(name),
        lambda: call(pipe.unet),
    )
    return found | {"file bytes": _bytes(folder / "a")}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _check(built: Tensor, applied: Tensor) -> None:
    """Raise RuntimeError unless both ways of LoCA give the same output; neither is timed before."""
    error = float((built - applied).abs().max() / built.abs().max())
    if error > (1e-4 if built.dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"built weights and applied updates differ by {error:.1e} of the largest output")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence diffusers' remarks on what a LoRA does not contain, in this block only."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def benchmark(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        found = report(SCRIPT, settings, figures=measure(settings, Path(folder)))
    write(settings.output, found)
    print(shown(found))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
