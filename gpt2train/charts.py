"""Pictures of a run and of several: numbers → SVG to stand in a page, or PNG.

An SVG's text and axes take the page's own color (`currentColor`) on a transparent ground, so it reads in light and in
dark. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Point = tuple[float, float]

MAX_POINTS = 400
"""Points of a curve that are drawn; more do not show and make a page heavy."""
# Okabe and Ito's palette (Color Universal Design, 2008) without its black and yellow: told apart by color-blind
# readers, and of middling lightness, so it shows on white and on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_INK = "#010203"
"""Stands for the page's own color until the SVG is written."""
_STYLE = {
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
    with rc_context({**_STYLE, "svg.hashsalt": name}):
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
        return _svg(figure)


def png_of_scaling(
    points: Sequence[tuple[str, float, float | None, bool]],
    curves: Sequence[tuple[str, Sequence[Point]]],
    law: Callable[[float], float] | None,
) -> bytes:
    """Loss over size, from (name, parameters, validation loss, finished), beside loss over tokens, as PNG."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
        by_size, by_tokens = figure.subplots(1, 2)
        colors = {name: COLORS[number % len(COLORS)] for number, (name, *_) in enumerate(points)}
        _draw_sizes(by_size, points, colors, law)
        for name, curve in curves:
            drawn = [(x, y) for x, y in thinned(curve) if x > 0]
            if drawn:
                by_tokens.plot(*zip(*drawn, strict=True), color=colors[name], linewidth=1.2, label=name)
        by_tokens.set_xlabel("training tokens")
        by_tokens.set_ylabel("train loss (nats a token)")
        if by_tokens.lines:
            by_tokens.set_xscale("log")
            by_tokens.legend(fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()


def _draw_sizes(
    axes: Axes,
    points: Sequence[tuple[str, float, float | None, bool]],
    colors: Mapping[str, str],
    law: Callable[[float], float] | None,
) -> None:
    axes.set_xlabel("parameters without embeddings")
    axes.set_ylabel("validation loss (nats a token)")
    known = [(name, n, loss, done) for name, n, loss, done in points if loss is not None and math.isfinite(loss)]
    if not known:
        return
    axes.set_xscale("log")
    for name, n, loss, done in known:
        axes.plot(n, loss, "o", color=colors[name], fillstyle="full" if done else "none")
        note = name if done else f"{name} (unfinished)"
        axes.annotate(note, (n, loss), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if law is not None:
        low, high = min(n for _, n, _, _ in known), max(n for _, n, _, _ in known)
        sizes = [low * (high / low) ** (i / 100) for i in range(101)]
        axes.plot(sizes, [law(n) for n in sizes], "--", color="gray", linewidth=1, label="fitted law")
        axes.legend(fontsize=8)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue().replace(_INK, "currentColor")
    return text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page
