"""Writing and reading WARC files (ISO 28500), and reading ARC files.

Written: responses of the fetch, one gzip member a record, so that each can be read by its offset. The body is stored
decoded, with the headers that spoke of its coding renamed to X-Crawler-…: then every reader can use it without
brotli or zstd and without a bomb in its hands, and equal pages have equal payload digests however they were sent. That
costs space only on paper, since the record is compressed anyway.

Read: what the fetch wrote and what others wrote: gzip, zstd (with or without a dictionary), plain, WARC 0.18 to 1.1,
ARC 1 and 2. A broken record is named and stepped over; the next one is looked for behind it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from data_pipeline.config import UrlListConfig
from data_pipeline.crawl.http.body import BodyError, content_codings, dechunk, decode_body, is_html
from data_pipeline.crawl.url_syntax import InvalidUrl, host_of, normalize, registrable_domain
from data_pipeline.crawl.warc_records import MAX_HEADER_BYTES, Archive, Record, WarcError
from data_pipeline.records import DROPPED, FAILED, KEPT
from data_pipeline.store import raise_storage_error, storage_errors

__all__ = [
    "Exchange",
    "WarcEntry",
    "WarcError",
    "WarcResponse",
    "WarcWriter",
    "index_warc",
    "is_whole",
    "read_response",
]

Headers = Sequence[tuple[str, str]]

COMPRESSION_LEVEL = 2
"""ISA-L's, of 0 to 3: 0.19 ms for a page of 126 kB at .242 of its size, where zlib's level 3 takes 0.98 ms for .236
(300 real pages)."""
SMALL_BYTES = 1000
"""Records up to this size take level 0, at a fifth of the time for a few bytes more."""
NOT_MODIFIED_PROFILE = "http://netpreserve.org/warc/1.1/revisit/server-not-modified"
"""ISO 28500:2017 (WARC 1.1), 6.7.3."""
MAX_BODY_BYTES = 5_000_000
"""Largest body that is read back unless told otherwise, decoded or not; as FetchConfig.max_page_bytes."""
_RENAMED = {
    "content-encoding": "X-Crawler-Content-Encoding",
    "transfer-encoding": "X-Crawler-Transfer-Encoding",
    "content-length": "X-Crawler-Content-Length",
}


# ---- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A request, byte for byte, and its response, as they go into a WARC file. `body` is decoded; `fetched_at` RFC 3339
    in UTC.

    `revisit_of`: (URL, date) of the archived response that a 304 says still holds; `body` is that one's, of which the
    digest alone is written.
    """

    url: str
    request: bytes
    status: int
    http_version: str
    reason_phrase: str
    headers: Headers
    body: bytes
    ip: str
    fetched_at: str
    revisit_of: tuple[str, str] | None = None


class WarcWriter:
    """Appends to one WARC file from a known offset on; what lay behind it (a torn record) is cut away."""

    def __init__(self, path: Path, offset: int = 0, software: str = "gpt2train") -> None:
        """Raises StorageError when the machine has no room, ValueError when the file is shorter than `offset`."""
        self.path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._file).st_size
            if size < offset:
                os.close(self._file)
                raise ValueError(f"{path} has {size} bytes, but {offset} were written")
            os.ftruncate(self._file, offset)
            self.offset = os.lseek(self._file, offset, os.SEEK_SET)
        if not offset:
            fields = f"software: {software}\r\nformat: WARC File Format 1.1\r\n".encode()
            head = [("WARC-Filename", path.name), ("Content-Type", "application/warc-fields")]
            self._append(_record("warcinfo", _now(), head, _record_id(), fields))

    def write(self, exchange: Exchange, payload_sha256: bytes) -> tuple[int, int]:
        """Append the response and its request in one write; returns (offset of the response, end of both)."""
        e = exchange
        response_id = _record_id()
        shared = [("WARC-Target-URI", e.url), *([("WARC-IP-Address", e.ip)] if e.ip else [])]
        digest = "sha256:" + base64.b32encode(payload_sha256).decode()
        fields = [*shared, ("WARC-Payload-Digest", digest), ("Content-Type", "application/http; msgtype=response")]
        status_line = f"HTTP/{e.http_version} {e.status} {e.reason_phrase}".rstrip()
        if e.revisit_of is not None:
            url, date = e.revisit_of
            fields += [
                ("WARC-Profile", NOT_MODIFIED_PROFILE),
                ("WARC-Refers-To-Target-URI", url),
                ("WARC-Refers-To-Date", date),
            ]
            response = _record("revisit", e.fetched_at, fields, response_id, _header_block(status_line, e.headers))
        else:
            head = _header_block(status_line, archived_headers(e))
            response = _record("response", e.fetched_at, fields, response_id, head, e.body)
        fields = [*shared, ("WARC-Concurrent-To", response_id), ("Content-Type", "application/http; msgtype=request")]
        request = _record("request", e.fetched_at, fields, _record_id(), e.request)
        start = self.offset
        self._append(response + request)
        return start, self.offset

    def _append(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as e:
            with storage_errors(self.path):
                os.ftruncate(self._file, self.offset)  # no half record stays
                os.lseek(self._file, self.offset, os.SEEK_SET)
            raise_storage_error(e, self.path)
        self.offset += len(data)

    def sync(self) -> None:
        with storage_errors(self.path):
            os.fsync(self._file)

    def duplicate(self) -> int:
        """Another descriptor of the file, for a sync that this writer's closing must not disturb."""
        return os.dup(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def archived_headers(exchange: Exchange) -> Headers:
    """The response's headers; if its coding was undone, those that spoke of it renamed and the new length added."""
    length = str(len(exchange.body))
    told = {name.lower(): value for name, value in exchange.headers}
    if told.get("content-length") == length and not told.keys() & {"content-encoding", "transfer-encoding"}:
        return exchange.headers
    kept = [(_RENAMED.get(name.lower(), name), value) for name, value in exchange.headers]
    return [*kept, ("Content-Length", length)]


def _header_block(start: str, headers: Headers) -> bytes:
    text = start + "".join([f"\r\n{name}: {value}" for name, value in headers])
    if text.count("\r") != len(headers) or text.count("\n") != len(headers):  # a line end inside would be a new field
        lines = (start, *(f"{name}: {value}" for name, value in headers))
        text = "\r\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines)
    return (text + "\r\n\r\n").encode("utf-8", "surrogateescape")


def _record_id() -> str:
    """A random UUID (RFC 9562, 5.4), at a third of what the standard library's takes."""
    h = os.urandom(16).hex()
    return f"<urn:uuid:{h[:8]}-{h[8:12]}-4{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:]}>"


def _record(kind: str, date: str, headers: Headers, record_id: str, *content: bytes) -> bytes:
    length = str(sum(map(len, content)))
    fields = [
        ("WARC-Type", kind),
        ("WARC-Record-ID", record_id),
        ("WARC-Date", date),
        *headers,
        ("Content-Length", length),
    ]
    plain = b"".join((_header_block("WARC/1.1", fields), *content, b"\r\n\r\n"))
    return isal_zlib.compress(plain, COMPRESSION_LEVEL if len(plain) > SMALL_BYTES else 0, 31)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- HTTP in a record -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarcResponse:
    """An archived HTTP response; `body` is decoded, `fetched_at` RFC 3339 in UTC."""

    url: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    fetched_at: str

    @property
    def content_type(self) -> str:
        return self.header("content-type")

    def header(self, name: str) -> str:
        return next((v for k, v in self.headers if k.lower() == name.lower()), "")

    def header_values(self, name: str) -> list[str]:
        return [v for k, v in self.headers if k.lower() == name.lower()]


def _response(record: Record) -> WarcResponse:
    """Split the HTTP message; the body is still as it was archived. Raises WarcError."""
    content = record.content
    ends = [i for i in (content.find(b"\r\n\r\n"), content.find(b"\n\n")) if i >= 0]
    head = content[: min(ends)] if ends else content
    lines = head.split(b"\n")
    match = re.match(rb"HTTP/\d(?:\.\d)? +(\d{3})", lines[0])
    if not match:
        raise WarcError("not_http", f"the record holds no HTTP response: {lines[0][:60]!r}")
    if not ends:
        raise WarcError("broken_record", "the HTTP header does not end")
    headers = []
    for line in lines[1:]:
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            headers.append((name.strip(), value.strip()))
    start = min(ends) + (4 if content.startswith(b"\r\n\r\n", min(ends)) else 2)
    return WarcResponse(record.url, int(match.group(1)), tuple(headers), content[start:], record.fetched_at)


def _decoded(response: WarcResponse, max_bytes: int) -> WarcResponse:
    body = response.body
    try:
        if "chunked" in ",".join(response.header_values("transfer-encoding")).lower():
            body = dechunk(body)
        body = decode_body(body, content_codings(response.header_values("content-encoding")), max_bytes)
    except BodyError as e:
        raise WarcError(e.reason, str(e)) from e
    return WarcResponse(response.url, response.status, response.headers, body, response.fetched_at)


def read_response(path: Path, offset: int, max_bytes: int = MAX_BODY_BYTES) -> WarcResponse:
    """The response record at `offset`, its body decoded. Raises WarcError, or OSError when the file is not there."""
    with Archive(path) as archive:
        record = archive.record(offset, max_bytes + MAX_HEADER_BYTES)
        if record.length > len(record.content):
            raise WarcError("too_large", f"{record.length} bytes; at most {max_bytes} are read")
        return _decoded(_response(record), max_bytes)


def is_whole(path: Path, offset: int, end: int, kind: str) -> bool:
    """Whether a record of `kind` and its request stand from `offset` to `end`, as `WarcWriter.write` wrote them.

    Raises WarcError, or OSError when the file is not there.
    """
    with Archive(path) as archive:
        first = archive.record(offset, MAX_HEADER_BYTES)
        if first.kind != kind or first.next_offset >= end:
            return False
        second = archive.record(first.next_offset, MAX_HEADER_BYTES)
        return second.kind == "request" and second.next_offset == end


# ---- all records of a file --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarcEntry:
    """A response record, or a broken one. `state` and `reason` are those of a verdict; kept: an HTML page."""

    offset: int
    url: str
    state: str
    reason: str | None = None
    detail: str | None = None
    status: int = 0
    content_type: str = ""
    fetched_at: str = ""
    payload_digest: str = ""

    @property
    def domain(self) -> str:
        with contextlib.suppress(InvalidUrl):
            return registrable_domain(host_of(normalize(self.url, UrlListConfig())))
        host = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/:?#]*)", self.url)
        return registrable_domain(host.group(1).strip("[]").lower()) if host else ""


def index_warc(
    path: Path, max_bytes: int = MAX_BODY_BYTES, refused: Callable[[WarcResponse], str | None] = lambda response: None
) -> Iterator[WarcEntry]:
    """Every response and revisit record of a file in order, and every stretch that cannot be read. `refused` says for a
    page which of its headers keeps it out, if any.

    Reasons: broken_record, too_large, truncated, bad_encoding, http_status (failed); not_http, not_html, revisit,
    noindex (dropped). Other kinds of records (request, metadata, ...) are no pages and yield nothing.
    """
    with Archive(path) as archive:
        offset = archive.skip_filler(0)
        while offset < archive.size:
            try:
                record = archive.record(offset, max_bytes + MAX_HEADER_BYTES)
                following = record.next_offset
            except WarcError as e:
                following = archive.resync(offset)
                detail = f"{path.name}, bytes {offset} to {following}: {e}"
                yield WarcEntry(offset, "", FAILED, e.reason, detail)
            else:
                entry = _entry(record, offset, max_bytes, refused)
                if entry is not None:
                    yield entry
            offset = archive.skip_filler(following)


def _entry(
    record: Record, offset: int, max_bytes: int, refused: Callable[[WarcResponse], str | None]
) -> WarcEntry | None:
    if record.kind == "revisit":
        return WarcEntry(offset, record.url, DROPPED, "revisit", "the page is archived in another record")
    if record.kind != "response":
        return None
    url, at = record.url, record.fetched_at
    if record.length > len(record.content):
        return WarcEntry(offset, url, FAILED, "too_large", f"{record.length} bytes", fetched_at=at)
    try:
        response = _response(record)
    except WarcError as e:
        state = DROPPED if e.reason == "not_http" else FAILED
        return WarcEntry(offset, url, state, e.reason, str(e), fetched_at=at)
    status, content_type = response.status, response.content_type
    if status != 200:
        return WarcEntry(offset, url, FAILED, "http_status", str(status), status, content_type, at)
    cut = record.headers.get("warc-truncated")
    if cut:
        return WarcEntry(offset, url, FAILED, "truncated", f"WARC-Truncated: {cut}", status, content_type, at)
    try:
        body = _decoded(response, max_bytes).body
    except WarcError as e:
        return WarcEntry(offset, url, FAILED, e.reason, str(e), status, content_type, at)
    if not is_html(content_type, body):
        return WarcEntry(offset, url, DROPPED, "not_html", content_type, status, content_type, at)
    refusal = refused(response)
    if refusal:
        return WarcEntry(offset, url, DROPPED, "noindex", refusal, status, content_type, at)
    digest = hashlib.sha256(body).hexdigest()
    return WarcEntry(offset, url, KEPT, None, None, status, content_type, at, digest)
