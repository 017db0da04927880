"""`retry=[dns,timeout,http_429]`: URLs that ended with such a reason are opened again, in rounds that survive kills.

Journals and reasons flow in, one line a journal flows out: the URLs that this round opens again. Nothing is erased:
the earlier decisions stay in the journal, and the newest one of a URL counts. `retry.json` says that a round is under
way; while it is, a restart goes on with it and opens nothing twice, however often it is killed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.crawl.fetch_journal import journal_path, newest_decisions, reopen, rounds_of
from data_pipeline.crawl.fetch_queue import FetchShard
from data_pipeline.records import KEPT
from data_pipeline.store import read_json, write_json


@dataclass(frozen=True)
class RetryRound:
    """`waiting`: shard number → URLs of it that are open again and not decided yet; shards without any are left out."""

    reasons: tuple[str, ...]
    waiting: dict[int, int]


def begin_round(folder: Path, shards: Sequence[FetchShard], reasons: Sequence[str]) -> RetryRound | None:
    """Open the URLs again that ended with one of `reasons`, or go on with the round that is under way.

    A round under way is ended first, with its own reasons, whatever `reasons` says now. None: there is no round.
    """
    state = _read_state(folder)
    if not state["under_way"]:
        if not reasons:
            return None
        earlier = (rounds_of(journal_path(shard.folder, shard.number)) for shard in shards)
        last = max(state["round"], *(number for rounds in earlier for number in rounds), 0)  # also without its file
        state = {"round": last + 1, "reasons": sorted(set(reasons)), "under_way": True}
        write_json(state, folder / "retry.json")
    waiting: dict[int, int] = {}
    for shard in shards:
        path = journal_path(shard.folder, shard.number)
        decisions = newest_decisions(path)
        listed = pq.read_table(shard.urls, columns=["url"])["url"].to_pylist()
        if state["round"] not in rounds_of(path):
            again = [u for u in listed if u in decisions and is_meant(decisions[u], state["reasons"])]
            reopen(path, state["round"], again)
            for url in again:
                del decisions[url]
        missing = sum(url not in decisions for url in listed)
        if missing:
            waiting[shard.number] = missing
    return RetryRound(tuple(state["reasons"]), waiting)


def end_round(folder: Path) -> None:
    """To be called once every URL of the round is decided anew."""
    state = _read_state(folder)
    if state["under_way"]:
        write_json({**state, "under_way": False}, folder / "retry.json")


def is_meant(line: dict[str, Any], reasons: Sequence[str]) -> bool:
    """Whether a journal line ended with one of `reasons`.

    >>> is_meant({"state": "failed", "reason": "http_status", "detail": "429"}, ["http_429"])
    True
    """
    if line["state"] == KEPT:
        return False
    status = re.match(r"\d{3}\b", line.get("detail") or "") if line["reason"] == "http_status" else None
    names = {line["reason"], *((status.group(), f"http_{status.group()}") if status else ())}
    return not names.isdisjoint(reasons)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "retry.json", "remove it; what was fetched stays, and retry= may be given again")
    except FileNotFoundError:
        return {"round": 0, "reasons": [], "under_way": False}
