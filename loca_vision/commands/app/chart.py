"""Two lists of probabilities side by side, as a table with bars."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from loca_vision.data.images import as_png

_MOST_ROWS = 10


def comparison(classes: Sequence[str], base: Tensor, adapter: Tensor, titles: tuple[str, str]) -> str:
    """Return HTML with both probabilities in a row for each class, in the head's order; of many classes the most probable.

    Args:
        base, adapter: (classes,), in [0, 1].
        titles: titles of the two columns.
    """
    rows = "".join(
        f'<tr{_marked(i, base, adapter)}><th scope="row">{escape(classes[i])}</th>'
        f"{_cell(base, i, 'base')}{_cell(adapter, i, 'adapter')}</tr>"
        for i in shown(base, adapter)
    )
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    answers = (
        f'<td class="loca-answer base">{escape(classes[int(base.argmax())])}</td>'
        f'<td class="loca-answer adapter">{escape(classes[int(adapter.argmax())])}</td>'
    )
    more = len(classes) - len(shown(base, adapter))
    note = f'<p class="loca-note">{more} other classes are less probable.</p>' if more else ""
    return (
        f'<table class="loca-chart"><thead><tr><th scope="col">Class</th>{heads}</tr></thead>'
        f'<tbody><tr class="loca-answers"><th scope="row">Answer</th>{answers}</tr>{rows}</tbody></table>{note}'
    )


def seen_by_the_model(image: Image.Image) -> str:
    """Return HTML that embeds the image as the model sees it in the page."""
    data = b64encode(as_png(image)).decode()
    return (
        f'<figure class="loca-seen"><img src="data:image/png;base64,{data}" alt="The image as the model sees it">'
        f"<figcaption>As the model sees it, {image.width} x {image.height} pixels</figcaption></figure>"
    )


def empty() -> str:
    """Return what is shown instead of the chart while there is no image."""
    return '<p class="loca-empty">Draw or upload an image, or pick an example: the answers appear here.</p>'


def shown(base: Tensor, adapter: Tensor) -> list[int]:
    """Return the classes that get a row: all, or the ones most probable to either."""
    if len(base) <= _MOST_ROWS:
        return list(range(len(base)))
    order = base.maximum(adapter).argsort(descending=True)
    return [int(i) for i in order[:_MOST_ROWS]]


def _marked(i: int, base: Tensor, adapter: Tensor) -> str:
    return ' class="loca-best"' if i in (int(base.argmax()), int(adapter.argmax())) else ""


def _cell(shares: Tensor, i: int, column: str) -> str:
    percent = 100 * float(shares[i])
    best = " best" if i == int(shares.argmax()) else ""
    return (
        f'<td class="{column}{best}"><span class="loca-bar" style="width:{percent:.1f}%"></span>'
        f'<span class="loca-number">{percent:.1f} %</span></td>'
    )
