"""Pictures of a run and of several: numbers → SVG to stand in a page, or PNG.

An SVG's text and axes take the page's own color (`currentColor`) on a transparent ground, so it reads in light and in
dark. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib import rc_context
from matplotlib.figure import Figure

Point = tuple[float, float]

MAX_POINTS = 400
"""Points of a curve that are drawn; more do not show and make a page heavy."""
# Okabe and Ito's palette (Color Universal Design, 2008) without its black and yellow: told apart by color-blind
# readers, and of middling lightness, so it shows on white and on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_INK = "#010203"
"""Stands for the page's own color until the SVG is written."""
STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points, each the mean of as many neighbors; those that are not finite are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= most:
        return finite
    edges = [round(i * len(finite) / most) for i in range(most + 1)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in (finite[a:b] for a, b in pairwise(edges))
    ]


def svg_of_curves(
    curves: Sequence[tuple[str, Sequence[Point]]],
    *,
    x_label: str,
    y_label: str,
    name: str,
    points_too: str = "",
) -> str:
    """One SVG element with a line for each (label, points); the curve labelled `points_too` shows its points as well.

    `name` keeps the ids of several pictures in one page apart.
    """
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(curves):
            drawn = thinned(points)
            axes.plot(
                [x for x, _ in drawn],
                [y for _, y in drawn],
                color=COLORS[number % len(COLORS)],
                linewidth=1.5,
                marker="o" if label == points_too or len(drawn) == 1 else "",
                markersize=4,
                label=label,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(curves) > 1:
            axes.legend()
        return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """The figure as an element to stand in a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue().replace(_INK, "currentColor")
    return text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page
