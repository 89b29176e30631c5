"""An adapter file's description as HTML, and the picture of its spectra."""

from __future__ import annotations

from html import escape
from itertools import chain
from pathlib import Path

from loca_vision.commands.inspect_file import contents_of, table_of


def about_file(path: Path) -> str:
    """Return the lines of `loca-vision inspect`, with those of the projections as a table.

    Raises:
        FileNotFoundError, ValueError: as `contents_of`.
    """
    contents = contents_of(path)
    header, *rows = table_of(contents)
    lines = "".join(f"<p>{escape(line)}</p>" for line in contents.head)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="loca-about">{lines}<div class="loca-scroll" tabindex="0" role="region" aria-label="Projections">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def picture_of(path: Path, picture: Path) -> bool:
    """Draw the cosine spectrum of every update into a PNG; return False if no update has a matrix of its own.

    Raises:
        OSError: it cannot be written.
    """
    from loca_vision.commands.spectrum_picture import draw_spectra

    layers = contents_of(path).layers()
    drawn = next((layer for layer in layers if layer.delta is not None), None)
    if drawn is not None:
        draw_spectra(picture, f"Cosine spectra of the updates in {path.name}", chain((drawn,), layers))
    return drawn is not None
