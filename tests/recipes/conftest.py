"""Fixtures of the tests in recipes/."""

import pytest

from loca_vision.recipes.reports import plots


@pytest.fixture(autouse=True)
def no_rendering(request, monkeypatch):
    """Figures are composed but not rendered, which takes a third of a tiny run: their files are empty.

    Tests that look at a picture ask for `rendered`; runs of module fixtures are made before this one and have real pictures.
    """
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(plots, "save", lambda figure, path: path.write_bytes(b""))


@pytest.fixture
def rendered():
    """Figures are rendered."""
