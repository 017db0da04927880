"""A run → one HTML file: curves, settings, versions, checkpoints, evaluation.

Flows in: a run's folder, also of a run that is still going on. Flows out: `report.html` in it, which loads nothing from
anywhere: styles and pictures stand within it. Everything that comes from a file is escaped.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gpt2train.charts import svg_of_curves
from gpt2train.evaluation import table
from gpt2train.planning import outcome
from gpt2train.planning.runs import summary
from gpt2train.run_folder import (
    CONFIG,
    EVALUATION,
    REPORT,
    VERSIONS,
    checkpoint_folders,
    read_json,
    read_metrics,
    read_run_config,
    replace_file,
    series,
)


def report(run_dir: Path) -> Path:
    """Writes the run's report.html and returns its path. Raises ConfigError when `run_dir` is no run's folder."""
    run_dir = Path(run_dir)
    name = run_dir.resolve().name
    config = read_run_config(run_dir)
    run = summary(run_dir, name)
    evaluation = read_json(run_dir / EVALUATION)
    page = _TEMPLATE.render(
        name=name,
        config=config,
        run=run,
        charts=_charts(run_dir),
        outcome=outcome.rows(run_dir),
        evaluation=evaluation,
        task_columns=table.COLUMNS,
        task_rows=table.rows(evaluation.get("tasks", [])),
        checkpoints=[(path.name, _bytes(path)) for path in checkpoint_folders(run_dir)],
        versions=_flat(read_json(run_dir / VERSIONS)),
        settings=(run_dir / CONFIG).read_text(encoding="utf-8"),
    )
    target = run_dir / REPORT
    replace_file(target, page.encode())
    return target


def _charts(run_dir: Path) -> list[tuple[str, Markup]]:
    """(title, SVG) of each quantity that the metrics have."""
    metrics = read_metrics(run_dir)
    wanted = [
        ("Loss", "nats a token", [("train", "loss"), ("validation", "validation_loss")]),
        ("Learning rate", "", [("lr", "lr")]),
        ("Gradient norm", "before clipping", [("gradient norm", "grad_norm")]),
        ("Speed", "tokens a second", [("tokens/s", "tokens_per_s")]),
    ]
    found: list[tuple[str, Markup]] = []
    for title, unit, names in wanted:
        curves = [(label, points) for label, key in names if (points := series(metrics, key))]
        if curves:
            svg = svg_of_curves(curves, x_label="step", y_label=unit, name=title, points_too="validation")
            found.append((title, Markup(svg)))  # our own drawing: no text of a file is in it
    scores = sorted({name for entry in metrics for name in entry if "/" in name})
    for title, share in (("Zero-shot tasks, shares right", True), ("Zero-shot tasks, perplexities and bits", False)):
        curves = [(name, series(metrics, name)) for name in scores if table.is_share(name.split("/")[1]) == share]
        if curves:
            title = title if len(curves) > 1 else curves[0][0]  # one curve has no legend
            svg = svg_of_curves(curves, x_label="step", y_label="", name=title)
            found.append((title, Markup(svg)))
    return found


def _bytes(folder: Path) -> int:
    """Bytes of the folder's files; what a run that is going on prunes in between counts 0."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def _flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested JSON object as rows of dotted name and value."""
    rows: list[tuple[str, str]] = []
    for key, value in found.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _short(value: float) -> str:
    """1234567 → 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


_environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_environment.filters |= {"number": _number, "short": _short}
_TEMPLATE = _environment.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · run report</title><style>
:root{color-scheme:light dark;--ink:#1d2330;--dim:#667085;--page:#fbfbfa;--card:#fff;--line:#e3e5ea}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ee;--dim:#98a1b3;--page:#14171c;--card:#1c2027;--line:#2d333d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:66rem;
padding:1.2rem}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .6rem}
.dim{color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.2rem,1fr));gap:.7rem;margin:1rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:.9rem}
figure{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem;margin:0}
figcaption{color:var(--dim);margin-bottom:.3rem}figure svg{width:100%;height:auto;display:block}
figure svg text{font-family:system-ui,sans-serif!important}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .5rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}th{color:var(--dim);font-weight:500}
td.text{overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;overflow-x:auto;
font:13px/1.45 ui-monospace,monospace}
</style></head><body>
<h1>{{ name }}</h1>
<p class="dim">{{ config.model.name }}: {{ config.model.layers }} layers, {{ config.model.channels }} channels,
{{ config.model.heads }} heads, context {{ config.model.context }}. Recipe {{ config.recipe }}, seed {{ config.seed }}.
{{ "Finished." if run.finished else "Not finished: step {:,} of {:,}.".format(run.steps_done, run.steps) }}</p>
<div class="cards">
<div class="card"><span class="dim">steps</span><b>{{ "{:,}".format(run.steps_done) }}</b></div>
<div class="card"><span class="dim">tokens</span><b>{{ run.tokens|short }}</b></div>
<div class="card"><span class="dim">parameters</span><b>{{ run.parameters|short }}</b></div>
<div class="card"><span class="dim">train loss</span><b>{{ run.train_loss|number }}</b></div>
<div class="card"><span class="dim">validation loss</span><b>{{ run.validation_loss|number }}</b></div>
<div class="card"><span class="dim">tokens/s</span><b>{{ run.tokens_per_s|number(",.0f") }}</b></div>
<div class="card"><span class="dim">training FLOPs</span><b>{{ run.flops|number(".2e") }}</b></div>
</div>
{% if charts %}<div class="charts">
{% for title, svg in charts %}
<figure><figcaption>{{ title }}</figcaption>{{ svg }}</figure>
{% endfor %}</div>
{% else %}<p>No step has been recorded yet.</p>{% endif %}
{% if evaluation.get("results") %}<h2>Evaluation</h2>
<p class="dim">Checkpoint {{ evaluation.source }}; texts by a sliding window of stride {{ evaluation.stride }}.</p>
<div class="scroll"><table>
<tr><th>text</th><th>tokens</th><th>loss</th><th>perplexity</th><th>per word</th><th>bits/byte</th></tr>
{% for r in evaluation.results %}
<tr><td>{{ r.name }}</td><td>{{ "{:,}".format(r.tokens) }}</td><td>{{ r.loss|number }}</td>
<td>{{ r.perplexity|number }}</td><td>{{ r.word_perplexity|number }}</td><td>{{ r.bits_per_byte|number }}</td></tr>
{% endfor %}</table></div>{% endif %}
{% if task_rows %}<h2>Zero-shot tasks</h2>
<p class="dim">Checkpoint {{ evaluation.source }}, weights {{ evaluation.weights_sha256[:12] }}. On the right what was
published for GPT-2's four sizes; “8-grams seen” is the share of a test set's 8-grams that the training data hold.</p>
<div class="scroll"><table><tr>{% for column in task_columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in task_rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<details><summary class="dim">Protocols and data</summary>
{% for task in evaluation.tasks %}<p><b>{{ task.name }}</b>: {{ task.protocol }}. Data: {{ task.data.file }}, sha256
{{ task.data.sha256[:12] }}; {{ task.source }}.{% for p in task.published %} Beside it: {{ p.metric }}, {{ p.source }}.
{% endfor %}</p>
{% endfor %}</details>{% endif %}
{% if evaluation.get("harness") %}<h2>lm-evaluation-harness</h2><div class="scroll"><table>
<tr><th>task</th><th>score</th><th>value</th></tr>
{% for task, found in evaluation.harness.items() %}{% for score, value in found.scores|dictsort %}
<tr><td>{{ task }}</td><td>{{ score }}</td><td>{{ value|number }}</td></tr>
{% endfor %}{% endfor %}</table></div>{% endif %}
{% if outcome %}<h2>Forecast and measurement</h2>
<div class="scroll"><table><tr><th></th><th>forecast</th><th>measured</th><th>off by</th></tr>
{% for name, told, found, off in outcome %}<tr><td>{{ name }}</td><td>{{ told }}</td><td>{{ found }}</td>
<td>{{ off.strip(" ()") }}</td></tr>
{% endfor %}</table></div>{% endif %}
<h2>Checkpoints</h2>
{% if checkpoints %}<div class="scroll"><table><tr><th>folder</th><th>bytes</th></tr>
{% for folder, size in checkpoints %}<tr><td>{{ folder }}</td><td>{{ "{:,}".format(size) }}</td></tr>
{% endfor %}</table></div>{% else %}<p class="dim">None yet.</p>{% endif %}
{% if versions %}<h2>What made it</h2><div class="scroll"><table>
{% for key, value in versions %}<tr><td>{{ key }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}</table></div>{% endif %}
<h2>Settings</h2><pre>{{ settings }}</pre>
</body></html>
""")
