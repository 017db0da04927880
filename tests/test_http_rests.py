"""Responses in crumbs: how often they wake the fetch up, that they come whole, and when they end."""

from __future__ import annotations

import asyncio
import collections
import math
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
import uvloop
from web import Handler, Request, Site, closing

from data_pipeline.config import FetchConfig
from data_pipeline.crawl.http import connection
from data_pipeline.crawl.http.get import FetchError, HttpClient, Reply
from data_pipeline.crawl.http.rests import FREE_PIECES, REST_SHARE, REST_TICK_S, SMALL_PIECE_BYTES, Rests
from data_pipeline.crawl.url_syntax import path_and_query

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
CRUMBS = bytes(range(256)) * 6


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Path → the sizes of the pieces in which responses to it are taken from the event loop."""
    sizes: dict[str, list[int]] = collections.defaultdict(list)
    original = connection.Exchange.received

    def received(self: connection.Exchange, data: bytes) -> None:
        sizes[path_and_query(self.url)].append(len(data))
        original(self, data)

    monkeypatch.setattr(connection.Exchange, "received", received)
    return sizes


def crumbs(head: bytes, body: bytes, end: bytes = b"", *, close: bool = False) -> Handler:
    """`head`, `body` a byte a millisecond, `end`."""

    async def handle(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for i in range(len(body)):
            writer.write(body[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(end)
        if close:
            writer.close()

    return handle


def got(
    site: Site, *paths: str, timeout_s: float = 60.0, host: str = "127.0.0.1", at_once: bool = False
) -> list[Reply | FetchError]:
    """What comes of one request after the other (or of all `at_once`), on one client."""

    async def lookup(_name: str) -> list[str]:
        return ["127.0.0.1"]

    async def main() -> list[Reply | FetchError]:
        client = HttpClient(FetchConfig(allow_addresses=[f"127.0.0.1:{site.port}"]), lookup)
        base = f"{'https' if site.tls else 'http'}://{host}:{site.port}"

        async def one(path: str) -> Reply | FetchError:
            try:
                return await client.get(base + path, timeout_s=timeout_s, max_bytes=1 << 20)
            except FetchError as e:
                return e

        ends = await asyncio.gather(*map(one, paths)) if at_once else [await one(path) for path in paths]
        await client.close()
        return ends

    return uvloop.run(main())


def most_pieces(age_s: float) -> float:
    """The bound that the module states."""
    steep_s = REST_SHARE * REST_TICK_S
    return FREE_PIECES + REST_SHARE + 1 + max(0.0, math.log(age_s / steep_s)) / math.log(1 + 1 / REST_SHARE)


def test_crumbs_are_gathered_and_come_whole(site: Site, pieces: dict[str, list[int]]) -> None:
    length = b"Content-Length: %d\r\n\r\n" % len(CRUMBS)
    chunks = b"".join(b"1\r\n%c\r\n" % b for b in CRUMBS[:300])
    site.pages = {
        "/length": crumbs(HEAD + length, CRUMBS),
        "/chunks": crumbs(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks, b"0\r\n\r\n"),
        "/head": crumbs(b"", HEAD + b"X: " + b"x" * 1000 + b"\r\n" + length, CRUMBS),
        "/until-closed": crumbs(HEAD + b"\r\n", CRUMBS, close=True),
    }
    for path, reply in zip(site.pages, got(site, *site.pages, at_once=True), strict=True):
        assert isinstance(reply, Reply), path
        assert reply.body == (CRUMBS[:300] if path == "/chunks" else CRUMBS), path
        assert FREE_PIECES < len(pieces[path]) <= most_pieces(60.0) < 100, path
        assert sum(pieces[path]) > len(reply.body), path


def test_after_crumbs_the_connection_serves_on(site: Site, pieces: dict[str, list[int]]) -> None:
    site.pages = {
        "/slow": crumbs(HEAD + b"Content-Length: 200\r\n\r\n", CRUMBS[:200]),
        "/fast": HEAD + b"Content-Length: 2\r\n\r\nok",
    }
    slow, fast, again = got(site, "/slow", "/fast", "/slow")
    assert isinstance(slow, Reply)
    assert isinstance(fast, Reply)
    assert isinstance(again, Reply)
    assert (slow.body, fast.body, again.body) == (CRUMBS[:200], b"ok", CRUMBS[:200])
    assert len(pieces["/slow"]) > 2 * FREE_PIECES  # each response has its own


def test_crumbs_under_tls(
    site: Site, pieces: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("good.test").configure_cert(context)
    pages: dict[str, bytes | Handler] = {"/": crumbs(HEAD + b"Content-Length: 500\r\n\r\n", CRUMBS[:500])}
    with Site(tls=context, pages=pages) as secure:
        (reply,) = got(secure, "/", host="good.test")
    assert isinstance(reply, Reply)
    assert reply.body == CRUMBS[:500]
    assert FREE_PIECES < len(pieces["/"]) <= most_pieces(60.0)


def test_large_pieces_never_rest(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(Rests, "add", lambda self, call, after_s: rests.append(after_s))
    block = b"x" * (16 * SMALL_PIECE_BYTES)

    async def blocks(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % (10 * len(block)))
        for _ in range(10):
            writer.write(block)
            await writer.drain()

    site.pages = {"/": blocks}
    (reply,) = got(site, "/")
    assert isinstance(reply, Reply)
    assert reply.body == block * 10
    assert rests == []


@pytest.mark.parametrize("how", ["time", "cut", "long"])
def test_what_ends_while_it_rests_ends_typed(site: Site, how: str) -> None:
    async def forever(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.001)

    ends: dict[str, tuple[Handler, str]] = {
        "time": (forever, "timeout"),
        "cut": (crumbs(HEAD + b"Content-Length: 999\r\n\r\n", CRUMBS[:300], close=True), "truncated"),
        "long": (crumbs(HEAD + b"Content-Length: 99\r\n\r\n", CRUMBS[:98], CRUMBS), ""),
    }
    handler, reason = ends[how]
    site.pages = {"/": handler, "/next": closing(HEAD + b"Content-Length: 2\r\n\r\nok")}
    first, following = got(site, "/", "/next", timeout_s=0.7 if how == "time" else 60.0)
    if how == "long":  # bytes behind the end: the page is whole, the connection is not used again
        assert isinstance(first, Reply)
        assert first.body == CRUMBS[:98] + CRUMBS[:1]
    else:
        assert isinstance(first, FetchError)
        assert first.reason == reason
    assert isinstance(following, Reply)
    assert following.body == b"ok"


def test_a_rest_is_never_shorter_than_asked_and_ends_with_its_tick() -> None:
    async def main() -> None:
        loop, rests = asyncio.get_running_loop(), Rests()
        begin = loop.time()
        waits = [0.0, 0.01, 0.12, 0.12, 0.3]
        ended: list[tuple[float, float]] = []
        done = asyncio.Event()

        def note(after_s: float) -> Callable[[], None]:
            def call() -> None:
                ended.append((after_s, loop.time() - begin))
                if len(ended) == len(waits):
                    done.set()

            return call

        for after_s in waits:
            rests.add(note(after_s), after_s)
        await done.wait()
        assert [after_s for after_s, _ in ended] == waits
        for after_s, took_s in ended:
            assert took_s >= after_s - 0.001  # the loop's clock has milliseconds
        assert ended[2][1] == ended[3][1]  # of one tick, in one turn
        rests.add(lambda: ended.append((9.0, 9.0)), 0.0)
        rests.close()
        await asyncio.sleep(3 * REST_TICK_S)
        assert len(ended) == len(waits)

    uvloop.run(main())
