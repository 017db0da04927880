"""One HTTP request, bounded in every direction: a vetted address, verified TLS, capped header, body and time.

A URL in normal form flows in; a `Reply` or a `FetchError` with a typed reason flows out. Redirects are not followed
here (each hop is vetted and waits its turn in `fetch`), cookies and credentials do not exist, and the body stays as it
was sent: decoding is bounded elsewhere (`http_body`).
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import aiohttp
import yarl
from aiohttp import http_exceptions

from data_pipeline.config import FetchConfig
from data_pipeline.crawl.addresses import BlockedAddressError, Lookup, vetted_connector
from data_pipeline.crawl.url_syntax import path_and_query

ACCEPT = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1"
ACCEPT_ENCODING = "gzip, deflate, br, zstd"
MAX_HEADERS = 256
"""Header fields of one response; `max_header_bytes` bounds them together."""
DRAINED_BYTES = 16_384
"""A body nobody wants is read to its end up to this length, since then the connection can be used again."""


class FetchError(Exception):
    """`reason` is one of the fetch's typed reasons; `passing`: it may be gone at the next try; `stale`: the server had
    closed the kept-alive connection, so that this was no try at all."""

    def __init__(self, reason: str, detail: str, *, passing: bool = False, stale: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:500]
        self.passing = passing
        self.stale = stale


@dataclass(frozen=True)
class Reply:
    """A response. `body` is as it was sent, without transfer coding, and whole; None when it was not wanted."""

    url: str
    status: int
    http_version: str
    reason_phrase: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    request_headers: tuple[tuple[str, str], ...]
    ip: str

    def header(self, name: str) -> str:
        return next((v for k, v in self.headers if k.lower() == name), "")

    def header_values(self, name: str) -> list[str]:
        return [v for k, v in self.headers if k.lower() == name]

    @property
    def request_target(self) -> str:
        return path_and_query(self.url)


class _Response(aiohttp.ClientResponse):
    """Remembers the address that answered: a short response gives its connection back before one can ask."""

    peer_ip = ""

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        peer = connection.transport.get_extra_info("peername") if connection.transport else None
        self.peer_ip = str(peer[0]) if peer else ""
        return await super().start(connection)


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
        return float(value[:12])
    try:
        moment = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, moment.timestamp() - time.time())


def now_text() -> str:
    """This moment, RFC 3339 in UTC, to the millisecond."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class HttpClient:
    """A session of vetted connections. Create it within a running event loop; close it."""

    def __init__(self, config: FetchConfig, lookup: Lookup | None = None) -> None:
        """`lookup`: name → addresses, for tests; by default the hosts file, then DNS."""
        self.config = config
        self._tls = ssl.create_default_context()
        self._session = aiohttp.ClientSession(
            connector=vetted_connector(config, lookup),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # no proxy, no netrc: they would be a way around the vetted address, and leak passwords
            headers={"User-Agent": user_agent(config), "Accept": ACCEPT, "Accept-Encoding": ACCEPT_ENCODING},
            response_class=_Response,
            max_line_size=config.max_header_bytes,
            max_field_size=config.max_header_bytes,
            max_headers=MAX_HEADERS,
            trace_configs=[_note_reuse()],
        )
        # aiohttp would send a request again by itself when a kept-alive connection turns out to be closed: behind the
        # back of the host's delay and of the audit log. Internal, but read afresh at every request.
        self._session._retry_connection = False

    async def close(self) -> None:
        await self._session.close()

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
        """GET `url` once. `wanted` sees the reply without its body and tells whether to read that; `on_bytes` is told
        of every piece of body and may raise FetchError; `last`: no further request to this host is planned; `cut`: a
        body longer than `max_bytes` is cut there instead of being an error; `conditions`: If-None-Match and the like.

        Raises FetchError: dns, connect, tls, timeout, blocked_address, header_too_large, too_large, truncated,
        protocol.
        """
        timeout = aiohttp.ClientTimeout(
            total=timeout_s, connect=min(timeout_s, self.config.connect_timeout_s), ceil_threshold=1e9
        )
        connection = {"reused": False}
        try:
            async with self._session.get(
                yarl.URL(url, encoded=True),
                allow_redirects=False,
                ssl=self._tls,
                timeout=timeout,
                headers={**(conditions or {}), **({"Connection": "close"} if last else {})},
                trace_request_ctx=connection,
            ) as response:
                assert isinstance(response, _Response)
                head = self._head(url, response)
                if not wanted(head):
                    await self._discard(response)
                    return head
                body = await self._read(response, max_bytes, on_bytes, cut)
                return Reply(**{**head.__dict__, "body": body})
        except FetchError:
            raise
        except Exception as e:
            failure = _typed(e, timeout_s)
            failure.stale = connection["reused"] and isinstance(e, (aiohttp.ServerDisconnectedError, ConnectionError))
            raise failure from e

    def _head(self, url: str, response: _Response) -> Reply:
        size = sum(len(k) + len(v) + 4 for k, v in response.raw_headers)
        if size > self.config.max_header_bytes:
            raise FetchError(
                "header_too_large", f"{size} bytes > fetch.max_header_bytes={self.config.max_header_bytes}"
            )
        number = response.version
        return Reply(
            url=url,
            status=response.status,
            http_version=f"{number.major}.{number.minor}" if number else "1.1",
            reason_phrase=response.reason or "",
            headers=tuple(
                (k.decode("utf-8", "surrogateescape"), v.decode("utf-8", "surrogateescape"))
                for k, v in response.raw_headers
            ),
            body=None,
            request_headers=tuple((str(k), v) for k, v in response.request_info.headers.items()),
            ip=response.peer_ip,
        )

    async def _read(self, response: _Response, max_bytes: int, on_bytes: Callable[[int], None], cut: bool) -> bytes:
        announced = response.headers.get("Content-Length", "")
        if not cut and announced.isdigit() and len(announced) < 19 and int(announced) > max_bytes:
            response.close()
            raise FetchError("too_large", f"Content-Length: {announced} > fetch.max_page_bytes={max_bytes}")
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            on_bytes(len(piece))
            if len(body) > max_bytes:
                response.close()
                if cut:
                    return bytes(body[:max_bytes])
                raise FetchError("too_large", f"the body goes on beyond fetch.max_page_bytes={max_bytes}")
        return bytes(body)

    async def _discard(self, response: _Response) -> None:
        length = "0" if response.status == 304 else response.headers.get("Content-Length", "")  # of what is not sent
        if length.isdigit() and int(length[:9]) <= DRAINED_BYTES and response.status != 200:
            await response.read()
        else:
            response.close()


def _note_reuse() -> aiohttp.TraceConfig:
    """Sets "reused" in a request's trace_request_ctx when it goes out on a connection that was kept alive."""

    async def note(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
        context.trace_request_ctx["reused"] = True

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(note)
    return config


def _typed(error: Exception, timeout_s: float) -> FetchError:
    """aiohttp's exception → a typed reason. The cause chain is searched, as aiohttp wraps what the connector raises."""
    blocked = _cause(error, BlockedAddressError)
    if blocked is not None:
        return FetchError("blocked_address", str(blocked))
    what = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, asyncio.TimeoutError):
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return FetchError("timeout", "no connection within fetch.connect_timeout_s", passing=True)
        return FetchError("timeout", f"not done within {timeout_s:.3g} s of fetch.timeout_s", passing=True)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return FetchError("dns", what, passing="Temporary failure" in what)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)) or _cause(error, ssl.SSLError) is not None:
        return FetchError("tls", what)
    if _cause(error, http_exceptions.LineTooLong) is not None or "Too many headers" in what:
        return FetchError("header_too_large", what)
    if isinstance(error, (aiohttp.ClientPayloadError, http_exceptions.PayloadEncodingError)):
        short = (
            _cause(error, http_exceptions.ContentLengthError) is not None
            or _cause(error, OSError) is not None
            or "Not enough data" in what
        )
        return FetchError("truncated" if short else "protocol", what, passing=short)
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
        return FetchError("connect", what, passing=True)
    if isinstance(error, (aiohttp.ClientError, http_exceptions.HttpProcessingError, ValueError)):
        return FetchError("protocol", what)
    raise error  # a bug of ours, and it must be seen


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first exception of `kind` along the chain of causes."""
    for _ in range(10):
        if error is None or isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None
