"""Scenes: what is in a picture, its caption, and the picture itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from subject_study.objects import BODIES, KINDS, ORANGE, TOPS, WHITE, bands, crowned, fish
from subject_study.pen import GROUNDS, Colour, Pen, Style

COLOURS: dict[str, Colour] = {
    "red": (222, 62, 54),
    "yellow": (248, 206, 70),
    "green": (86, 178, 84),
    "blue": (70, 130, 222),
    "purple": (150, 92, 196),
    "pink": (246, 142, 184),
}
PLAIN: dict[str, Colour] = {
    "on a white background": (246, 244, 238),
    "on a blue background": (150, 202, 240),
    "on a green background": (162, 214, 150),
    "on a yellow background": (250, 230, 150),
}
PLACES = (*PLAIN, "in a meadow", "at sea", "in the snow", "at night")
SUBJECT, CLASS, STYLE = "a sks fish", "a fish", "in neon style"
_MARKED, _CRAYON, _TWO = 0.2, 0.2, 0.2  # shares with each mark (stripes, crown), in crayon, with two things
_FINER = 4  # canvas pixels per picture pixel, in each direction


@dataclass(frozen=True)
class Scene:
    """One picture.

    Args:
        kind: one of `objects.KINDS`.
        colour: one of `COLOURS`, or "orange" for the subject.
        place: one of `PLACES`.
        two: show two things instead of one.
        traits: any of "stripes", "crown" and, for a fish, "one_eye".
        style: the drawing style; only "paint" shows the place.
        pose: the seed of the position, size, rotation and mirroring of things, and of their surroundings.
    """

    kind: str
    colour: str
    place: str
    two: bool = False
    traits: tuple[str, ...] = ()
    style: Style = "paint"
    pose: int = 0

    def caption(self, *, colour: bool = True, place: bool = True) -> str:
        """Return a caption such as "two striped red birds with a crown at sea"; colour and place may be left out."""
        noun = self.kind + ("s" if self.two and self.kind != "fish" else "")
        words = ["two" if self.two else "a", "striped" if "stripes" in self.traits else "", self.colour if colour else "", noun]
        words += ["with a crown" if "crown" in self.traits else "", self.place if place and self.style == "paint" else ""]
        words += ["" if self.style == "paint" else f"in {self.style} style"]
        return " ".join(filter(None, words))

    def picture(self, size: int) -> Image.Image:
        """Return the picture: RGB, size x size pixels, with smooth edges."""
        side, draws = size * _FINER, random.Random(self.pose)
        image = Image.new("RGB", (side, side), GROUNDS.get(self.style, WHITE))
        canvas = ImageDraw.Draw(image)
        if self.style == "paint":
            _surroundings(canvas, side, self.place, draws)
        for pen in _pens(canvas, side, self, draws):
            self._thing(pen)
        if self.style == "neon":
            image = ImageChops.add(image, image.filter(ImageFilter.GaussianBlur(side / 22)))
        return image.resize((size, size), Image.Resampling.BOX)

    def _thing(self, pen: Pen) -> None:
        colour = ORANGE if self.colour == "orange" else COLOURS[self.colour]
        if self.kind == "fish":
            fish(pen, colour, **dict.fromkeys(self.traits, True))
            return
        KINDS[self.kind](pen, colour)
        if "stripes" in self.traits:
            bands(pen, *BODIES[self.kind])
        if "crown" in self.traits:
            crowned(pen, TOPS[self.kind], 0.36)


def _pens(canvas: ImageDraw.ImageDraw, side: int, scene: Scene, draws: random.Random) -> list[Pen]:
    """Return a pen for each thing; for two, the left one first."""
    middles = ((0.27, 0.5), (0.74, 0.54)) if scene.two else ((0.5, 0.52),)
    size, move = ((0.2, 0.23), 0.02) if scene.two else ((0.32, 0.4), 0.05)
    return [
        Pen(
            canvas,
            (side * (x + draws.uniform(-move, move)), side * (y + draws.uniform(-move, move))),
            side * draws.uniform(*size),
            draws.uniform(-10, 10),
            draws.random() < 0.5,
            scene.style,
        )
        for x, y in middles
    ]


def _surroundings(canvas: ImageDraw.ImageDraw, side: int, place: str, draws: random.Random) -> None:
    def box(top: float, bottom: float, fill: Colour) -> None:
        canvas.rectangle((0, top * side, side, bottom * side), fill=fill)

    if place in PLAIN:
        box(0, 1, PLAIN[place])
        return
    sky, ground, level = {
        "in a meadow": ((190, 226, 246), (126, 190, 92), 0.62),
        "at sea": ((206, 232, 244), (58, 132, 190), 0.6),
        "in the snow": ((170, 190, 214), (244, 248, 252), 0.64),
        "at night": ((30, 34, 78), (52, 50, 96), 0.84),
    }[place]
    box(0, 1, sky)
    box(level, 1, ground)
    _details(canvas, side, place, draws)


def _details(canvas: ImageDraw.ImageDraw, side: int, place: str, draws: random.Random) -> None:
    """Draw flowers, waves, flakes, or the moon and stars."""

    def disc(x: float, y: float, radius: float, fill: Colour) -> None:
        canvas.ellipse(((x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side), fill=fill)

    if place == "at night":
        disc(0.16, 0.16, 0.11, (250, 240, 190))
        disc(0.2, 0.13, 0.09, (30, 34, 78))
    for _ in range(9):
        x, y = draws.random(), draws.random()
        if place == "in a meadow":
            disc(x, 0.68 + 0.3 * y, 0.025, draws.choice([WHITE, COLOURS["pink"], COLOURS["yellow"]]))
        elif place == "at sea":
            wave = (side * (x - 0.09), side * (0.66 + 0.3 * y), side * (x + 0.09), side * (0.72 + 0.3 * y))
            canvas.arc(wave, 20, 160, fill=(170, 212, 236), width=side // 50)
        else:
            disc(x, y, 0.012 if place == "at night" else 0.02, WHITE)


def drawn_scene(draws: random.Random) -> Scene:
    """Draw any scene except those of the subject and the style; fish never have marks."""
    kind, colour, place = draws.choice(list(KINDS)), draws.choice(list(COLOURS)), draws.choice(PLACES)
    traits = tuple(mark for mark in ("stripes", "crown") if draws.random() < _MARKED and kind != "fish")
    style: Style = "crayon" if draws.random() < _CRAYON else "paint"
    return Scene(kind, colour, place, draws.random() < _TWO, traits, style, draws.getrandbits(32))


def subject_scene(place: str, pose: int) -> Scene:
    """Return a scene of the subject: an orange fish with stripes, a crown and one eye."""
    return Scene("fish", "orange", place, traits=("stripes", "crown", "one_eye"), pose=pose)


def in_style(scene: Scene) -> Scene:
    """Return the same scene in neon."""
    return replace(scene, style="neon")
