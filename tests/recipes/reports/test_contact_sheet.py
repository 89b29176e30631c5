"""Contact sheets show exact pixels, leave missing images empty, and keep text within its cell."""

import numpy as np
import pytest
from PIL import Image

from loca_vision.recipes.reports.contact_sheet import contact_sheet
from support.photographs import scene


def parts_of(sheet, picture):
    """Where, in the sheet, a picture's pixels are: left upper corners."""
    whole, part = np.asarray(sheet, np.int16), np.asarray(picture, np.int16)
    height, width = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(whole, (height, width, 3))[:, :, 0]
    starts = np.argwhere((whole[: len(whole) - height + 1, : whole.shape[1] - width + 1] == part[0, 0]).all(2))
    return [(left, top) for top, left in starts.tolist() if (windows[top, left] == part).all()]


@pytest.fixture
def pictures():
    return [scene(64).rotate(90 * turn) for turn in range(3)]


def test_small_pictures_are_enlarged_pixel_by_pixel(pictures):
    sheet = contact_sheet([pictures, pictures[::-1]], columns=["a", "b", "c"], labels=["one", "two"])
    places = [parts_of(sheet, picture.resize((128, 128), Image.Resampling.NEAREST)) for picture in pictures]
    assert [len(found) for found in places] == [2, 2, 2] and sheet.mode == "RGB"
    (a, other_a), (b, _), (c, other_c) = places
    assert a[0] < b[0] < c[0] and a[1] == b[1] == c[1] and other_a == (c[0], other_c[1]) and other_c[0] == a[0]


def test_large_pictures_are_shown_as_they_are_or_reduced(pictures):
    large = scene(200)
    assert len(parts_of(contact_sheet([[large]], columns=["a"]), large)) == 1
    reduced = large.resize((100, 100), Image.Resampling.LANCZOS)
    assert len(parts_of(contact_sheet([[large]], columns=["a"], side=100), reduced)) == 1
    flat = Image.new("RGB", (200, 100), "red")
    assert len(parts_of(contact_sheet([[flat]], columns=["a"]), flat)) == 1  # in its own proportions


def test_an_empty_cell_is_empty(pictures):
    sheet = contact_sheet([[pictures[0], None]], columns=["a", "b"])
    assert len(parts_of(sheet, Image.new("RGB", (128, 128), "#f3f3f3"))) == 1


@pytest.mark.parametrize("text", ["word " * 60, "letters" * 40, "", "Größe λ Ж"])
def test_texts_of_any_length_stay_next_to_the_pictures(pictures, text):
    given = {"columns": [text, "b"], "labels": [text], "captions": [[text, text]]}
    sheet = contact_sheet([pictures[:2]], **given)
    for picture in pictures[:2]:
        assert len(parts_of(sheet, picture.resize((128, 128), Image.Resampling.NEAREST))) == 1
    edge = np.asarray(sheet)[:, [0, -1]]
    assert (edge == 255).all()


@pytest.mark.parametrize(
    ("rows", "more", "sentence"),
    [
        ([], {}, "0 rows and 2 columns: there is nothing to show"),
        ([[None]], {}, r"rows\[0\]: it has 1 cells, and there are 2 columns"),
        ([[None, None]], {"labels": ["a", "b"]}, "labels: 2 of them for 1 rows"),
        ([[None, None]], {"captions": []}, "captions: 0 of them for 1 rows"),
        ([[None, None]], {"captions": [["a"]]}, r"captions\[0\]: it has 1 cells"),
        ([[None, None]], {"side": 8}, "side=8: a cell has at least 32 pixels a side"),
    ],
)
def test_what_does_not_fit_together(rows, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        contact_sheet(rows, columns=["a", "b"], **more)
