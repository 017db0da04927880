"""URL lists: the normal form against the URL standard's own examples, and lists of every form and fault."""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from data_pipeline.config import UrlListConfig
from data_pipeline.crawl import spill, urls
from data_pipeline.crawl.url_syntax import host_of, origin_of, path_and_query, port_of, without_credentials
from data_pipeline.crawl.urls import (
    InvalidUrl,
    UrlRules,
    count_urls,
    normalize,
    read_url_list,
    registrable_domain,
    shard_of,
    write_url_shards,
)
from data_pipeline.records import URL_SCHEMA, VERDICT_SCHEMA, InputError

DEFAULT = UrlListConfig()


# ---- the normal form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://example.com", "http://example.com/"),
        ("HTTP://EXAMPLE.com/Path", "http://example.com/Path"),
        ("http://example.com:80/", "http://example.com/"),
        ("https://example.com:443/", "https://example.com/"),
        ("https://example.com:0443/", "https://example.com/"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("http://example.com:/", "http://example.com/"),
        ("  http://example.com/ \n", "http://example.com/"),
        ("ht\ntp://exa\tmple.com/a\rb", "http://example.com/ab"),
        ("http:\\\\example.com\\a\\b", "http://example.com/a/b"),
        ("https:example.com/x", "https://example.com/x"),
        ("https:////example.com///x", "https://example.com///x"),
        ("http://user:pass@example.com/", "http://example.com/"),
        ("http://a@b@example.com/", "http://example.com/"),
        ("http://example.com./", "http://example.com/"),
        # fragments, queries, tracking
        ("http://example.com/a#b?c", "http://example.com/a"),
        ("http://example.com/?", "http://example.com/"),
        ("http://example.com/?a=1&b", "http://example.com/?a=1&b"),
        ("http://example.com/?utm_source=x", "http://example.com/"),
        ("http://example.com/?b=2&UTM_Medium=x&a=1&fbclid=y", "http://example.com/?b=2&a=1"),
        ("http://example.com/?utmost=1", "http://example.com/?utmost=1"),
        # paths
        ("http://example.com/a/./b/../c", "http://example.com/a/c"),
        ("http://example.com/../../a", "http://example.com/a"),
        ("http://example.com/a/..", "http://example.com/"),
        ("http://example.com/a/.", "http://example.com/a/"),
        ("http://example.com/%2e%2E/a/%2e/b", "http://example.com/a/b"),
        ("http://example.com/a//b/", "http://example.com/a//b/"),
        ("http://example.com/a b\"<>`{}^|~'", "http://example.com/a%20b%22%3C%3E%60%7B%7D%5E|~'"),
        ("http://example.com/?a b\"<>`{}^|~'", "http://example.com/?a%20b%22%3C%3E`{}^|~%27"),
        ("http://example.com/é?é", "http://example.com/%C3%A9?%C3%A9"),
        ("http://example.com/%zz%e9", "http://example.com/%zz%e9"),
        ("http://example.com/\ud800", "http://example.com/%EF%BF%BD"),
        # hosts
        ("http://EXAMPLE.com%2Eorg/", "http://example.com.org/"),
        ("http://Bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://bu\u0308cher.example/", "http://xn--bcher-kva.example/"),
        ("http://b%C3%BCcher.example/", "http://xn--bcher-kva.example/"),
        ("http://faß.de/", "http://xn--fa-hia.de/"),
        ("http://日本語。ＪＰ/", "http://xn--wgv71a119e.jp/"),
        ("http://i❤.ws/", "http://xn--i-7iq.ws/"),
        ("http://foo_bar.example/", "http://foo_bar.example/"),
        # addresses
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0300.168.0xF0/", "http://192.168.0.240/"),
        ("http://４.３.２.１/", "http://4.3.2.1/"),
        ("http://[::FFFF:1.2.3.4]/", "http://[::ffff:102:304]/"),
        ("http://[2001:DB8:0:0:0:0:0:1]:80/", "http://[2001:db8::1]/"),
    ],
)
def test_normal_form(url: str, normal: str) -> None:
    assert normalize(url, DEFAULT) == normal
    assert normalize(normal, DEFAULT) == normal


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "invalid_url"),
        ("example.com/x", "invalid_url"),
        ("//example.com/", "invalid_url"),
        ("http://", "invalid_url"),
        ("http:///", "invalid_url"),
        ("http://exa mple.com/", "invalid_url"),
        ("http://exa%00mple.com/", "invalid_url"),
        ("http://exa%2Fmple.com/", "invalid_url"),
        ("http://a..b/", "invalid_url"),
        ("http://.../", "invalid_url"),
        (f"http://{'a' * 64}.com/", "invalid_url"),
        (f"http://{'a.' * 200}com/", "invalid_url"),
        ("http://example.com:65536/", "invalid_url"),
        ("http://example.com:8a/", "invalid_url"),
        (f"http://example.com:{'0' * 5000}1{'0' * 9}/", "invalid_url"),
        ("http://1.2.3.4.5/", "invalid_url"),
        ("http://256.1.1.1/", "invalid_url"),
        ("http://1.2.3.08/", "invalid_url"),
        ("http://4294967296/", "invalid_url"),
        ("http://01_0.1/", "invalid_url"),
        ("http://[::1/", "invalid_url"),
        ("http://[::1%25eth0]/", "invalid_url"),
        ("http://[1::2::3]/", "invalid_url"),
        ("http://%E9.example/", "invalid_url"),
        ("file:///etc/passwd", "scheme_not_allowed"),
        ("ftp://example.com/", "scheme_not_allowed"),
        ("data:text/html,x", "scheme_not_allowed"),
        ("gopher://example.com/", "scheme_not_allowed"),
        ("javascript:alert(1)", "scheme_not_allowed"),
        ("mailto:a@example.com", "scheme_not_allowed"),
        ("http://example.com/" + "a" * 9000, "url_too_long"),
        ("http://example.com/" + "é" * 3000, "url_too_long"),
    ],
)
def test_what_is_no_url_says_why(url: str, reason: str) -> None:
    with pytest.raises(InvalidUrl) as caught:
        normalize(url, DEFAULT)
    assert caught.value.reason == reason
    assert str(caught.value)


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        # RFC 3986, 5.4, as far as the URL standard agrees and fragments are cut
        ("g", "http://a/b/c/g"),
        ("./g", "http://a/b/c/g"),
        ("g/", "http://a/b/c/g/"),
        ("/g", "http://a/g"),
        ("//g", "http://g/"),
        ("?y", "http://a/b/c/d;p?y"),
        ("g?y", "http://a/b/c/g?y"),
        ("#s", "http://a/b/c/d;p?q"),
        (";x", "http://a/b/c/;x"),
        ("", "http://a/b/c/d;p?q"),
        (".", "http://a/b/c/"),
        ("..", "http://a/b/"),
        ("../g", "http://a/b/g"),
        ("../../../g", "http://a/g"),
        ("g/../h", "http://a/b/c/h"),
        ("g?y/../x", "http://a/b/c/g?y/../x"),
        ("http:g", "http://a/b/c/g"),
        ("https:g", "https://g/"),
        ("\\\\g\\h", "http://g/h"),
        ("https://h:444/", "https://h:444/"),
    ],
)
def test_references_are_resolved(reference: str, target: str) -> None:
    assert normalize(reference, DEFAULT, base="http://a/b/c/d;p?q") == target


def test_parts_of_a_normal_form() -> None:
    for url, parts in {
        "http://a.b/c?d": ("a.b", "http://a.b", 80, "/c?d"),
        "https://a.b:8/": ("a.b", "https://a.b:8", 8, "/"),
        "https://[::1]/x": ("::1", "https://[::1]", 443, "/x"),
        "https://[::1]:9/x": ("::1", "https://[::1]:9", 9, "/x"),
    }.items():
        assert (host_of(url), origin_of(url), port_of(url), path_and_query(url)) == parts


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.text(max_size=60))
def test_the_normal_form_is_idempotent(text: str) -> None:
    for url in (text, f"http://{text}", f"http://h/{text}", f"http://h/?{text}"):
        try:
            normal = normalize(url, DEFAULT)
        except InvalidUrl:
            continue
        assert normalize(normal, DEFAULT) == normal
        assert normal.isascii()
        assert origin_of(normal) + path_and_query(normal) == normal


def test_registrable_domain_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a look-up")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cases = {
        "news.bbc.co.uk": "bbc.co.uk",
        "www.example.com": "example.com",
        "a.b.github.io": "b.github.io",
        "xn--bcher-kva.example.de": "example.de",
        "1.2.3.4": "1.2.3.4",
        "2001:db8::1": "2001:db8::1",
        "localhost": "localhost",
        "co.uk": "co.uk",
    }
    assert {host: registrable_domain(host) for host in cases} == cases


def test_shards_are_fixed_for_ever_and_even() -> None:
    # Known answers: a change here moves every URL of every corpus.
    assert [shard_of(d, 1000) for d in ("example.com", "bbc.co.uk", "")] == [755, 220, 307]
    counts = collections.Counter(shard_of(f"domain{i}.com", 16) for i in range(16_000))
    assert set(counts) == set(range(16))
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


# ---- lists ------------------------------------------------------------------------------------------------------

URLS = [f"http://h{i}.example.com/{i}" for i in range(5)]
SCORES = [3.0, None, 1.0, 12.0, 0.0]


def make_list(folder: Path, name: str) -> Path:
    """The five URLs in the form that `name` says."""
    form = name.removeprefix("list").removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")
    path = folder / name
    if form == ".parquet":
        pq.write_table(pa.table({"url": URLS, "score": SCORES, "other": [1] * 5}), path)
        return path
    if form == ".txt":
        text = "\ufeff# a list\r\n" + "\r\n\r\n".join(URLS) + "  \r\n"
    elif form in (".csv", ".tsv"):
        d = "," if form == ".csv" else "\t"
        rows = [
            ["title", "url", "score"],
            *([f'"a{d} b\n{i}"', u, "" if s is None else f"{s:g}"] for i, (u, s) in rows_of()),
        ]
        text = "\ufeff" + "\r\n".join(d.join(row) for row in rows) + "\r\n"
    else:
        text = "\n\n".join(json.dumps({"id": i, "url": u, "score": s}) for i, (u, s) in rows_of())
    raw = text.encode()
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    path.write_bytes(packers[path.suffix](raw) if path.suffix in packers else raw)
    return path


def rows_of() -> list[tuple[int, tuple[str, float | None]]]:
    return list(enumerate(zip(URLS, SCORES, strict=True)))


@pytest.mark.parametrize(
    "name",
    [
        *("list.txt", "list.txt.gz", "list.txt.xz", "list.txt.zst", "list.csv", "list.csv.gz", "list.tsv"),
        *("list.jsonl", "list.jsonl.zst", "list.ndjson", "list.parquet"),
    ],
)
def test_every_form_reads_the_same(tmp_path: Path, name: str) -> None:
    path = make_list(tmp_path, name)
    rows = list(read_url_list(path, DEFAULT))
    assert [(i, u) for i, u, _ in rows] == list(enumerate(URLS))
    if ".txt" not in name:
        assert [s for _, _, s in rows] == SCORES
    assert count_urls(path, DEFAULT) == 5


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    make_list(tmp_path, "list.csv")
    make_list(tmp_path / "b", "list.txt")
    (tmp_path / "README.md").write_text("http://not.a.list/\n")
    rows = list(read_url_list(tmp_path, DEFAULT))
    assert [u for _, u, _ in rows] == URLS + URLS
    assert [i for i, _, _ in rows] == list(range(10))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("list.pdf", b"http://a.b/\n", "not a form that is known"),
        ("list", b"http://a.b/\n", "not a form that is known"),
        ("list.csv", b"title,address\nx,http://a.b/\n", "none of title, address is a URL column"),
        ("list.csv", b"http://a.b/\nhttp://a.c/\n", "the first line is a URL, not column names"),
        ("list.jsonl", b'{"a": 1, "b": "http://a.b/"}\n', "none of a, b is a URL column"),
        ("list.parquet", b"not parquet", "cannot be read"),
        ("list.txt.gz", b"not gzip", "cannot be read"),
        ("list.txt.gz", gzip.compress(b"http://a.b/\n" * 999, mtime=0)[:-20], "cannot be read"),
        ("list.txt.xz", b"not xz", "cannot be read"),
        ("list.txt.zst", b"not zstd", "cannot be read"),
        ("list.txt", b"", "holds no URL"),
        ("list.txt", b"# only\r\n\r\n# comments\n", "holds no URL"),
        ("list.csv", b"", "holds no URL"),
        ("list.csv", b"url\n", "holds no URL"),
        ("list.txt", b"nonsense\nftp://a.b/\n", "none of its 2 rows can be fetched, the first because of invalid_url"),
    ],
)
def test_a_list_that_cannot_be_used_is_told_in_a_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        write_url_shards(path, tmp_path / "out", 2, DEFAULT)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
    assert not list((tmp_path / "out").glob(".spill*"))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = make_list(tmp_path, "list.parquet")
    with pytest.raises(InputError, match=r"no column 'address' among url, score, other; give url_list\.column"):
        list(read_url_list(path, UrlListConfig(column="address")))
    assert [u for _, u, _ in read_url_list(path, UrlListConfig(column="url"))] == URLS


def test_a_list_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_list(tmp_path, "list.txt")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        monkeypatch.setattr(
            urls, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")), raising=False
        )
    with pytest.raises(InputError, match="Permission denied"):
        list(read_url_list(path, DEFAULT))


def test_ten_megabyte_lines_and_broken_rows_each_get_a_verdict(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    long = "http://long.example/" + "x" * 10_000_000
    with open(path, "w") as f:
        f.write(json.dumps({"url": "http://a.example/"}) + "\n")
        f.write(json.dumps({"url": long}) + "\n")
        f.write('{"url": "http://b.exa\n')
        f.write('["http://c.example/"]\n')
        f.write('{"title": "no url"}\n')
        f.write('{"url": null}\n')
        f.write("[" * 100_000 + "\n")
        f.write('"http://d.example/"\n')
        f.write(json.dumps({"url": "http://e.example/", "selftext": "y" * 40_000_000}) + "\n")
        f.write(json.dumps({"url": "http://f.example/"}) + "\n")
    counts = write_url_shards(path, tmp_path / "out", 2, DEFAULT)
    assert counts == {"rows": 10, "kept": 3, "dropped": 7, "reasons": {"invalid_url": 5, "url_too_long": 2}}
    rows = read_all(tmp_path / "out", 2)[1]
    assert [r["index"] for r in rows] == list(range(10))
    assert max(len(r["url"]) for r in rows) < 3000


# ---- rules and shards -------------------------------------------------------------------------------------------


def read_all(out: Path, shards: int) -> tuple[list[dict], list[dict]]:
    """(kept, verdicts) of all shards by index."""
    kept, verdicts = [], []
    for k in range(shards):
        table, verdict = pq.read_table(out / f"{k:05d}.parquet"), pq.read_table(out / f"{k:05d}.verdicts.parquet")
        assert table.schema.equals(URL_SCHEMA)
        assert verdict.schema.equals(VERDICT_SCHEMA)
        for rows in (table.to_pylist(), verdict.to_pylist()):
            assert [r["index"] for r in rows] == sorted(r["index"] for r in rows)
        assert all(shard_of(r["domain"], shards) == k for r in table.to_pylist())
        kept += table.to_pylist()
        verdicts += verdict.to_pylist()
    return sorted(kept, key=lambda r: r["index"]), sorted(verdicts, key=lambda r: r["index"])


def test_every_row_gets_the_verdict_of_the_first_rule_that_refuses_it(tmp_path: Path) -> None:
    rows = [
        ("http://good.example/a", 5, False, None),
        ("HTTP://good.example:80/a?utm_source=x#top", 5, False, "duplicate_url"),
        ("http://good.example/A", 5, False, None),
        ("http://good.example/self", 5, True, "self_post"),
        ("http://good.example/low", 2, False, "low_score"),
        ("http://good.example/unknown", None, False, None),
        ("http://bad.example/", 5, False, "blocked_domain"),
        ("http://www.BAD.example/", 5, False, "blocked_domain"),
        ("http://notbad.example/", 5, False, None),
        ("http://good.example/x.JPG?size=1", 5, False, "blocked_extension"),
        ("http://good.example/jpg", 5, False, None),
        ("http://good.example/?f=x.jpg", 5, False, None),
        ("http://good.example/login?x", 5, False, "blocked_pattern"),
        ("mailto:a@b.c", 5, False, "scheme_not_allowed"),
        ("nonsense", 5, False, "invalid_url"),
        ("http://good.example/" + "a" * 9000, 5, False, "url_too_long"),
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"url": u, "score": s, "is_self": f}) + "\n" for u, s, f, _ in rows))
    config = UrlListConfig(min_score=3, blocked_domains=["bad.example"], blocked_patterns=[r"/login\b"])
    counts = write_url_shards(path, tmp_path / "out", 3, config)
    kept, verdicts = read_all(tmp_path / "out", 3)
    assert [v["reason"] for v in verdicts] == [reason for *_, reason in rows]
    assert [v["state"] for v in verdicts] == ["dropped" if r else "kept" for *_, r in rows]
    assert [k["url"] for k in kept] == [u for u, _, _, reason in rows if reason is None]
    assert verdicts[1]["detail"] == "row 0 is the same URL"
    assert json.loads(verdicts[0]["numbers"]) == {"score": 5.0}
    assert counts["rows"] == len(rows) == counts["kept"] + counts["dropped"]
    assert counts["dropped"] == sum(counts["reasons"].values())


def test_a_blocked_domain_that_is_none(tmp_path: Path) -> None:
    path = make_list(tmp_path, "list.txt")
    with pytest.raises(InputError, match=r"url_list\.blocked_domains=a b"):
        write_url_shards(path, tmp_path / "out", 1, UrlListConfig(blocked_domains=["a b"]))
    bad = ["ok.example/p", "https://ok.example", "a@ok.example", "*.ok.example", "ok.example:80"]
    with pytest.raises(InputError) as e:
        UrlRules(UrlListConfig(blocked_domains=["ok.example", ".Other.example.", "xyz", *bad]))
    assert [line.split(": ")[0].partition("=")[2] for line in str(e.value).split("\n")] == bad


@pytest.mark.parametrize(
    "url",
    [
        "http://u:p@h.example/x@y",
        "http:u:p@h.example/",
        " HTTP:/\t/u@h.example",
        "<ftp://u:p@h.example/>",
        "//u:p@h.example",
    ],
)
def test_no_password_is_left_in_a_url(url: str) -> None:
    bare = without_credentials(url)
    assert "u:p" not in bare
    assert "u@" not in bare
    assert "h.example" in bare
    if url.strip()[0] != "<" and url[:2] != "//":
        assert normalize(bare, DEFAULT) == normalize(url, DEFAULT)


def test_the_same_list_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"http://h{i % 97}.example{i % 7}.com/{i % 800}\n" for i in range(5000)))
    write_url_shards(path, tmp_path / "a", 8, DEFAULT)
    write_url_shards(path, tmp_path / "b", 8, DEFAULT)
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / x).iterdir()} for x in ("a", "b")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 16


def test_memory_holds_one_shard_not_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPILL_BYTES", 100_000)
    path = tmp_path / "list.txt"
    with open(path, "w") as f:
        f.writelines(f"http://host{i % 1000}.com/{'p' * 2000}/{i}\n" for i in range(5000))
    write_url_shards(path, tmp_path / "first", 64, DEFAULT)  # what is loaded once, and caches that grow by doubling
    tracemalloc.start()
    counts = write_url_shards(path, tmp_path / "out", 64, DEFAULT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["kept"] == 5000
    assert peak < path.stat().st_size / 2


def test_reddit_submissions(tmp_path: Path) -> None:
    path = SHARED / "reddit" / "RS_v2_2005-06.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    lines = [json.loads(line) for line in lzma.decompress(path.read_bytes()).split(b"\n") if line]
    assert len(lines) == 103
    counts = write_url_shards(path, tmp_path / "out", 4, UrlListConfig(min_score=3))
    kept, verdicts = read_all(tmp_path / "out", 4)
    assert counts["rows"] == len(verdicts) == 103
    assert counts["kept"] == len(kept)
    low = sum(line["score"] < 3 for line in lines)
    assert counts["reasons"]["low_score"] == low
    assert counts["kept"] + counts["dropped"] == 103
    assert [v["index"] for v in verdicts if v["state"] == "kept"] == [k["index"] for k in kept]


def test_common_crawl_index_lines(tmp_path: Path) -> None:
    """CDXJ as in Common Crawl's files, and the index server's JSON lines: the same rows, the same verdicts."""
    place = {"digest": "X", "length": "1234", "offset": "567", "filename": "crawl-data/CC-MAIN-2026-01/x.warc.gz"}
    lines = [
        ({"url": "https://a.example/page", "mime": "text/html", "mime-detected": "text/html", "status": "200"}, None),
        (
            {"url": "https://a.example/x", "mime": "text/html", "mime-detected": "application/pdf", "status": "200"},
            "mime",
        ),
        ({"url": "https://a.example/moved", "mime": "text/html", "status": "301"}, "status"),
        ({"url": "https://a.example/gone", "mime": "text/html", "status": "404"}, "status"),
        ({"url": "https://a.example/again", "mime": "warc/revisit", "status": "-"}, None),
        ({"url": "https://a.example/{curly}", "mime": "application/xhtml+xml", "status": "200"}, None),
        ({"url": "https://a.example/paper.pdf", "mime": "application/pdf", "status": "200"}, "mime"),
    ]
    rows = [json.dumps(value | place) for value, _ in lines]
    cdxj = "".join(f"example,a)/{i} 20260117063422 {row}\n" for i, row in enumerate(rows))
    files = {
        "cdx-00000.gz": gzip.compress(cdxj.encode()),
        "part.cdxj": cdxj.encode(),
        "server.jsonl": "".join(f"{row}\n" for row in rows).encode(),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        counts = write_url_shards(path, tmp_path / f"out-{name}", 2, DEFAULT)
        kept, verdicts = read_all(tmp_path / f"out-{name}", 2)
        assert [v["reason"] for v in verdicts] == [reason and f"index_{reason}" for _, reason in lines]
        assert [k["url"] for k in kept] == [v["url"] for v in verdicts if v["state"] == "kept"]
        assert counts["rows"] == len(lines) == counts["kept"] + sum(counts["reasons"].values())
    (verdict,) = [v for v in verdicts if v["url"].endswith("/x")]
    assert verdict["detail"] == "application/pdf in the index"
