"""summary.json, ledger and documents → what a person reads: tables on the terminal, and one self-contained HTML file.

The file holds no script and loads nothing: it opens from a disk, in a mail, behind any firewall. One pass over the
ledger, one over the documents, and a look at the pages of the samples in their WARC files; in memory stay counts
and a few samples."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.clean import personal
from data_pipeline.clean.html_text import visible_lines
from data_pipeline.crawl import warc
from data_pipeline.layout import Corpus, read_config
from data_pipeline.lists import read_list
from data_pipeline.records import KEPT, CorruptionError, InputError
from data_pipeline.store import corruption_errors, read_json, write_atomic

TEMPLATE = Path(__file__).with_name("report.html.jinja")
AGAIN = "run `gpt2train corpus` again, which makes it anew"
SAMPLES = 6
SAMPLE_CHARACTERS = 2_400
REASON_SAMPLES = 3
CLUSTERS = 8
CLUSTER_SAMPLES = 4
TOP_DOMAINS = 25
LENGTH_BINS = (0, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)
"""Characters of a document; the last bin is open."""


def read_summary(corpus: Corpus) -> dict[str, Any]:
    """summary.json. Raises InputError where there is none, CorruptionError where it is torn."""
    try:
        summary = read_json(corpus.summary, AGAIN)
    except FileNotFoundError:
        raise InputError(f"{corpus.out}: is no corpus folder (no summary.json); run `gpt2train corpus` first") from None
    if missing := [name for name in ("stages", "urls", "source") if name not in summary]:
        raise CorruptionError(f"{corpus.summary}: is damaged (no `{missing[0]}` in it); {AGAIN}")
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
    try:
        masked = read_config(corpus).documents.mask_personal_data
    except InputError:  # a folder of another version: what was asked for then is not known
        masked = True
    domains: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    languages: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    documents = characters = 0
    for file in sorted(corpus.folder("documents").glob("[0-9]*.parquet")):
        with corruption_errors(file):
            parquet = pq.ParquetFile(file)
            for batch in parquet.iter_batches(batch_size=500, columns=["url", "title", "text", "domain", "language"]):
                for row in batch.to_pylist():
                    domains[row["domain"] or "—"] += 1
                    languages[row["language"] or "—"] += 1
                    documents, characters = documents + 1, characters + len(row["text"])
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
        reasons=_reason_samples(corpus),
        clusters=_clusters(corpus),
        domains=_bars(domains.most_common(TOP_DOMAINS)),
        languages=_bars(languages.most_common(10)),
        # Bins without a document between others stay, so that the bars are a histogram.
        lengths=_bars(
            [
                (f"≥ {LENGTH_BINS[i]:,}", lengths[i])
                for i in range(min(lengths, default=0), max(lengths, default=-1) + 1)
            ]
        ),
        documents=documents,
        characters=characters,
        samples=[_sample(row, corpus.out, masked) for row in samples],
    )
    with write_atomic(corpus.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return corpus.report


def compare_domains(corpus: Corpus, path: str) -> dict[str, Any]:
    """The corpus's domains beside a list, one a line, most frequent first, with or without a count before it.

    An entry without a dot (OpenAI's list: "nytimes") stands for a registrable domain's first label.
    Returns {"listed", "found", "documents", "share", "top": [{"domain", "rank", "documents"}]}: how many of the list's
    entries the corpus has, how many of its documents are theirs, and that as a share of all.
    """
    entries = [line.split()[-1].lower() for line in read_list(path, "report.domains")]
    rank = {entry: place for place, entry in reversed(list(enumerate(entries, 1)))}
    found: Counter[str] = Counter()
    total = 0
    for file in sorted(corpus.folder("documents").glob("[0-9]*.parquet")):
        for domain in _columns(file, "domain")["domain"].to_pylist():
            total += 1
            name = (domain or "").lower()
            entry = name if name in rank else name.split(".")[0]
            if entry in rank:
                found[entry] += 1
    return {
        "listed": len(rank),
        "found": len(found),
        "documents": found.total(),
        "share": round(found.total() / max(total, 1), 6),
        "top": [{"domain": entry, "rank": rank[entry], "documents": n} for entry, n in found.most_common(TOP_DOMAINS)],
    }


def _columns(file: Path, *names: str) -> pa.Table:
    with corruption_errors(file):
        return pq.read_table(file, columns=list(names))


def _reason_samples(corpus: Corpus) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(stage, "state:reason") → some rows that ended so, from all over the ledger."""
    # One a shard first, so that a single site at the list's head does not speak for all; then any.
    spread: dict[tuple[str, str], list[dict[str, Any]]] = {}
    more: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(corpus.folder("ledger").glob("[0-9]*.parquet")):
        seen: set[tuple[str, str]] = set()
        for row in _columns(file, "url", "state", "reason", "detail", "stage").to_pylist():
            if row["state"] == KEPT:
                continue
            key = (row["stage"], f"{row['state']}:{row['reason']}")
            rows = (more if key in seen else spread).setdefault(key, [])
            seen.add(key)
            if len(rows) < REASON_SAMPLES:
                rows.append(row)
    return {key: [*rows, *more.get(key, [])][:REASON_SAMPLES] for key, rows in spread.items()}


def _clusters(corpus: Corpus) -> dict[str, Any]:
    """How many clusters of duplicates there are by size, and the largest: who stays, and some of who goes."""
    if not corpus.duplicates.exists():
        return {"sizes": [], "largest": []}
    table = _columns(corpus.duplicates, "index", "twin", "twin_url", "kind", "cluster_size")
    # The rows of one cluster share their twin.
    size = dict(zip(table["twin"].to_pylist(), table["cluster_size"].to_pylist(), strict=True))
    largest = sorted(size, key=lambda twin: (-size[twin], twin))[:CLUSTERS]
    rows = table.filter(pc.is_in(table["twin"], value_set=pa.array(largest, pa.int64()))).to_pylist()
    members: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        members.setdefault(row["twin"], []).append(row)
    wanted = {row["index"] for group in members.values() for row in group[:CLUSTER_SAMPLES]}
    url_of: dict[int, str] = {}
    for file in sorted(corpus.folder("dedup").glob("[0-9]*.signatures.parquet")) if wanted else []:
        signed = _columns(file, "index", "url")
        signed = signed.filter(pc.is_in(signed["index"], value_set=pa.array(list(wanted), pa.int64())))
        url_of.update(zip(signed["index"].to_pylist(), signed["url"].to_pylist(), strict=True))
    return {
        "sizes": _bars([(f"{n:,} documents", count) for n, count in sorted(Counter(size.values()).items())][:12]),
        "largest": [
            {
                "size": size[twin],
                "stays": members[twin][0]["twin_url"],
                "goes": [(row["kind"], url_of.get(row["index"], "")) for row in members[twin][:CLUSTER_SAMPLES]],
            }
            for twin in largest
        ],
    }


def _sample(row: Mapping[str, Any], out: Path, masked: bool) -> dict[str, Any]:
    """A document for the report: its text's beginning beside its page's, and the numbers behind it as short text."""
    numbers = json.loads(row["numbers"] or "{}")
    shown = [
        f"{name} {value:,}" if isinstance(value, int | float) else f"{name} {value}" for name, value in numbers.items()
    ]
    page, no_page = _page_lines(row, out, masked)
    text = row["text"][:SAMPLE_CHARACTERS]
    return {**row, "text": text, "characters": len(row["text"]), "shown": shown, "page": page, "no_page": no_page}


def _page_lines(row: Mapping[str, Any], out: Path, masked: bool) -> tuple[list[tuple[str, bool]], str]:
    """The beginning of what the page of a document shows, line by line, and whether the line is in the document's text.

    Without a page at hand (texts from a dataset, a WARC file that is gone, a page that was taken down) there are no
    lines, and the second part says so. `masked`: personal data are masked in the page as they are in the text.
    """
    if not row["warc_file"]:
        return [], "This text entered without a page."
    try:
        response = warc.read_response(out / row["warc_file"], row["warc_offset"])
        lines = visible_lines(response.body, response.content_type)
    except (warc.WarcError, OSError) as e:
        return [], f"The page is not at hand: {type(e).__name__}."
    kept = _bare(row["text"])
    found: list[tuple[str, bool]] = []
    size = 0
    for line in lines:
        if size > 2 * SAMPLE_CHARACTERS:
            break
        size += len(line)
        if masked:
            line = personal.mask(line)[0]
        found.append((line[:SAMPLE_CHARACTERS], _bare(line) in kept))
    return found, "The page shows no text."


def _bare(text: str) -> str:
    """The words of `text` alone, by which a line of a page is known again in the text that was made of it."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text))
    return f" {' '.join(words)} "


def _bars(rows: list[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """(label, count, width in percent of the longest bar)."""
    most = max((n for _, n in rows), default=1) or 1
    return [(label, n, 100 * n / most) for label, n in rows]
