"""One row a URL, for ever: which state it ended in, at which stage, why, and the numbers behind it.

Promise 2: what enters a stage is what the stage before kept, and every row of it ends as kept, dropped or failed. Where
that does not hold, AccountingError stops the run; a total that does not add up is a bug, never a rounding.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.layout import Corpus
from data_pipeline.records import DROPPED, FAILED, KEPT, LEDGER_SCHEMA, ORIGIN_NUMBERS, AccountingError, numbers_to_json
from data_pipeline.store import write_table


def write_ledger_shard(corpus: Corpus, k: int, stages: Sequence[str]) -> dict[str, Any]:
    """Follow each row of shard `k` through `stages`; write ledger/NNNNN.parquet; return the counts of each stage.

    Returns {"stages": {stage: {"in", "kept", "dropped", "failed", "reasons": {reason: n}}}}.
    """
    ended: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    entering: set[int] | None = None
    rows: list[dict[str, Any]] = []
    for stage in stages:
        rows = pq.read_table(corpus.verdicts(stage, k)).to_pylist()
        indexes = {row["index"] for row in rows}
        if len(indexes) != len(rows):
            raise AccountingError(f"{stage}, shard {k}: {len(rows)} rows hold {len(rows) - len(indexes)} index twice")
        if entering is not None and indexes != entering:
            raise AccountingError(
                f"{stage}, shard {k}: {len(entering)} rows were handed on, {len(indexes)} came out: "
                f"{len(entering - indexes)} lost, {len(indexes - entering)} from nowhere"
            )
        counts[stage] = count(rows, f"{stage}, shard {k}")
        ended += [{**row, "stage": stage} for row in rows if row["state"] != KEPT]
        entering = {row["index"] for row in rows if row["state"] == KEPT}
    origin = origin_numbers(corpus, k)
    for row in rows:
        if row["state"] == KEPT:
            numbers = row["numbers"]
            if row["index"] in origin:
                numbers = numbers_to_json({**json.loads(numbers or "{}"), **origin[row["index"]]})
            ended.append({**row, "numbers": numbers, "stage": stages[-1]})
    ended.sort(key=lambda row: row["index"])
    if len(ended) != counts[stages[0]]["in"]:
        raise AccountingError(f"shard {k}: {counts[stages[0]]['in']} rows in, {len(ended)} in the ledger")
    write_table(pa.Table.from_pylist(ended, schema=LEDGER_SCHEMA), corpus.ledger(k))
    return {"stages": counts}


def origin_numbers(corpus: Corpus, k: int) -> dict[int, dict[str, Any]]:
    """Index → ORIGIN_NUMBERS, for the pages of shard `k` that came otherwise than by a plain request."""
    path = corpus.verdicts("fetch", k)
    if not path.exists():  # source=dataset
        return {}
    found = {}
    table = pq.read_table(path, columns=["index", "numbers"])
    for index, text in zip(table["index"].to_pylist(), table["numbers"].to_pylist(), strict=True):
        if text and any(name in text for name in ORIGIN_NUMBERS):
            numbers = json.loads(text)
            found[index] = {name: numbers[name] for name in ORIGIN_NUMBERS if name in numbers}
    return found


def count(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """States and reasons of one stage's verdicts. Raises AccountingError for a row without a valid end."""
    states = Counter(row["state"] for row in rows)
    if set(states) - {KEPT, DROPPED, FAILED}:
        raise AccountingError(f"{where}: unknown state {sorted(map(str, set(states) - {KEPT, DROPPED, FAILED}))}")
    unexplained = [row["url"] for row in rows if row["state"] != KEPT and not row["reason"]]
    if unexplained:
        raise AccountingError(f"{where}: no reason for {unexplained[0]} and {len(unexplained) - 1} more")
    reasons = Counter(f"{row['state']}:{row['reason']}" for row in rows if row["state"] != KEPT)
    return {
        "in": len(rows),
        **{state: states.get(state, 0) for state in (KEPT, DROPPED, FAILED)},
        "reasons": dict(reasons),
    }


_REMEDIES = {
    "urls": "mend the list, or loosen url_list.*",
    "fetch": "give other pages, or loosen fetch.*",
    "extract": "give pages or texts that hold more, or loosen extract.*",
    "filter": "loosen language.* or quality.*",
    "dedup": "give other documents, or loosen dedup.*",
    "decontaminate": "give other documents, or loosen decontaminate.*",
}


def why_nothing_is_left(summary: Mapping[str, Any]) -> str:
    """One line for a corpus without a document: the end that most rows came to, and what to do."""
    ends = [(n, row["stage"], *end.split(":", 1)) for row in summary["stages"] for end, n in row["reasons"].items()]
    if not ends:
        return "no row came in; give other input"
    n, stage, state, reason = max(ends, key=lambda end: int(end[0]))
    remedy = _REMEDIES[stage]
    if stage == "fetch" and state == FAILED and summary["source"] == "urls":
        remedy = f"mend the network or the list, then run again with retry=[{reason}]"
    rows = f"{n:,} of {summary['urls']['in']:,} rows"
    return f"no document is left: {rows} {state} at {stage} for {reason}; {remedy}; `gpt2train report` shows all"


def funnel(shards: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    """Totals over shards. Raises AccountingError unless rows in = kept + dropped (reason) + failed (reason)."""
    total: list[dict[str, Any]] = []
    for stage in stages:
        row: dict[str, Any] = {"stage": stage, "in": 0, KEPT: 0, DROPPED: 0, FAILED: 0}
        reasons: Counter[str] = Counter()
        for shard in shards:
            numbers = shard["stages"][stage]
            for key in ("in", KEPT, DROPPED, FAILED):
                row[key] += numbers[key]
            reasons.update(numbers["reasons"])
        row["reasons"] = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
        total.append(row)
    for before, after in itertools.pairwise(total):
        if before[KEPT] != after["in"]:
            raise AccountingError(f"{before['stage']} kept {before[KEPT]}, {after['stage']} took in {after['in']}")
    for row in total:
        if row["in"] != row[KEPT] + row[DROPPED] + row[FAILED] or sum(row["reasons"].values()) != row["in"] - row[KEPT]:
            raise AccountingError(f"{row['stage']}: {row['in']} in, but {row}")
    urls = {
        "in": total[0]["in"],
        KEPT: total[-1][KEPT],
        DROPPED: sum(row[DROPPED] for row in total),
        FAILED: sum(row[FAILED] for row in total),
    }
    if urls["in"] != urls[KEPT] + urls[DROPPED] + urls[FAILED]:
        raise AccountingError(f"URLs in ≠ kept + dropped + failed: {urls}")
    return {"stages": total, "urls": urls}
