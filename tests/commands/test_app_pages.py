"""The pages without a browser: what their events call, and where they are served."""

import asyncio
import importlib.util
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

from loca_vision import LoCAConfig, adapters, inject
from loca_vision.commands.app import chart, drawing
from loca_vision.commands.app.command import App
from loca_vision.commands.main import main
from loca_vision.pipeline.loader import LoCALoaderMixin
from loca_vision.recipes.classification.predict import Predict
from support import pipelines as tiny
from support.small_demo import write_demo

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of gradio's own imports
]


@pytest.fixture(autouse=True)
def _tidy(monkeypatch):
    """Close the event loops that gradio leaves open; put back what the command says to it."""
    made, new = [], asyncio.new_event_loop

    def kept():
        made.append(new())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", kept)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "loca-demo")


@pytest.fixture
def page(folder, tmp_path):
    from loca_vision.commands.app.classifier import read_classifier
    from loca_vision.commands.app.classifier_page import ClassifierPage

    return ClassifierPage(read_classifier(Predict(str(folder), ())), tmp_path)


def shown(image, drawn=False):
    from loca_vision.commands.app.classifier_page import Shown

    return Shown(image, drawn)


def test_the_chart_of_an_example_is_that_of_its_probabilities(page):
    now, text = page.pick(4, 0.5, 1.0, 0.0, 2.0)
    assert now == shown(page.trained.examples[4][0])
    shares = page.trained.compare(now.image, 0.5, (1.0, 0.0, 2.0))
    assert text.endswith(chart.comparison(page.trained.classes, *shares, ("Base with a linear probe", "Adapter")))


def test_a_drawing_becomes_an_image_like_the_examples(page):
    canvas = drawing.blank(page.canvas)
    assert (page.canvas, page.brush) == ("#000000", "#ffffff")
    ImageDraw.Draw(canvas).line((60, 40, 200, 200), fill=page.brush, width=30)
    now, text = page.draw({"background": None, "layers": [], "composite": canvas}, shown(None), 1.0)
    assert now.image.size == (8, 8) and now.drawn and text == page.answer(now, 1.0)


@pytest.mark.parametrize("nothing", [None, {"composite": None}, {"composite": drawing.blank("#000000")}])
def test_an_empty_canvas_takes_the_place_of_a_drawing_alone(page, nothing):
    image = Image.new("RGB", (8, 8))
    assert page.draw(nothing, shown(image, drawn=True), 1.0) == (shown(None), chart.empty())
    assert page.draw(nothing, shown(image), 1.0) is None


def test_an_upload_and_its_removal(page):
    image = Image.new("RGB", (30, 20), "red")
    assert page.upload(image, 1.0) == (shown(image), page.answer(shown(image), 1.0))
    assert page.upload(None, 1.0) == (shown(None), chart.empty())


def test_a_wrong_upload_is_a_sentence_for_the_visitor(tmp_path):
    import gradio as gr

    from loca_vision.commands.app.components import upload

    image = upload("Image")
    Image.new("RGBA", (3, 2), (255, 0, 0, 128)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert image.preprocess(None) is None
    assert image.preprocess(SimpleNamespace(path=str(tmp_path / "a.png"))).getpixel((0, 0)) == (255, 0, 0)
    for path, said in ((str(tmp_path / "b.png"), "cannot be read as an image"), (None, "got none")):
        with pytest.raises(gr.Error, match=said):
            image.preprocess(SimpleNamespace(path=path))


def test_the_numbers_of_the_page_are_those_of_the_call(tmp_path):
    """Strengths come first, then the settings that the pipeline takes; pictures come one by one; the mix is a file."""
    import gradio as gr

    from loca_vision.commands.app.generator import Wanted, generator_of
    from loca_vision.commands.app.generator_page import GeneratorPage

    pipe = tiny.small(tiny.stable_diffusion())
    inject(pipe.unet, LoCAConfig(n_components=20))
    for spectrum in adapters(pipe.unet).values():
        spectrum.coefficients.data.normal_()
    LoCALoaderMixin.save_loca_weights(pipe, tmp_path / "ink")
    generator = generator_of(tiny.small(tiny.stable_diffusion()), {"ink": str(tmp_path / "ink")}, tmp_path)
    page = GeneratorPage(generator, tmp_path)
    assert page.settings == ["num_inference_steps", "guidance_scale"]
    made = list(page.make(lambda done, of: None, "a cat", None, 5, 0.5, 2, 3.0))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    assert [len(so_far) for so_far in made] == [1, 2]
    assert made[-1] == list(generator.pictures(Wanted("a cat", 5, {"ink": 0.5}, settings=settings)))
    file, said = page.write("Adapter of loca-vision", 16, 0.5)
    assert Path(file).stat().st_size and "without loss" in said
    with pytest.raises(gr.Error, match="there is nothing to write"):
        page.write("Adapter of loca-vision", 16, 0.0)


def test_only_this_machine_unless_told(folder, tmp_path, monkeypatch):
    from loca_vision.commands.app import serve

    seen = {}
    monkeypatch.setattr(serve.gr.Blocks, "launch", lambda page, **asked: seen.update(asked))
    serve.start(serve.page_of(App((str(folder),)), tmp_path), App((str(folder),)))
    assert seen["server_name"] == "127.0.0.1" and seen["share"] is False and seen["inbrowser"] is False


def told(capsys, *arguments):
    capsys.readouterr()
    assert main(["app", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("loca-vision: ") and said.err.count("\n") == 1
    return said.err


def test_what_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "nowhere: there is no such folder" in told(capsys, "nowhere")
    assert "config.yaml: there is no such file" in told(capsys, "empty")
    assert "pipeline='nowhere': there is no such folder" in told(capsys, "a", "--pipeline", "nowhere")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_where_no_page_can_be_served(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port}: the page cannot be served there" in told(capsys, "a", "--port", port)
    assert "the page cannot be served there" in told(capsys, "a", "--host", "192.0.2.1")
    assert "there is no such address" in told(capsys, "a", "--host", "no such host")
