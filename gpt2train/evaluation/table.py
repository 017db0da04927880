"""Task records → a table beside GPT-2's four sizes, for the terminal and for the run's report.

In: records as evaluation.json holds them. Out: rows of text. A row is one score of a task; the scores that were
published for GPT-2 come with their values, and every task with the share of its 8-grams in the training data.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2train.evaluation.tasks import SIZES

_NO_SHARES = ("perplexity", "bits", "bleu")
"""How the names of scores begin that are no shares of 1."""
COLUMNS = ("task", "score", "value", "± s.e.", "items", "8-grams seen", *SIZES)


def is_share(metric: str) -> bool:
    """Is the score a share of 1, rather than a perplexity, bits or BLEU?"""
    return not metric.startswith(_NO_SHARES)


def shown(metric: str, value: float | None, digits: int = 2) -> str:
    """A perplexity as it is, a share of 1 in per cent."""
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f} %" if is_share(metric) else f"{value:.{digits}f}"


def rows(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One tuple of COLUMNS a score: the task's main one first, then those that were published, then the rest."""
    made = []
    for record in records:
        published = {p["metric"]: p["values"] for p in record.get("published", [])}
        scores = record["scores"]
        order = [record["metric"], *published, *scores]
        contamination = record.get("contamination")
        for place, metric in enumerate(m for m in dict.fromkeys(order) if m in scores):
            first, score = place == 0, scores[metric]
            items, of_items = record["items"], record["of_items"]
            made.append(
                (
                    record["title"] if first else "",
                    metric,
                    shown(metric, score["value"]),
                    shown(metric, score["stderr"]),
                    (f"{items:,}" if items == of_items else f"{items:,} of {of_items:,}") if first else "",
                    (f"{100 * contamination['share']:.2f} %" if contamination else "–") if first else "",
                    *(shown(metric, value) if value is not None else "" for value in published.get(metric, [None] * 4)),
                )
            )
    return made


def show(records: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints the table; what was published for GPT-2 stands under the paper's names of its sizes."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(COLUMNS):
        table.add_column(
            name,
            justify="left" if number < 2 else "right",
            no_wrap=number > 1,
            overflow="fold" if number < 2 else "ellipsis",
        )
    for row in rows(records):
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(Text(title))
    console.print(table)
    protocols: dict[str, list[str]] = {}
    for record in records:
        protocols.setdefault(record["protocol"], []).append(f"{record['name']} ({record['data']['file']})")
    for protocol, names in protocols.items():
        console.print(Text(f"{', '.join(names)}: {protocol}", style="dim"))


def show_harness(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what lm-evaluation-harness found, in its own names."""
    table = Table(box=box.SIMPLE_HEAD, title="lm-evaluation-harness", title_justify="left")
    for name in ("task", "score", "value"):
        table.add_column(name, justify="right" if name == "value" else "left", no_wrap=name == "value")
    for task, result in found.items():
        for place, (score, value) in enumerate(sorted(result["scores"].items())):
            table.add_row(Text(task if place == 0 else ""), Text(score), f"{value:.4f}")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
