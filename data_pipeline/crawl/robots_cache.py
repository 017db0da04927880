"""robots.txt of each origin: fetched once, kept for a day, with what went wrong when it could not be had.

An origin (scheme, host and port: RFC 9309, 2.3) flows in, a `Site` flows out. Redirects are followed over at most five
hops, every one of them vetted like any request; the rules then hold for the origin that was asked first.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.config import FetchConfig, UrlListConfig
from data_pipeline.crawl.fetch_journal import AppendOnly
from data_pipeline.crawl.http.body import BodyError, content_codings, decode_body
from data_pipeline.crawl.http.get import FetchError, HttpClient, Reply, now_text, retry_after_s
from data_pipeline.crawl.robots import MAX_ROBOTS_BYTES, RobotsRules, no_rules, rules_for_status, unreachable_rules
from data_pipeline.crawl.url_syntax import InvalidUrl, host_of, normalize

MAX_HOPS = 5
"""Redirects of robots.txt to follow; beyond them it counts as not there (RFC 9309, 2.3.1.2)."""
MAX_AGE_S = 24 * 3600.0
"""RFC 9309, 2.4: not to be used for longer than a day."""
MAX_ORIGINS = 50_000
"""Origins remembered; those that were not needed for longest are forgotten first."""
_URLS = UrlListConfig(strip_tracking=False)


@dataclass(frozen=True)
class Site:
    """What an origin's robots.txt says. `error`: the host itself could not be asked, and so every URL of it fails."""

    rules: RobotsRules
    delay_s: float
    at: float
    refusal_reason: str = "robots"
    error: FetchError | None = None


class Turns(Protocol):
    """When a host may be asked next (time.monotonic); kept by the scheduler."""

    def next_start(self, host: str) -> float: ...

    def rest_until(self, host: str, moment: float) -> None: ...

    def claim(self, host: str) -> float: ...

    def release(self, host: str) -> None: ...


class RobotsCache:
    def __init__(self, client: HttpClient, config: FetchConfig, turns: Turns) -> None:
        self.client, self.config, self.turns = client, config, turns
        self._sites: OrderedDict[str, Site] = OrderedDict()

    def known(self, origin: str) -> Site | None:
        site = self._sites.get(origin)
        if site is None or time.monotonic() - site.at > MAX_AGE_S:
            return None
        self._sites.move_to_end(origin)
        return site

    async def fetch(self, origin: str, audit: AppendOnly) -> Site:
        """Ask `origin` for its robots.txt, with retries; never raises FetchError: what went wrong is in the Site."""
        for attempt in range(self.config.retries + 1):
            site, wait_s = await self._ask(origin, audit)
            if wait_s is None or wait_s > self.config.max_retry_after_s or attempt == self.config.retries:
                break
            await asyncio.sleep(max(wait_s, self.config.retry_wait_s * 2**attempt))
        self._sites[origin] = site
        if len(self._sites) > MAX_ORIGINS:
            self._sites.popitem(last=False)
        return site

    async def _ask(self, origin: str, audit: AppendOnly) -> tuple[Site, float | None]:
        """(what came of one try, seconds after which another one may help)."""
        url, own_host = f"{origin}/robots.txt", host_of(origin)
        reply: Reply | None = None
        for hop in range(MAX_HOPS + 1):
            host = host_of(url)
            claimed = hop > 0 and await self._turn_of(host, own_host)
            line: dict[str, Any] = {"at": now_text(), "url": url, "rule": "robots.txt itself is always allowed"}
            try:
                reply = await self._get(url)
                line["status"] = reply.status
            except FetchError as e:
                line["error"] = e.reason
                return self._failed(e, own_host=hop == 0), 0.0 if e.passing else None
            finally:
                self.turns.rest_until(host, time.monotonic() + self.config.delay_s)
                if claimed:
                    self.turns.release(host)
                audit.write(line)
            if not 300 <= reply.status < 400 or not reply.header("location"):
                break
            try:
                url = normalize(reply.header("location"), _URLS, base=url)
            except InvalidUrl as e:
                return self._site(unreachable_rules(f"robots.txt redirects to where it cannot be: {e}")), None
        else:
            return self._site(no_rules(f"robots.txt redirects more than {MAX_HOPS} times: no rules")), None
        assert reply is not None
        passing = reply.status == 429 or reply.status >= 500
        return self._read(reply), (retry_after_s(reply.header("retry-after")) or 0.0) if passing else None

    async def _turn_of(self, host: str, own_host: str) -> bool:
        """Wait until `host`, to which robots.txt was redirected, may be asked, and take that turn; whether it has to be
        released. The turn of `own_host` is this process's already."""
        give_up = time.monotonic() + self.config.max_retry_after_s
        claimed = False
        while time.monotonic() < give_up:
            wait_s = self.turns.next_start(host) - time.monotonic()
            if wait_s <= 0 and host != own_host:
                wait_s = self.turns.claim(host)
                claimed = not wait_s
            if wait_s <= 0:
                break
            await asyncio.sleep(min(wait_s, max(0.0, give_up - time.monotonic())))
        self.turns.rest_until(host, time.monotonic() + self.config.delay_s)
        return claimed

    async def _get(self, url: str) -> Reply:
        return await self.client.get(
            url,
            timeout_s=self.config.timeout_s,
            max_bytes=MAX_ROBOTS_BYTES + 1,
            wanted=lambda head: 200 <= head.status < 300,
            cut=True,
        )

    def _read(self, reply: Reply) -> Site:
        body = reply.body or b""
        if 200 <= reply.status < 300:
            try:
                body = decode_body(body, content_codings(reply.header_values("content-encoding")), MAX_ROBOTS_BYTES + 1)
            except BodyError as e:
                if e.reason == "bad_encoding":
                    return self._site(unreachable_rules(f"robots.txt cannot be decoded: {e}"))
                body = e.partial  # the parser cuts at its limit, at the end of a line
        return self._site(rules_for_status(reply.status, body), found=200 <= reply.status < 500 and reply.status != 429)

    def _site(self, rules: RobotsRules, *, found: bool = False) -> Site:
        delay_s = rules.crawl_delay(self.config.user_agent) or 0.0
        return Site(rules, delay_s, time.monotonic(), "robots" if found else "robots_unreachable")

    def _failed(self, error: FetchError, *, own_host: bool) -> Site:
        why = f"robots.txt: {error.reason}: {error.detail}"
        if own_host and error.reason in ("dns", "connect", "tls", "blocked_address"):
            # The page would meet the same fate; its own reason says more than "robots.txt was not to be had".
            gone = FetchError(error.reason, why)
            return Site(unreachable_rules(why), 0.0, time.monotonic(), error.reason, gone)
        return self._site(unreachable_rules(why))
