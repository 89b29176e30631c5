"""The page of a classifier: an image, the answers of base and adapter, the adapter's strength, and what its file contains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from loca_vision.commands.app import chart, drawing
from loca_vision.commands.app.about_tabs import about_tabs
from loca_vision.commands.app.classifier import Classifier
from loca_vision.commands.app.components import strength_slider, upload

_SMALL = 64  # pixels a side: examples up to this size are drawings, or as coarse as drawings

_BRUSH = 16  # pixels from the middle of a stroke to its edge: a ninth of the canvas, about as thick as the digits' strokes


@dataclass(frozen=True)
class Shown:
    """The image whose chart a visitor sees, if any, and whether it is drawn."""

    image: Image.Image | None
    drawn: bool = False


class ClassifierPage:
    """The page of a classifier.

    Args:
        trained: the classifier that answers.
        scratch: a folder for the picture of the spectra.
    """

    def __init__(self, trained: Classifier, scratch: Path) -> None:
        self.trained, self.scratch = trained, scratch
        images = [image for image, _ in trained.examples]
        self.canvas, self.brush = drawing.colours(images)
        small = images[0].size if images and max(images[0].size) <= _SMALL else None
        self.example_size = small
        self.titles = (trained.base_title, "Adapter")

    # Called by events; needs no browser

    def answer(self, shown: Shown, strength: float, *by_group: float) -> str:
        """Return the chart of an image, as HTML."""
        if shown.image is None:
            return chart.empty()
        base, adapter = self.trained.compare(shown.image, strength, by_group)
        seen = self.trained.seen(shown.image)
        return chart.seen_by_the_model(seen) + chart.comparison(self.trained.classes, base, adapter, self.titles)

    def draw(self, value: dict[str, Any] | None, shown: Shown, *strengths: float) -> tuple[Shown, str] | None:
        """Return the image that a drawing stands for, and its chart.

        Return None if nothing is to change: a canvas reports itself when the page opens, and an empty one must not replace an
        image that was not drawn.
        """
        drawn = value["composite"] if value else None
        if drawn is None or drawing.is_blank(drawn, self.canvas):
            return (Shown(None), chart.empty()) if shown.drawn else None
        now = Shown(drawing.as_example(drawn, self.canvas, self.example_size), drawn=True)
        return now, self.answer(now, *strengths)

    def upload(self, image: Image.Image | None, *strengths: float) -> tuple[Shown, str]:
        """Return the image and its chart."""
        return Shown(image), self.answer(Shown(image), *strengths)

    def pick(self, place: int, *strengths: float) -> tuple[Shown, str]:
        """Return the example at a position, and its chart."""
        return self.upload(self.trained.examples[place][0], *strengths)

    # The layout

    def build(self) -> None:
        """Lay out the page inside a `gr.Blocks`."""
        first = Shown(self.trained.examples[0][0] if self.trained.examples else None)
        current = gr.State(first)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                pad, sent = self._inputs()
                gallery = self._examples()
            with gr.Column(scale=5, min_width=320):
                answers = gr.HTML(self.answer(first, 1.0), elem_id="answers")
                strengths = self._strengths()
        self._connect(current, pad, sent, gallery, strengths, answers)
        with gr.Tabs():
            about_tabs(self.trained.source, self.scratch)

    def _inputs(self) -> tuple[Any, Any]:
        def draw() -> Any:
            with gr.Tab("Draw"):
                return gr.Sketchpad(
                    self._blank(), type="pil", image_mode="RGB", label="Drawing", height=380, transforms=(), layers=False,
                    canvas_size=(drawing.SIDE, drawing.SIDE), fixed_canvas=True, elem_id="canvas",
                    brush=gr.Brush(default_size=_BRUSH, colors=[self.brush], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=_BRUSH),
                )  # fmt: skip

        def send() -> Any:
            with gr.Tab("Upload"):
                return upload("Image", height=380, elem_id="upload")

        with gr.Tabs():
            if self.example_size or not self.trained.examples:
                return draw(), send()
            second = send()
            return draw(), second

    def _examples(self) -> Any:
        if not self.trained.examples:
            return None
        return gr.Gallery(
            [(image.resize((56, 56), Image.Resampling.NEAREST) if self.example_size else image, name)
             for image, name in self.trained.examples],
            label="Examples from the test images", columns=10, rows=1, allow_preview=False, object_fit="contain",
            interactive=False, buttons=[], elem_id="examples", format="png",
            elem_classes=[] if self.example_size else ["large"],
        )  # fmt: skip

    def _strengths(self) -> list[Any]:
        sliders = [strength_slider("Strength of the adapter", elem_id="strength")]
        if self.trained.groups:
            with gr.Accordion("Strength by blocks: for each third, times the one above", open=True), gr.Row():
                sliders += [strength_slider(label, min_width=150, elem_classes=["loca-third"]) for label in self.trained.groups]
        return sliders

    def _connect(self, current: Any, pad: Any, sent: Any, gallery: Any, strengths: list[Any], answers: Any) -> None:
        def drawn(*given: Any) -> Any:
            return self.draw(*given) or (gr.skip(), gr.skip())

        shared = {"show_progress": "hidden", "api_visibility": "private"}
        to_both = {"outputs": [current, answers], **shared}
        pad.input(drawn, [pad, current, *strengths], trigger_mode="always_last", **to_both)
        pad.clear(self._blank, None, pad, **shared).then(drawn, [pad, current, *strengths], **to_both)
        sent.change(self.upload, [sent, *strengths], **to_both)
        if gallery is not None:

            def picked(event: gr.SelectData, *given: float) -> tuple[Shown, str]:
                return self.pick(event.index, *given)

            gallery.select(picked, strengths, trigger_mode="always_last", **to_both)
        for slider in strengths:
            slider.change(self.answer, [current, *strengths], answers, trigger_mode="always_last", **shared)

    def _blank(self) -> dict[str, Any]:
        return {"background": drawing.blank(self.canvas), "layers": [], "composite": None}
