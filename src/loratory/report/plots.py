"""Plots for reports, made without pyplot, so that no window system or global state is touched."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#8a8a8a"


def panels(count: int, *, width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure and its axes, `count` of them in so many rows, row by row; places left over are empty."""
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "loratory-matplotlib"))
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = list(figure.subplots(rows, -(-count // rows), squeeze=False, **options).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def title(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=9)


def written(figure: Figure, format: str) -> bytes:
    """The figure as a file; the same picture gives the same bytes."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "loratory"}):
        figure.savefig(
            stream, format=format, dpi=150, metadata={"Date": None} if format == "svg" else {"Software": None}
        )
    return stream.getvalue()


def embedded(figure: Figure) -> str:
    """The figure as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(written(figure, "svg")).decode()
