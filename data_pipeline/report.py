"""summary.json and the documents → what a person reads: a table of the funnel, and one self-contained HTML file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq

from data_pipeline.layout import Corpus
from data_pipeline.records import InputError
from data_pipeline.store import write_atomic

SAMPLES = 6
SAMPLE_CHARACTERS = 1_200
TOP_DOMAINS = 25
LENGTH_BINS = (0, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)
"""Characters of a document; the last bin is open."""


def read_summary(corpus: Corpus) -> dict[str, Any]:
    """summary.json. Raises InputError where there is none."""
    try:
        summary: dict[str, Any] = json.loads(corpus.summary.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{corpus.out}: is no corpus folder (no summary.json); run `gpt2train corpus` first") from None
    return summary


def funnel_lines(summary: Mapping[str, Any]) -> list[str]:
    """The funnel as plain text: a line a stage, then the reasons that ended rows there."""
    lines = [f"{'stage':<14} {'in':>10} {'kept':>10} {'dropped':>10} {'failed':>10}"]
    for row in summary["stages"]:
        lines.append(
            f"{row['stage']:<14} {row['in']:>10,} {row['kept']:>10,} {row['dropped']:>10,} {row['failed']:>10,}"
        )
        for reason, n in row["reasons"].items():
            lines.append(f"    {reason:<32} {n:>10,}")
    u = summary["urls"]
    lines.append(f"{'all':<14} {u['in']:>10,} {u['kept']:>10,} {u['dropped']:>10,} {u['failed']:>10,}")
    return lines


def write_corpus_report(corpus: Corpus) -> Path:
    """Write report.html from summary.json, documents/ and tokens/; return its path."""
    summary = read_summary(corpus)
    domains: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    languages: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    for file in sorted(corpus.folder("documents").glob("[0-9]*.parquet")):
        parquet = pq.ParquetFile(file)
        for batch in parquet.iter_batches(batch_size=500, columns=["url", "title", "text", "domain", "language"]):
            for row in batch.to_pylist():
                domains[row["domain"] or "—"] += 1
                languages[row["language"] or "—"] += 1
                lengths[max(i for i, least in enumerate(LENGTH_BINS) if len(row["text"]) >= least)] += 1
        first = next(parquet.iter_batches(batch_size=1), None)
        if first is not None and first.num_rows and len(samples) < SAMPLES:
            samples += first.to_pylist()
    page = _TEMPLATE.render(
        summary=summary,
        stages=summary["stages"],
        widest=max((row["in"] for row in summary["stages"]), default=1) or 1,
        domains=_bars(domains.most_common(TOP_DOMAINS)),
        languages=_bars(languages.most_common(10)),
        lengths=_bars([(f"≥ {LENGTH_BINS[i]:,}", lengths[i]) for i in sorted(lengths)]),
        samples=[{**s, "text": s["text"][:SAMPLE_CHARACTERS]} for s in samples],
    )
    with write_atomic(corpus.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return corpus.report


def _bars(rows: list[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """(label, count, width in percent of the longest bar)."""
    most = max((n for _, n in rows), default=1) or 1
    return [(label, n, 100 * n / most) for label, n in rows]


_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Corpus report</title><style>
:root{color-scheme:light dark;--ink:#1d2330;--dim:#667085;--page:#fbfbfa;--card:#fff;--line:#e3e5ea;--bar:#3b6fd4;
--kept:#2f8f5b;--dropped:#c98a1b;--failed:#c2453d}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ee;--dim:#98a1b3;--page:#14171c;--card:#1c2027;--line:#2d333d;
--bar:#6f9bef;--kept:#5cbf8a;--dropped:#e0ae52;--failed:#e4766e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:62rem;padding:1.5rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .6rem}.dim{color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.7rem;margin:1rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .5rem;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--dim);font-weight:500}
.funnel{display:flex;height:.8rem;border-radius:.2rem;overflow:hidden;min-width:12rem}
.kept{background:var(--kept)}.dropped{background:var(--dropped)}.failed{background:var(--failed)}
.bar{background:var(--bar);height:.7rem;border-radius:.2rem}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1.5rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.8rem;max-height:16rem;overflow-y:auto;font:13px/1.45 ui-monospace,monospace}
a{color:var(--bar);overflow-wrap:anywhere}td.wide{width:45%}
</style></head><body>
<h1>Corpus report</h1>
<p class="dim">Recipe {{ summary.recipe or "—" }}, source {{ summary.source }}, {{ summary.shards }} shards.</p>
<div class="cards">
{% for label, key in [("URLs in","in"),("kept","kept"),("dropped","dropped"),("failed","failed")] %}
<div class="card"><span class="dim">{{ label }}</span><b>{{ "{:,}".format(summary.urls[key]) }}</b></div>
{% endfor %}
{% if summary.tokens %}
{% for name, split in summary.tokens.splits.items() %}
<div class="card"><span class="dim">{{ name }} tokens</span><b>{{ "{:,}".format(split.tokens) }}</b></div>
{% endfor %}{% endif %}
</div>
<h2>Funnel</h2><div class="scroll"><table><tr><th>stage</th><th>in</th><th>kept</th><th>dropped</th><th>failed</th><th></th></tr>
{% for row in stages %}
<tr><td>{{ row.stage }}</td><td>{{ "{:,}".format(row["in"]) }}</td><td>{{ "{:,}".format(row.kept) }}</td>
<td>{{ "{:,}".format(row.dropped) }}</td><td>{{ "{:,}".format(row.failed) }}</td>
<td class="wide"><div class="funnel" style="width:{{ 100*row["in"]/widest }}%">
{% for s in ["kept","dropped","failed"] %}{% if row[s] %}<div class="{{ s }}" style="flex:{{ row[s] }}" title="{{ s }}"></div>{% endif %}{% endfor %}
</div></td></tr>
{% endfor %}</table></div>
<h2>Why rows ended</h2><div class="scroll"><table><tr><th>stage</th><th>state and reason</th><th>rows</th></tr>
{% for row in stages %}{% for reason, n in row.reasons.items() %}
<tr><td>{{ row.stage }}</td><td>{{ reason }}</td><td>{{ "{:,}".format(n) }}</td></tr>
{% endfor %}{% endfor %}</table></div>
<div class="two">
{% for title, bars in [("Domains", domains), ("Characters per document", lengths), ("Languages", languages)] %}
<div><h2>{{ title }}</h2><table>
{% for label, n, width in bars %}<tr><td>{{ label }}</td><td>{{ "{:,}".format(n) }}</td><td class="wide"><div class="bar" style="width:{{ width }}%"></div></td></tr>
{% endfor %}</table></div>
{% endfor %}
</div>
{% if summary.contamination %}<h2>Evaluation sets in the corpus</h2><table><tr><th>set</th><th>n-grams</th><th>found</th><th>share</th></tr>
{% for row in summary.contamination %}<tr><td>{{ row.name }}</td><td>{{ "{:,}".format(row.ngrams) }}</td><td>{{ "{:,}".format(row.found) }}</td><td>{{ "%.2f"|format(100*row.share) }} %</td></tr>
{% endfor %}</table>{% endif %}
<h2>Samples</h2>
{% for s in samples %}<p><b>{{ s.title or "untitled" }}</b><br><a href="{{ s.url if s.url.startswith("http") else "#" }}" rel="noreferrer">{{ s.url }}</a></p><pre>{{ s.text }}</pre>
{% endfor %}
</body></html>
""")
