"""Pictures of runs for a quarter of their price: in a few dots, and laid out once for each kind of picture."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from loca_vision.recipes.reports import plots


def draw_less() -> None:
    """Runs in tests draw some thousand pictures, most of them alike, which takes longer than the runs' steps."""
    execute, seen = ConstrainedLayoutEngine.execute, set()

    def once(engine: Any, figure: Figure) -> None:
        kind = (*figure.get_size_inches(), len(figure.axes))
        if kind not in seen:
            execute(engine, figure)
            seen.add(kind)

    ConstrainedLayoutEngine.execute = once
    plots.DPI = 40
