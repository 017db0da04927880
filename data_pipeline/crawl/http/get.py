"""One HTTP request, bounded in every direction: a vetted address, verified TLS, capped header, body and time.

A URL in normal form flows in; a `Reply` or a `FetchError` with a typed reason flows out. Redirects are not followed
here (each hop is vetted and waits its turn in `fetch`), cookies and credentials do not exist, and the body stays as it
was sent: decoding is bounded elsewhere (`body`).
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from data_pipeline.config import FetchConfig
from data_pipeline.crawl.addresses import Lookup, VettedConnector
from data_pipeline.crawl.http.connection import Connections, Exchange
from data_pipeline.crawl.http.message import FetchError, Reply
from data_pipeline.crawl.url_syntax import host_of, origin_of, port_of

__all__ = ["FetchError", "HttpClient", "Reply", "now_text", "retry_after_s", "user_agent"]

ACCEPT = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1"
ACCEPT_ENCODING = "gzip, deflate, br, zstd"


def user_agent(config: FetchConfig) -> str:
    """`gpttrain/0.1.0 (+https://example.org/crawler)`."""
    try:
        number = version("gpt2train")
    except PackageNotFoundError:  # run from a source tree that was never installed
        number = "0"
    return f"{config.user_agent}/{number}" + (f" (+{config.contact})" if config.contact else "")


def retry_after_s(value: str) -> float | None:
    """`Retry-After` (RFC 9110, 10.2.3) → seconds from now; None when it is missing or says nothing."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, moment.timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def now_text() -> str:
    """This moment, RFC 3339 in UTC, to the millisecond."""
    ms = time.time_ns() // 1_000_000
    return f"{_second_text(ms // 1000)}.{ms % 1000:03d}Z"


@lru_cache(maxsize=4)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class HttpClient:
    """GET requests over vetted connections. Create it within a running event loop; close it."""

    def __init__(self, config: FetchConfig, lookup: Lookup | None = None) -> None:
        """`lookup`: name → addresses, for tests; by default the hosts file, then DNS."""
        self.config = config
        self._loop = asyncio.get_running_loop()
        # Kept long enough for the next turn of a host that still has work; idle sockets are a scarce thing.
        keep_s = min(1.5 * config.delay_s + 1.0, 15.0)
        self._connections = Connections(VettedConnector(config, lookup), config.connect_timeout_s, keep_s)
        fields = {"User-Agent": user_agent(config), "Accept": ACCEPT, "Accept-Encoding": ACCEPT_ENCODING}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())

    async def close(self) -> None:
        self._connections.close()
        await asyncio.sleep(0)  # the event loop closes sockets in its next round

    async def get(
        self,
        url: str,
        *,
        timeout_s: float,
        max_bytes: int,
        wanted: Callable[[Reply], bool] = lambda head: True,
        on_bytes: Callable[[int], None] = lambda size: None,
        last: bool = False,
        cut: bool = False,
        conditions: Mapping[str, str] | None = None,
    ) -> Reply:
        """GET `url` (in normal form) once. `wanted` sees the reply without its body and tells whether to read that;
        `on_bytes` is told of every piece of body and may raise FetchError; `last`: no further request to this host is
        planned; `cut`: a body longer than `max_bytes` is cut there instead of being an error; `conditions`:
        If-None-Match and the like.

        Raises FetchError: dns, connect, tls, timeout, blocked_address, header_too_large, too_large, truncated,
        protocol.
        """
        begin = self._loop.time()
        origin = origin_of(url)
        request = self._request(url, origin, conditions, last=last)
        connection = self._connections.kept(origin)
        if connection is None:
            tls = url.startswith("https:")
            connection = await self._connections.open(host_of(url), port_of(url), tls=tls, timeout_s=timeout_s)
        exchange = Exchange(url, request, self.config.max_header_bytes, max_bytes, wanted, on_bytes, cut)
        timer = self._loop.call_at(begin + timeout_s, exchange.out_of_time, timeout_s)
        try:
            connection.send(exchange)
            return await exchange.done
        finally:
            timer.cancel()
            if connection.free() and not last:
                self._connections.keep(origin, connection)
            else:
                connection.abort()

    def _request(self, url: str, origin: str, conditions: Mapping[str, str] | None, *, last: bool) -> bytes:
        """The request as it is sent."""
        if not (url.isascii() and url.isprintable()) or " " in url:  # it could end the request and begin another one
            raise FetchError("protocol", f"{url[:200]!r} is no URL in normal form")
        lines = [f"GET {url[len(origin) :] or '/'} HTTP/1.1\r\nHost: {origin.partition('://')[2]}\r\n{self._fields}"]
        if conditions:
            lines += [f"{name}: {value}\r\n" for name, value in conditions.items()]
        if last:
            lines.append("Connection: close\r\n")
        return ("".join(lines) + "\r\n").encode("ascii")
