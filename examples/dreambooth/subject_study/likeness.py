"""A small network that recognises what is in a drawing, used to measure generated pictures.

It is trained on drawings alone. Half of them are passed through the base's autoencoder, as generated pictures are. Its fish
have stripes, a crown and one eye or not, each independently, and any colour, so it knows the subject's marks without being
told about the subject. Some of its drawings are in neon.
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
_SCENES, _BATCHES = 61, 62  # keys of random number streams
_WIDTH = 64
DRAWINGS = 4000  # training drawings, at most


class Eye(nn.Module):
    """Convolutions, average pooling to 2 x 2, a hidden layer, and a linear answer to each of `QUESTIONS`."""

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
        """Build a trained network from its tensors."""
        eye = Eye()
        eye.load_state_dict(tensors)
        return eye.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Return features (n, 64) for images (n, 3, h, w) in [-1, 1]: centred on the mean of drawings, and of length 1."""
        return F.normalize(self.seen(images) - self.middle, dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (n, choices) for each question."""
        found = self.seen(images)
        return {name: answer(found) for name, answer in self.answers.items()}


@dataclass(frozen=True)
class Seen:
    """The network's output for pictures: features (n, 64), and for every question one answer per picture."""

    features: Tensor
    answers: dict[str, list[Any]]

    def share(self, name: str, answer: Any) -> float:
        """Return the share of pictures with this answer, 0 to 1."""
        return [found == answer for found in self.answers[name]].count(True) / len(self.answers[name])

    def likeness(self, other: Seen) -> float:
        """Return the mean cosine of all pairs of features, -1 to 1."""
        return float((self.features @ other.features.T).mean())


@torch.no_grad()
def seen(eye: Eye, pictures: Sequence[Image.Image]) -> Seen:
    """Evaluate pictures, all of the same size."""
    images = as_tensor(pictures)
    answers = {name: [QUESTIONS[name][at] for at in logits.argmax(1).tolist()] for name, logits in eye(images).items()}
    return Seen(eye.features(images), answers)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Return the pictures as a tensor (n, 3, h, w), float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.array(picture.convert("RGB")) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def marked_scene(draws: random.Random) -> Scene:
    """Draw any scene; about one in three is made fish with random marks, and one in five is in neon."""
    scene = drawn_scene(draws)
    if draws.random() < 1 / 3:
        traits = tuple(mark for mark in MARKS if draws.random() < 0.5)
        scene = replace(scene, kind="fish", traits=traits, colour=draws.choice([*COLOURS, "orange", "orange"]))
    return in_style(scene) if draws.random() < 0.2 else scene


def trained_eye(vae: Any, resolution: int, drawings: int, steps: int, seed: int) -> Eye:
    """Train the network on this many drawings, without changing global random states."""
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
    """Return the share of correct answers to each question, for new drawings passed through the autoencoder."""
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
    """Encode and decode images."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in torch.split(images, 64)])


def _wanted(name: str, scenes: Sequence[Scene]) -> Tensor:
    """Return the indices (n,) of the correct answers, or -1 if there is none: only painted pictures show a place."""
    if name == "place":
        return torch.tensor([PLACES.index(scene.place) if scene.style == "paint" else -1 for scene in scenes])
    if name in MARKS:
        return torch.tensor([int(name in scene.traits) for scene in scenes])
    return torch.tensor([QUESTIONS[name].index(getattr(scene, name)) for scene in scenes])
