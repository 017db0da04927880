"""Responses as they come off the wire: against llhttp (as aiohttp carries it), cut anywhere, hostile in every field."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from unittest import mock

import pytest
from aiohttp import http_exceptions
from aiohttp.http_parser import HttpResponseParser

from data_pipeline.crawl.http.message import FetchError, ResponseReader

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def read(wire: bytes, cuts: list[int] | None = None, *, closed: bool = False, max_header_bytes: int = 32_768):  # type: ignore[no-untyped-def]
    """(status, headers, body, complete, reusable) of `wire`, fed in the pieces between `cuts`."""
    reader, body = ResponseReader(max_header_bytes), b""
    edges = [0, *(cuts or []), len(wire)]
    for begin, end in itertools.pairwise(edges):
        reader.feed(wire[begin:end])
        if reader.head is not None:
            body += reader.body()
    if closed:
        reader.closed()
    if reader.head is None:
        return None
    return reader.head.status, reader.head.headers, body, reader.complete, reader.reusable


def refused(wire: bytes, **options: object) -> str:
    with pytest.raises(FetchError) as caught:
        read(wire, **options)  # type: ignore[arg-type]
    return caught.value.reason


# ---- what is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "body", "reusable"),
    [
        (OK + b"Content-Length: 5\r\n\r\nhello", b"hello", True),
        (OK + b"Content-Length: 5, 5\r\ncontent-length: 5\r\n\r\nhello", b"hello", True),
        (OK + b"Content-Length: 0\r\n\r\n", b"", True),
        (OK + b"Content-Length: 5\r\nConnection: Keep-Alive, Close\r\n\r\nhello", b"hello", False),
        (OK + b"Content-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\r\n", b"hello", False),  # nobody asked for a second
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\nhello", b"hello", True),
        (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", b"ok", True),  # no reason phrase
        (b"HTTP/1.1 200 \xe9t\xe9\nContent-Length: 2\n\nok", b"ok", True),  # lone LF
        (OK + b"X: a\r\n b\r\n\tc\r\nContent-Length: 2\r\n\r\nok", b"ok", True),  # folded
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 999\r\n\r\n", b"", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nbody", b"", False),
        (CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", b"hello", True),
        (CHUNKED + b'5;ext=1;x="y"\r\nhello\r\n00\r\nTrailer: x\r\n\r\n', b"hello", True),
        (CHUNKED + b"2\nhe\n3 \nllo\n0\n\n", b"hello", True),
        (CHUNKED + b"5\r\nhello\r\n0\r\n\r\nmore", b"hello", False),
        (OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello", False),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
            b"ok",
            True,
        ),
    ],
)
def test_whole_however_it_is_cut(wire: bytes, body: bytes, reusable: bool) -> None:
    whole = read(wire)
    assert whole is not None
    assert whole[2:] == (body, True, reusable)
    chance = random.Random(len(wire))
    assert read(wire, list(range(1, len(wire))))[:4] == whole[:4]  # byte by byte
    for _ in range(20):
        assert read(wire, sorted(chance.sample(range(len(wire)), 3)))[:4] == whole[:4]


def test_a_body_that_ends_with_the_connection() -> None:
    assert read(OK + b"\r\nhello", closed=True)[2:] == (b"hello", True, False)
    assert read(OK + b"\r\nhello")[2:] == (b"hello", False, False)
    for wire in (OK + b"Content-Length: 6\r\n\r\nhello", CHUNKED + b"5\r\nhello\r\n", CHUNKED + b"5\r\nhel", OK):
        assert refused(wire, closed=True) == "truncated"


def test_names_and_values_keep_their_bytes() -> None:
    wire = OK + b"X-A:  \xfc ; b\t \r\nx-a:\r\nSET-cookie: a=b\r\nContent-Length: 0\r\n\r\n"
    reader = ResponseReader(9999)
    reader.feed(wire)
    assert reader.head is not None
    assert reader.head.headers[:2] == (("X-A", "\udcfc ; b"), ("x-a", ""))
    assert reader.head.fields["x-a"] == ["\udcfc ; b", ""]
    assert reader.head.fields["set-cookie"] == ["a=b"]


# ---- what is not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        b"<html>HTTP/0.9 sends no header</html>",
        b"SSH-2.0-OpenSSH_9.0\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.10 200 OK\r\n\r\n",
        b"HTTP/1.1 \xb2\xb0\xb0 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 17 + OK + b"\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b": no name\r\n\r\n",
        OK + b"Content-Length : 5\r\n\r\nhello",
        OK + b" folded: first\r\n\r\n\r\n",
        OK + b"N\xc3\xa4me: x\r\n\r\n",
        OK + b"X: a\0b\r\n\r\n",
        OK + b"X: a\rSet-Cookie: b\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        OK + b"Content-Length: 5, 6\r\n\r\nhello",
        OK + b"Content-Length: -5\r\n\r\nhello",
        OK + b"Content-Length: +5\r\n\r\nhello",
        OK + b"Content-Length: 0x5\r\n\r\nhello",
        OK + b"Content-Length: 5_0\r\n\r\nhello",
        OK + b"Content-Length: \xd9\xa5\r\n\r\nhello",
        OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        OK + b"Content-Length:\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        OK + b"Transfer-Encoding: identity\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Transfer-Encoding: xchunked\r\n\r\n",
        CHUNKED + b"xyz\r\n",
        CHUNKED + b"-5\r\nhello\r\n",
        CHUNKED + b"0x5\r\nhello\r\n",
        CHUNKED + b"5_0\r\n",
        CHUNKED + b" 5\r\nhello\r\n",
        CHUNKED + b"\r\nhello\r\n",
        CHUNKED + b"ffffffffffffffff\r\n",
        CHUNKED + b"5\r\nhelloX\r\n",
        CHUNKED + b"5\r\nhello0\r\n\r\n",
        CHUNKED + b"5\rX\r\nhello\r\n",
        CHUNKED + b"5;" + b"x" * 5000,
        CHUNKED + b"5\r\nhello\r\n0\r\nT: " + b"x" * 5000,
    ],
)
def test_what_is_no_response_is_refused_at_once(wire: bytes) -> None:
    assert refused(wire) == "protocol"


def test_a_header_has_a_bound_wherever_its_bytes_stand() -> None:
    for wire in (
        OK + b"X: " + b"a" * 40_000,
        OK + b"X: a\r\n" * 6000,
        (b"HTTP/1.1 103 Early Hints\r\nLink: " + b"a" * 3000 + b"\r\n\r\n") * 11,
        OK + b"X: a\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 " + b"a" * 40_000,
    ):
        assert refused(wire) == "header_too_large"
        assert refused(wire, cuts=list(range(1, len(wire), 97))) == "header_too_large"
    size = len(OK + b"X: \r\n\r\n")
    assert read(OK + b"X: " + b"a" * (500 - size) + b"\r\n\r\n", max_header_bytes=500) is not None
    assert refused(OK + b"X: " + b"a" * (501 - size) + b"\r\n\r\n", max_header_bytes=500) == "header_too_large"


def test_a_body_that_is_mostly_framing_is_refused() -> None:
    """Extensions, trailers and chunks of one byte: content for nobody, work for the reader."""
    for wire in (
        CHUNKED + (b"1;" + b"x" * 1000 + b"\r\na\r\n") * 100,
        CHUNKED + b"1\r\na\r\n" * 100_000,
        CHUNKED + b"0\r\n" + b"T: x\r\n" * 10_000,
    ):
        assert refused(wire) == "protocol"
    assert read(CHUNKED + b"10\r\n" + b"0123456789abcdef\r\n10\r\n" * 20_000)[3] is False  # small ones are no crime


def test_time_is_linear_in_the_bytes() -> None:
    """Each of these once made some parser quadratic."""
    begin = time.process_time()
    spaces = b" " * 31_000
    for wire in (
        OK + b"X:" + spaces + b"\0\r\n\r\n",
        OK + b"X: a\r\n" + spaces + b"\r\n\r\n",
        OK + b"X:" + spaces + b"\r\n y\r\n\r\n",
        OK + b"X" + spaces + b": y\r\n\r\n",
        OK + b"\t\n" * 15_000 + b"\r\n",
        OK + b"Content-Length: " + b"5," * 15_000 + b"5\r\n\r\nhello",
        OK + b"Connection: " + b"," * 31_000 + b"\r\nContent-Length: 0\r\n\r\n",
    ):
        for cuts in (None, list(range(1, len(wire)))):
            with contextlib.suppress(FetchError):
                read(wire, cuts)
    page = CHUNKED + b"".join(b"64\r\n" + b"x" * 100 + b"\r\n" for _ in range(2000)) + b"0\r\n\r\n"
    assert read(page, list(range(1, len(page))))[3] is True
    assert time.process_time() - begin < 30  # 3 s on a busy machine; quadratic ones take minutes


# ---- beside llhttp ----------------------------------------------------------------------------------------------


def by_llhttp(wire: bytes) -> tuple[int, bytes] | None:
    """(status, body) when the message is whole; None when it is refused or not whole."""

    async def parse() -> tuple[int, bytes] | None:
        protocol = mock.Mock(_reading_paused=False)
        loop = asyncio.get_running_loop()
        parser = HttpResponseParser(
            protocol, loop, 2**16, max_line_size=32_768, max_field_size=32_768, max_headers=256, read_until_eof=True,
            auto_decompress=False, response_with_body=True,
        )  # fmt: skip
        try:
            messages, _, _ = parser.feed_data(wire)
            final = [m for m in messages if m[0].code >= 200]
            if not final:
                return None
            message, payload = final[0]
            parser.feed_eof()
        except (http_exceptions.HttpProcessingError, http_exceptions.PayloadEncodingError):
            return None
        if payload.exception() is not None or not payload.is_eof():
            return None
        return message.code, payload.read_nowait() if payload.total_bytes else b""

    return asyncio.run(parse())


def test_beside_llhttp_on_messages_that_were_tampered_with() -> None:
    """What both take for whole must be the same; what only this one takes must be rare, and named."""
    whole = [
        OK + b"Server: x\r\nContent-Type: text/html\r\nContent-Length: 11\r\n\r\nhello world",
        CHUNKED + b"5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX: y\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc",
    ]
    chance = random.Random(9112)
    agreed = ours_alone = 0
    for _ in range(1500):
        wire = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(0, 3)):
            place = chance.randrange(len(wire))
            action = chance.randrange(3)
            if action == 0:
                wire[place] = chance.choice(b" \t\r\n\0:;0123456789abcdefXYZ\xff")
            elif action == 1:
                del wire[place]
            else:
                wire.insert(place, chance.choice(b" \t\r\n:;,0aF"))
        try:
            mine = read(bytes(wire), closed=True)
        except FetchError:
            mine = None
        theirs = by_llhttp(bytes(wire))
        if mine is not None and theirs is not None:
            assert (mine[0], mine[2]) == theirs, bytes(wire)
            agreed += 1
        elif mine is not None:
            ours_alone += 1
    assert agreed > 700
    assert ours_alone < 120
