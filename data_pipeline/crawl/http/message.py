"""A response as it comes off the wire: HTTP/1.0 and 1.1 (RFC 9112), read strictly and within bounds, without a socket.

Pieces of bytes flow in, cut wherever the network cut them; a head and the bytes of the body flow out, or a FetchError
with its reason. Memory: the head up to its bound, and what of the body has not been taken. Time: linear in the bytes,
however they are cut.

Whatever is doubtful about where the body ends (both Content-Length and Transfer-Encoding, two lengths, bytes behind the
end) is read as the RFC says, and the connection is not used again. What the RFC calls an error is one here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_FIELDS = 256
"""Header fields of one response; `max_header_bytes` bounds them together."""
MAX_INTERIM = 16
"""Responses of the 1xx class before the real one; their bytes count as header bytes, too."""
MAX_COMMON_BYTES = 100
"""Fields longer than this are not remembered, so that what is remembered stays small."""
MAX_CHUNK_LINE_BYTES = 4096
"""A chunk's size with its extensions, which nobody uses."""

_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: ([^\r\n\0]*))?")  # RFC 9112, 4
_TOKEN_CHARACTERS = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # RFC 9110, 5.6.2
_FOLD = re.compile(rb"\n[ \t]+")  # RFC 9112, 5.2: obsolete, but to be read as one space
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n\0]*)?\r?")  # RFC 9112, 7.1


class FetchError(Exception):
    """`reason` is one of the fetch's typed reasons; `passing`: it may be gone at the next try; `stale`: the server had
    closed the kept-alive connection, so that this was no try at all."""

    def __init__(self, reason: str, detail: str, *, passing: bool = False, stale: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:500]
        self.passing = passing
        self.stale = stale


@dataclass(slots=True)
class Reply:
    """A response. `body` is as it was sent, without transfer coding, and whole; None when it was not wanted. `request`
    is what it answers, byte for byte; `fields` are the values of each header field by its name in small letters.
    Bytes of the head that are not UTF-8 are surrogates, so that they can be written back as they came."""

    url: str
    status: int
    http_version: str
    reason_phrase: str
    headers: tuple[tuple[str, str], ...]
    fields: dict[str, list[str]]
    body: bytes | None
    request: bytes
    ip: str

    def header(self, name: str) -> str:
        """The first value of the field `name` (in small letters); "" when there is none."""
        values = self.fields.get(name)
        return values[0] if values else ""

    def header_values(self, name: str) -> list[str]:
        return self.fields.get(name, [])


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and fields, as in `Reply`."""

    status: int
    http_version: str
    reason_phrase: str
    headers: tuple[tuple[str, str], ...]
    fields: dict[str, list[str]]


class ResponseReader:
    """One response. Give `feed` what came in until `head` is there, look at it, then call `body` for what is read of
    the body so far; `complete` says whether that is all. `reusable`: another request may follow on the connection."""

    __slots__ = (
        "_at", "_buffer", "_chunked", "_framing", "_interim", "_left", "_max_header_bytes", "_searched", "_spent",
        "_taken", "_until_closed", "complete", "head", "length", "reusable",
    )  # fmt: skip

    def __init__(self, max_header_bytes: int) -> None:
        self._max_header_bytes = max_header_bytes
        self._buffer = bytearray()
        self._searched = self._spent = self._interim = 0
        self._left = 0  # of the body, or of the chunk and the line end behind it
        self._chunked = self._until_closed = False
        self._at = "size"  # of a chunked body: size, data, line end, trailers
        self._framing = self._taken = 0
        self.head: Head | None = None
        self.length: int | None = None
        """Of the body, where it was announced."""
        self.complete = False
        self.reusable = True

    def feed(self, data: bytes) -> None:
        """Raises FetchError: protocol, header_too_large."""
        self._buffer += data
        while self.head is None and self._buffer:
            end = self._head_end()
            if end is None:
                return
            raw = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._spent += end
            self._searched = 0
            head = _head(raw)
            if head.status >= 200:
                self.head = head
                self._frame(head)
                return
            self._interim += 1
            if head.status == 101 or self._interim > MAX_INTERIM:  # an upgrade that nobody asked for, or a flood
                raise FetchError("protocol", f"{self._interim} interim responses, the last one {head.status}")

    def _head_end(self) -> int | None:
        """Where the head ends that starts the buffer; None while that is not there yet."""
        buffer = self._buffer
        if not buffer.startswith(b"HTTP/1."[: len(buffer)]):  # HTTP/0.9, another protocol, another version
            raise FetchError("protocol", f"not an HTTP/1 response: {bytes(buffer[:40])!r}")
        room = self._max_header_bytes - self._spent
        lines = buffer.find(b"\n\r\n", self._searched, room)
        lone = buffer.find(b"\n\n", self._searched, lines + 1 if lines >= 0 else room)
        if lone >= 0:
            return lone + 2
        if lines >= 0:
            return lines + 3
        if len(buffer) >= room:
            raise FetchError("header_too_large", f"more than fetch.max_header_bytes={self._max_header_bytes}")
        self._searched = max(0, len(buffer) - 2)
        return None

    def _frame(self, head: Head) -> None:
        """How long the body is: RFC 9112, 6.3."""
        fields = head.fields
        connection = ",".join(fields.get("connection", ())).lower()
        options = [option.strip() for option in connection.split(",")] if connection else []
        self.reusable = "close" not in options and (head.http_version != "1.0" or "keep-alive" in options)
        codings, lengths = fields.get("transfer-encoding"), fields.get("content-length")
        if head.status in (204, 304):
            self.complete = True
            self._end()
        elif codings is not None:
            if ",".join(codings).strip().lower() != "chunked":
                raise FetchError("protocol", f"Transfer-Encoding: {', '.join(codings)[:100]}")
            if lengths is not None or head.http_version == "1.0":
                self.reusable = False
            self._chunked = True
        elif lengths is not None:
            told = {part.strip() for value in lengths for part in value.split(",")}
            (length,) = told if len(told) == 1 else ("",)
            if not (length.isascii() and length.isdigit()) or len(length) > 18:
                raise FetchError("protocol", f"Content-Length: {', '.join(lengths)[:100]}")
            self.length = self._left = int(length)
            if not self._left:
                self.complete = True
                self._end()
        else:
            self._until_closed = True
            self.reusable = False

    def body(self) -> bytes:
        """What has come of the body since the last call. Raises FetchError: protocol."""
        if self.complete or not self._buffer:
            return b""
        if self._chunked:
            return self._dechunk()
        if self._until_closed:
            return self._all()
        if len(self._buffer) <= self._left:
            piece = self._all()
        else:
            piece = bytes(self._buffer[: self._left])
            del self._buffer[: self._left]
        self._left -= len(piece)
        if not self._left:
            self.complete = True
            self._end()
        return piece

    def _all(self) -> bytes:
        piece = bytes(self._buffer)
        self._buffer.clear()
        return piece

    def _end(self) -> None:
        if self._buffer:  # nobody asked for what follows; it must never be taken for the next answer
            self.reusable = False

    def _dechunk(self) -> bytes:
        buffer, out, at = self._buffer, bytearray(), 0
        while True:
            if self._at == "data":
                piece = buffer[at : at + self._left]
                out += piece
                at += len(piece)
                self._left -= len(piece)
                self._taken += len(piece)
                if self._left:
                    break
                self._at = "line end"
            end = buffer.find(b"\n", at, at + MAX_CHUNK_LINE_BYTES)
            if end < 0:
                if len(buffer) - at >= MAX_CHUNK_LINE_BYTES:
                    raise FetchError("protocol", f"a chunk's size or a trailer of over {MAX_CHUNK_LINE_BYTES} bytes")
                break
            line = bytes(buffer[at:end])
            at = end + 1
            # Sizes, extensions and trailers are no content: a body that is mostly of these is an attack on time.
            self._framing += len(line) + 1
            if self._framing > self._max_header_bytes + self._taken:
                raise FetchError("protocol", f"{self._framing} bytes of chunk framing for {self._taken} of content")
            if self._at == "size":
                size = _CHUNK_SIZE.fullmatch(line)
                if size is None:
                    raise FetchError("protocol", f"bad chunk size {line[:40]!r}")
                self._left = int(size.group(1), 16)
                self._at = "data" if self._left else "trailers"
            elif self._at == "line end":
                if line not in (b"", b"\r"):
                    raise FetchError("protocol", f"{line[:40]!r} where a chunk ends")
                self._at = "size"
            elif line in (b"", b"\r"):  # of the trailers, which are dropped: nothing in them is worth a risk
                self.complete = True
                break
        del buffer[:at]
        if self.complete:
            self._end()
        return bytes(out)

    def closed(self) -> None:
        """The other side has closed the connection. Raises FetchError (truncated) where that is no end."""
        if self.complete:
            return
        if self.head is None:
            raise FetchError("truncated", "closed in the middle of the header", passing=True)
        if not self._until_closed:
            missing = f"{self._left} bytes of {self.length}" if self.length is not None else "the last chunk"
            raise FetchError("truncated", f"closed in the middle of the body: {missing} did not come", passing=True)
        self.complete = True


def _head(raw: bytes) -> Head:
    """A head with the empty line that ends it, in time linear in its length. Raises FetchError: protocol,
    header_too_large."""
    text = raw.replace(b"\r\n", b"\n")  # a lone LF ends a line, too (RFC 9112, 2.2); a lone CR is an attack on others
    if b"\r" in text or b"\0" in text:
        raise FetchError("protocol", f"a lone CR or a NUL in the header {raw[:60]!r}")
    if b"\n " in text or b"\n\t" in text:
        if text.startswith((b" ", b"\t"), text.index(b"\n") + 1):
            raise FetchError("protocol", "white space before the first header field")
        text = _FOLD.sub(b" ", text)
    start, *lines = text[:-2].split(b"\n")
    status = _STATUS_LINE.fullmatch(start)
    if status is None:
        raise FetchError("protocol", f"bad status line {start[:60]!r}")
    if len(lines) > MAX_FIELDS:
        raise FetchError("header_too_large", f"{len(lines)} header fields; at most {MAX_FIELDS} are read")
    headers: list[tuple[str, str]] = []
    fields: dict[str, list[str]] = {}
    for line in lines:
        name, value, small = _common_field(line) if len(line) <= MAX_COMMON_BYTES else _field(line)
        headers.append((name, value))
        fields.setdefault(small, []).append(value)
    version, code, phrase = status.groups()
    reason_phrase = (phrase or b"").decode("utf-8", "surrogateescape")
    return Head(int(code), f"1.{int(version)}", reason_phrase, tuple(headers), fields)


def _field(line: bytes) -> tuple[str, str, str]:
    """(name, value, name in small letters). Raises FetchError: protocol."""
    key, colon, content = line.partition(b":")
    if not colon or not key or key.translate(None, _TOKEN_CHARACTERS):
        raise FetchError("protocol", f"bad header field {line[:60]!r}")
    name = key.decode("ascii")
    return name, content.strip(b" \t").decode("utf-8", "surrogateescape"), name.lower()


_common_field = lru_cache(maxsize=1024)(_field)  # most of a response's fields are as in the last one
