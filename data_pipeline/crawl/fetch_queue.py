"""What waits to be fetched: shards of URLs that are read bit by bit, and the queue of each host.

A URL file of a shard flows in, jobs in their hosts' queues flow out; what the shard's journal has decided is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.crawl.earlier import EarlierPage, earlier_pages
from data_pipeline.crawl.fetch_journal import ShardLog
from data_pipeline.crawl.url_syntax import host_of


@dataclass(frozen=True)
class FetchShard:
    """`urls`: a file of URL_SCHEMA, sorted by index; `folder`: where journal and audit log of shard `number` lie;
    `since`: the page table of the same shard of an earlier corpus."""

    urls: Path
    folder: Path
    number: int
    since: Path | None = None


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
    earlier: EarlierPage | None = None


class Host:
    """A host's queue of (not before, sequence, job), when it may be asked next, its delay as far as it is known,
    whether it sent its last page quickly, and `strain`: by how much its delay is stretched since it said 429 or 503."""

    __slots__ = ("busy", "delay_s", "failures", "name", "next_start", "queue", "quick", "strain")

    def __init__(self, name: str, delay_s: float) -> None:
        self.name = name
        self.delay_s = delay_s
        self.strain = 1.0
        self.queue: list[tuple[float, int, Job]] = []
        self.next_start = 0.0
        self.busy = self.quick = False
        self.failures = 0

    def due(self) -> float:
        return max(self.next_start, self.queue[0][0])


def host_counts(urls: pa.ChunkedArray) -> Counter[str]:
    """Host → how many of `urls` (normal forms) are its own; what is no such form counts for some host or other."""
    counts: Counter[str] = Counter()
    if len(urls):
        with_third_part = pc.binary_join_element_wise(urls, "//", "")
        authorities = pc.list_element(pc.split_pattern(with_third_part, "/", max_splits=3), 2)
        for item in pc.value_counts(authorities).to_pylist():
            counts[host_of(f"http://{item['values']}/")] += item["counts"]
    return counts


class OpenShard:
    """A shard under way: its log, the rows not yet read, and how many of its URLs wait."""

    def __init__(self, shard: FetchShard, corpus: Path, max_warc_bytes: int) -> None:
        self.shard = shard
        self.log = ShardLog(shard.folder, shard.number, corpus, max_warc_bytes)
        self.waiting = 0
        self.exhausted = False
        urls = pq.read_table(shard.urls, columns=["url"])["url"]
        left = urls
        if self.log.done:
            left = pa.chunked_array([[url for url in urls.to_pylist() if url not in self.log.done]], type=pa.string())
        self.decided_before = len(urls) - len(left)
        self.left_by_host = host_counts(left)
        since = shard.since
        # That table lies in CORPUS/fetch/, and the WARC files that it names are told from CORPUS on.
        self.earlier = earlier_pages(since, since.parent.parent) if since is not None and len(left) else {}
        self.rows = self._read()

    def _read(self) -> Iterator[str]:
        with pq.ParquetFile(self.shard.urls) as parquet:
            for batch in parquet.iter_batches(batch_size=1000, columns=["url"]):
                for url in batch.column(0).to_pylist():
                    if url not in self.log.done:
                        yield url
        self.exhausted = True
