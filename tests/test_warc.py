"""WARC files: ours read by warcio and fastwarc, theirs read by us, and what breaks on the way."""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import os
import random
import resource
import subprocess
import sys
import textwrap
import time
import zlib
from dataclasses import replace
from pathlib import Path

import brotli
import pyarrow.parquet as pq
import pytest
import zstandard
from fastwarc.warc import ArchiveIterator
from places import SHARED
from warcio.archiveiterator import ArchiveIterator as WarcioIterator
from warcio.checker import Checker

from data_pipeline.crawl.http.body import BodyError, content_codings, dechunk, decode_body, is_html
from data_pipeline.crawl.warc import Exchange, WarcError, WarcWriter, index_warc, read_response
from data_pipeline.tasks import index_warc_file

PAGE = "<html><title>Grüße</title><p>Some words.</html>".encode() * 50


def exchange(number: int = 0, body: bytes = PAGE, **headers: str) -> Exchange:
    fields = {"Content-Type": "text/html; charset=utf-8", "X-Name": "ü \udcff", **headers}
    return Exchange(
        url=f"http://example.com/{number}?q=ü".replace("ü", "%C3%BC"),
        request=f"GET /{number}?q=%C3%BC HTTP/1.1\r\nHost: example.com\r\nUser-Agent: test\r\n\r\n".encode(),
        status=200,
        http_version="1.1",
        reason_phrase="OK",
        headers=[(k.replace("_", "-"), v) for k, v in fields.items()],
        body=body,
        ip="93.184.216.34",
        fetched_at="2026-11-23T05:00:00Z",
    )


def write(path: Path, *exchanges: Exchange) -> list[tuple[int, int]]:
    writer = WarcWriter(path)
    spans = [writer.write(e, hashlib.sha256(e.body).digest()) for e in exchanges]
    writer.close()
    return spans


def check(path: Path) -> int:
    return Checker(argparse.Namespace(inputs=[str(path)], verbose=False)).process_all()


# ---- writing ----------------------------------------------------------------------------------------------------


def test_others_read_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    spans = write(path, *(exchange(i, PAGE + bytes([i]), Content_Encoding="br", Content_Length="9") for i in range(5)))
    assert check(path) == 0
    with open(path, "rb") as f:
        kinds, offsets = [], []
        iterator = WarcioIterator(f)
        for record in iterator:
            kinds.append(record.rec_type)
            if record.rec_type == "response":
                assert record.content_stream().read() == PAGE + bytes([kinds.count("response") - 1])
                assert record.http_headers.get_header("X-Crawler-Content-Encoding") == "br"
                assert record.http_headers.get_header("Content-Encoding") is None
                assert record.rec_headers.get_header("WARC-IP-Address") == "93.184.216.34"
            if record.rec_type == "request":
                assert record.rec_headers.get_header("WARC-Concurrent-To")
            offsets.append(iterator.get_record_offset())  # reads the record to its end
    assert kinds == ["warcinfo", *["response", "request"] * 5]
    assert offsets[1::2] == [start for start, _ in spans]
    assert [end for _, end in spans][-1] == path.stat().st_size
    with open(path, "rb") as f:
        records = [r for r in ArchiveIterator(f, parse_http=True, verify_digests=False) if r.http_headers]
        assert sum(r.http_headers.status_code == 200 for r in records if "HTTP/" in r.http_headers.status_line) >= 5
    for i, (start, _) in enumerate(spans):
        response = read_response(path, start)
        assert (response.status, response.body) == (200, PAGE + bytes([i]))
        assert response.url == f"http://example.com/{i}?q=%C3%BC"
        assert response.content_type == "text/html; charset=utf-8"
        assert response.fetched_at == "2026-11-23T05:00:00Z"


def test_headers_that_tell_the_truth_stay_as_they_are(tmp_path: Path) -> None:
    ((start, _),) = write(tmp_path / "a.warc.gz", exchange(Content_Length=str(len(PAGE))))
    names = [name for name, _ in read_response(tmp_path / "a.warc.gz", start).headers]
    assert "Content-Length" in names
    assert not any(name.startswith("X-Crawler") for name in names)


def test_a_header_cannot_break_out_of_its_line(tmp_path: Path) -> None:
    ((start, _),) = write(tmp_path / "a.warc.gz", exchange(X_Evil="a\r\n\r\n<p>body"))
    assert read_response(tmp_path / "a.warc.gz", start).body == PAGE
    assert check(tmp_path / "a.warc.gz") == 0


def test_a_writer_goes_on_where_the_last_good_record_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    spans = write(path, exchange(0), exchange(1))
    with open(path, "ab") as f:
        f.write(b"\x1f\x8b\x08 a torn record")
    writer = WarcWriter(path, spans[0][1])
    writer.write(exchange(2), hashlib.sha256(PAGE).digest())
    writer.close()
    assert check(path) == 0
    assert [e.url[-10:] for e in index_warc(path)] == ["0?q=%C3%BC", "2?q=%C3%BC"]
    with pytest.raises(ValueError, match=r"has \d+ bytes, but 999999 were written"):
        WarcWriter(path, 999_999)


# ---- reading ----------------------------------------------------------------------------------------------------


def outcomes(path: Path) -> collections.Counter[tuple[str, str | None]]:
    return collections.Counter((e.state, e.reason) for e in index_warc(path))


KEPT = ("kept", None)
BROKEN = ("failed", "broken_record")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dolma/sample-0000.warc.gz", {KEPT: 22}),
        ("dolma/sample-0001.warc.gz", {KEPT: 15}),
        (
            "aut/example.arc.gz",
            {KEPT: 94, ("dropped", "not_html"): 120, ("dropped", "not_http"): 38, ("failed", "http_status"): 47},
        ),
        ("warcio/example.warc", {KEPT: 1, ("dropped", "revisit"): 1}),
        ("warcio/example.warc.gz", {KEPT: 1, ("dropped", "revisit"): 1}),
        ("warcio/example.arc", {KEPT: 1}),
        ("warcio/example.arc.gz", {KEPT: 1}),
        ("warcio/example-iana.org-chunked.warc", {KEPT: 1}),
        ("warcio/example-wget-bad-target-uri.warc.gz", {KEPT: 1}),
        ("warcio/post-test.warc.gz", {("dropped", "not_html"): 3}),
        ("warcio/example-digest.warc", {}),
        ("warcio/example-resource.warc.gz", {}),
        ("warcio/example-space-in-target-uri.warc.gz", {}),
        ("warcio/example-trunc.warc", {BROKEN: 1}),
        ("warcio/example-space-in-url.arc", {BROKEN: 1}),
        ("warcio/example-wrong-chunks.warc.gz", {BROKEN: 1}),
        ("warcio/example-bad-non-chunked.warc.gz", {BROKEN: 1}),
        ("warcio/example-bad.warc.gz.bad", {BROKEN: 1}),
        ("warcio/bad.arc", {BROKEN: 1}),
    ],
)
def test_real_and_broken_files(name: str, expected: dict[tuple[str, str | None], int]) -> None:
    path = SHARED / "warc" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert outcomes(path) == expected
    for entry in index_warc(path):
        if entry.state == "kept":
            body = read_response(path, entry.offset).body
            assert hashlib.sha256(body).hexdigest() == entry.payload_digest
            assert entry.fetched_at.endswith("Z")
            assert entry.domain
        elif entry.reason == "broken_record":
            assert f"{path.name}, bytes {entry.offset} to " in (entry.detail or "")


@pytest.mark.parametrize("name", ["aut/example.arc.gz", "dolma/sample-0000.warc.gz", "warcio/example.warc"])
def test_bodies_are_those_that_warcio_reads(name: str) -> None:
    path = SHARED / "warc" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    ours = {e.offset: e for e in index_warc(path)}
    with open(path, "rb") as f:
        iterator = WarcioIterator(f, arc2warc=True)
        responses = 0
        for record in iterator:
            if record.rec_type not in ("response", "revisit"):
                continue
            responses += 1
            body = record.content_stream().read()
            entry = ours[iterator.get_record_offset()]
            if entry.state != "kept":
                continue
            assert entry.url == record.rec_headers.get_header("WARC-Target-URI").strip("<>")
            assert read_response(path, entry.offset).body == body
    assert responses == len(ours)


def archive(gzipped: bool, bodies: list[tuple[str, bytes, list[tuple[str, str]]]]) -> bytes:
    records = []
    for url, body, headers in bodies:
        lines = "".join(f"{k}: {v}\r\n" for k, v in [("Content-Type", "text/html"), *headers])
        content = f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + body
        fields = f"WARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2020-01-02T03:04:05Z\r\n"
        fields += f"Content-Type: application/http\r\nContent-Length: {len(content)}\r\n"
        record = f"WARC/1.0\r\n{fields}\r\n".encode() + content + b"\r\n\r\n"
        records.append(gzip.compress(record) if gzipped else record)
    return b"".join(records)


def zstd_members(plain: bytes, dictionary: zstandard.ZstdCompressionDict | None = None) -> bytes:
    """One frame a record, as the WARC + zstd convention has it."""
    records = [b"WARC/1.0" + r for r in plain.split(b"WARC/1.0") if r]
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    head = b""
    if dictionary is not None:
        raw = zstandard.compress(dictionary.as_bytes())
        head = b"\x5d\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw
    return head + b"".join(compressor.compress(r) for r in records)


def pages(count: int) -> list[tuple[str, bytes, list[tuple[str, str]]]]:
    return [(f"http://h{i}.test/", b"<p>%d " % i + PAGE, []) for i in range(count)]


@pytest.mark.parametrize("form", ["plain", "gzip", "zstd", "zstd with a dictionary"])
def test_every_container(tmp_path: Path, form: str) -> None:
    plain = archive(False, pages(20))
    dictionary = zstandard.train_dictionary(2000, [b"WARC/1.0" + r for r in plain.split(b"WARC/1.0") if r] * 10)
    data = {
        "plain": plain,
        "gzip": archive(True, pages(20)),
        "zstd": zstd_members(plain),
        "zstd with a dictionary": zstd_members(plain, dictionary),
    }[form]
    path = tmp_path / "file"
    path.write_bytes(data)
    entries = list(index_warc(path))
    assert [e.url for e in entries] == [u for u, _, _ in pages(20)]
    for entry, (_, body, _) in zip(entries, pages(20), strict=True):
        assert read_response(path, entry.offset).body == body


@pytest.mark.parametrize("form", ["gzip", "zstd", "plain"])
def test_one_broken_record_costs_one_record(tmp_path: Path, form: str) -> None:
    plain = archive(False, pages(12))
    data = {"plain": plain, "gzip": archive(True, pages(12)), "zstd": zstd_members(plain)}[form]
    path = tmp_path / "file"
    path.write_bytes(data)
    offsets = [e.offset for e in index_warc(path)] + [len(data)]
    chance = random.Random(3)
    for _ in range(60):
        broken = bytearray(data)
        victim = chance.randrange(12)
        start, end = offsets[victim], offsets[victim + 1]
        at = chance.randrange(start, end)
        fault = chance.choice(("flip", "cut", "zeros"))
        if fault == "flip":
            broken[at] ^= 1 << chance.randrange(8)
        elif fault == "cut":
            del broken[at : chance.randrange(at, end) + 1]
        else:
            broken[at:end] = bytes(end - at)
        path.write_bytes(broken)
        entries = list(index_warc(path))
        good = {e.url for e in entries if e.state == "kept"}
        expected = {u for i, (u, _, _) in enumerate(pages(12)) if i != victim}
        missing = expected - good
        assert not missing, (fault, victim, at - start)
        if form != "plain":
            whole = [e for e in entries if e.state == "kept"]
            assert all(
                hashlib.sha256(read_response(path, e.offset).body).hexdigest() == e.payload_digest for e in whole
            )


def test_a_truncated_file_names_its_last_record(tmp_path: Path) -> None:
    data = archive(True, pages(3))
    path = tmp_path / "file"
    path.write_bytes(data[:-30])
    *whole, last = index_warc(path)
    assert [e.state for e in whole] == ["kept", "kept"]
    assert (last.state, last.reason) == BROKEN
    assert "the file ends in the middle of the record" in (last.detail or "")
    with pytest.raises(WarcError, match="ends in the middle"):
        read_response(path, last.offset)


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"hello\n", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x5d\x2a\x4d\x18"]
)
def test_files_that_are_no_archives(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert {e.reason for e in index_warc(path)} <= {"broken_record"}


def test_encodings_and_lies_in_archived_responses(tmp_path: Path) -> None:
    chunked = b"5;ext\r\n<html\r\n1\r\n>\r\n0\r\n\r\n"
    bodies = [
        ("http://gzip.test/", gzip.compress(PAGE), [("Content-Encoding", "gzip")]),
        ("http://br.test/", brotli.compress(PAGE), [("Content-Encoding", "br")]),
        ("http://chunked.test/", chunked, [("Transfer-Encoding", "chunked")]),
        ("http://not-chunked.test/", PAGE, [("Transfer-Encoding", "chunked")]),
        ("http://cut-chunks.test/", chunked[:10], [("Transfer-Encoding", "chunked")]),
        ("http://not-gzip.test/", PAGE, [("Content-Encoding", "gzip")]),
        ("http://bomb.test/", gzip.compress(bytes(20_000_000)), [("Content-Encoding", "gzip")]),
        ("http://huge.test/", PAGE * 5000, []),
    ]
    path = tmp_path / "file"
    path.write_bytes(archive(True, bodies))
    assert {e.url: e.reason for e in index_warc(path)} == {
        "http://gzip.test/": None,
        "http://br.test/": None,
        "http://chunked.test/": None,
        "http://not-chunked.test/": None,
        "http://cut-chunks.test/": "truncated",
        "http://not-gzip.test/": "bad_encoding",
        "http://bomb.test/": "too_large",
        "http://huge.test/": "too_large",
    }
    entries = {e.url: e.offset for e in index_warc(path)}
    assert read_response(path, entries["http://br.test/"]).body == PAGE
    assert read_response(path, entries["http://chunked.test/"]).body == b"<html>"
    assert len(read_response(path, entries["http://huge.test/"], max_bytes=20_000_000).body) == len(PAGE) * 5000


# ---- bodies -----------------------------------------------------------------------------------------------------

ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("coding", ENCODERS)
@pytest.mark.parametrize("body", [b"", b"x", PAGE, os.urandom(300_000), bytes(1_000_000)])
def test_codings(coding: str, body: bytes) -> None:
    encoded = ENCODERS[coding](body)
    assert decode_body(encoded, [coding], 1_000_000) == body
    if len(body) > 1:
        with pytest.raises(BodyError) as caught:
            decode_body(encoded, [coding], len(body) - 1)
        assert caught.value.reason == "too_large"
        assert body.startswith(caught.value.partial[:-1])
    if len(body) > 1000:
        with pytest.raises(BodyError) as caught:
            decode_body(encoded[: len(encoded) // 2], [coding], 1_000_000)
        assert caught.value.reason in ("truncated", "bad_encoding")


def test_gzip_oddities() -> None:
    two = gzip.compress(b"one") + gzip.compress(b"two")
    assert decode_body(two, ["gzip"], 100) == b"onetwo"
    assert decode_body(two + bytes(100), ["gzip"], 100) == b"onetwo"
    assert decode_body(gzip.compress(b"x"), ["gzip"], 100) == b"x"
    assert content_codings(["gzip, identity", "BR"]) == ["gzip", "br"]
    for name in ("compress", "gzip2", ""):
        with pytest.raises(BodyError, match="is not known"):
            decode_body(b"x", [name or "''"], 100)


def test_dechunk() -> None:
    assert dechunk(b"3\r\nabc\r\n0\r\n\r\n") == b"abc"
    assert dechunk(b"<html>") == b"<html>"
    with pytest.raises(BodyError, match="middle of a chunk"):
        dechunk(b"ff\r\nabc")
    with pytest.raises(BodyError, match="bad chunk"):
        dechunk(b"3\r\nabc\r\nzz\r\n")


@pytest.mark.parametrize(
    ("content_type", "body", "html"),
    [
        ("text/html", b"", True),
        ("Text/HTML;charset=x", b"", True),
        ("application/xhtml+xml", b"", True),
        ("text/plain", b"<html>", False),
        ("application/pdf", b"<html>", False),
        ("", b" \n<!DOCTYPE html>", True),
        ("", b"\xef\xbb\xbf<html>", True),
        ("", b"<?xml version='1.0'?>", True),
        ("", b"<!-- x -->", True),
        ("", b"<pdf>", False),
        ("", b"%PDF-1.4", False),
        ("", b"", False),
    ],
)
def test_is_html(content_type: str, body: bytes, html: bool) -> None:
    assert is_html(content_type, body) is html


MEASURE = textwrap.dedent(
    """
    import resource, sys, time, zlib, gzip
    import brotli, zstandard
    from data_pipeline.crawl.http.body import BodyError, decode_body
    block = bytes(1 << 20)

    def packed(coding):
        if coding == "br":
            return open(sys.argv[1], "rb").read()
        if coding == "zstd":
            c = zstandard.ZstdCompressor().compressobj()
        else:
            c = zlib.compressobj(1, wbits=31 if coding == "gzip" else 15)
        return b"".join(c.compress(block) for _ in range(256)) + c.flush()

    bodies = {c: packed(c) for c in ("gzip", "deflate", "br", "zstd")}
    bodies["members"] = gzip.compress(b"") * 250_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for coding, body in bodies.items():
        begin = time.process_time()
        try:
            decode_body(body, ["gzip" if coding == "members" else coding], 5_000_000)
            sys.exit(f"{coding} was decoded")
        except BodyError:
            assert time.process_time() - begin < 1.0, coding
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
)


def test_bombs_stay_small(tmp_path: Path) -> None:
    compressor = brotli.Compressor(quality=1)
    block = bytes(1 << 20)
    packed = b"".join(compressor.process(block) for _ in range(256)) + compressor.finish()
    (tmp_path / "bomb.br").write_bytes(packed)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "bomb.br")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 64 * 1024  # KiB


def test_a_bomb_in_an_archive_stays_small(tmp_path: Path) -> None:
    """A record whose compressed member grows a thousandfold is skipped, not held."""
    length = 300 << 20
    head = b"WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: http://b.test/\r\nContent-Length: %d\r\n\r\n" % length
    compressor = zlib.compressobj(1, wbits=31)
    block = bytes(1 << 20)
    path = tmp_path / "file"
    with open(path, "wb") as f:
        f.write(compressor.compress(head))
        for _ in range(300):
            f.write(compressor.compress(block))
        f.write(compressor.compress(b"\r\n\r\n") + compressor.flush())
        f.write(archive(True, pages(1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    assert [e.reason for e in index_warc(path)] == ["too_large", None]
    assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_pages_whose_headers_refuse_are_named(tmp_path: Path) -> None:
    tags = ["noindex", "otherbot: noindex", "nofollow"]
    pages = [exchange(i, X_Robots_Tag=tag) for i, tag in enumerate(tags)] + [exchange(3, TDM_Reservation="1")]
    write(tmp_path / "a.warc.gz", *pages)
    index_warc_file(tmp_path / "a.warc.gz", "a", 0, tmp_path / "pages", tmp_path / "verdicts", "gpttrain")
    rows = pq.read_table(tmp_path / "verdicts").to_pylist()
    assert [r["reason"] for r in rows] == ["noindex", None, None, "noindex"]
    assert rows[3]["detail"] == "TDM-Reservation: 1"
    assert pq.read_metadata(tmp_path / "pages").num_rows == 2
    index_warc_file(tmp_path / "a.warc.gz", "a", 0, tmp_path / "pages", tmp_path / "verdicts", None)
    assert pq.read_metadata(tmp_path / "pages").num_rows == 4


def test_a_password_in_a_url_stays_in_the_archive(tmp_path: Path) -> None:
    pages = [replace(exchange(i), url=url) for i, url in enumerate(["http://u:pass@secret.test/x", "http://Ü.test./"])]
    write(tmp_path / "a.warc.gz", *pages)
    index_warc_file(tmp_path / "a.warc.gz", "a", 0, tmp_path / "pages", tmp_path / "verdicts", None)
    rows = pq.read_table(tmp_path / "pages").to_pylist()
    assert [(r["url"], r["final_url"], r["domain"]) for r in rows] == [
        ("http://secret.test/x", "http://secret.test/x", "secret.test"),
        ("http://Ü.test./", "http://Ü.test./", "xn--tda.test"),
    ]
    assert [r["url"] for r in pq.read_table(tmp_path / "verdicts").to_pylist()] == [r["url"] for r in rows]
