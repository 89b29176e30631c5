"""Drawings, uploads and charts of the page."""

import struct
import zlib

import pytest
import torch
from PIL import Image, ImageDraw

from loca_vision.commands.app import chart, drawing, uploads

DARK, LIGHT = "#000000", "#ffffff"


def canvas(*box, fill=LIGHT):
    image = drawing.blank(DARK)
    ImageDraw.Draw(image).rectangle(box, fill=fill)
    return image


def test_a_drawing_is_what_is_drawn_wherever_and_however_large():
    here = drawing.as_example(canvas(20, 40, 67, 119), DARK, (8, 8))
    there = drawing.as_example(canvas(180, 100, 227, 179), DARK, (8, 8))
    larger = drawing.as_example(canvas(100, 40, 195, 199), DARK, (8, 8))
    assert here.size == (8, 8) and here.tobytes() == there.tobytes() == larger.tobytes()
    whole = drawing.as_example(canvas(20, 40, 79, 139), DARK, None)
    assert whole.size == (100, 100)
    assert whole.getbbox() == (20, 0, 80, 100)


def test_an_empty_canvas():
    assert drawing.is_blank(drawing.blank(DARK), DARK) and drawing.is_blank(drawing.blank(LIGHT), LIGHT)
    assert not drawing.is_blank(canvas(5, 5, 6, 6), DARK)


def test_the_canvas_is_as_dark_as_the_examples():
    dark, light = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    dark.putpixel((4, 4), (255, 255, 255))
    assert drawing.colours([dark, dark, light]) == (DARK, LIGHT)
    assert drawing.colours([light]) == drawing.colours([]) == (LIGHT, DARK)


def png_of(width, height):
    """A PNG of any size, cut off where its pixels would begin."""
    about = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + about + struct.pack(">I", zlib.crc32(about)) + b"\0\0\0\0IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not an image", "cannot be read as an image"),
        (b"", "cannot be read as an image"),
        (png_of(8, 8), "cannot be read as an image"),
        (png_of(9000, 9000), "has 9000 x 9000 pixels; expected at most 40 million"),
        (png_of(100_000, 100_000), "cannot be read as an image"),
    ],
)
def test_a_wrong_upload_is_told_without_a_path(tmp_path, content, said):
    file = tmp_path / "secret-name.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as told:
        uploads.read_upload(file)
    assert "secret-name" not in str(told.value)


def test_an_upload_of_too_many_bytes(tmp_path, monkeypatch):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    assert uploads.read_upload(tmp_path / "a.png").size == (300, 200)
    monkeypatch.setattr(uploads, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="expected at most"):
        uploads.read_upload(tmp_path / "a.png")


def test_large_images_are_shrunk_and_small_ones_stay():
    assert uploads.fitted(Image.new("RGB", (2000, 1000)), 500).size == (500, 250)
    assert uploads.fitted(Image.new("RGB", (20, 10)), 500).size == (20, 10)


def test_the_chart_has_every_number_and_no_markup_of_names():
    base, adapter = torch.tensor([0.25, 0.75]), torch.tensor([0.9, 0.1])
    text = chart.comparison(["<script>", "b"], base, adapter, ("Base", "A & B"))
    assert "<script>" not in text and "&lt;script&gt;" in text and "A &amp; B" in text
    assert [f"{share} %" in text for share in ("25.0", "75.0", "90.0", "10.0")] == [True] * 4


def test_of_many_classes_the_most_probable_to_either_are_shown():
    base, adapter = torch.zeros(50), torch.zeros(50)
    base[7], adapter[30] = 1.0, 1.0
    assert chart.shown(base, adapter)[:2] in ([7, 30], [30, 7]) and len(chart.shown(base, adapter)) == 10
    assert "40 other classes" in chart.comparison([str(i) for i in range(50)], base, adapter, ("", ""))
    assert chart.shown(base[:10], adapter[:10]) == list(range(10))
