"""The page of a classifier: an image, the answers of base and adapter, the strength of the adapter, and what its file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from loca_vision.commands.app import chart, drawing
from loca_vision.commands.app.about import about_file, picture_of
from loca_vision.commands.app.classifier import Classifier
from loca_vision.commands.app.components import Upload, strength_slider

_SMALL = 64  # pixels a side: examples of at most so many are drawings, or as coarse as some

_BRUSH = 14  # pixels from the middle of a stroke to its edge: a tenth of the canvas is as thick as the digits' strokes are


class ClassifierPage:
    """
    Args:
        trained: what answers.
        scratch: a folder for the picture of the spectra.
    """

    def __init__(self, trained: Classifier, scratch: Path) -> None:
        self.trained, self.scratch = trained, scratch
        images = [image for image, _ in trained.examples]
        self.canvas, self.brush = drawing.colours(images)
        small = images[0].size if images and max(images[0].size) <= _SMALL else None
        self.example_size = small
        self.titles = (trained.base_title, "Adapter")

    # What the events call, without a browser

    def answer(self, image: Image.Image | None, strength: float, *by_group: float) -> str:
        """The chart of an image, as HTML."""
        if image is None:
            return chart.empty()
        base, adapter = self.trained.compare(image, strength, by_group)
        seen = self.trained.seen(image)
        return chart.seen_by_the_model(seen) + chart.comparison(self.trained.classes, base, adapter, self.titles)

    def draw(self, value: dict[str, Any] | None, *strengths: float) -> tuple[Image.Image | None, str]:
        """The image that a drawing stands for, None of an empty canvas, and its chart."""
        drawn = value and value["composite"]
        blank = drawn is None or drawing.is_blank(drawn, self.canvas)
        image = None if blank else drawing.as_example(drawn, self.canvas, self.example_size)
        return image, self.answer(image, *strengths)

    def upload(self, image: Image.Image | None, *strengths: float) -> tuple[Image.Image | None, str]:
        """The image and its chart."""
        return image, self.answer(image, *strengths)

    def pick(self, place: int, *strengths: float) -> tuple[Image.Image, str]:
        """An example, by its place, and its chart."""
        image = self.trained.examples[place][0]
        return image, self.answer(image, *strengths)

    # The layout

    def build(self) -> None:
        """Lay out the page inside a `gr.Blocks`."""
        first = self.trained.examples[0][0] if self.trained.examples else None
        current = gr.State(first)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                pad, upload = self._inputs()
                gallery = self._examples()
            with gr.Column(scale=5, min_width=320):
                answers = gr.HTML(self.answer(first, 1.0), elem_id="answers")
                strengths = self._strengths()
        self._connect(current, pad, upload, gallery, strengths, answers)
        self._about()

    def _inputs(self) -> tuple[Any, Any]:
        def draw() -> Any:
            with gr.Tab("Draw"):
                return gr.Sketchpad(
                    self._blank(), type="pil", image_mode="RGB", label="Drawing", height=380, transforms=(), layers=False,
                    canvas_size=(drawing.SIDE, drawing.SIDE), fixed_canvas=True, elem_id="canvas",
                    brush=gr.Brush(default_size=_BRUSH, colors=[self.brush], color_mode="fixed"), eraser=gr.Eraser(default_size=_BRUSH),
                )  # fmt: skip

        def upload() -> Any:
            with gr.Tab("Upload"):
                return Upload(label="Image", sources=["upload", "clipboard"], height=380, elem_id="upload")

        with gr.Tabs():
            if self.example_size or not self.trained.examples:
                return draw(), upload()
            second = upload()
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

    def _connect(self, current: Any, pad: Any, upload: Any, gallery: Any, strengths: list[Any], answers: Any) -> None:
        shared = {"show_progress": "hidden", "api_visibility": "private"}
        to_both = {"outputs": [current, answers], **shared}
        pad.input(self.draw, [pad, *strengths], trigger_mode="always_last", **to_both)
        pad.clear(self._blank, None, pad, **shared).then(self.draw, [pad, *strengths], **to_both)
        upload.change(self.upload, [upload, *strengths], **to_both)
        if gallery is not None:

            def picked(event: gr.SelectData, *given: float) -> tuple[Image.Image, str]:
                return self.pick(event.index, *given)

            gallery.select(picked, strengths, trigger_mode="always_last", **to_both)
        for slider in strengths:
            slider.change(self.answer, [current, *strengths], answers, trigger_mode="always_last", **shared)

    def _blank(self) -> dict[str, Any]:
        return {"background": drawing.blank(self.canvas), "layers": [], "composite": None}

    def _about(self) -> None:
        with gr.Tabs():
            with gr.Tab("What the file says"):
                gr.HTML(about_file(self.trained.source))
            picture = picture_of(self.trained.source, self.scratch)
            if picture is not None:
                with gr.Tab("Spectra"):
                    gr.Image(str(picture), label="Cosine spectrum of each projection's update", buttons=["fullscreen", "download"], format="png")
