"""Which settings of a run are published."""

import pytest

from loca_vision.recipes.reports.redaction import redact, tells_a_place


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/pairs", "pairs"),
        ("/home/me/pairs/", "pairs"),
        ("~/pairs", "pairs"),
        ("~", "."),
        ("/", "."),
        ("../../me/pairs", "pairs"),
        ("C:\\Users\\me\\pairs", "pairs"),
        ("C:/Users/me/pairs", "pairs"),
        ("data/pairs", "data/pairs"),
        ("timbrooks/instruct-pix2pix", "timbrooks/instruct-pix2pix"),
        ("cosine", "cosine"),
        ("https://me:key@host/a.png?token=secret#there", "https://host/a.png"),
        ("https://host/a.png", "https://host/a.png"),
        ("", ""),
    ],
)
def test_texts(text, shown):
    assert redact(text) == shown
    assert not tells_a_place(shown)


def test_everything_else_stays():
    value = {"a": [1, 2.5, None, True, {"b": "/x/y"}], "validation_prompt": "/imagine a/cat", "c": "x"}
    assert redact(value) == {"a": [1, 2.5, None, True, {"b": "y"}], "validation_prompt": "/imagine a/cat", "c": "x"}
