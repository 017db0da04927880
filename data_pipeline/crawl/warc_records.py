"""Records of WARC and ARC files, one at a time and by offset, whatever they are packed in.

A file flows in (gzip, zstd with or without a dictionary, plain; WARC 0.18 to 1.1, ARC 1 and 2), records flow out, each
with the offset of the next one. What cannot be read raises WarcError, and `resync` finds where reading can go on.
Memory is bounded by what the caller wants of a record's content; a bomb is decompressed in small steps and dropped.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard

MAX_HEADER_BYTES = 1 << 20
"""Longest header of a record, and of the HTTP message in it."""


class WarcError(ValueError):
    """A record that cannot be used. `reason` is `broken_record`, `not_http`, or one of BodyError's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Reader(Protocol):
    """Bytes of one record (a compressed member) or of all from it on (a plain file)."""

    def read(self, size: int) -> bytes: ...

    def next_offset(self) -> int:
        """Where the next record starts, once this one was read. Raises WarcError if this one does not end there."""
        ...


_ZLIB = type(zlib.decompressobj())


class _Compressed:
    """One gzip member or zstd frame, decompressed in small steps, so that a bomb stays small in memory."""

    def __init__(self, file: int, offset: int, decompressor: zlib._Decompress | zstandard.ZstdDecompressionObj) -> None:
        self._file = file
        self._at = offset
        self._decompressor = decompressor
        # zstd's object knows no output limit: a block makes at most 128 kB of 4 bytes (RFC 8878, 3.1.1.2.3).
        self._step = 16_384 if isinstance(decompressor, _ZLIB) else 128
        self._buffer = bytearray()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the member's end only."""
        while len(self._buffer) < size and self._more():
            pass
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _more(self) -> bool:
        d = self._decompressor
        if d.eof:
            return False
        try:
            if isinstance(d, _ZLIB):
                data = d.unconsumed_tail or self._take()
                self._buffer += d.decompress(data, 1 << 20)
            else:
                self._buffer += d.decompress(self._take())
        except (zlib.error, zstandard.ZstdError) as e:
            raise WarcError("broken_record", f"cannot be decompressed: {e}") from e
        return True

    def _take(self) -> bytes:
        data = os.pread(self._file, self._step, self._at)
        if not data:
            raise WarcError("broken_record", "the file ends in the middle of the record")
        self._at += len(data)
        return data

    def next_offset(self) -> int:
        rest = bytearray()
        while block := self.read(4096):
            rest += block.strip(b"\r\n")
            if rest:
                raise WarcError(
                    "broken_record",
                    "more than one record in a compressed member; `warcio recompress` makes such a file readable",
                )
        return self._at - len(self._decompressor.unused_data)


class _Plain:
    def __init__(self, file: int, offset: int) -> None:
        self._file = file
        self._at = offset

    def read(self, size: int) -> bytes:
        data = os.pread(self._file, size, self._at)
        self._at += len(data)
        return data

    def next_offset(self) -> int:
        while True:
            block = os.pread(self._file, 4096, self._at)
            blank = len(block) - len(block.lstrip(b"\r\n"))
            self._at += blank
            if blank < len(block):
                if not _starts_record(block[blank:]):
                    raise WarcError("broken_record", "no record follows; Content-Length must be wrong")
                return self._at
            if not block:
                return self._at


_ARC_LINE = re.compile(rb"(\S.*) (\S+) (\d{8,14}) (\S*) (\d+)\s*$")
_ARC2_LINE = re.compile(rb"(\S.*) (\S+) (\d{8,14}) (\S+) (\d+) (\S+) (\S+) (\d+) (\S+) (\d+)\s*$")


_WARC_HEAD = re.compile(rb"WARC/\d\.\d+\r?\n(?:[A-Za-z-]+:[^\n]*\n)*?WARC-Type:", re.IGNORECASE)


def _starts_record(data: bytes) -> bool:
    line = data.split(b"\n", 1)[0]
    return line.startswith(b"WARC/") or _ARC_LINE.match(line) is not None


@dataclass
class Record:
    kind: str
    headers: dict[str, str]
    content: bytes  # at most what was asked for
    length: int
    next_offset: int

    @property
    def url(self) -> str:
        return self.headers.get("warc-target-uri", "").strip("<> ").replace(" ", "%20")

    @property
    def fetched_at(self) -> str:
        match = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", self.headers.get("warc-date", ""))
        return match.group(1) + "Z" if match else ""


class Archive:
    """An open WARC or ARC file; records are read by offset."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        magic = os.pread(self._file, 4, 0)
        self.form = "gzip" if magic[:2] == b"\x1f\x8b" else "zstd" if _is_zstd(magic) else "plain"
        self._dictionary = self._read_dictionary(magic) if self.form == "zstd" else None

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _read_dictionary(self, magic: bytes) -> zstandard.ZstdCompressionDict | None:
        """The leading skippable frame of "WARC + zstd" (iipc.github.io/warc-specifications) holds the dictionary."""
        if magic != b"\x5d\x2a\x4d\x18":
            return None
        length = int.from_bytes(os.pread(self._file, 4, 4), "little")
        if length > 100 << 20:
            raise WarcError("broken_record", f"a zstd dictionary of {length} bytes")
        data = os.pread(self._file, length, 8)
        if _is_zstd(data[:4]):
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=100 << 20)
        return zstandard.ZstdCompressionDict(data)

    def _reader(self, offset: int) -> _Reader:
        if self.form == "gzip":
            return _Compressed(self._file, offset, zlib.decompressobj(wbits=31))
        if self.form == "zstd":
            decompressor = zstandard.ZstdDecompressor(dict_data=self._dictionary, max_window_size=128 << 20)
            return _Compressed(self._file, offset, decompressor.decompressobj())
        return _Plain(self._file, offset)

    def skip_filler(self, offset: int) -> int:
        """The offset of the next record: past skippable zstd frames and blank lines."""
        while self.form == "zstd" and offset < self.size:
            head = os.pread(self._file, 8, offset)
            if len(head) < 8 or head[0] >> 4 != 5 or head[1:4] != b"\x2a\x4d\x18":
                break
            offset += 8 + int.from_bytes(head[4:], "little")
        return offset

    def record(self, offset: int, max_content: int) -> Record:
        """The record at `offset`; of its content at most `max_content` bytes are kept. Raises WarcError."""
        reader = self._reader(offset)
        buffer = bytearray()
        line = _line(reader, buffer)
        if line.startswith(b"WARC/"):
            headers = _headers(reader, buffer)
            kind = headers.get("warc-type", "").lower()
        else:
            kind, headers = _arc_headers(line)
        length_text = headers.get("content-length", "")
        if not re.fullmatch(r"\d{1,18}", length_text):
            raise WarcError("broken_record", f"Content-Length is {length_text[:40]!r}")
        length = left = int(length_text)
        content = bytearray()
        while left:
            block = bytes(buffer[:left]) if buffer else reader.read(min(left, 1 << 16))
            del buffer[: len(block)]
            if not block:
                raise WarcError("broken_record", f"only {length - left} of {length} bytes are there")
            left -= len(block)
            content += block[: max_content - len(content)]
        if buffer.strip(b"\r\n"):
            if isinstance(reader, _Compressed):
                raise WarcError("broken_record", "the compressed member holds more than its record")
            reader = _Plain(self._file, reader._at - len(buffer))  # type: ignore[attr-defined]
        return Record(kind, headers, bytes(content), length, reader.next_offset())

    def resync(self, offset: int) -> int:
        """The next offset behind `offset` at which a record may start; the file's end if there is none."""
        marks = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd", "plain": b"WARC/"}
        mark = marks[self.form]
        at = offset + 1
        while at < self.size:
            block = os.pread(self._file, 1 << 20, at)
            found = block.find(mark)
            if found < 0:
                at += max(1, len(block) - len(mark) + 1)
                continue
            candidate = at + found
            try:
                head = self._reader(candidate).read(4096)
                if _WARC_HEAD.match(head) or (self.form != "plain" and _starts_record(head)):
                    return candidate
            except WarcError:
                pass
            at += found + 1
        return self.size


def _is_zstd(magic: bytes) -> bool:
    return magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5)


def _line(reader: _Reader, buffer: bytearray) -> bytes:
    """One line without its end, over `buffer`, which holds what was read beyond it."""
    while (end := buffer.find(b"\n")) < 0:
        block = reader.read(4096)
        if not block or len(buffer) > MAX_HEADER_BYTES:
            raise WarcError("broken_record", "the header does not end")
        buffer += block
    line = bytes(buffer[:end]).rstrip(b"\r")
    del buffer[: end + 1]
    return line


def _headers(reader: _Reader, buffer: bytearray) -> dict[str, str]:
    headers: dict[str, str] = {}
    name = ""
    total = 0
    while line := _line(reader, buffer):
        total += len(line)
        if total > MAX_HEADER_BYTES:
            raise WarcError("broken_record", "the header is longer than 1 MiB")
        text = line.decode("utf-8", "replace")
        if text[0] in " \t" and name:
            headers[name] += " " + text.strip()
        else:
            name, _, value = text.partition(":")
            name = name.strip().lower()
            headers[name] = value.strip()
    return headers


def _arc_headers(line: bytes) -> tuple[str, dict[str, str]]:
    """An ARC record's line (archive.org/web/researcher/ArcFileFormat.php) in the words of a WARC header."""
    match = _ARC2_LINE.match(line) or _ARC_LINE.match(line)
    if not match:
        raise WarcError("broken_record", f"neither a WARC nor an ARC record starts here: {line[:60]!r}")
    url, date = match.group(1).decode("utf-8", "replace"), match.group(3).decode().ljust(14, "0")
    stamp = f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[8:10]}:{date[10:12]}:{date[12:14]}Z"
    kind = "warcinfo" if url.startswith("filedesc:") else "response"
    return kind, {
        "warc-target-uri": url,
        "warc-date": stamp,
        "content-length": match.group(match.lastindex or 0).decode(),
    }
