"""A sweep to look at: loss over parameters, tokens and FLOPs, isoFLOP curves, learning rates; as a page and as PNG.

Flows in: runs and findings. Flows out: one HTML file that loads nothing from anywhere, or a PNG of two pictures. The
same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial

import jinja2
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2train.charts import COLORS, STYLE, svg_of, thinned
from gpt2train.planning.law import Findings
from gpt2train.planning.runs import RunSummary

ISOFLOP_CURVES = 4
FLOPS_PER_PARAMETER_TOKEN = 6
"""Of training; attention's own left out (Kaplan et al. 2020, section 2.1)."""


def page(
    name: str, runs: Sequence[RunSummary], found: Sequence[Findings], words: Callable[[Findings], list[str]]
) -> str:
    """The whole sweep.html."""
    kinds = []
    for number, f in enumerate(found):
        own = [r for r in runs if r.kind == f.kind]
        drawn: list[tuple[str, Callable[[Axes], None]]] = [
            ("Loss over parameters; lines: the law; rings: held out", partial(over_size, f=f)),
            ("Loss over training tokens", partial(over_tokens, runs=own)),
            ("Loss over training FLOPs", partial(over_flops, runs=own)),
            ("The same FLOPs in several sizes (isoFLOP); dots: measured", partial(isoflop, f=f)),
            ("Loss over learning rate", partial(over_rate, runs=own)),
        ]
        charts = [(title, Markup(_svg(f"{number}-{i}", draw))) for i, (title, draw) in enumerate(drawn)]
        kinds.append((f.kind, words(f), charts))
    return _TEMPLATE.render(name=name, runs=runs, kinds=kinds)


def png(runs: Sequence[RunSummary], found: Sequence[Findings]) -> bytes:
    """Loss over size beside loss over tokens."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        for f in found:
            over_size(left, f)
        over_tokens(right, runs)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        draw(figure.add_subplot())
        return svg_of(figure)


def over_size(axes: Axes, f: Findings) -> None:
    """Points and the law's line for each amount of tokens."""
    axes.set(xlabel="parameters without embeddings", ylabel="validation loss (nats a token)", xscale="log")
    held = {h.name for h in f.held_out}
    for number, tokens in enumerate(sorted({p.tokens for p in f.points})):
        color = COLORS[number % len(COLORS)]
        at = sorted((p for p in f.points if p.tokens == tokens), key=lambda p: p.parameters)
        for p in at:
            axes.plot(p.parameters, p.loss, "o", color=color, fillstyle="none" if p.name in held else "full")
        axes.plot([], [], "o", color=color, label=f"{_short(tokens)} tokens")
        if f.law is not None:
            sizes = _between(min(p.parameters for p in f.points), max(p.parameters for p in f.points))
            axes.plot(sizes, [f.law.loss(n, tokens) for n in sizes], "--", color=color, linewidth=1)
    _legend(axes)


def over_tokens(axes: Axes, runs: Sequence[RunSummary]) -> None:
    """The training curve of each model, of its longest run with the lowest loss."""
    axes.set(xlabel="training tokens", ylabel="train loss (nats a token)")
    best: dict[str, RunSummary] = {}
    for r in runs:
        before = best.get(r.model)
        if before is None or (-r.tokens, r.validation_loss or math.inf) < (
            -before.tokens,
            before.validation_loss or math.inf,
        ):
            best[r.model] = r
    for number, r in enumerate(best.values()):
        drawn = [(x, y) for x, y in thinned(r.curve, 60) if x > 0]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), color=COLORS[number % len(COLORS)], linewidth=1.2, label=r.model)
    if axes.lines:
        axes.set_xscale("log")
    _legend(axes)


def over_flops(axes: Axes, runs: Sequence[RunSummary]) -> None:
    """Every finished run, by model."""
    axes.set(xlabel="training FLOPs", ylabel="validation loss (nats a token)", xscale="log")
    for number, model in enumerate(dict.fromkeys(r.model for r in runs)):
        at = sorted(
            (r.flops, r.validation_loss)
            for r in runs
            if r.model == model and r.finished and r.validation_loss is not None and math.isfinite(r.validation_loss)
        )
        if at:
            axes.plot(*zip(*at, strict=True), "o", markersize=4, color=COLORS[number % len(COLORS)], label=model)
    _legend(axes)


def isoflop(axes: Axes, f: Findings) -> None:
    """The law's loss over size with D = C / 6N, for amounts of FLOPs within what was measured."""
    axes.set(xlabel="parameters without embeddings", ylabel="loss (nats a token)", xscale="log")
    if f.law is None or not f.law.B or not f.points:
        axes.text(0.5, 0.5, "needs a law in parameters and tokens", ha="center", transform=axes.transAxes)
        return
    flops = [FLOPS_PER_PARAMETER_TOKEN * p.parameters * p.tokens for p in f.points]
    sizes = _between(min(p.parameters for p in f.points), max(p.parameters for p in f.points))
    for number, C in enumerate(_between(min(flops), max(flops), ISOFLOP_CURVES)):
        losses = [f.law.loss(n, C / (FLOPS_PER_PARAMETER_TOKEN * n)) for n in sizes]
        color = COLORS[number % len(COLORS)]
        axes.plot(sizes, losses, color=color, linewidth=1.2, label=f"{C:.1e} FLOPs")
        low = min(range(len(sizes)), key=losses.__getitem__)
        axes.plot(sizes[low], losses[low], "v", color=color, markersize=5)
    axes.plot([p.parameters for p in f.points], [p.loss for p in f.points], ".", color="gray", markersize=4)
    top = max(p.loss for p in f.points)
    axes.set_ylim(min(p.loss for p in f.points) - 0.1, top + 0.2)
    _legend(axes)


def over_rate(axes: Axes, runs: Sequence[RunSummary]) -> None:
    """Of each model that was tried with several learning rates at equal tokens, the fewest that it had."""
    axes.set(xlabel="peak learning rate", ylabel="validation loss (nats a token)", xscale="log")
    ended = [r for r in runs if r.finished and r.validation_loss is not None and math.isfinite(r.validation_loss)]
    for number, model in enumerate(dict.fromkeys(r.model for r in ended)):
        tokens = min(r.tokens for r in ended if r.model == model)
        tried = sorted((r.lr, r.validation_loss or 0.0) for r in ended if r.model == model and r.tokens == tokens)
        if len({rate for rate, _ in tried}) > 1:
            color = COLORS[number % len(COLORS)]
            axes.plot(*zip(*tried, strict=True), "o-", color=color, linewidth=1, markersize=4, label=model)
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _between(low: float, high: float, count: int = 81) -> list[float]:
    """`count` numbers from low to high in equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


_TEMPLATE = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · sweep</title><style>
:root{color-scheme:light dark;--ink:#1d2330;--dim:#667085;--page:#fbfbfa;--card:#fff;--line:#e3e5ea}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ee;--dim:#98a1b3;--page:#14171c;--card:#1c2027;--line:#2d333d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:72rem;
padding:1.2rem}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .6rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:.9rem}
figure{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem;margin:0}
figcaption{color:var(--dim);margin-bottom:.3rem}figure svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .5rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}th{color:var(--dim);font-weight:500}
</style></head><body>
<h1>{{ name }}</h1>
{% for kind, words, charts in kinds %}
<h2>{{ kind }}</h2>
<ul>{% for line in words %}<li>{{ line }}</li>{% endfor %}</ul>
<div class="charts">{% for title, svg in charts %}
<figure><figcaption>{{ title }}</figcaption>{{ svg }}</figure>{% endfor %}</div>
{% endfor %}
<h2>Runs</h2><div class="scroll"><table>
<tr><th>run</th><th>parameters</th><th>tokens</th><th>FLOPs</th><th>learning rate</th><th>train</th><th>validation</th>
<th>tokens/s</th><th></th></tr>
{% for r in runs %}
<tr><td>{{ r.name }}</td><td>{{ "{:,}".format(r.parameters) }}</td><td>{{ "{:,}".format(r.tokens) }}</td>
<td>{{ "%.3g" % r.flops }}</td><td>{{ "%g" % r.lr }}</td>
<td>{{ "–" if r.train_loss is none else "%.4f" % r.train_loss }}</td>
<td>{{ "–" if r.validation_loss is none else "%.4f" % r.validation_loss }}</td>
<td>{{ "–" if r.tokens_per_s is none else "{:,.0f}".format(r.tokens_per_s) }}</td>
<td>{{ "" if r.finished else "unfinished" }}</td></tr>
{% endfor %}</table></div>
</body></html>
""")
