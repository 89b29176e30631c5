"""LoCA and the other methods in peft's image generation benchmark: FLUX.2 klein 4B learns a cat from 14 images.

    python examples/dreambooth/peft_image_gen.py --output_dir cat --method loca --n_components 1000 --learning_rate 2e-2
    python examples/dreambooth/peft_image_gen.py --output_dir cat --compare peft/method_comparison/image-gen/results

The first command trains, measures, and writes METHOD--cat.json in the schema of peft's result files, and pictures in samples/.
When started again, it resumes where it was stopped. The second command prints the run next to theirs. Training needs the hub,
for 16 GB of weights, and a GPU that holds them all at once; peft measured 10 to 13 GB in training for most adapters. --dry_run
prints the calculated memory needs and stops.

These are the same as in method_comparison/image-gen of huggingface/peft: base, images, their split, prompts, sizes, steps,
batch, AdamW's settings, clipping, loss, uniform timesteps, seeds and random numbers of all pictures, DINOv2 similarity, drift.
Their rate of 1e-4 is also the default here, but it is one for LoRA: with it, their FourierFT reached a similarity of 0.347, and
their LN tuning, whose pictures are the base's, 0.342. Methods with spectra need far larger rates.

These differ:

* Batches, noise and timesteps are drawn by other generators, as functions of (seed, step, place).
* Latents, noise and targets are float32, and products are bfloat16 by autocast; in theirs, everything but the adapter is
  bfloat16 without autocast, and `use_amp` is true in the result file. Validation pictures are also drawn with autocast.
* LoCA's locations have their own rate, no weight decay, and an alternating schedule. They count among the trained numbers of
  the result file.
* --targets adapts q, k, v, out, fc1 and fc2, each part of a fused matrix separately: 160 projections of FLUX.2 klein 4B. peft
  adapts 80 matrices: the fused q, k, v and fc1 of a single-stream block as a whole, and not the matrix that follows it.
* The text encoder shares the GPU with the transformer while it encodes; the peak of training is measured after it is removed.
* A checkpoint is written before each validation. Memory is what torch has reserved, as in theirs; memory and times of a resumed
  run cover all its starts.
* Test, drift and sample pictures are drawn with the saved file in a newly loaded pipeline, as in their evaluate.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import Flux2KleinPipeline
from torch import nn

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.recipes.diffusion.checks import adapter_of
from loca_vision.recipes.diffusion.drawing import without_adapters
from loca_vision.recipes.diffusion.families.flux import Flux2
from loca_vision.recipes.diffusion.loading import Source
from loca_vision.recipes.diffusion.settings import METHODS, Method
from loca_vision.recipes.diffusion.train import train
from loca_vision.recipes.settings.command_line import Parsed, as_json_dict, parse
from loca_vision.recipes.settings.console import guarded
from loca_vision.recipes.text_to_image.recipe import ImageRecipe, resolve
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim
from peft_image_gen_log import START, Log
from peft_image_gen_measures import Dino, Drawer, drift, encoded, pictures, similarity
from peft_image_gen_needs import Needs, needs_of
from peft_image_gen_protocol import (
    DRIFT_PROMPTS,
    DRIFT_SEED,
    SAMPLE_PROMPTS,
    SCORE_SEED,
    TEST_REPEATS,
    Parts,
    Protocol,
    prepared,
)
from peft_image_gen_result import result_of
from peft_image_gen_table import read_row, rows_of, table
from peft_image_gen_training import recipe_of, task_of

PROG = "peft_image_gen.py"
_TARGETS: Any = ("q", "k", "v", "out", "fc1", "fc2")


@dataclass(frozen=True)
class Benchmark(Protocol, Method):
    """peft's image generation benchmark with a method of this library"""

    FIRST: ClassVar[tuple[str, ...]] = (
        "output_dir", "method", "n_components", "rank", "learning_rate", "targets", "base", "dataset", "dino", "compare",
        "dry_run",
    )  # fmt: skip

    output_dir: Path = Path("peft-image-gen")
    """Output folder; its name is the name of the experiment."""
    learning_rate: float = 1e-4
    """Learning rate of the coefficients or factors. The default is the benchmark's, for LoRA; spectra need larger rates."""
    targets: tuple[Literal["q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear"], ...] = _TARGETS
    """Adapted projections; by default in all attention and feed-forward layers."""
    learning_steps: Annotated[int | None, METHODS.help("learning_steps")] = 75
    """Steps B_s after which the locations are final: by default a tenth of the steps, as in the paper."""
    compare: Path | None = None
    """Folder of result files: print them in a table, with the run of --output_dir if it is finished, and train nothing."""
    dry_run: bool = False
    """Print what will be needed, and stop."""
    config: Path | None = None
    """YAML file with these settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing parts of the benchmark and return the exit status."""

    def command() -> None:
        parsed = parse(Benchmark, sys.argv[1:] if arguments is None else list(arguments), prog=PROG, presets={})
        compare(parsed.settings) if parsed.settings.compare else run(parsed)

    return guarded(PROG, command, extra="edit")


def run(parsed: Parsed[Benchmark]) -> Path | None:
    """Prepare, train, measure and write the result; finished steps are not repeated.

    Returns:
        The result file, or None for a dry run.

    Raises:
        OSError: base, images or DINOv2 are not available.
        ValueError: a setting is out of range or differs from the one the folder was started with, or the machine is too small.
    """
    of = parsed.settings
    of.check()
    recipe = _recipe(parsed)
    needs = needs_of(of, recipe)
    print(needs.said())
    for name, (own, usual) in of.departures().items():
        told = f"{name}={own!r}, there {usual!r}" if name != "instance_prompts" else name
        print(f"not the benchmark's: {told}")
    if of.dry_run:
        return None
    needs.check()
    claim(of.output_dir, "settings.json", _about(of), "results")
    if _file(of).exists():
        return _shown(_file(of))
    log = Log(of.output_dir / "log.jsonl")
    log.add(started=datetime.now(timezone.utc).replace(microsecond=0).isoformat())
    with log.stage(START):
        parts = prepared(of, of.output_dir / "images")
        metrics = train(recipe, task_of(of, parts, log))
        if not log.last("drift"):
            measure(of, recipe, parts, log)
        return _written(of, recipe, metrics, log, needs)


def _about(of: Benchmark) -> dict[str, Any]:
    """Return the settings that the results depend on."""
    passed = ("output_dir", "compare", "dry_run", "config")
    return {name: value for name, value in as_json_dict(of).items() if name not in passed}


def _recipe(parsed: Parsed[Benchmark]) -> ImageRecipe:
    of, own = parsed.settings, {field.name for field in fields(Method)}
    folder = of.output_dir.expanduser()
    return resolve(recipe_of(of, of, of.learning_rate, folder / "adapter", folder / "images" / "train"), parsed.given & own)


def measure(of: Benchmark, recipe: ImageRecipe, parts: Parts, log: Log) -> None:
    """Measure test and drift and draw samples with the trained file; existing pictures are not drawn again."""
    drawer, dino = _trained(of, recipe, parts)
    folder, seed = of.output_dir / "pictures", of.seed
    with log.stage("test"):
        drawn = pictures(drawer, parts.test.prompts, seed + SCORE_SEED, folder, name="test-", repeats=TEST_REPEATS)
        near = similarity(dino.features(drawn), dino.features(parts.test.images()).repeat(TEST_REPEATS, 1))
    with log.stage("drift"):
        with without_adapters(drawer.pipe):
            before = pictures(drawer, DRIFT_PROMPTS, seed + DRIFT_SEED, folder, name="drift-base-")
        after = pictures(drawer, DRIFT_PROMPTS, seed + DRIFT_SEED, folder, name="drift-adapter-")
        gone = drift(dino.features(after), dino.features(before))
    with log.stage("samples"):
        pictures(drawer, SAMPLE_PROMPTS, seed + SCORE_SEED, of.output_dir / "samples", name=f"{_stem(of)}_")
    log.add(**{"test dino_similarity": near, "drift": gone})


def _trained(of: Benchmark, recipe: ImageRecipe, parts: Parts) -> tuple[Drawer, Dino]:
    """Return a drawer with the trained file loaded, on the device and without the language model, and DINOv2."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = Source(of.base, what="a text-to-image pipeline")
    pipe = source.load(Flux2KleinPipeline, Flux2, getattr(torch, of.dtype))
    nn.Module.to(pipe.text_encoder, device)
    texts = encoded(pipe, [*parts.test.prompts, *DRIFT_PROMPTS, *SAMPLE_PROMPTS], of)
    pipe.text_encoder = None
    nn.Module.to(pipe.transformer, device)
    pipe.load_loca_weights(recipe.output_dir)
    return Drawer(pipe, texts, of), Dino(of.dino, device)


def _written(of: Benchmark, recipe: ImageRecipe, metrics: dict[str, Any], log: Log, needs: Needs) -> Path:
    result = result_of(
        of,
        of.learning_rate,
        name=f"{of.method}/{of.output_dir.resolve().name}",
        adapter=adapter_of(recipe),
        projections=list(needs.projections),
        metrics=metrics,
        log=log,
        base_numbers=needs.base,
    )
    file = _file(of)
    write_atomically(file, (json.dumps(result, indent=2) + "\n").encode())
    return _shown(file)


def _shown(file: Path) -> Path:
    row = read_row(file, ours=True)
    assert row is not None
    print(f"{file}\n{table([row])}")
    return file


def compare(of: Benchmark) -> None:
    """Print the results of a folder, with ours if there is one.

    Raises:
        OSError, ValueError: as `rows_of`.
    """
    assert of.compare is not None
    rows, failed = rows_of(of.compare.expanduser())
    for name in failed:
        print(f"not shown, as the run did not succeed: {name}")
    ours = sorted(of.output_dir.expanduser().glob("*--*.json"))
    found = [read_row(file, ours=True) for file in ours if file.resolve().parent != of.compare.expanduser().resolve()]
    if not found:
        print(f"{of.output_dir}: no finished run is there")
    print(table([*rows, *(row for row in found if row is not None)]))


def _stem(of: Benchmark) -> str:
    return f"{of.method}--{of.output_dir.resolve().name}"


def _file(of: Benchmark) -> Path:
    return of.output_dir / f"{_stem(of)}.json"


if __name__ == "__main__":
    sys.exit(main())
