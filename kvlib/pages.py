# SPDX-License-Identifier: Apache-2.0
"""What kvlib's HTML reports share: one style, and drawings that follow the page's colours."""

import io
from typing import Any

__all__ = ["LINES", "STYLE", "TEXT", "figure", "inline", "svg"]

LINES = ("#3b82c4", "#c2553f", "#4b9a5f", "#8a63b0", "#b0893a", "#3a9a9a", "#a0507d", "#6b7280")
"""Colours of lines."""

TEXT = "#202124"
"""Colour of text in drawings; `inline` gives it to the page."""

STYLE = """
:root { color-scheme: light dark; --text: #202124; --soft: #5f6368; --line: #dadce0; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8eaed; --soft: #9aa0a6; --line: #3c4043; --back: #1b1c1f; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.soft, td.soft, footer { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
blockquote { margin: 0; padding: .6rem 1rem; border-left: 3px solid #3b82c4; }
svg { max-width: 100%; height: auto; color: var(--text); }
.wide { overflow-x: auto; } code { font-size: .92em; }
"""


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> Any:
    """A figure of matplotlib, without a window, and its axes in reading order; sizes in inches."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "kvlib", "font.size": 10})
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(drawing)
    axes = drawing.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", colors=TEXT)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(TEXT)
        axis.set_facecolor("none")
    return drawing, axes


def svg(drawing: Any, background: str) -> str:
    """The figure as an SVG element, the same for the same figure."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def inline(drawing: str) -> str:
    """Let the page's text colour reach the drawing, and its background show through."""
    return drawing.replace(TEXT, "currentColor").replace("fill: #ffffff", "fill: none")
