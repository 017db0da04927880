"""What the end of a fetch waits for: the hosts that have the most left.

A host is asked one URL at a time, its delay apart, so the end cannot come before the longest of all hosts' queues is
through. Shards flow in and are put in an order, those with the longest queue first; while they are open it is known how
many URLs each host has left, which says whose turn goes first and when the end can come. Memory: one number a shard,
and one a host of the open shards.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

import pyarrow.parquet as pq

from data_pipeline.crawl.fetch_queue import FetchShard, host_counts


class Backlog:
    """URLs left, by host for open shards, and the largest host of each shard that is still to be opened."""

    def __init__(self, shards: Sequence[FetchShard]) -> None:
        largest = [(self._largest(shard), shard) for shard in shards]
        largest.sort(key=lambda item: -item[0])  # stable: equal ones stay in the list's order
        self.unopened: deque[FetchShard] = deque(shard for _, shard in largest)
        self._largest_unopened = deque(size for size, _ in largest)
        self._left: Counter[str] = Counter()

    @staticmethod
    def _largest(shard: FetchShard) -> int:
        urls = pq.read_table(shard.urls, columns=["url"])["url"]
        return max(host_counts(urls).values(), default=0)

    def next_shard(self) -> FetchShard:
        self._largest_unopened.popleft()
        return self.unopened.popleft()

    def opened(self, counts: Counter[str]) -> None:
        """`counts`: the undecided URLs of a shard that was opened, by host."""
        self._left.update(counts)

    def decided(self, host: str) -> None:
        self._left[host] -= 1
        if self._left[host] <= 0:
            del self._left[host]

    def left(self, host: str) -> int:
        return self._left.get(host, 0)

    def slowest(self, delays: Iterable[tuple[str, float]], delay_s: float) -> tuple[str, float]:
        """(host, seconds) of the longest queue: `delays` of the hosts at work; `delay_s` for shards not yet open."""
        best = ("a host whose turn has not come", (self._largest_unopened[0] if self.unopened else 0) * delay_s)
        for host, delay in delays:
            best = max(best, (host, self.left(host) * delay), key=lambda item: item[1])
        return best
