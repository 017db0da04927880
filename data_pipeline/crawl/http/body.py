"""HTTP message bodies: undoing transfer and content codings within a bound, and telling whether the rest is HTML.

Bytes as a server sent them flow in, the entity's bytes flow out, never more than `max_bytes` of them at any layer. The
memory in use is at most the input and twice `max_bytes`; the time is linear, whatever the input holds.
"""

from __future__ import annotations

import re
import zlib

import brotli
import zstandard

MAX_CODINGS = 3
"""Content codings applied one after the other; nobody honest needs a second one."""
MAX_GZIP_MEMBERS = 1000
"""A body of many tiny members costs far more than its length to decode; honest ones have one."""
ZSTD_MAX_WINDOW_BYTES = 8 << 20
"""RFC 9659, 3: the largest window that `Content-Encoding: zstd` may use."""
_SLICE = 64 << 10
_ZSTD_SLICE = 256
"""Its decompressor knows no output limit (and its stream reader does not tell a cut body from a whole one): four bytes
make a block of at most 128 kB (RFC 8878, 3.1.1.2), so this much input makes 8 MB at most."""


class BodyError(ValueError):
    """`reason` is `bad_encoding`, `truncated` or `too_large`; `partial`: what was decoded before it was found."""

    def __init__(self, reason: str, message: str, partial: bytes = b"") -> None:
        super().__init__(message)
        self.reason = reason
        self.partial = partial


def content_codings(header_values: list[str]) -> list[str]:
    """`Content-Encoding` values → codings in the order they were applied; `identity` left out."""
    codings = [c.strip().lower() for value in header_values for c in value.split(",")]
    return [c for c in codings if c and c not in ("identity", "none", "utf-8")]


def decode_body(body: bytes, codings: list[str], max_bytes: int) -> bytes:
    """Undo `codings`, the last one applied first. Raises BodyError."""
    if len(codings) > MAX_CODINGS:
        raise BodyError("bad_encoding", f"{len(codings)} content codings in a row; at most {MAX_CODINGS} are undone")
    for coding in reversed(codings):
        if coding in ("gzip", "x-gzip"):
            body = _gunzip(body, max_bytes)
        elif coding == "deflate":
            body = _inflate(body, max_bytes)
        elif coding == "br":
            body = _unbrotli(body, max_bytes)
        elif coding == "zstd":
            body = _unzstd(body, max_bytes)
        else:
            raise BodyError("bad_encoding", f"content coding {coding[:40]!r} is not known")
    if len(body) > max_bytes:
        raise _too_large(max_bytes, body)
    return body


def _too_large(max_bytes: int, partial: bytes | bytearray) -> BodyError:
    return BodyError("too_large", f"more than {max_bytes} bytes once decoded", bytes(partial))


def _zlib(decompressor: zlib._Decompress, body: memoryview, out: bytearray, max_bytes: int) -> int:
    """Run one zlib stream over `body`; returns the bytes that it used. Raises BodyError, zlib.error."""
    at = 0
    while at < len(body) and not decompressor.eof:
        piece = body[at : at + _SLICE]  # small, as unused_data is a copy of what lies behind the stream's end
        at += len(piece)
        data: bytes | memoryview = piece
        while data and not decompressor.eof:
            out += decompressor.decompress(data, max_bytes + 1 - len(out))
            if len(out) > max_bytes:
                raise _too_large(max_bytes, out)
            data = decompressor.unconsumed_tail
    if not decompressor.eof:
        raise BodyError("truncated", "the compressed body ends in the middle", bytes(out))
    return at - len(decompressor.unused_data)


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    first = zlib.decompressobj(wbits=31)
    try:
        whole = first.decompress(body, max_bytes + 1)
    except zlib.error as e:
        raise BodyError("bad_encoding", f"gzip: {e}") from e
    if len(whole) > max_bytes:
        raise _too_large(max_bytes, whole)
    if first.eof and not first.unused_data:  # as all but a few are; the rest is read member by member
        return whole
    view, out, at = memoryview(body), bytearray(), 0
    for _ in range(MAX_GZIP_MEMBERS):
        try:
            at += _zlib(zlib.decompressobj(wbits=31), view[at:], out, max_bytes)
        except zlib.error as e:
            raise BodyError("bad_encoding", f"gzip: {e}") from e
        if not body.startswith(b"\x1f\x8b", at):  # the end, or padding behind it, which browsers ignore
            return bytes(out)
    raise BodyError("bad_encoding", f"more than {MAX_GZIP_MEMBERS} gzip members")


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """RFC 9110, 8.4.1.2 means the zlib form, but many servers send it bare."""
    wrapped = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    out = bytearray()
    try:
        _zlib(zlib.decompressobj(wbits=15 if wrapped else -15), memoryview(body), out, max_bytes)
    except zlib.error as e:
        raise BodyError("bad_encoding", f"deflate: {e}") from e
    return bytes(out)


def _unbrotli(body: bytes, max_bytes: int) -> bytes:
    decompressor = brotli.Decompressor()
    out = bytearray()
    try:
        data = body
        while True:
            out += decompressor.process(data, output_buffer_limit=max(1, max_bytes + 1 - len(out)))
            if len(out) > max_bytes:
                raise _too_large(max_bytes, out)
            if decompressor.is_finished():
                return bytes(out)
            if decompressor.can_accept_more_data():
                raise BodyError("truncated", "the compressed body ends in the middle", bytes(out))
            data = b""
    except brotli.error as e:
        raise BodyError("bad_encoding", f"br: {e}") from e


def _unzstd(body: bytes, max_bytes: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES)
    out, at = bytearray(), 0
    for _ in range(MAX_GZIP_MEMBERS):
        frame = decompressor.decompressobj()
        while at < len(body) and not frame.eof:
            piece = body[at : at + _ZSTD_SLICE]
            at += len(piece)
            try:
                out += frame.decompress(piece)
            except zstandard.ZstdError as e:
                raise BodyError("bad_encoding", f"zstd: {e}") from e
            if len(out) > max_bytes:
                raise _too_large(max_bytes, out[: max_bytes + 1])
        if not frame.eof:
            raise BodyError("truncated", "the compressed body ends in the middle", bytes(out))
        at -= len(frame.unused_data)
        if at >= len(body):
            return bytes(out)
    raise BodyError("bad_encoding", f"more than {MAX_GZIP_MEMBERS} zstd frames")


def dechunk(body: bytes) -> bytes:
    """Undo `Transfer-Encoding: chunked` (RFC 9112, 7.1) in an archived body. Raises BodyError.

    Archives hold bodies that are called chunked and are not: those are given back as they are.
    """
    out = bytearray()
    at = 0
    while True:
        end = body.find(b"\r\n", at, at + 1024)
        size = re.match(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;|$)", body[at:end] if end >= 0 else b"")
        if size is None:
            if at == 0:
                return body
            raise BodyError("truncated", "the chunked body ends in the middle or holds a bad chunk")
        length = int(size.group(1), 16)
        at = end + 2
        if length == 0:
            return bytes(out)
        out += body[at : at + length]
        if len(body) < at + length:
            raise BodyError("truncated", "the chunked body ends in the middle of a chunk")
        at += length + 2


# ---- is it HTML? ------------------------------------------------------------------------------------------------

HTML_TYPES = frozenset(("text/html", "application/xhtml+xml"))

# MIME Sniffing standard, 7.1: what marks HTML where a resource starts; "TT" a tag-terminating byte follows.
_HTML_START = re.compile(
    rb"[\t\n\x0c\r ]*<(?:!--|\?xml|"
    rb"(?:!DOCTYPE HTML|HTML|HEAD|SCRIPT|IFRAME|H1|DIV|FONT|TABLE|A|STYLE|TITLE|B|BODY|BR|P)[ >])",
    re.IGNORECASE,
)


def media_type(content_type: str) -> str:
    """`Text/HTML; charset=x` → `text/html`."""
    return content_type.partition(";")[0].strip().lower()


def is_html(content_type: str, body: bytes) -> bool:
    """By the declared type; where none is declared, by how the body starts."""
    declared = media_type(content_type)
    if declared:
        return declared in HTML_TYPES
    return _HTML_START.match(body.removeprefix(b"\xef\xbb\xbf")[:1445]) is not None
