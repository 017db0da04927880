"""What waits to be fetched: shards of URLs that are read bit by bit, and the queue of each host.

A URL file of a shard flows in, jobs in their hosts' queues flow out; what the shard's journal has decided is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.crawl.fetch_journal import ShardLog


@dataclass(frozen=True)
class FetchShard:
    """`urls`: a file of URL_SCHEMA, sorted by index; `folder`: where journal and audit log of shard `number` lie."""

    urls: Path
    folder: Path
    number: int


@dataclass(slots=True)
class Job:
    """One URL on its way: `url` is where the redirects so far have led."""

    shard: OpenShard
    original: str
    url: str
    seen: list[str] = field(default_factory=list)
    tries: int = 0
    requests: int = 0
    spent_s: float = 0.0
    was_stale: bool = False


class Host:
    """A host's queue of (not before, sequence, job), and when it may be asked next."""

    __slots__ = ("busy", "failures", "name", "next_start", "queue")

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: list[tuple[float, int, Job]] = []
        self.next_start = 0.0
        self.busy = False
        self.failures = 0

    def due(self) -> float:
        return max(self.next_start, self.queue[0][0])


class OpenShard:
    """A shard under way: its log, the rows not yet read, and how many of its URLs wait."""

    def __init__(self, shard: FetchShard, corpus: Path, max_warc_bytes: int) -> None:
        self.shard = shard
        self.log = ShardLog(shard.folder, shard.number, corpus, max_warc_bytes)
        self.waiting = 0
        self.exhausted = False
        urls = pq.read_table(shard.urls, columns=["url"])["url"] if self.log.done else ()
        self.decided_before = sum(url.as_py() in self.log.done for url in urls)
        self.rows = self._read()

    def _read(self) -> Iterator[str]:
        with pq.ParquetFile(self.shard.urls) as parquet:
            for batch in parquet.iter_batches(batch_size=1000, columns=["url"]):
                for url in batch.column(0).to_pylist():
                    if url not in self.log.done:
                        yield url
        self.exhausted = True
