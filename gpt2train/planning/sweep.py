"""The runs of a sweep → scaling.json, sweep.html, scaling.png and a table.

Flows in: run folders, finished or not. Flows out, into one folder: `scaling.json` (each run's numbers; for each kind of
run the law with its intervals, what it missed of the largest size, the learning-rate rule, the forecast), `sweep.html`
(the same to look at, one file that loads nothing) and `scaling.png`.

N is without embeddings (Kaplan et al. 2020, section 1.3), which are most of a small model and do little for it. Of runs
of equal size and tokens the law takes the one with the lowest loss: it is a law of well-chosen learning rates.
Each amount of tokens is a run of its own with its own cool-down; points along one run's curve would lie too high, since
their learning rate has not come down yet (Hoffmann et al. 2022, section 3.1).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2train.config import ModelConfig, parameter_count
from gpt2train.errors import ConfigError
from gpt2train.planning.forecast import TOKENS_PER_PARAMETER
from gpt2train.planning.law import Findings, HeldOut, Point, RateRule, ScalingLaw, fit, hold_out, rate_rule
from gpt2train.planning.runs import RunSummary, body_parameter_count, summary
from gpt2train.run_folder import replace_file

SCALING, PAGE, PICTURE = "scaling.json", "sweep.html", "scaling.png"
NEEDED = "three sizes whose loss falls; with several amounts of tokens, three of those and six runs"


def summarize(run_dirs: Sequence[Path], out: Path, *, models: Mapping[str, ModelConfig] | None = None) -> int:
    """Writes the three files into the folder `out` and prints the table. models: whose loss is forecast, by name.

    Raises ConfigError when a folder is no run's.
    """
    if not run_dirs:
        raise ConfigError(["runs=[]: must name at least one run folder; give runs=[runs/a,runs/b]"])
    names = [folder.resolve().name for folder in run_dirs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in run_dirs]
    runs = [summary(folder, name) for folder, name in zip(run_dirs, names, strict=True)]
    runs.sort(key=lambda r: (r.body_parameters, r.tokens, r.name))
    found = [
        findings(kind, [r for r in runs if r.kind == kind], models or {}) for kind in sorted({r.kind for r in runs})
    ]
    out.mkdir(parents=True, exist_ok=True)
    content = {"runs": [_as_json(r) for r in runs], "laws": {f.kind: _law_as_json(f) for f in found}}
    replace_file(out / SCALING, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    from gpt2train.planning.pictures import page, png

    replace_file(out / PICTURE, png(runs, found))
    replace_file(out / PAGE, page(out.resolve().name, runs, found, words).encode())
    _print(runs, found)
    return 0


def findings(kind: str, runs: Sequence[RunSummary], models: Mapping[str, ModelConfig]) -> Findings:
    """Laws and rules of runs of one kind."""
    ended = [r for r in runs if r.finished and r.validation_loss is not None]
    lowest: dict[tuple[int, int], RunSummary] = {}
    for r in ended:
        loss = r.validation_loss if r.validation_loss is not None and math.isfinite(r.validation_loss) else math.inf
        before = lowest.get((r.body_parameters, r.tokens))
        if before is None or loss < (before.validation_loss or math.inf):
            lowest[r.body_parameters, r.tokens] = r
    points = [
        Point(r.name, r.body_parameters, r.tokens, r.validation_loss)
        for r in lowest.values()
        if r.validation_loss is not None and math.isfinite(r.validation_loss)
    ]
    law = fit(points)
    _, held_out = hold_out(points)
    # The rule is of the grid alone: several rates at equal tokens, the fewest that any size had.
    tried: dict[int, list[tuple[float, float, float]]] = {}
    for r in ended:
        tried.setdefault(r.tokens, []).append((float(r.body_parameters), r.lr, r.validation_loss or math.nan))
    constant = bool(runs) and all(r.mup for r in runs)
    rule = rate_rule(tried[min(tried)], constant=constant) if tried else None
    forecasts = [_forecast(name, model, law, rule) for name, model in models.items()] if law is not None else []
    return Findings(kind, points, law, held_out, _naive_miss(points, held_out), rule, forecasts)


def _forecast(name: str, model: ModelConfig, law: ScalingLaw, rule: RateRule | None) -> dict[str, Any]:
    body, tokens = body_parameter_count(model), TOKENS_PER_PARAMETER * parameter_count(model)
    return {
        "model": name,
        "parameters": parameter_count(model),
        "tokens": tokens,
        "loss": law.loss(body, tokens),
        "interval": law.interval(body, tokens),
        "learning_rate": rule.rate(body) if rule else None,
    }


def _naive_miss(points: Sequence[Point], held_out: Sequence[HeldOut]) -> float | None:
    if not held_out:
        return None
    largest = max(p.parameters for p in points)
    below = max(p.parameters for p in points if p.parameters < largest)
    misses = []
    for p in points:
        near = [q for q in points if q.parameters == below and q.tokens == p.tokens]
        if p.parameters == largest and near:
            misses.append(abs(near[0].loss / p.loss - 1))
    return max(misses, default=None)


def _as_json(run: RunSummary) -> dict[str, Any]:
    """Without the curve; a loss that is not finite is null, as JSON has no other word for it."""
    found: dict[str, Any] = {k: v for k, v in asdict(run).items() if k != "curve"} | {"finished": run.finished}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def _law_as_json(f: Findings) -> dict[str, Any]:
    law = f.law
    return {
        "form": "L(N, D) = E + A / N^alpha + B / D^beta, N parameters without embeddings, D tokens, nats a token",
        "law": {k: v for k, v in asdict(law).items() if k != "resampled"} if law else None,
        "intervals": law.intervals() if law else {},
        "bootstrap_fits": len(law.resampled) if law else 0,
        "points": [asdict(p) | {"fitted": law.loss(p.parameters, p.tokens) if law else None} for p in f.points],
        "held_out": [asdict(h) | {"miss": h.miss} for h in f.held_out],
        "largest_miss": f.largest_miss,
        "naive_miss": f.naive_miss,
        "learning_rate": asdict(f.rule) if f.rule else None,
        "forecasts": f.forecasts,
    }


def _print(runs: Sequence[RunSummary], found: Sequence[Findings]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for name in ("parameters", "steps", "tokens", "FLOPs", "lr", "train", "validation", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for r in runs:
        table.add_row(
            Text(r.name),
            f"{r.parameters:,}",
            f"{r.steps_done:,} of {r.steps:,}",
            f"{r.tokens:,}",
            f"{r.flops:.3g}",
            f"{r.lr:g}",
            _number(r.train_loss, ".4f"),
            _number(r.validation_loss, ".4f"),
            _number(r.tokens_per_s, ",.0f"),
            "" if r.finished else "unfinished",
        )
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    for f in found:
        console.print(Text("\n".join([f"{f.kind}:", *(f"  {line}" for line in words(f))])))


def words(f: Findings) -> list[str]:
    """Findings as sentences, for the terminal and the page."""
    lines = []
    if f.law is None:
        lines.append(f"no scaling law: it takes {NEEDED}")
    else:
        law, spans = f.law, f.law.intervals()
        data = f" + {law.B:.4g} / D^{law.beta:.3f}" if law.B else ""
        lines.append(
            f"L = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f}{data} nats a token, N parameters without embeddings, "
            f"{len(f.points)} runs"
        )
        if spans:
            told = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in spans.items())
            lines.append(f"90 % of {len(law.resampled)} bootstrap fits: {told}")
        worst = max(f.points, key=lambda p: abs(law.loss(p.parameters, p.tokens) - p.loss))
        off = law.loss(worst.parameters, worst.tokens) / worst.loss - 1
        lines.append(f"fitted within {abs(off):.2%} ({worst.name})")
    for h in f.held_out:
        span = f" ({h.interval[0]:.3f} to {h.interval[1]:.3f})" if h.interval else ""
        lines.append(
            f"held out {h.name}: forecast {h.forecast:.4f}{span}, measured {h.measured:.4f}: missed by {h.miss:+.2%}"
        )
    if f.largest_miss is not None and f.naive_miss is not None:
        lines.append(f"who expects of the largest size what the next smaller one gives misses by {f.naive_miss:.2%}")
    if f.rule is not None:
        rule = f"learning rate = {f.rule.c:.4g} · N^{f.rule.p:.3f}" if f.rule.p else f"learning rate = {f.rule.c:.3g}"
        bests = ", ".join(f"N = {n:,.0f}: {rate:.3g}" for n, rate in f.rule.best.items())
        edge = (
            f"; best at the grid's edge for {', '.join(f'{n:,.0f}' for n in f.rule.at_edge)}" if f.rule.at_edge else ""
        )
        lines.append(f"{rule} (N: parameters without embeddings; best of {bests}{edge})")
    for c in f.forecasts:
        span = f" ({c['interval'][0]:.2f} to {c['interval'][1]:.2f})" if c["interval"] else ""
        what = f"{c['model']}, {c['parameters']:,} parameters on {c['tokens']:,} tokens"
        lines.append(f"forecast for {what}: {c['loss']:.3f}{span}, as far from the sizes measured as it is")
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
