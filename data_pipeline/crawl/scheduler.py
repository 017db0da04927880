"""When each URL has its turn, and what becomes of it: the event loop's side of the fetch.

    shards of URLs ─ read as there is room ─► hosts, each with its queue and the time of its next turn
        │ a host's first turn fetches its robots.txt (RFC 9309); every later turn is one request of one URL
        │ a redirect is a new turn of the host that it leads to, with that host's robots.txt and delay; where several
    │ processes fetch, `shared_turns` keeps two of them from asking one host at the same time
        ▼ a decision in the shard's journal, the page before it in its WARC file

Memory is bounded: so many shards are open, so many URLs of each are waiting, so many responses are under way; hosts are
forgotten when they have nothing to do. A request that takes long leaves its place to others and goes on in a slow lane,
so that dripping hosts do not stop the good ones. Of the hosts whose turn it is, the one with the most left goes first
(`tail`), so that the end does not wait for a long queue that was begun late.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.config import FetchConfig
from data_pipeline.crawl.decision import journal_line
from data_pipeline.crawl.fetch_queue import FetchShard, Host, Job, OpenShard
from data_pipeline.crawl.http.get import FetchError, HttpClient, Reply, now_text, retry_after_s
from data_pipeline.crawl.lanes import NEW_SLOW_AFTER_S, SLOW_AFTER_S, Flight, Lanes
from data_pipeline.crawl.page_rules import REDIRECTS, header_refusal, page_body, redirect_target, wants_body
from data_pipeline.crawl.robots_cache import RobotsCache
from data_pipeline.crawl.shared_turns import SharedTurns
from data_pipeline.crawl.tail import Backlog
from data_pipeline.crawl.url_syntax import host_of, origin_of, starts_normal
from data_pipeline.records import DROPPED, FAILED, KEPT, AccountingError

DROPPED_REASONS = frozenset(("robots", "noindex", "wrong_type", "blocked_address", "bad_scheme", "crawl_delay"))
OPEN_SHARDS = 128
"""Shards (with a journal, an audit log and a WARC file each) open at once; so many are reached only when most of them
wait for their slowest host."""
WAITING_URLS = 2000
"""URLs of one open shard that wait in hosts' queues."""
GIVE_UP_AFTER = 10
"""Tries in a row that got no response: then the host's waiting URLs end with the same reason."""
GIVE_UP_REASONS = frozenset(("dns", "connect", "tls", "timeout"))
SYNC_EVERY_S = 2.0
PROGRESS_EVERY_S = 0.2
ESTIMATE_EVERY_S = 60.0
STRAIN_GROWS, STRAIN_EASES, MAX_STRAIN = 2.0, 0.95, 32.0
"""A 429 or 503 stretches a host's delay by the first, each page shrinks it again by the second."""
LEAST_TURN_S = 0.05
"""What a delay of 0 counts as, where hosts are ordered by the time they need and where one has said 429 or 503."""
TAIL_SHARE = 0.99
"""`tail_budget_s` runs once this share of the URLs is done."""


class Scheduler:
    def __init__(
        self,
        shards: Sequence[FetchShard],
        config: FetchConfig,
        corpus: Path,
        client: HttpClient,
        on_progress: Callable[[int, int], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.config, self.corpus, self.client = config, corpus, client
        self.on_progress, self.on_note = on_progress, on_note
        self.backlog = Backlog(shards)
        self.open: list[OpenShard] = []
        self.total = sum(pq.read_metadata(s.urls).num_rows for s in shards)
        self.done = 0
        self.decided_before = 0
        """Of `done`, how many an earlier run decided."""
        self.reported = 0.0
        self.hosts: dict[str, Host] = {}
        self.turns: list[tuple[float, int, Host]] = []  # by the time that they are due
        # Hosts that are due, the longest queue first: those that have yet to answer quickly, and those that have.
        self.ready: dict[bool, list[tuple[float, int, Host]]] = {False: [], True: []}
        self.resting: list[tuple[float, int, Host]] = []
        self.sequence = itertools.count()
        self.robots = RobotsCache(client, config, self)
        self.shared: SharedTurns | None = None
        if config.processes > 1 and shards:
            longest_s = MAX_STRAIN * max(config.delay_s, config.max_crawl_delay_s) + config.max_retry_after_s
            self.shared = SharedTurns(shards[0].folder / "turns", longest_s)
        self.wake = asyncio.Event()
        self.lanes = Lanes(config.concurrency, self.wake.set)
        self.tasks: set[asyncio.Task[None]] = set()
        self.tail_deadline: float | None = None
        self.error: BaseException | None = None
        self.caught: int | None = None
        self.random = random.Random()

    def stop(self, number: int) -> None:
        self.caught = number
        self.wake.set()

    async def run(self) -> None:
        self._feed()
        syncing = asyncio.create_task(self._sync_now_and_then())
        estimating = asyncio.create_task(self._estimate_now_and_then())
        try:
            while self.done < self.total and self.error is None and self.caught is None:
                now = time.monotonic()
                if self._tail_is_over(now):
                    await self._end_tail()
                    break
                self._start_due(now)
                self._forget_hosts(now)
                await self._sleep_until(self._next_event())
                self._feed()
            if self.error is not None:
                raise self.error
        finally:
            for task in (*self.tasks, syncing, estimating):
                task.cancel()
            await asyncio.gather(*self.tasks, syncing, estimating, return_exceptions=True)
            for shard in self.open:
                shard.log.close()
            if self.shared is not None:
                self.shared.close()
            self.on_progress(self.done, self.total)
        if self.caught is None and self.done != self.total:
            raise AccountingError(f"fetch: {self.total} URLs in, {self.done} decided")

    # ---- what to do next ----

    def _feed(self) -> None:
        """Keep hosts' queues filled: read on in the open shards, and open further ones while few hosts have work."""
        for shard in self.open:
            if shard.waiting < WAITING_URLS // 2 and not shard.exhausted:
                self._fill(shard)
        self._close_finished()
        wanted = 4 * self.config.concurrency
        while self.backlog.unopened and len(self.open) < OPEN_SHARDS and self._waiting_hosts() < wanted:
            shard = self._open_next()
            self._fill(shard)
            self._close_finished()

    def _waiting_hosts(self) -> int:
        return len(self.turns) + len(self.ready[False]) + len(self.ready[True])

    def _open_next(self) -> OpenShard:
        shard = OpenShard(self.backlog.next_shard(), self.corpus, self.config.max_warc_bytes)
        self.done += shard.decided_before
        self.decided_before += shard.decided_before
        self.backlog.opened(shard.left_by_host)
        self.open.append(shard)
        return shard

    def _fill(self, shard: OpenShard) -> None:
        for url in itertools.islice(shard.rows, WAITING_URLS - shard.waiting):
            shard.waiting += 1
            job = Job(shard, url, url, earlier=shard.earlier.get(url))
            if starts_normal(url):
                self._enqueue(job)
            else:  # the first stage lets none through, but its file may have been tampered with
                self._decide(job, DROPPED, "bad_scheme", "no http or https URL in normal form")
        # Whether the iterator is at its end shows only at the next row.
        if shard.waiting < WAITING_URLS:
            shard.exhausted = True

    def _close_finished(self) -> None:
        for shard in [s for s in self.open if s.exhausted and not s.waiting]:
            shard.log.close()
            self.open.remove(shard)

    def _enqueue(self, job: Job, not_before: float = 0.0) -> None:
        host = self._host(host_of(job.url))
        heapq.heappush(host.queue, (not_before, next(self.sequence), job))
        if not host.busy:
            self._schedule(host)

    def _host(self, name: str) -> Host:
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(name, self.config.delay_s)
        return host

    def _schedule(self, host: Host) -> None:
        heapq.heappush(self.turns, (host.due(), next(self.sequence), host))

    def _start_due(self, now: float) -> None:
        while self.turns and self.turns[0][0] <= now:
            _, _, host = heapq.heappop(self.turns)
            if not host.busy and host.queue:
                left_s = self.backlog.left(host.name) * max(host.delay_s, LEAST_TURN_S)
                heapq.heappush(self.ready[host.quick], (-left_s, next(self.sequence), host))
        while (next_host := self._next_ready()) is not None:
            host = next_host
            if host.busy or not host.queue:
                continue  # an older entry of the same host was first
            if host.due() > now:
                self._schedule(host)
                continue
            wait_s = self.claim(host.name)
            if wait_s:  # another process is asking it, or has just done so
                host.next_start = max(host.next_start, now + wait_s)
                self._schedule(host)
                continue
            _, _, job = heapq.heappop(host.queue)
            host.busy = True
            flight = Flight(self.lanes, new=not host.quick)
            task = asyncio.create_task(self._turn(host, job, flight))
            self.tasks.add(task)
            task.add_done_callback(self._ended)

    def _next_ready(self) -> Host | None:
        """Of the hosts for which there is room, the one with the most left."""
        heaps = [
            self.ready[quick] for quick in (False, True) if self.ready[quick] and self.lanes.has_room(new=not quick)
        ]
        return heapq.heappop(min(heaps))[2] if heaps else None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.error = self.error or task.exception()
        self.wake.set()

    def _forget_hosts(self, now: float) -> None:
        """Hosts without work are kept until their delay is over, so that a redirect to one of them still waits."""
        while self.resting and self.resting[0][0] <= now:
            _, _, host = heapq.heappop(self.resting)
            if not host.queue and not host.busy and host.next_start <= now and self.hosts.get(host.name) is host:
                del self.hosts[host.name]

    def _next_event(self) -> float | None:
        times = [self.tail_deadline] if self.tail_deadline is not None else []
        if self.turns and self.lanes.has_room(new=False):
            times.append(self.turns[0][0])
        return min(times, default=None)

    async def _sleep_until(self, moment: float | None) -> None:
        timer = None
        if moment is not None:
            timer = asyncio.get_running_loop().call_later(max(0.0, moment - time.monotonic()), self.wake.set)
        await self.wake.wait()
        self.wake.clear()
        if timer is not None:
            timer.cancel()

    async def _sync_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            try:
                for shard in list(self.open):
                    await shard.log.sync()
            except Exception as e:
                self.error = self.error or e
                self.wake.set()

    async def _estimate_now_and_then(self) -> None:
        """Tell from time to time when the end can come, and which host it waits for."""
        began, done = time.monotonic(), self.done
        while True:
            await asyncio.sleep(ESTIMATE_EVERY_S)
            rate = (self.done - done) / (time.monotonic() - began)
            rate_s = (self.total - self.done) / rate if rate else float("inf")
            delays = ((h.name, max(h.delay_s, h.next_start - time.monotonic())) for h in self.hosts.values())
            name, host_s = self.backlog.slowest(delays, self.config.delay_s)
            if host_s > rate_s:
                self.on_note(f"fetch: {host_s:,.0f} s to go at least: so long takes {name}, one URL a turn")

    def _tail_is_over(self, now: float) -> bool:
        budget_s = self.config.tail_budget_s
        if self.tail_deadline is None and budget_s and 0 < int(TAIL_SHARE * self.total) <= self.done:
            self.tail_deadline = now + budget_s
        return self.tail_deadline is not None and now >= self.tail_deadline

    async def _end_tail(self) -> None:
        """Every URL that is not decided yet ends as `out_of_budget`."""
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        why = f"not done {self.config.tail_budget_s:g} s (fetch.tail_budget_s) after 99 % of all URLs were"
        while self.open or self.backlog.unopened:
            if not self.open:
                self._open_next()
            for shard in self.open:
                with pq.ParquetFile(shard.shard.urls) as parquet:
                    for row in parquet.read(columns=["url"]).to_pylist():
                        if row["url"] not in shard.log.done:
                            job = Job(shard, row["url"], row["url"])
                            self._decide(job, FAILED, "out_of_budget", why)
                shard.log.close()
            self.open.clear()

    # ---- one turn of one host ----

    async def _turn(self, host: Host, job: Job, flight: Flight) -> None:
        slow_after_s = NEW_SLOW_AFTER_S if flight.new else SLOW_AFTER_S
        slow_down = asyncio.get_running_loop().call_later(slow_after_s, flight.slow_down)
        try:
            await self._robots_or_page(host, job, flight)
        except FetchError as e:
            self._retry_or_fail(host, job, e)
        finally:
            slow_down.cancel()
            flight.land()
            host.busy = False
            self.release(host.name)
            if host.queue:
                self._schedule(host)
            else:
                self._rest(host)

    async def _robots_or_page(self, host: Host, job: Job, flight: Flight) -> None:
        rule = "fetch.robots=false: robots.txt is not asked for"
        asked_delay_s = 0.0
        if self.config.robots:
            origin = origin_of(job.url)
            site = self.robots.known(origin)
            if site is None:
                await self.robots.fetch(origin, job.shard.log.audit)
                self._enqueue(job)  # the page waits for the host's next turn
                return
            if site.error is not None:
                raise FetchError(site.error.reason, site.error.detail)
            if site.delay_s > self.config.max_crawl_delay_s:
                bound = self.config.max_crawl_delay_s
                raise FetchError("crawl_delay", f"Crawl-delay: {site.delay_s:g} > fetch.max_crawl_delay_s={bound:g}")
            decision = site.rules.decide(job.url, self.config.user_agent)
            rule = decision.rule
            if not decision.allowed:
                raise FetchError(site.refusal_reason, rule)
            asked_delay_s = site.delay_s
        started = time.monotonic()
        host.delay_s = self._delay_s(host, asked_delay_s)
        self.rest_until(host.name, started + host.delay_s)
        conditions = job.earlier.conditions() if job.earlier and job.url == job.earlier.final_url else {}
        audit: dict[str, Any] = {
            "at": now_text(),
            **({"for": job.original} if job.url != job.original else {}),
            "url": job.url,
            "rule": rule,
            "delay_s": round(host.delay_s, 3),
            **({"asked_if_changed": True} if conditions else {}),
        }
        job.requests += 1
        try:
            reply = await self.client.get(
                job.url,
                timeout_s=max(0.1, self.config.timeout_s - job.spent_s),
                max_bytes=self.config.max_page_bytes,
                wanted=lambda head: wants_body(head, self.config),
                on_bytes=flight.on_bytes,
                last=not host.queue,
                conditions=conditions,
            )
            audit["status"] = reply.status
            host.failures = 0
            host.quick = not flight.slow  # by a page, since a host may drip although its robots.txt came at once
        except FetchError as e:
            audit["error"] = e.reason
            host.quick = False
            raise
        finally:
            # Counted from the end of the request: then the server, too, sees at least the delay between two starts.
            self.rest_until(host.name, time.monotonic() + host.delay_s)
            job.spent_s += time.monotonic() - started
            job.shard.log.audit.write(audit)
        self._judge(host, job, reply, conditional=bool(conditions))

    def _delay_s(self, host: Host, asked_s: float) -> float:
        """`asked_s`: the Crawl-delay of its robots.txt."""
        delay_s = max(self.config.delay_s, asked_s)
        return delay_s if host.strain == 1.0 else host.strain * max(delay_s, LEAST_TURN_S)

    def _rest(self, host: Host) -> None:
        heapq.heappush(self.resting, (host.next_start, next(self.sequence), host))

    def claim(self, name: str) -> float:
        """0.0: nobody else asks this host until `release`; else the seconds to wait before the next try."""
        return self.shared.claim(name) if self.shared is not None else 0.0

    def release(self, name: str) -> None:
        if self.shared is not None:
            self.shared.release(name, max(0.0, self.next_start(name) - time.monotonic()))

    def next_start(self, name: str) -> float:
        return self._host(name).next_start

    def rest_until(self, name: str, moment: float) -> None:
        host = self._host(name)
        host.next_start = max(host.next_start, moment)
        if not host.queue and not host.busy:
            self._rest(host)

    def _judge(self, host: Host, job: Job, reply: Reply, *, conditional: bool) -> None:
        """Response → kept, another turn, or FetchError."""
        if reply.status in REDIRECTS:
            self._follow(job, redirect_target(reply))
        elif reply.status == 304 and conditional:
            self._keep_earlier(job, reply)
        elif reply.status == 429 or reply.status >= 500:
            self._back_off(host, job, reply)
        else:
            host.strain = max(1.0, host.strain * STRAIN_EASES)
            self._decide(job, KEPT, None, None, reply, page_body(reply, self.config))

    def _keep_earlier(self, job: Job, reply: Reply) -> None:
        """304: the page is as it was and the earlier corpus holds it; if that holds it no more, it is sent anew."""
        refusal = header_refusal(reply, self.config)
        if refusal:
            raise FetchError("noindex", refusal)
        assert job.earlier is not None
        original = job.earlier.read(self.config.max_page_bytes)
        if original is None:
            job.earlier = None
            self._enqueue(job)
        else:
            self._decide(job, KEPT, None, None, reply, original.body, (original.url, original.fetched_at))

    def _follow(self, job: Job, target: str) -> None:
        job.seen.append(job.url)
        if target in job.seen:
            raise FetchError("redirect_loop", f"back to {target[:300]} after {len(job.seen)} redirects")
        if len(job.seen) > self.config.max_redirects:
            raise FetchError("too_many_redirects", f"more than fetch.max_redirects={self.config.max_redirects}")
        job.url = target
        self._enqueue(job)

    def _back_off(self, host: Host, job: Job, reply: Reply) -> None:
        """429 and 5xx: the host rests and is asked more slowly from now on, then the URL gets another try."""
        if reply.status in (429, 503):
            host.strain = min(MAX_STRAIN, host.strain * STRAIN_GROWS)
            site = self.robots.known(origin_of(job.url)) if self.config.robots else None
            host.delay_s = self._delay_s(host, site.delay_s if site is not None else 0.0)
            self.rest_until(host.name, time.monotonic() + host.delay_s)
        wait_s = retry_after_s(reply.header("retry-after"))
        if wait_s is not None and wait_s > self.config.max_retry_after_s:
            bound = self.config.max_retry_after_s
            raise FetchError(
                "retry_after", f"{reply.status}, Retry-After {wait_s:.0f} s > fetch.max_retry_after_s={bound:g}"
            )
        if job.tries >= self.config.retries:
            raise FetchError("http_status", str(reply.status))
        moment = time.monotonic() + (self._retry_wait_s(job) if wait_s is None else wait_s)
        if reply.status in (429, 503) or wait_s is not None:
            self.rest_until(host.name, moment)
        self._again(job, moment)

    def _retry_wait_s(self, job: Job) -> float:
        return self.config.retry_wait_s * 2**job.tries * (1 + self.random.random() / 2)

    def _again(self, job: Job, moment: float) -> None:
        """From the start: redirects may lead elsewhere the next time."""
        job.tries += 1
        job.spent_s = 0.0
        job.seen.clear()
        job.url = job.original
        self._enqueue(job, moment)

    def _retry_or_fail(self, host: Host, job: Job, error: FetchError) -> None:
        no_answer = error.reason in GIVE_UP_REASONS and not error.stale
        host.failures += no_answer
        if no_answer and host.failures >= GIVE_UP_AFTER:
            why = f"{host.name} gave no answer {host.failures} times in a row, the last time: {error.detail}"
            waiting, host.queue = host.queue, []
            for _, _, other in [(0.0, 0, job), *waiting]:
                self._decide(other, FAILED, error.reason, why)
        elif error.stale and not job.was_stale:
            job.was_stale = True
            self._enqueue(job)
        elif error.passing and job.tries < self.config.retries:
            self._again(job, time.monotonic() + self._retry_wait_s(job))
        else:
            state = DROPPED if error.reason in DROPPED_REASONS else FAILED
            self._decide(job, state, error.reason, error.detail)

    def _decide(
        self,
        job: Job,
        state: str,
        reason: str | None,
        detail: str | None,
        reply: Reply | None = None,
        body: bytes = b"",
        revisit_of: tuple[str, str] | None = None,
    ) -> None:
        line, exchange = journal_line(job, state, reason, detail, reply, body, revisit_of)
        job.shard.log.add(line, exchange)
        job.shard.waiting -= 1
        self.backlog.decided(host_of(job.original))
        self.done += 1
        now = time.monotonic()
        if now - self.reported > PROGRESS_EVERY_S:
            self.reported = now
            self.on_progress(self.done, self.total)
