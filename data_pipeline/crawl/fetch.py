"""URLs → responses in WARC files, politely and safely; each URL ends in exactly one typed state.

    urls/00000.parquet ─► scheduler (a turn for each host) ─► http.get (one bounded request) ─► page_rules
                                │                                                                │
    corpus/warc/00000-000.warc.gz, fetch/00000.journal.jsonl, fetch/00000.audit.jsonl ◄──────────┘

    kept      an HTML page: WARC record, then journal line; or one that did not change since an earlier corpus
              (`since`: a WARC revisit record), or a dead link found in a WARC file at hand (`rescue`)
    dropped   robots, noindex, wrong_type, blocked_address, bad_scheme, crawl_delay
    failed    dns, connect, tls, timeout, http_status, too_large, header_too_large, truncated, protocol, bad_encoding,
              robots_unreachable, redirect_loop, too_many_redirects, retry_after, out_of_budget

One event loop serves all shards it is given; what it has decided is never decided again, however often it is killed.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import uvloop

from data_pipeline.config import FetchConfig
from data_pipeline.crawl.addresses import AddressRules, Lookup, read_hosts_file
from data_pipeline.crawl.fetch_journal import decisions_and_tries, journal_path, read_journal, warc_name, warc_path
from data_pipeline.crawl.fetch_queue import FetchShard
from data_pipeline.crawl.http.get import HttpClient
from data_pipeline.crawl.lanes import SLOW_LANE_FACTOR
from data_pipeline.crawl.rescue import Rescue, is_dead
from data_pipeline.crawl.scheduler import OPEN_SHARDS, Scheduler
from data_pipeline.crawl.url_syntax import host_of, origin_of, port_of, starts_normal
from data_pipeline.records import (
    FAILED,
    KEPT,
    PAGE_SCHEMA,
    VERDICT_SCHEMA,
    AccountingError,
    ConfigError,
    CorruptionError,
    Verdict,
    verdict_table,
)

__all__ = ["FetchShard", "fetch_shards", "finish_shard", "read_journal"]


_GC_THRESHOLD = (20_000, 20, 20)
"""Python's collector by default goes over all that lives after every 700 new objects, a few dozen pages; what a page
leaves behind holds no circles."""


def fetch_shards(
    shards: Sequence[FetchShard],
    config: FetchConfig,
    corpus: Path,
    on_progress: Callable[[int, int], None],
    lookup: Lookup | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> int:
    """Fetch until every URL of `shards` has its state in a journal; `on_progress(done, total)` counts URLs, `on_note`
    gets a line now and then on when the end can come. Returns how many URLs this call decided.

    Call it again after a crash: it goes on. On SIGTERM or SIGINT journals are closed and the signal is raised again.
    Raises ConfigError before any request if a contact is needed and missing, StorageError when the disk is full.
    `lookup`: name → addresses, for tests.
    """
    demand_contact(shards, config)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        caught, decided = uvloop.run(_run(shards, config, corpus, on_progress, lookup, on_note))
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)  # the event loop leaves the system's defaults behind
    if caught is not None:
        signal.raise_signal(caught)
    return decided


def demand_contact(shards: Sequence[FetchShard], config: FetchConfig) -> None:
    """Without `fetch.contact` every URL must lead to an allow-listed address by its own name. Raises ConfigError."""
    if config.contact:
        return
    remedy = "fetch.contact='': site owners must be able to reach you; give fetch.contact=https://… or a mail address"
    rules = AddressRules(config)
    hosts = read_hosts_file(Path(config.hosts_file)) if config.hosts_file else {}
    seen: set[str] = set()
    for shard in shards:
        with pq.ParquetFile(shard.urls) as parquet:
            for batch in parquet.iter_batches(columns=["url"]):
                for url in batch.column(0).to_pylist():
                    if not starts_normal(url) or (origin := origin_of(url)) in seen:
                        continue
                    seen.add(origin)
                    host = host_of(url)
                    if any(rules.refusal(ip, port_of(url)) for ip in hosts.get(host, [host])):
                        raise ConfigError([f"{remedy} ({url[:100]} is not in fetch.allow_addresses)"])


async def _run(
    shards: Sequence[FetchShard],
    config: FetchConfig,
    corpus: Path,
    on_progress: Callable[[int, int], None],
    lookup: Lookup | None,
    on_note: Callable[[str], None],
) -> tuple[int | None, int]:
    """The signal that ended the run, if one did, and how many URLs were decided."""
    collector = gc.get_threshold()
    gc.set_threshold(*_GC_THRESHOLD)
    before = _raise_file_limit(config.concurrency * (1 + SLOW_LANE_FACTOR) + 3 * OPEN_SHARDS + 1000)
    client = HttpClient(config, lookup)
    scheduler = Scheduler(shards, config, corpus, client, on_progress, on_note)
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in signals:
        loop.add_signal_handler(number, scheduler.stop, number)
    try:
        await scheduler.run()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await client.close()
        gc.set_threshold(*collector)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    return scheduler.caught, scheduler.done - scheduler.decided_before


def _raise_file_limit(needed: int) -> tuple[int, int]:
    """Allow this process `needed` descriptors as far as the hard limit goes; returns the limits before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = before
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
    return before


def finish_shard(shard: FetchShard, corpus: Path, rescue: Rescue | None = None) -> tuple[pa.Table, pa.Table]:
    """(pages: PAGE_SCHEMA, verdicts: VERDICT_SCHEMA with one row for every URL of the shard), sorted by index.

    `rescue`: the archived pages among which dead links are looked up.

    Raises AccountingError when a URL has no state yet, CorruptionError when a page is not in its WARC file.
    """
    lines, tries = decisions_and_tries(journal_path(shard.folder, shard.number))
    urls = pq.read_table(shard.urls).to_pylist()
    dead = [url for url, line in lines.items() if line["state"] == FAILED and is_dead(line["reason"], line["detail"])]
    archived = rescue.find(dead) if rescue is not None else {}
    pages: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    sizes: dict[int, int] = {}
    for row in urls:
        line = lines.get(row["url"])
        if line is None:
            raise AccountingError(f"fetch: URL {row['index']} ({row['url']}) has no state in shard {shard.number}")
        numbers = {name: line[name] for name in ("status", "bytes", "wire_bytes", "requests") if name in line}
        if tries[row["url"]] > 1:
            numbers["rounds"] = tries[row["url"]]
        if "unchanged" in line:
            numbers["not_modified"] = 1
        verdict = Verdict(row["index"], row["url"], line["state"], line.get("reason"), line.get("detail"), numbers)
        if rescue is not None and row["url"] in archived:
            verdict = rescue.verdict(verdict, archived[row["url"]])
            if verdict.state == KEPT:
                pages.append({**archived[row["url"]], "index": row["index"]})
        verdicts.append(verdict)
        if line["state"] != KEPT:
            continue
        part = line["part"]
        if part not in sizes:
            file = warc_path(corpus, shard.number, part)
            sizes[part] = file.stat().st_size if file.exists() else -1
        if line["end"] > sizes[part]:
            name = warc_name(shard.number, part)
            raise CorruptionError(
                f"{corpus / name}: expected at least {line['end']} bytes, got {max(0, sizes[part])}; "
                f"remove {journal_path(shard.folder, shard.number)} to fetch the shard again"
            )
        pages.append(
            {
                "index": row["index"],
                "url": row["url"],
                "final_url": line.get("final_url", row["url"]),
                "domain": row["domain"],
                "status": line["status"],
                "content_type": line["content_type"],
                "fetched_at": line["fetched_at"],
                "warc_file": warc_name(shard.number, part),
                "warc_offset": line["offset"],
                "payload_digest": line["digest"],
                "etag": line.get("etag"),
                "last_modified": line.get("last_modified"),
                **line.get("unchanged", {}),  # where the body lies that still holds
            }
        )
    table = verdict_table(verdicts) if verdicts else VERDICT_SCHEMA.empty_table()
    return pa.Table.from_pylist(pages, schema=PAGE_SCHEMA), table
