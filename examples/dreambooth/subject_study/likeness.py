"""A small network that tells what is in a drawing, by which generated pictures are measured.

It learns from drawings alone, half of them passed through the base's autoencoder, as what is measured has passed through it.
Its drawings of fish have stripes, crown and one eye or not, each by itself, and any colour; so it knows the marks of the
subject and has never been told of the subject. Some of its drawings are in neon.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from loca_vision.data.sampling import stream_seed
from subject_study.objects import KINDS
from subject_study.scenes import COLOURS, PLACES, Scene, drawn_scene, in_style

MARKS = ("stripes", "crown", "one_eye")
QUESTIONS: dict[str, tuple[Any, ...]] = {
    "kind": tuple(KINDS),
    "colour": (*COLOURS, "orange"),
    "place": PLACES,
    "two": (False, True),
    "style": ("paint", "crayon", "neon"),
    **dict.fromkeys(MARKS, (False, True)),
}
_SCENES, _BATCHES = 61, 62  # keys of streams of random numbers
_WIDTH = 64
DRAWINGS = 4000  # that it learns from, at most


class Eye(nn.Module):
    """Convolutions, the means over the picture of what they find, and a linear answer to each of `QUESTIONS`."""

    middle: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for given, width, stride in ((3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(given, width, 3, stride, 1), nn.GroupNorm(8, width), nn.ReLU()]
        self.seen = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 96, _WIDTH), nn.ReLU())
        self.answers = nn.ModuleDict({name: nn.Linear(_WIDTH, len(choices)) for name, choices in QUESTIONS.items()})
        self.register_buffer("middle", torch.zeros(_WIDTH))

    @staticmethod
    def holding(tensors: Mapping[str, Tensor]) -> Eye:
        """A trained network from its tensors."""
        eye = Eye()
        eye.load_state_dict(tensors)
        return eye.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """(n, 64) for images (n, 3, h, w) in [-1, 1]: of length 1, from the middle of those of drawings."""
        return F.normalize(self.seen(images) - self.middle, dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, choices) logits of each question."""
        found = self.seen(images)
        return {name: answer(found) for name, answer in self.answers.items()}


@dataclass(frozen=True)
class Seen:
    """What the network says of pictures: features (n, 64), and one answer each to every question."""

    features: Tensor
    answers: dict[str, list[Any]]

    def share(self, name: str, answer: Any) -> float:
        """Of the pictures of which that is the answer: 0 to 1."""
        return [found == answer for found in self.answers[name]].count(True) / len(self.answers[name])

    def likeness(self, other: Seen) -> float:
        """The mean cosine of all pairs of features: -1 to 1."""
        return float((self.features @ other.features.T).mean())


@torch.no_grad()
def seen(eye: Eye, pictures: Sequence[Image.Image]) -> Seen:
    """What it says of pictures of one size."""
    images = as_tensor(pictures)
    answers = {name: [QUESTIONS[name][at] for at in logits.argmax(1).tolist()] for name, logits in eye(images).items()}
    return Seen(eye.features(images), answers)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, h, w) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.array(picture.convert("RGB")) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def marked_scene(draws: random.Random) -> Scene:
    """Any scene; of three one is of fish with any marks, and of four one is in neon."""
    scene = drawn_scene(draws)
    if draws.random() < 1 / 3:
        traits = tuple(mark for mark in MARKS if draws.random() < 0.5)
        scene = replace(scene, kind="fish", traits=traits, colour=draws.choice([*COLOURS, "orange", "orange"]))
    return in_style(scene) if draws.random() < 0.2 else scene


def trained_eye(vae: Any, resolution: int, drawings: int, steps: int, seed: int) -> Eye:
    """The network, trained on this many drawings; no global random number is drawn."""
    draws = random.Random(stream_seed(seed, _SCENES))
    scenes = [marked_scene(draws) for _ in range(drawings)]
    images = as_tensor([scene.picture(resolution) for scene in scenes])
    passed, wanted = _passed(vae, images), {name: _wanted(name, scenes) for name in QUESTIONS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        eye = Eye()
    optimizer = torch.optim.AdamW(eye.parameters(), lr=3e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="likeness", dynamic_ncols=True, disable=None):
        generator = torch.Generator().manual_seed(stream_seed(seed, step, _BATCHES))
        chosen = torch.randint(drawings, (32,), generator=generator)
        batch = torch.where(torch.rand(32, 1, 1, 1, generator=generator) < 0.5, images[chosen], passed[chosen])
        batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
        logits = eye(batch)
        losses = [F.cross_entropy(logits[name], wanted[name][chosen], ignore_index=-1) for name in QUESTIONS]
        torch.stack(losses).nan_to_num().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    with torch.no_grad():
        eye.middle = torch.cat([eye.seen(part) for part in torch.split(passed, 256)]).mean(0)
    return eye.eval().requires_grad_(False)


def accuracies(eye: Eye, vae: Any, resolution: int, count: int, seed: int) -> dict[str, float]:
    """Of each question the share of right answers, for new drawings that have passed through the autoencoder."""
    draws = random.Random(stream_seed(seed, _SCENES, 1))
    scenes = [marked_scene(draws) for _ in range(count)]
    logits = eye(_passed(vae, as_tensor([scene.picture(resolution) for scene in scenes])))
    found = {}
    for name in QUESTIONS:
        wanted = _wanted(name, scenes)
        asked = wanted >= 0
        found[name] = float((logits[name].argmax(1) == wanted)[asked].float().mean())
    return found


@torch.no_grad()
def _passed(vae: Any, images: Tensor) -> Tensor:
    """Encoded and decoded."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in torch.split(images, 64)])


def _wanted(name: str, scenes: Sequence[Scene]) -> Tensor:
    """(n,) the numbers of the right answers; -1 where there is none: only painted pictures show a place."""
    if name == "place":
        return torch.tensor([PLACES.index(scene.place) if scene.style == "paint" else -1 for scene in scenes])
    if name in MARKS:
        return torch.tensor([int(name in scene.traits) for scene in scenes])
    return torch.tensor([QUESTIONS[name].index(getattr(scene, name)) for scene in scenes])
