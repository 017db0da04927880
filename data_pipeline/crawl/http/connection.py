"""Connections to vetted addresses, kept for the next request, and one exchange of request and response on each.

Request bytes flow in, a `Reply` flows out, or a FetchError. The event loop hands over what the network sent, and each
piece is judged at once: nothing waits in buffers, so a response's memory is its head and what was wanted of its body.
A connection carries one request at a time; bytes that no request asked for close it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from data_pipeline.crawl.addresses import BlockedAddressError, LookupFailedError, VettedConnector
from data_pipeline.crawl.http.message import FetchError, Head, Reply, ResponseReader
from data_pipeline.crawl.http.rests import FREE_PIECES, SMALL_PIECE_BYTES, Rests, rest_s

DRAINED_BYTES = 16_384
"""A body nobody wants is read to its end up to this length, since then the connection can be used again."""
MAX_IDLE = 1000
"""Connections kept open for their host's next turn; the oldest goes first."""
_SWEEP_S = 0.5


class Exchange:
    """One request on a connection. `done` gets the Reply or a FetchError."""

    __slots__ = (
        "_body", "_cut", "_ip", "_max_bytes", "_on_bytes", "_reused", "_size", "_wanted", "_wants", "begun_at", "done",
        "reader", "reply", "request", "small_pieces", "started", "url",
    )  # fmt: skip

    def __init__(
        self,
        url: str,
        request: bytes,
        max_header_bytes: int,
        max_bytes: int,
        wanted: Callable[[Reply], bool],
        on_bytes: Callable[[int], None],
        cut: bool,
    ) -> None:
        """As in `HttpClient.get`."""
        self.url, self.request = url, request
        self._max_bytes, self._wanted, self._on_bytes, self._cut = max_bytes, wanted, on_bytes, cut
        self.reader = ResponseReader(max_header_bytes)
        self.done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.reply: Reply | None = None
        self.started = self._reused = self._wants = False
        self._body: list[bytes] = []  # pieces, of which `rests` lets none but a few be small
        self._size = 0
        self._ip = ""
        self.begun_at = 0.0
        self.small_pieces = 0

    def begin(self, ip: str, now: float, *, reused: bool) -> None:
        """`now`: by the event loop's clock."""
        self._ip, self._reused, self.begun_at = ip, reused, now

    def received(self, data: bytes) -> None:
        """Raises FetchError: protocol, header_too_large, too_large; and what `wanted` and `on_bytes` raise."""
        self.started = True
        reader = self.reader
        reader.feed(data)
        if self.reply is None:
            if reader.head is None:
                return
            self._take_head(reader.head)
            if self.done.done():
                return
        piece = reader.body()
        if piece:
            self._take(piece)
        if reader.complete and not self.done.done():
            self._finish()

    def _take_head(self, head: Head) -> None:
        self.reply = reply = Reply(
            self.url, head.status, head.http_version, head.reason_phrase, head.headers, head.fields, None,
            self.request, self._ip,
        )  # fmt: skip
        self._wants = self._wanted(reply)
        length = self.reader.length
        if self._wants:
            if length is not None and length > self._max_bytes and not self._cut:
                raise FetchError("too_large", f"Content-Length: {length} > fetch.max_page_bytes={self._max_bytes}")
        elif head.status == 200 or (length or 0) > DRAINED_BYTES:
            self._end_here()

    def _take(self, piece: bytes) -> None:
        self._body.append(piece)
        self._size += len(piece)
        self._on_bytes(len(piece))
        if not self._wants:
            self._body.clear()
            if self._size > DRAINED_BYTES:
                self._end_here()
        elif self._size > self._max_bytes:
            if not self._cut:
                raise FetchError("too_large", f"the body goes on beyond fetch.max_page_bytes={self._max_bytes}")
            self._body[-1] = piece[: self._max_bytes - self._size]  # less what is beyond the bound: a negative index
            self._end_here()

    def _end_here(self) -> None:
        """What is there is enough; the rest is not read."""
        self.reader.reusable = False
        self._finish()

    def _finish(self) -> None:
        assert self.reply is not None
        if self._wants:
            self.reply.body = b"".join(self._body)
        self.done.set_result(self.reply)

    def closed(self, error: Exception | None) -> None:
        """The connection is gone."""
        if self.done.done():
            return
        self.reader.reusable = False
        what = f": {error}" if error else ""
        if not self.started:
            self.fail(
                FetchError("connect", f"the server closed without an answer{what}", passing=True, stale=self._reused)
            )
        elif self.reply is not None and not self._wants:
            self._finish()
        elif error is not None:
            self.fail(FetchError("truncated", f"the connection broke{what}", passing=True))
        else:
            try:
                self.reader.closed()
            except FetchError as e:
                self.fail(e)
            else:
                self._finish()

    def out_of_time(self, timeout_s: float) -> None:
        if self.done.done():
            return
        self.reader.reusable = False
        if self.reply is not None and not self._wants:  # only the rest of a body that nobody wants drips
            self._finish()
        else:
            self.fail(FetchError("timeout", f"not done within {timeout_s:.3g} s of fetch.timeout_s", passing=True))

    def fail(self, error: FetchError) -> None:
        if not self.done.done():
            self.reader.reusable = False
            self.done.set_exception(error)


class Connection(asyncio.Protocol):
    """An open connection: at most one exchange at a time. `alive` ends when the other side says or sends anything that
    was not asked for."""

    __slots__ = ("_exchange", "_loop", "_rests", "_transport", "alive", "ip", "served")

    def __init__(self, ip: str, rests: Rests) -> None:
        self.ip = ip
        self._rests = rests
        self._loop = asyncio.get_running_loop()
        self.alive = False
        self.served = 0
        self._exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.alive = True

    def send(self, exchange: Exchange) -> None:
        assert self._exchange is None
        self._exchange = exchange
        exchange.begin(self.ip, self._loop.time(), reused=self.served > 0)
        self.served += 1
        self._transport.write(exchange.request)

    def free(self) -> bool:
        """The exchange is over; whether another one may follow."""
        exchange, self._exchange = self._exchange, None
        return self.alive and exchange is not None and exchange.reader.complete and exchange.reader.reusable

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None or exchange.done.done():
            self.abort()
            return
        try:
            exchange.received(data)
        except FetchError as e:
            exchange.fail(e)
            self.abort()
        except Exception as e:  # a bug of ours, and it must be seen
            if not exchange.done.done():
                exchange.done.set_exception(e)
            self.abort()
        else:
            if len(data) < SMALL_PIECE_BYTES and not exchange.done.done():
                exchange.small_pieces += 1
                if exchange.small_pieces > FREE_PIECES:
                    self._transport.pause_reading()
                    self._rests.add(self._read_on, rest_s(self._loop.time() - exchange.begun_at))

    def _read_on(self) -> None:
        """The rest is over. Only an unfinished exchange has one, so the connection carries the same one still, or it is
        closed."""
        if self.alive:
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.alive = False
        if self._exchange is not None:
            self._exchange.closed(error)

    def abort(self) -> None:
        self.alive = False
        self._transport.abort()


class Connections:
    """Opens connections and keeps those whose origin (scheme, host, port) may be asked again soon."""

    def __init__(self, connector: VettedConnector, connect_timeout_s: float, keep_s: float) -> None:
        """`connect_timeout_s`: for look-up, connection and TLS; `keep_s`: how long one is kept without a request."""
        self._connector = connector
        self._connect_timeout_s, self._keep_s = connect_timeout_s, keep_s
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        self._idle: dict[str, tuple[float, Connection]] = {}  # by origin, the one kept for longest first
        self._loop = asyncio.get_running_loop()
        self._rests = Rests()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    def kept(self, origin: str) -> Connection | None:
        """A connection to `origin` on which the last exchange ended well."""
        entry = self._idle.pop(origin, None)
        return entry[1] if entry is not None and entry[1].alive else None

    def keep(self, origin: str, connection: Connection) -> None:
        older = self._idle.pop(origin, None)
        if older is not None:
            older[1].abort()
        elif len(self._idle) >= MAX_IDLE:
            self._idle.pop(next(iter(self._idle)))[1].abort()
        self._idle[origin] = self._loop.time() + self._keep_s, connection
        if self._sweep is None and not self._closed:
            self._sweep = self._loop.call_later(_SWEEP_S, self._close_old)

    def _close_old(self) -> None:
        now = self._loop.time()
        for origin, (until, connection) in list(self._idle.items()):
            if until > now and connection.alive:
                break
            connection.abort()
            del self._idle[origin]
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_old) if self._idle else None

    async def open(self, host: str, port: int, *, tls: bool, timeout_s: float) -> Connection:
        """Raises FetchError: dns, connect, tls, timeout, blocked_address."""
        # Not wait_for: before Python 3.12 it may swallow the cancelling of its caller, or drop what was just opened.
        opening = self._loop.create_task(self._open(host, port, tls=tls))
        try:
            await asyncio.wait((opening,), timeout=min(timeout_s, self._connect_timeout_s))
            if not opening.done():
                raise FetchError("timeout", "no connection within fetch.connect_timeout_s", passing=True)
        except BaseException:
            opening.cancel()
            opening.add_done_callback(_drop)
            raise
        try:
            return opening.result()
        except BlockedAddressError as e:
            raise FetchError("blocked_address", str(e)) from e
        except LookupFailedError as e:
            raise FetchError("dns", str(e), passing=e.passing) from e
        except (ssl.SSLError, ssl.CertificateError) as e:
            raise FetchError("tls", f"{type(e).__name__}: {e}") from e
        except (OSError, RuntimeError) as e:  # uvloop raises the latter where others raise the former
            raise FetchError("connect", f"{type(e).__name__}: {e}", passing=True) from e

    async def _open(self, host: str, port: int, *, tls: bool) -> Connection:
        connected, ip = await self._connector.connect(host, port)
        try:
            _, connection = await self._loop.create_connection(
                lambda: Connection(ip, self._rests),
                sock=connected,
                ssl=self._tls if tls else None,
                server_hostname=host if tls else None,
            )
        except BaseException:
            connected.close()
            raise
        return connection

    def close(self) -> None:
        self._closed = True
        self._rests.close()
        if self._sweep is not None:
            self._sweep.cancel()
        for _, connection in self._idle.values():
            connection.abort()
        self._idle.clear()


def _drop(opening: asyncio.Task[Connection]) -> None:
    """Nobody waits any more for what was being opened."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()
