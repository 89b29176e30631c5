"""The page of a pipeline: a prompt or a photograph, pictures of base, adapters and mix from one seed, and the mix as a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from loca_vision.commands.app.about import about_file
from loca_vision.commands.app.components import Upload, strength_slider
from loca_vision.commands.app.generator import Generator, Wanted
from loca_vision.commands.app.mixture import FORMS, write_mix

_MOST_SEED = 2**31 - 1
# Of the call's settings, those that are shown where the pipeline takes them: label, least, most, step.
_SETTINGS = {
    "num_inference_steps": ("Steps", 1, 100, 1),
    "guidance_scale": ("Guidance by the prompt", 0, 20, 0.5),
    "image_guidance_scale": ("Guidance by the photograph", 1, 5, 0.1),
    "strength": ("Change of the photograph", 0.05, 1, 0.05),
}


class GeneratorPage:
    """
    Args:
        generator: what makes the pictures.
        scratch: a folder for files that are offered for download.
    """

    def __init__(self, generator: Generator, scratch: Path) -> None:
        self.generator, self.scratch = generator, scratch
        self.settings = [name for name in _SETTINGS if isinstance(generator.takes.get(name), (int, float))]

    # What the events call, without a browser

    def make(
        self, told: Callable[[int, int], None], prompt: str, image: Image.Image | None, seed: float, numbers: Sequence[float]
    ) -> list[tuple[Image.Image, str]]:
        """The pictures with their titles.

        Args:
            numbers: the strengths of the adapters, then the settings, in their orders.
        """
        names = list(self.generator.sources)
        strengths = dict(zip(names, numbers, strict=False))
        settings = dict(zip(self.settings, numbers[len(names) :], strict=True))
        if "num_inference_steps" in settings:
            settings["num_inference_steps"] = int(settings["num_inference_steps"])
        wanted = Wanted(prompt or "", int(seed or 0), strengths, image, settings)
        return self.generator.pictures(wanted, told)

    def write(self, form: str, rank: float, *strengths: float) -> tuple[str, str]:
        """The file of the mix, and what is said about it."""
        names = self.generator.sources
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
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
                button = gr.Button("Make the pictures", variant="primary")
            with gr.Column(scale=6, min_width=320):
                pictures = gr.Gallery(
                    label="Pictures from one seed", columns=min(3, len(strengths) + 1), height="auto", object_fit="contain",
                    format="png", interactive=False, buttons=["download", "fullscreen"], elem_id="pictures",
                )  # fmt: skip
                self._download(strengths)
        self._connect(button, [prompt, image, seed, *strengths, *settings], pictures)
        self._about()

    def _inputs(self) -> tuple[Any, Any, Any]:
        takes = self.generator.takes
        label = "Instruction" if self.generator.takes_image else "Prompt"
        image = Upload(label="Photograph", sources=["upload", "clipboard"], height=260, visible=self.generator.takes_image)
        prompt = gr.Textbox(label=label, lines=2, max_length=1000, visible="prompt" in takes, elem_id="prompt")
        return prompt, image, gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MOST_SEED)

    def _setting(self, name: str) -> Any:
        label, least, most, step = _SETTINGS[name]
        return gr.Slider(least, most, min(max(self.generator.takes[name], least), most), step=step, label=label)

    def _download(self, strengths: list[Any]) -> None:
        with gr.Accordion("Download the mix at these strengths", open=False):
            form = gr.Radio(list(FORMS), value=next(iter(FORMS)), label="As")
            rank = gr.Number(16, label="Rank, of a LoRA", precision=0, minimum=1, maximum=1024)
            button = gr.Button("Write the file")
            file, said = gr.File(label="File", interactive=False), gr.Markdown()
            button.click(told_on_the_page(self.write), [form, rank, *strengths], [file, said], api_visibility="private")

    def _connect(self, button: Any, inputs: list[Any], pictures: Any) -> None:
        def made(prompt: str, image: Any, seed: float, *numbers: float, progress: Any = gr.Progress()) -> Any:  # noqa: B008
            def told(done: int, of: int) -> None:
                progress((done, of), desc="Steps")

            return told_on_the_page(self.make)(told, prompt, image, seed, numbers)

        button.click(made, inputs, pictures, api_visibility="private", show_progress="full")

    def _about(self) -> None:
        with gr.Tabs():
            for name, source in self.generator.sources.items():
                with gr.Tab(f"What the file of {name} says"):
                    gr.HTML(about_file(source))


def told_on_the_page(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose sentences about wrong input stand on the page, without a traceback."""

    def told(*given: Any) -> Any:
        try:
            return function(*given)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    return told
