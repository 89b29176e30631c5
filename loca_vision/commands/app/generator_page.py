"""The page of a pipeline: a prompt or a photograph, pictures of base, adapters and mix from one seed, and the mix as a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from loca_vision.commands.app.about_tabs import about_tabs
from loca_vision.commands.app.components import strength_slider, upload
from loca_vision.commands.app.generator import Generator, Told, Wanted
from loca_vision.commands.app.mixture import FORMS, write_mix

_MOST_SEED = 2**31 - 1
# The settings of the call that are shown if the pipeline takes them: label, least, most, step.
_SETTINGS = {
    "num_inference_steps": ("Steps", 1, 100, 1),
    "guidance_scale": ("Guidance by the prompt", 0, 20, 0.5),
    "image_guidance_scale": ("Guidance by the photograph", 1, 5, 0.1),
    "strength": ("Change of the photograph", 0.05, 1, 0.05),
}


class GeneratorPage:
    """The page of a pipeline.

    Args:
        generator: what makes the pictures.
        scratch: a folder for files that are offered for download.
    """

    def __init__(self, generator: Generator, scratch: Path) -> None:
        self.generator, self.scratch = generator, scratch
        self.settings = [name for name in _SETTINGS if isinstance(generator.takes.get(name), (int, float))]

    # Called by events; needs no browser

    def make(
        self, told: Told, prompt: str, image: Image.Image | None, seed: float | None, *numbers: float
    ) -> Iterator[list[tuple[Image.Image, str]]]:
        """Yield the pictures made so far with their titles, each time another is made.

        Args:
            numbers: the strengths of the adapters, then the settings, each in order.
        """
        names = list(self.generator.sources)
        strengths = dict(zip(names, numbers, strict=False))
        settings = dict(zip(self.settings, numbers[len(names) :], strict=True))
        if "num_inference_steps" in settings:
            settings["num_inference_steps"] = int(settings["num_inference_steps"])
        made = []
        for picture in self.generator.pictures(Wanted(prompt or "", int(seed or 0), strengths, image, settings), told):
            made.append(picture)
            yield list(made)

    def write(self, form: str, rank: float, *strengths: float) -> tuple[str, str]:
        """Return the file of the mix, and a message about it."""
        names = self.generator.sources
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        with on_the_page():
            file, said = write_mix(names, dict(zip(names, strengths, strict=True)), form, int(rank or 0), folder)
        return str(file), said

    # The layout

    def build(self) -> None:
        """Lay out the page inside a `gr.Blocks`."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                prompt, image, seed = self._inputs()
                strengths = [strength_slider(f"Strength of {name}") for name in self.generator.sources]
                with gr.Accordion("More settings", open=False):
                    settings = [self._setting(name) for name in self.settings]
                with gr.Row():
                    button = gr.Button("Make the pictures", variant="primary", scale=3, min_width=200)
                    stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=6, min_width=320):
                pictures = gr.Gallery(
                    label="Pictures from one seed", columns=3 if len(strengths) > 2 else 2, height="auto", object_fit="contain",
                    format="png", interactive=False, buttons=["download", "fullscreen"], elem_id="pictures",
                )  # fmt: skip
                self._download(strengths)
        self._connect(button, stop, [prompt, image, seed, *strengths, *settings], pictures)
        with gr.Tabs():
            for name, source in self.generator.sources.items():
                about_tabs(source, self.scratch, name)

    def _inputs(self) -> tuple[Any, Any, Any]:
        takes = self.generator.takes
        label = "Instruction" if self.generator.takes_image else "Prompt"
        image = upload("Photograph", height=260, visible=self.generator.takes_image, elem_id="photograph")
        prompt = gr.Textbox(label=label, lines=2, max_length=1000, visible="prompt" in takes, elem_id="prompt")
        return prompt, image, gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MOST_SEED)

    def _setting(self, name: str) -> Any:
        label, least, most, step = _SETTINGS[name]
        return gr.Slider(least, most, min(max(self.generator.takes[name], least), most), step=step, label=label)

    def _download(self, strengths: list[Any]) -> None:
        with gr.Accordion("Download the mix at these strengths", open=False, elem_id="mix"):
            form = gr.Radio(list(FORMS), value=next(iter(FORMS)), label="As")
            rank = gr.Number(16, label="Rank, of a LoRA", precision=0, minimum=1, maximum=1024)
            button = gr.Button("Write the file")
            file, said = gr.File(label="File", interactive=False), gr.Markdown()
            button.click(self.write, [form, rank, *strengths], [file, said], api_visibility="private")

    def _connect(self, button: Any, stop: Any, inputs: list[Any], pictures: Any) -> None:
        def made(*given: Any, progress: Any = gr.Progress()) -> Iterator[Any]:  # noqa: B008  as gradio finds it
            with on_the_page():
                yield from self.make(lambda done, of: progress((done, of), desc="Steps"), *given)

        making = button.click(made, inputs, pictures, api_visibility="private", show_progress="full")
        stop.click(None, None, None, cancels=[making], api_visibility="private")


@contextmanager
def on_the_page() -> Iterator[None]:
    """Show errors about wrong input, raised inside, to the visitor on the page, without a traceback anywhere."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from None
