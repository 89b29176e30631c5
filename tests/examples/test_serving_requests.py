"""The server's requests: images, options, and how the requests of a batch are kept apart."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from image_bodies import ImageLimits, image_of
from refusals import Refusal, each
from request_options import Options
from support.serving import encoded, photo, png_that_claims

LIMITS = ImageLimits(most_bytes=100_000, most_pixels=10_000)


def refused(body: bytes) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        image_of(body, LIMITS)
    return caught.value.status, caught.value.sentence


@pytest.mark.parametrize("image", [photo(1), photo(1).convert("L"), photo(1).convert("RGBA"), photo(1).convert("P")])
def test_png_images_are_read_as_rgb(image):
    assert image_of(encoded(image), LIMITS).mode == "RGB"


def test_a_jpeg_is_turned_as_the_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert image_of(encoded(photo(1, (40, 50)), "JPEG", exif=exif), LIMITS).size == (40, 50)


def test_pixels_are_those_of_the_file():
    assert np.array_equal(np.asarray(image_of(encoded(photo(3)), LIMITS)), np.asarray(photo(3)))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "got nothing"),
        (b"GIF89a" + bytes(100), 415, "JPEG or PNG"),
        (encoded(photo(1), "GIF"), 415, "JPEG or PNG"),
        (encoded(photo(1), "WEBP"), 415, "JPEG or PNG"),
        (b"%!PS-Adobe-3.0", 415, "JPEG or PNG"),
        (bytes(100_001), 413, "at most 100,000 bytes"),
        (png_that_claims(101, 100), 413, "got 101 x 100"),
        (png_that_claims(100_000, 100_000), 413, "at most 10,000 pixels"),  # a bomb to PIL, too
        (png_that_claims(10_000, 10_000), 413, "at most 10,000 pixels"),  # at which PIL warns
        (png_that_claims(9_000, 1), 422, "16 short ones, got 9000 x 1"),
        (encoded(photo(1))[:-200], 422, "cannot be read"),
        (encoded(photo(1), "JPEG")[:400], 422, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_for_the_model_is_refused(body, status, words):
    found, sentence = refused(body)
    assert found == status and words in sentence and "\n" not in sentence


def test_a_claimed_size_is_refused_before_pixels_are_decoded(monkeypatch):
    body = png_that_claims(101, 100)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert refused(body)[0] == 413


@examples(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_damaged_images_are_refused_or_read(noise, at):
    raw = encoded(photo(1, (8, 8)))
    try:
        assert image_of(raw[:at] + noise + raw[at + len(noise) :], LIMITS).mode == "RGB"
    except Refusal as refusal:
        assert 400 <= refusal.status < 500


# Options


def test_options_are_read():
    options = Options([("seed", "0"), ("prompt", "a cat"), ("scale", "1.5")])
    assert options.count("seed", 7, least=0, most=9) == 0 and options.count("steps", 7, most=9) == 7
    assert options.text("prompt", 100) == "a cat" and options.number("scale", 1.0, least=1.0, most=2.0) == 1.5
    options.finish()


@pytest.mark.parametrize("value", ["", "-1", "10", "1.0", "1e1", "¹", "٣", "nan", "9" * 5000])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(Refusal, match="whole number from 1 to 9"):
        Options([("steps", value)]).count("steps", 1, most=9)


@pytest.mark.parametrize("value", ["", "nan", "inf", "0.9", "x", "1" * 400])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(Refusal, match="number from 1 to 9"):
        Options([("scale", value)]).number("scale", 1.0, least=1.0, most=9.0)


def test_unknown_double_and_missing_options_are_refused():
    options = Options([("sead", "1")])
    options.count("seed", 1, most=9)
    with pytest.raises(Refusal, match="no option 'sead'; perhaps seed"):
        options.finish()
    with pytest.raises(Refusal, match="twice"):
        Options([("seed", "1"), ("seed", "2")])
    with pytest.raises(Refusal, match="prompt: expected a text of 1 to 10 characters, got 0"):
        Options([]).text("prompt", 10)


# Batches


@examples(deadline=None)
@given(st.lists(st.tuples(st.integers(), st.booleans()), max_size=20))
def test_only_what_fails_by_itself_has_no_answer(asked):
    def together(some):
        if any(broken for _, broken in some):
            raise KeyError("one of them")
        return [2 * number for number, _ in some]

    found = each(asked, together)
    assert len(found) == len(asked)
    for (number, broken), answer in zip(asked, found, strict=True):
        assert isinstance(answer, KeyError) if broken else answer == 2 * number


def test_too_few_answers_are_given_to_nobody():
    found = each([1, 2], lambda some: some[1:])
    assert all(isinstance(answer, RuntimeError) for answer in found)


def test_a_refusal_is_a_sentence_and_says_when_to_come_again():
    reply = pickle.loads(pickle.dumps(Refusal(503, "later", again=3))).reply()
    assert (reply.status, json.loads(reply.body), reply.headers) == (503, {"error": "later"}, {"Retry-After": "3"})
