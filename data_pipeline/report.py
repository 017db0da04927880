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

TEMPLATE = Path(__file__).with_name("report.html.jinja")
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


def measure_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was measured of the corpus as plain text: the paper's table of overlaps, and recall by planted copies."""
    lines = []
    if rows := summary.get("contamination"):
        width = max(14, *(len(row["name"]) for row in rows))
        lines.append(f"{'evaluation set':<{width}} {'n-grams':>10} {'in corpus':>10} {'share':>8}")
        for row in rows:
            lines.append(f"{row['name']:<{width}} {row['ngrams']:>10,} {row['found']:>10,} {row['share']:>8.2%}")
    if p := summary.get("planted"):
        lines.append(
            f"near-duplicates planted: {p['found']:,} of {p['planted']:,} found (recall {p['recall']:.3f}), "
            f"{p['alike_joined']:,} of {p['alike']:,} merely alike joined (precision {p['precision']:.3f})"
        )
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
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(
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
