"""Train adapters that draw cartoons from scratch, in one command and without a hub.

    python examples/instruct_pix2pix/study.py study
    python examples/instruct_pix2pix/study.py study --photographs photos --mixed_precision bf16

The steps are photographs, pairs, base, training and measurements, each a run of a script next to this one. Finished steps are
not repeated, so the command can be stopped and started again. Photographs are divided first: the base and the adapters are
trained on the first part, rates are compared on the second (--tune), and results and pictures come from the third.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from loca_vision.checks import check_count, check_share
from loca_vision.data.images import as_png, open_image
from loca_vision.data.pairs import CARTOONIZATION, read_pairs
from loca_vision.data.photographs import Photograph, photographs_in
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.registry import config_class
from loca_vision.recipes.editing.edit import squares
from loca_vision.recipes.reports.metrics import METRICS, read_metrics
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim
from loca_vision.storage.strict_json import read_json
from photo_pairs import SPLITS, split_of
from study_report import arms_of, column, draw_numbers, study_sheet, study_table

PROG = "study.py"
HERE = Path(__file__).parent
BUNDLED = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
WALLPAPERS = Path("/usr/share/backgrounds")  # of Debian and its derivatives
FLAT = 1.0  # of 255: if neighbouring pixels differ by less than this on average, a wallpaper is a colour gradient
GRID = (1 / 3, 1.0, 3.0)  # factors on the methods' rates, with --tune


@dataclass(frozen=True)
class Study:
    """Train a base on photographs, train adapters to draw cartoons, and measure them on unseen photographs."""

    output: Annotated[Path, tyro.conf.Positional]
    """Output folder: results.json, study.md, study.png, numbers.png, and a folder for each step."""
    photographs: Path | None = None
    """Folder of photographs; by default those in the packages scikit-image and scikit-learn, and Debian's wallpapers."""
    methods: tuple[str, ...] = ("loca", "lora", "fourierft")
    """Methods to compare."""
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    """Adapted layers of the base's transformers; fc1, fc2, proj_in and proj_out are also possible."""
    n_components: int = 700
    """Components per projection, for methods that have them."""
    rank: int = 4
    """Rank of LoRA. SeLoRA gets twice this rank, because its spectra are half empty."""
    steps: int = 500
    """Optimiser steps of every method."""
    batch_size: int = 8
    """Pairs per step."""
    tune: bool = False
    """Train every method at a third of its rate, at its rate, and at three times its rate, and take the best on validation."""
    resolution: int = 64
    """Pixels per side."""
    channels: tuple[int, ...] = (48, 96, 128)
    """Channels of the base UNet's levels."""
    base_steps: int = 1000
    """Optimiser steps of the base's UNet."""
    autoencoder_steps: int = 400
    """Optimiser steps of the base's autoencoder."""
    crops: int = 12
    """Pairs per photograph."""
    validation_share: float = 0.15
    """Share of the photographs for validation."""
    test_share: float = 0.2
    """Share of the photographs for testing."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of all training. On processors with bfloat16 units (AMX), bf16 is faster; on others it is slower."""
    num_inference_steps: int = 20
    """Denoising steps of every edit."""
    guidance_scale: float = 1.0
    """Guidance scale of every edit. On validation photographs, edits were closer to their targets without guidance than with
    scales of 2 and 1.5."""
    image_guidance_scale: float = 1.0
    """Image guidance scale of every edit; see guidance_scale."""
    seed: int = 0
    """Seed of everything but the pairs, whose seed is the first that divides the photographs well."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing parts of the study and return the exit status."""
    return run_command(PROG, Study, run, arguments, extra="edit,pairs")


def run(study: Study) -> dict[str, Any]:
    """Run all steps, write the results, and return the contents of results.json.

    Raises:
        ValueError: a setting is out of range or differs from the one the folder was started with, or a step failed.
        FileNotFoundError: there are too few photographs.
    """
    _check(study)
    found = photographs_in(study.photographs) if study.photographs else installed()
    split_seed = _split_seed(found, study)
    about = {name: value for name, value in asdict(study).items() if name not in ("output", "photographs")}
    about |= {"photographs": [one.content for one in found], "split_seed": split_seed}
    claim(study.output, "settings.json", json.loads(json.dumps(about)), "results")
    steps = Steps(study, split_seed)
    steps.divide(found)
    steps.pairs()
    steps.base()
    chosen = {method: steps.adapter(method) for method in study.methods}
    steps.evaluate(study.output / "evaluation", list(chosen.values()), "test")
    return _written(study, chosen, about)


def _check(study: Study) -> None:
    for name in ("n_components", "rank", "steps", "batch_size", "base_steps", "autoencoder_steps", "crops"):
        check_count(name, getattr(study, name))
    for name in ("validation_share", "test_share"):
        check_share(name, getattr(study, name), open_end=True)
    if not study.methods or len(set(study.methods)) < len(study.methods):
        raise ValueError(f"methods={list(study.methods)}: at least one, and none twice")
    for method in study.methods:
        config_class(method)
    if study.resolution % 8 or study.resolution < 16:
        raise ValueError(f"resolution={study.resolution}: expected a multiple of 8 from 16 up")


# Photographs


def installed() -> list[Photograph]:
    """Return the photographs in installed packages and Debian's wallpapers, each picture only once.

    Raises:
        FileNotFoundError: there are too few photographs.
    """
    files = [file for package, (folder, names) in BUNDLED.items() for file in _of_package(package, folder, names)]
    if WALLPAPERS.is_dir():
        sizes = {re.sub(r"_\d+x\d+$", "", file.stem): file for file in sorted(WALLPAPERS.rglob("*.jpg")) if file.is_file()}
        files += [file for file in sizes.values() if _detail(file) > FLAT]
    found: dict[str, Photograph] = {}
    for file in files:
        content = sha256(file.read_bytes()).hexdigest()
        found.setdefault(content, Photograph(file, content))
    if len(found) < len(SPLITS):
        raise FileNotFoundError(f"only {len(found)} photographs: python -m pip install scikit-image, or say --photographs")
    return [found[content] for content in sorted(found)]


def _of_package(package: str, folder: str, names: Sequence[str]) -> list[Path]:
    spec = find_spec(package)
    places = (spec.submodule_search_locations or []) if spec else []
    return [file for place in places for name in names if (file := Path(place) / folder / name).is_file()]


def _detail(file: Path) -> float:
    """Return the mean difference of neighbouring pixels (of 255) in a copy with at most 256 pixels per side."""
    image = open_image(file).convert("L")
    image.thumbnail((256, 256))
    pixels = np.asarray(image, np.float64)
    return float(np.mean([np.abs(np.diff(pixels, axis=axis)).mean() for axis in (0, 1)]))


def _parts(found: Sequence[Photograph], seed: int, study: Study) -> dict[str, list[Photograph]]:
    """Divide the photographs as build_pairs.py does."""
    parts: dict[str, list[Photograph]] = {split: [] for split in SPLITS}
    for one in found:
        parts[split_of(one, seed, study.validation_share, study.test_share)].append(one)
    return parts


def _split_seed(found: Sequence[Photograph], study: Study) -> int:
    """Return the first seed that gives every part nearly its share; nothing else affects the choice."""
    shares = {"validation": study.validation_share, "test": study.test_share}
    least = {split: max(1, int(0.9 * share * len(found))) for split, share in shares.items()}
    for seed in range(1000):
        parts = _parts(found, seed, study)
        if parts["train"] and all(len(parts[split]) >= count for split, count in least.items()):
            return seed
    raise ValueError(f"{len(found)} photographs cannot be divided into three parts; give more photographs, or other shares")


# Steps


@dataclass(frozen=True)
class Steps:
    """The steps of a study, each in its own folder."""

    study: Study
    split_seed: int

    def _folder(self, name: str) -> Path:
        return self.study.output / name

    def divide(self, found: Sequence[Photograph]) -> None:
        """Copy the photographs into a folder for each part."""
        for split, photographs in _parts(found, self.split_seed, self.study).items():
            for one in photographs:
                copy = self._folder("photographs") / split / f"{one.file.stem}-{one.name[:8]}{one.file.suffix.lower()}"
                if not copy.exists():
                    write_atomically(copy, one.file.read_bytes())

    def pairs(self) -> None:
        of = self.study
        shares = {"validation_share": of.validation_share, "test_share": of.test_share}
        told = {"size": 2 * of.resolution, "crops": of.crops, "seed": self.split_seed, **shares}
        _run("build_pairs.py", [str(self._folder("photographs")), str(self._folder("pairs"))], told)

    def base(self) -> None:
        """Train the base on the training photographs and measure it on the validation photographs."""
        of, photographs = self.study, self._folder("photographs")
        told = {"held_out": photographs / "validation", "steps": of.base_steps}
        same: tuple[str, ...] = ("resolution", "channels", "autoencoder_steps", "batch_size", "mixed_precision", "seed")
        same += ("num_inference_steps", "guidance_scale", "image_guidance_scale")
        _run(
            "pretrain.py",
            [str(photographs / "train"), str(self._folder("base"))],
            told | {name: getattr(of, name) for name in same},
        )

    def adapter(self, method: str) -> Path:
        """Train an adapter at its rate, or choose the best of three rates, and return the adapter's folder."""
        if not self.study.tune:
            return self._trained(method, config_class(method).edit_lr, self._folder("adapters") / method)
        tried = {}
        for factor in GRID:
            rate = float(f"{factor * config_class(method).edit_lr:.2g}")
            folder = self._trained(method, rate, self._folder("tuning") / f"{method}-{rate:g}" / method)
            evaluation = self.evaluate(folder.with_name("validation"), [folder], "validation")
            tried[folder] = float(evaluation["means"][column(evaluation, method)]["psnr_to_target"]["mean"])
        return max(tried, key=lambda folder: tried[folder])

    def _trained(self, method: str, rate: float, folder: Path) -> Path:
        if (folder / METRICS).exists():
            return folder
        of = self.study
        told: dict[str, Any] = {
            "pretrained_model_name_or_path": self._folder("base"),
            "train_data_dir": self._folder("pairs"),
            "original_image_column": CARTOONIZATION.original,
            "edited_image_column": CARTOONIZATION.edited,
            "resolution": of.resolution,
            "train_batch_size": of.batch_size,
            "max_train_steps": of.steps,
            "learning_rate": rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0,
            "conditioning_dropout_prob": 0.05,
            "method": method,
            "targets": of.targets,
            **_size(config_class(method), of),
            "latents_dir": self._folder("latents"),
            "cache_dir": self._folder("cache"),
            "mixed_precision": of.mixed_precision,
            "checkpointing_steps": 100,
            "checkpoints_total_limit": 1,
            "resume_from_checkpoint": "latest",
            "validation_epochs": 10**6,  # so that validation pictures are drawn only at the end
            "num_validation_images": 1,
            "report_to": "none",
            "seed": of.seed,
            "output_dir": folder,
        }
        _run("train.py", ["--center_crop", "--random_flip"], told)
        return folder

    def evaluate(self, folder: Path, adapters: Sequence[Path], split: str) -> dict[str, Any]:
        """Evaluate adapters on the pairs of one part with evaluate.py, if not done yet, and return the evaluation."""
        of = self.study
        if not (folder / "evaluation.json").exists():
            told: dict[str, Any] = {
                "pretrained_model_name_or_path": self._folder("base"),
                "adapter": adapters[0],
                "pairs": self._folder("pairs"),
                "split": split,
                "resolution": of.resolution,
                "scales": 1,
                "num_inference_steps": of.num_inference_steps,
                "guidance_scale": of.guidance_scale,
                "image_guidance_scale": of.image_guidance_scale,
                "clip_model": None,
                "seed": of.seed,
                "output_dir": folder,
            }
            others = ["--other", *map(str, adapters[1:])] if adapters[1:] else []
            _run("evaluate.py", ["--no_lpips", *others], told)
        found: dict[str, Any] = read_json(folder / "evaluation.json")
        return found


def _size(config: type[AdapterConfig], of: Study) -> dict[str, int]:
    """Return the settings for a method's number of trained parameters and, if its locations move, for how long they do."""
    like_lora = config.at_budget(2 * of.rank, (1, 1))  # as many numbers per row and column as LoRA's factors
    size: dict[str, int] = {"rank": like_lora["r"]} if "r" in like_lora else {}
    size |= {"n_components": of.n_components} if "n_components" in like_lora else {}
    return size | ({"learning_steps": 3 * of.steps // 4} if config.moves_locations else {})


def _run(script: str, arguments: Sequence[str], told: dict[str, Any]) -> None:
    """Run one of the scripts next to this one in its own process, with its progress bars and messages shown.

    Raises:
        ValueError: the script failed.
    """
    flags = [word for name, value in told.items() for word in (f"--{name}", *_words(value))]
    print(f"{script} {' '.join(arguments[:2])}", flush=True)
    done = subprocess.run([sys.executable, str(HERE / script), *arguments, *flags], check=False)
    if done.returncode:
        raise ValueError(f"{script}: it ended with status {done.returncode}; what it said is above")


def _words(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


# Results


def _written(study: Study, chosen: dict[str, Path], about: dict[str, Any]) -> dict[str, Any]:
    folder = study.output / "evaluation"
    evaluation = read_json(folder / "evaluation.json")
    arms = arms_of(evaluation, {method: read_metrics(path) for method, path in chosen.items()})
    pairs = read_pairs(study.output / "pairs", columns=CARTOONIZATION, split="test", cache_dir=study.output / "cache")
    images = [squares(pairs[index], study.resolution) for index in range(len(pairs))]
    write_atomically(study.output / "study.png", as_png(study_sheet(folder, evaluation, list(chosen), images, study.crops)))
    title = f"{len(images)} pairs of photographs nobody has seen, {study.resolution} pixels, {study.steps} steps"
    draw_numbers(study.output / "numbers.png", title, arms)
    write_atomically(study.output / "study.md", study_table(arms).encode())
    results = {
        "settings": about,
        "base": read_json(study.output / "base" / "pretrain.json")["measured"],
        "test_pairs": len(images),
        "results": [asdict(arm) for arm in arms],
        "environment": evaluation["environment"],
    }
    write_atomically(study.output / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(study_table(arms))
    return results


if __name__ == "__main__":
    sys.exit(main())
