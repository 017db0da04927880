"""The fetch against real servers on loopback: an adversarial one, dead ones, and a process that is killed."""

from __future__ import annotations

import asyncio
import collections
import gzip
import itertools
import json
import os
import random
import signal
import ssl
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brotli
import pytest
import trustme
import zstandard
from web import (
    HTML,
    Crawl,
    Handler,
    Request,
    Site,
    closing,
    crawl,
    decided,
    drip,
    killable,
    names,
    outcome,
    redirect,
    response,
    start_child,
)

from data_pipeline.crawl import scheduler, warc
from data_pipeline.crawl.fetch import finish_shard
from data_pipeline.crawl.fetch_journal import audit_path, journal_path
from data_pipeline.records import ConfigError, CorruptionError, StorageError


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as s:
        yield s


# ---- connections, counted at the socket -------------------------------------------------------------------------

_connects: list[tuple[Any, ...]] = []


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        _connects.append(args[1])


sys.addaudithook(_on_event)  # CPython tells of every connect(2) made through a socket object


@pytest.fixture
def connects() -> list[tuple[Any, ...]]:
    _connects.clear()
    return _connects


# ---- the way of a page ------------------------------------------------------------------------------------------


def test_pages_come_as_they_were_sent_whatever_their_coding(tmp_path: Path, site: Site) -> None:
    page = HTML * 1000
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(page[i : i + 999]), page[i : i + 999]) for i in range(0, len(page), 999))
    site.pages = {
        "/plain": response(page),
        "/gzip": response(gzip.compress(page), Content_Encoding="gzip"),
        "/deflate": response(zlib.compress(page), Content_Encoding="deflate"),
        "/raw-deflate": response(zlib.compress(page)[2:-4], Content_Encoding="deflate"),
        "/br": response(brotli.compress(page), Content_Encoding="br"),
        "/zstd": response(zstandard.compress(page), Content_Encoding="zstd"),
        "/two": response(brotli.compress(gzip.compress(page)), Content_Encoding="gzip, br"),
        "/chunked": response(chunked + b"0\r\n\r\n", Content_Length="", Transfer_Encoding="chunked"),
        "/until-closed": closing(response(page, Content_Length="")),
        "/no-type": response(page, Content_Type=""),
        "/xhtml": response(page, Content_Type="application/xhtml+xml; charset=utf-8"),
    }
    paths = list(site.pages)
    results = crawl(tmp_path, site, paths, robots=False)
    assert {p: outcome(r) for p, r in results.items()} == dict.fromkeys(paths, ("kept", None))
    run = Crawl(tmp_path, [])
    assert all(run.body(row) == page for row in results.values())
    assert len({row["page"]["payload_digest"] for row in results.values()}) == 1
    assert run.check_warcs() == 1
    coded = results["/br"]["page"]
    record = warc.read_response(tmp_path / coded["warc_file"], coded["warc_offset"])
    assert record.header("X-Crawler-Content-Encoding") == "br"
    assert record.header("Content-Encoding") == ""
    assert record.header("Content-Length") == str(len(page))
    entries = list(warc.index_warc(tmp_path / coded["warc_file"]))
    assert [e.state for e in entries] == ["kept"] * len(paths)


def test_what_is_no_page_is_dropped_or_failed_with_its_reason(tmp_path: Path, site: Site) -> None:
    cases: dict[str, tuple[bytes | Handler, tuple[str, str]]] = {
        "/image": (response(b"\x89PNG", Content_Type="image/png"), ("dropped", "wrong_type")),
        "/text": (response(b"plain", Content_Type="text/plain"), ("dropped", "wrong_type")),
        "/no-type-no-html": (response(b"%PDF-1.4", Content_Type=""), ("dropped", "wrong_type")),
        "/gone": (response(b"", "410 Gone"), ("failed", "http_status")),
        "/error": (response(b"", "500 Oops"), ("failed", "http_status")),
        "/partial": (response(HTML, "206 Partial Content"), ("failed", "http_status")),
        "/nowhere": (response(b"", "302 Found"), ("failed", "http_status")),
        "/header-noindex": (response(X_Robots_Tag="noindex, nofollow"), ("dropped", "noindex")),
        "/header-ours": (response(X_Robots_Tag="gpttrain: noai"), ("dropped", "noindex")),
        "/header-tdm": (response(TDM_Reservation="1"), ("dropped", "noindex")),
        "/meta": (response(b"<html><meta content='NOAI' name=robots><p>x"), ("dropped", "noindex")),
        "/unknown-coding": (response(Content_Encoding="sdch"), ("failed", "bad_encoding")),
        "/not-gzip": (response(Content_Encoding="gzip"), ("failed", "bad_encoding")),
        "/half-gzip": (
            response(gzip.compress(os.urandom(999))[:500], Content_Encoding="gzip"),
            ("failed", "truncated"),
        ),
    }
    site.pages = {p: page for p, (page, _) in cases.items()}
    site.pages["/header-other"] = response(X_Robots_Tag="otherbot: noindex")
    site.pages["/comment"] = response(b"<!-- <meta name=robots content=noindex> --><p>x")
    results = crawl(tmp_path, site, list(site.pages))
    expected = {p: o for p, (_, o) in cases.items()} | dict.fromkeys(("/header-other", "/comment"), ("kept", None))
    assert {p: outcome(r) for p, r in results.items()} == expected
    assert results["/gone"]["detail"] == "410"


def test_noindex_is_kept_when_told_to(tmp_path: Path, site: Site) -> None:
    site.pages = {"/a": response(X_Robots_Tag="noindex"), "/b": response(b"<meta name=robots content=none><p>x")}
    results = crawl(tmp_path, site, ["/a", "/b"], respect_noai=False)
    assert {outcome(r) for r in results.values()} == {("kept", None)}


# ---- redirects --------------------------------------------------------------------------------------------------


def test_redirects_end_somewhere(tmp_path: Path, site: Site) -> None:
    site.pages = {
        "/loop": redirect("/loop2"),
        "/loop2": redirect("/loop"),
        "/self": redirect("/self#again"),
        "/end": response(),
        "/relative": redirect("sub/../end#part"),
        **{f"/hop{i}": redirect(f"/hop{i + 1}") for i in range(11)},
        "/hop11": response(),
        **{f"/to-{s}": redirect(f"{s}:/etc/passwd") for s in ("file", "ftp", "data", "gopher", "javascript")},
        "/broken": redirect("http://[::1/"),
    }
    paths = ["/loop", "/self", "/relative", "/hop0", "/hop7", "/hop6", "/broken"]
    paths += [p for p in site.pages if p.startswith("/to-")]
    results = crawl(tmp_path, site, paths)
    assert outcome(results["/loop"]) == outcome(results["/self"]) == ("failed", "redirect_loop")
    assert outcome(results["/hop0"]) == ("failed", "too_many_redirects")
    assert outcome(results["/hop6"]) == ("kept", None)
    assert outcome(results["/broken"]) == ("failed", "protocol")
    assert results["/relative"]["page"]["final_url"].endswith("/end")
    assert {outcome(results[p]) for p in paths if p.startswith("/to-")} == {("dropped", "bad_scheme")}
    assert set(site.paths()) <= set(site.pages)


def test_neither_cookies_nor_credentials_are_ever_sent(tmp_path: Path, site: Site) -> None:
    site.pages = {
        "a.test/start": response(
            b"", "302 Found", Location=f"http://user:secret@b.test:{site.port}/next", Set_Cookie="id=1"
        ),
        "b.test/next": response(b"", "302 Found", Location=f"http://a.test:{site.port}/end", Set_Cookie="id=2"),
        "a.test/end": response(Set_Cookie="id=3"),
        "a.test/again": response(),
    }
    urls = [f"http://a.test:{site.port}{p}" for p in ("/start", "/again")]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, ["a.test", "b.test"]),
    )
    results = run.run()
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    sent = [r.headers for r in site.requests]
    assert len(sent) == 6  # two robots.txt, four pages
    assert not any({"cookie", "authorization"} & h.keys() for h in sent)
    assert all(
        h["user-agent"].startswith("gpttrain/") and "+https://example.org/crawler" in h["user-agent"] for h in sent
    )
    assert b"secret" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*.jsonl"))


# ---- addresses --------------------------------------------------------------------------------------------------


def spellings() -> list[str]:
    """Hosts of URLs that all mean an address one must not connect to."""
    bases = [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.5.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "127.1.2.3",
    ]
    hosts: list[str] = []
    for base in bases:
        a, b, c, d = map(int, base.split("."))
        value = a << 24 | b << 16 | c << 8 | d
        hosts += [
            base,
            str(value),
            hex(value),
            hex(value).upper().replace("X", "x"),
            f"0{value:o}",
            f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
            f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
            f"{a:#x}.{b}.0{c:o}.{d}",
            f"{a}.{(b << 16) + (c << 8) + d}",
            f"{a}.{b}.{(c << 8) + d}",
            base + ".",
            f"%{ord(base[0]):02x}" + base[1:],
            "".join(chr(0xFF10 + int(ch)) if ch.isdigit() else "。" for ch in base),
            f"[::ffff:{base}]",
            f"[::ffff:{value >> 16:x}:{value & 0xFFFF:x}]",
            f"[0:0:0:0:0:FFFF:{base}]",
            f"[64:ff9b::{base}]",
            f"[64:ff9b:1::{base}]",
            f"[2002:{value >> 16:x}:{value & 0xFFFF:x}::1]",
            f"[2001:0:{value >> 16:x}:{value & 0xFFFF:x}::1]",
            f"[::{base}]",
            f"user:pass@{base}",
            f"n{value:x}.evil.test",  # resolves to it, see below
            f"m{value:x}.evil.test",  # resolves to it, mapped into IPv6
        ]
    hosts += ["[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[3fff::1]"]
    hosts += ["[0:0:0:0:0:0:0:1]", "[100::1]", "[fec0::1]", "[5f00::1]", "localhost", "LOCALHOST.", "255.255.255.255"]
    hosts += ["224.0.0.1", "240.0.0.1", "198.18.0.1", "192.0.2.1", "203.0.113.9", "192.0.0.170", "168.63.129.16"]
    return hosts


async def evil_lookup(host: str) -> list[str]:
    name = host.rstrip(".").lower()
    if name.endswith(".evil.test"):
        value = int(name[1:].partition(".")[0], 16)
        address = ".".join(str(value >> s & 255) for s in (24, 16, 8, 0))
        return [address if name.startswith("n") else f"::ffff:{address}"]
    if name.endswith(".good.test"):
        return ["127.0.0.1"]
    if name == "localhost":
        return ["::1", "127.0.0.1"]
    raise OSError(f"no such host: {host}")


def test_no_spelling_of_a_forbidden_address_is_connected_to(
    tmp_path: Path, site: Site, connects: list[tuple[Any, ...]]
) -> None:
    from data_pipeline.config import UrlListConfig
    from data_pipeline.crawl.urls import InvalidUrl, normalize

    hosts = spellings()
    assert len(set(hosts)) >= 200
    direct: list[str] = []
    for host in hosts:
        try:  # the list's own rule comes first, and what it refuses is never asked for
            direct.append(normalize(f"http://{host}:8123/direct", UrlListConfig()))
        except InvalidUrl:
            continue
    assert len(direct) > 190
    good = f"http://site.good.test:{site.port}"
    redirected, robots = [], []
    for i, host in enumerate(hosts):
        site.pages[f"/to{i}"] = redirect(f"http://{host}:8123/redirected")
        redirected.append(f"{good}/to{i}")
        site.pages[f"r{i}.good.test/robots.txt"] = redirect(f"http://{host}:8123/robots.txt")
        robots.append(f"http://r{i}.good.test:{site.port}/page")
    site.default = response()
    site.pages["/robots.txt"] = response(b"", "404 Not Found")
    urls = list(dict.fromkeys(direct)) + redirected + robots
    run = Crawl(tmp_path, urls, allow_addresses=[f"127.0.0.1:{site.port}"])
    results = run.run(evil_lookup)
    assert set(connects) == {("127.0.0.1", site.port)}
    refused = {("dropped", "blocked_address")}
    assert {outcome(results[u]) for u in direct} == refused
    no_urls = len(hosts) - len(direct)  # a redirect to what is no URL at all has a reason of its own
    assert collections.Counter(outcome(results[u]) for u in redirected) == {
        ("dropped", "blocked_address"): len(direct),
        **({("failed", "protocol"): no_urls} if no_urls else {}),
    }
    assert {outcome(results[u]) for u in robots} == {("failed", "robots_unreachable")}
    # The control: the same server answers when asked by its allowed address.
    assert sum(r.path.startswith("/to") for r in site.requests) == len(hosts)
    assert not any(r.path in ("/direct", "/redirected", "/page") for r in site.requests)


def test_a_name_that_changes_its_mind_reaches_only_vetted_addresses(
    tmp_path: Path, site: Site, connects: list[tuple[Any, ...]]
) -> None:
    asked: list[str] = []

    async def rebinding(host: str) -> list[str]:
        asked.append(host)
        if host == "mixed.test":
            return ["10.0.0.1", "127.0.0.1", "::1"]
        return ["127.0.0.1"] if asked.count(host) == 1 else ["127.0.0.2"]

    site.default = closing(response(HTML, Connection="close"))
    urls = [f"http://{h}.test:{site.port}/{i}" for h in ("rebound", "mixed") for i in range(3)]
    run = Crawl(tmp_path, urls, allow_addresses=[f"127.0.0.1:{site.port}"], robots=False)
    results = run.run(rebinding)
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    assert set(connects) == {("127.0.0.1", site.port)}


def test_allow_listing_is_by_exact_port(tmp_path: Path, site: Site, connects: list[tuple[Any, ...]]) -> None:
    run = Crawl(tmp_path, [f"http://127.0.0.1:{site.port}/"], allow_addresses=[f"127.0.0.1:{site.port ^ 1}"])
    (row,) = run.run().values()
    assert outcome(row) == ("dropped", "blocked_address")
    assert f"add 127.0.0.1:{site.port} to fetch.allow_addresses" in row["detail"]
    assert connects == []


def test_no_contact_no_request(tmp_path: Path, site: Site, connects: list[tuple[Any, ...]]) -> None:
    site.default = response()
    own = f"http://127.0.0.1:{site.port}/"
    allow = [f"127.0.0.1:{site.port}"]
    with pytest.raises(ConfigError, match=r"fetch\.contact=''.*example\.org"):
        Crawl(tmp_path / "a", [own, "http://example.org/"], contact="", allow_addresses=allow).run()
    assert connects == []
    (row,) = Crawl(tmp_path / "b", [own], contact="", allow_addresses=allow, robots=False).run().values()
    assert outcome(row) == ("kept", None)


# ---- bodies and headers that do not behave ----------------------------------------------------------------------


def bomb(coding: str, megabytes: int) -> bytes:
    block = b"\0" * (1 << 20)
    if coding == "br":
        compressor = brotli.Compressor(quality=1)
        return b"".join(compressor.process(block) for _ in range(megabytes)) + compressor.finish()
    if coding == "zstd":
        z = zstandard.ZstdCompressor().compressobj()
        return b"".join(z.compress(block) for _ in range(megabytes)) + z.flush()
    c = zlib.compressobj(9, wbits=31 if coding == "gzip" else 15)
    return b"".join(c.compress(block) for _ in range(megabytes)) + c.flush()


def test_hostile_bodies_and_headers_end_typed_and_in_time(tmp_path: Path, site: Site) -> None:
    ok = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
    cases: dict[str, tuple[bytes | Handler, str]] = {
        **{
            f"/bomb-{c}": (response(bomb(c, 100), Content_Encoding=c), "too_large")
            for c in ("gzip", "deflate", "br", "zstd")
        },
        "/bomb-twice": (response(gzip.compress(bomb("gzip", 100)), Content_Encoding="gzip, gzip"), "too_large"),
        "/codings": (response(Content_Encoding=", ".join(["gzip"] * 50)), "bad_encoding"),
        "/members": (response(gzip.compress(b"") * 100_000, Content_Encoding="gzip"), "bad_encoding"),
        "/drip-header": (drip(b"HTTP/1.1 200 OK\r\n", b"X"), "timeout"),
        "/drip-body": (drip(ok + b"Content-Length: 100000\r\n\r\n", b"X"), "timeout"),
        "/silent": (drip(b"", b"", 60), "timeout"),
        "/endless": (drip(ok + b"\r\n", b"X" * 500_000, 0.001), "too_large"),
        "/announced": (response(HTML, Content_Length="99000000"), "too_large"),
        "/short": (closing(response(HTML, Content_Length="999")), "truncated"),
        "/short-chunks": (closing(ok + b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc"), "truncated"),
        "/bad-chunks": (closing(ok + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n"), "protocol"),
        "/long-header": (closing(ok + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n"), "header_too_large"),
        "/many-headers": (closing(ok + b"X: a\r\n" * 100_000 + b"\r\n"), "header_too_large"),
        "/big-headers": (closing(ok + b"X: %s\r\n" % (b"a" * 7000) * 9 + b"\r\n"), "header_too_large"),
        "/not-http": (closing(b"SSH-2.0-OpenSSH_9.0\r\n"), "protocol"),
        "/nothing": (closing(b""), "connect"),
        "/two-lengths": (closing(ok + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"), "protocol"),
    }
    site.pages = {p: page for p, (page, _) in cases.items()}
    site.pages["/bomb-redirect"] = response(
        bomb("gzip", 100), "302 Found", Content_Encoding="gzip", Location="/after-bomb"
    )
    site.pages["/after-bomb"] = response()
    hosts = [f"h{i}.test" for i in range(len(site.pages))]
    urls = {f"http://{h}:{site.port}{p}": p for h, p in zip(hosts, site.pages, strict=True)}
    run = Crawl(
        tmp_path,
        list(urls),
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, hosts),
        robots=False,
        timeout_s=2.0,
    )
    begin = time.monotonic()
    results = {urls[u]: r for u, r in run.run().items()}
    assert time.monotonic() - begin < 8
    expected: dict[str, tuple[str, str | None]] = {p: ("failed", reason) for p, (_, reason) in cases.items()}
    expected |= {"/bomb-redirect": ("kept", None), "/after-bomb": ("kept", None)}
    assert {p: outcome(r) for p, r in results.items()} == expected
    assert len(list(warc.index_warc(tmp_path / "warc" / "00000-000.warc.gz"))) == 2  # nothing half is stored


def test_bytes_behind_a_body_never_answer_the_next_request(tmp_path: Path, site: Site) -> None:
    smuggled = response(b"<html>smuggled")
    site.default = response(b"<html>honest")
    site.pages = {"/first": response(b"<html>honest") + smuggled}
    results = crawl(tmp_path, site, ["/first", *(f"/{i}" for i in range(5))], robots=False)
    run = Crawl(tmp_path, [])
    for row in results.values():
        assert outcome(row) != ("kept", None) or run.body(row) == b"<html>honest"
    assert sum(outcome(r) == ("kept", None) for r in results.values()) >= 5


def test_tls_is_verified(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))

    def server(issuer: trustme.CA, name: str, **options: Any) -> Site:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issuer.issue_cert(name, **options).configure_cert(context)
        return Site(tls=context, default=response())

    import datetime

    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    with (
        server(authority, "good.test") as good,
        server(stranger, "self.test") as unknown,
        server(authority, "else.test") as other_name,
        server(authority, "old.test", not_after=past) as expired,
    ):
        sites = {"good": good, "self": unknown, "name": other_name, "old": expired}
        urls = {f"https://{n}.test:{s.port}/": n for n, s in sites.items()}
        run = Crawl(
            tmp_path,
            list(urls),
            allow_addresses=[f"127.0.0.1:{s.port}" for s in sites.values()],
            hosts_file=names(tmp_path, [f"{n}.test" for n in sites]),
        )
        results = {urls[u]: outcome(r) for u, r in run.run().items()}
        assert results == {"good": ("kept", None), **dict.fromkeys(("self", "name", "old"), ("failed", "tls"))}
        assert not unknown.requests
        assert not other_name.requests
        assert not expired.requests


# ---- robots.txt -------------------------------------------------------------------------------------------------


def robots_reply(body: bytes, status: str = "200 OK") -> bytes:
    return response(body, status, Content_Type="text/plain")


ROBOTS: dict[str, tuple[bytes | Handler, tuple[str, str | None]]] = {
    "allow": (robots_reply(b"user-agent: *\nallow: /"), ("kept", None)),
    "disallow": (robots_reply(b"user-agent: *\ndisallow: /p"), ("dropped", "robots")),
    "ours": (robots_reply(b"user-agent: *\nallow: /\nuser-agent: GptTrain/2\ndisallow: /"), ("dropped", "robots")),
    "mark": (robots_reply(b"\xef\xbb\xbfuser-agent: *\ndisallow: /"), ("dropped", "robots")),
    "html": (response(b"<html><body>disallow nothing</body>"), ("kept", None)),
    "nul": (robots_reply(b"\0\0user-agent: *\0\ndisallow: /\0"), ("dropped", "robots")),
    "missing": (robots_reply(b"", "404 Not Found"), ("kept", None)),
    "forbidden": (robots_reply(b"user-agent: *\ndisallow: /", "401 Unauthorized"), ("kept", None)),
    "error": (robots_reply(b"", "503 Busy"), ("failed", "robots_unreachable")),
    "silent": (drip(b"", b"", 60), ("failed", "robots_unreachable")),
    "huge": (
        robots_reply(b"user-agent: *\n" + b"#" * 79 + b"\n" * 1 + (b"#" * 79 + b"\n") * 7000 + b"disallow: /"),
        ("kept", None),
    ),
    "huge-but-early": (
        robots_reply(b"user-agent: *\ndisallow: /\n" + (b"#" * 79 + b"\n") * 7000),
        ("dropped", "robots"),
    ),
    "bomb": (
        response(
            gzip.compress(b"user-agent: *\ndisallow: /\n") + bomb("gzip", 50),
            Content_Type="text/plain",
            Content_Encoding="gzip",
        ),
        ("dropped", "robots"),
    ),
    "slow-crawl": (robots_reply(b"user-agent: *\ncrawl-delay: 3600"), ("dropped", "crawl_delay")),
    "five": (redirect("/r1"), ("dropped", "robots")),
    "six": (redirect("/r0"), ("kept", None)),
    "away": (redirect("ftp://example.org/robots.txt"), ("failed", "robots_unreachable")),
}


def test_robots_txt_is_read_as_rfc_9309_says(tmp_path: Path, site: Site) -> None:
    site.default = response()
    hosts = {f"{name}.test": case for name, case in ROBOTS.items()}
    site.pages = {f"{host}/robots.txt": page for host, (page, _) in hosts.items()}
    site.pages |= {f"/r{i}": redirect(f"/r{i + 1}") for i in range(5)}
    site.pages["/r5"] = robots_reply(b"user-agent: *\ndisallow: /")
    urls = [f"http://{host}:{site.port}/p{i}" for host in hosts for i in range(3)]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, list(hosts)),
        timeout_s=1.5,
    )
    results = run.run()
    got = {host: {outcome(results[f"http://{host}:{site.port}/p{i}"]) for i in range(3)} for host in hosts}
    assert got == {host: {expected} for host, (_, expected) in hosts.items()}
    asked = collections.Counter(r.host for r in site.requests if r.path == "/robots.txt")
    assert asked == dict.fromkeys(hosts, 1)  # one request a host
    fetched = {r.host for r in site.requests if r.path.startswith("/p")}
    assert fetched == {host for host, (_, expected) in hosts.items() if expected == ("kept", None)}
    audit = [json.loads(line) for line in audit_path(tmp_path / "fetch", 0).read_text().splitlines()]
    rules = {line["url"]: line["rule"] for line in audit}
    assert rules[f"http://allow.test:{site.port}/p0"] == "line 2: Allow: /"
    assert rules[f"http://missing.test:{site.port}/p0"] == "robots.txt answered 404: no rules"
    requested = collections.Counter(f"http://{r.host}:{site.port}{r.path}" for r in site.requests)
    assert collections.Counter(line["url"] for line in audit) == requested  # every request is in the audit log


def test_delays_are_kept_as_the_server_sees_them(tmp_path: Path, site: Site) -> None:
    site.default = response()
    site.pages = {
        "plain.test/robots.txt": robots_reply(b"", "404 Not Found"),
        "slow.test/robots.txt": robots_reply(b"user-agent: gpttrain\ncrawl-delay: 0.6"),
        "plain.test/1": redirect(f"http://slow.test:{site.port}/from-plain"),
    }
    hosts = ["plain.test", "slow.test"]
    urls = [f"http://{h}:{site.port}/{i}" for h in hosts for i in range(4)]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, hosts),
        delay_s=0.25,
    )
    assert {outcome(r) for r in run.run().values()} == {("kept", None)}
    for host, delay_s in (("plain.test", 0.25), ("slow.test", 0.6)):
        starts = [r.at for r in site.requests if r.host == host]
        assert len(starts) == (5 if host == "plain.test" else 6)
        gaps = [b - a for a, b in itertools.pairwise(starts)]
        # robots.txt comes first: its crawl-delay is known from the second gap on.
        assert min(gaps[1:]) >= delay_s
        assert gaps[0] >= 0.25


def test_busy_hosts_are_left_alone_as_long_as_they_ask(tmp_path: Path, site: Site) -> None:
    tries: collections.Counter[str] = collections.Counter()

    def busy_once(status: str, **headers: str) -> Handler:
        async def handle(request: Request, writer: asyncio.StreamWriter) -> None:
            tries[request.path] += 1
            writer.write(response(b"", status, **headers) if tries[request.path] == 1 else response())

        return handle

    site.pages = {
        "/429": busy_once("429 Too Many Requests", Retry_After="1"),
        "/503": busy_once("503 Busy"),
        "/500": busy_once("500 Oops"),
        "/reset": closing(b""),
        "/never": response(b"", "503 Busy", Retry_After="86400"),
        "/always": response(b"", "502 Bad Gateway"),
    }
    results = crawl(tmp_path, site, list(site.pages), robots=False, retries=2, retry_wait_s=0.1)
    got = {p: outcome(r) for p, r in results.items()}
    assert got == {
        "/429": ("kept", None),
        "/503": ("kept", None),
        "/500": ("kept", None),
        "/reset": ("failed", "connect"),
        "/never": ("failed", "retry_after"),
        "/always": ("failed", "http_status"),
    }
    asked = collections.Counter(site.paths())
    # A first try that met a kept-alive connection which the server had closed does not count.
    assert asked.pop("/reset") in (3, 4)
    assert asked == {"/429": 2, "/503": 2, "/500": 2, "/never": 1, "/always": 3}
    first = next(r.at for r in site.requests if r.path == "/429")
    following = min(r.at for r in site.requests if r.at > first)
    assert following - first >= 1.0  # the whole host rests, not only the one URL


# ---- many hosts, some of them bad -------------------------------------------------------------------------------


def test_dripping_hosts_do_not_stop_the_good_ones(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "SLOW_AFTER_S", 0.3)
    monkeypatch.setattr(scheduler, "NEW_SLOW_AFTER_S", 0.3)
    drippers = [f"d{i}.test" for i in range(100)]
    good = [f"g{i}.test" for i in range(20)]
    site.default = drip(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", b"X", 0.3)
    site.pages = {f"{h}/": response() for h in good}
    run = Crawl(
        tmp_path,
        [f"http://{h}:{site.port}/" for h in drippers + good],
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, drippers + good),
        concurrency=16,
        robots=False,
        timeout_s=4.0,
    )
    begin = time.monotonic()
    results = run.run()
    assert time.monotonic() - begin < 12
    reasons = collections.Counter(outcome(r) for r in results.values())
    assert reasons == {("kept", None): 20, ("failed", "timeout"): 100}
    assert max(r.at for r in site.requests if r.host in good) - begin < 3  # long before the drippers' time is up


def test_a_dead_host_ends_all_its_urls_soon(tmp_path: Path, site: Site) -> None:
    closed = 1  # nobody listens on tcpmux here, and 127.0.0.1:1 is allow-listed
    urls = [f"http://127.0.0.1:{closed}/{i}" for i in range(500)]
    urls += [f"http://nowhere.invalid/{i}" for i in range(500)]
    run = Crawl(tmp_path, urls, allow_addresses=[f"127.0.0.1:{closed}"], hosts_file=names(tmp_path, []))
    begin = time.monotonic()
    results = run.run()
    assert time.monotonic() - begin < 10
    assert collections.Counter(outcome(r) for r in results.values()) == {
        ("failed", "connect"): 500,
        ("failed", "dns"): 500,
    }


def test_the_tail_has_a_budget(tmp_path: Path, site: Site) -> None:
    site.default = response()
    site.pages = {
        "/robots.txt": response(b"", "404 Not Found"),
        **{f"slow.test/{i}": drip(b"", b"", 60) for i in range(3)},
    }
    urls = [f"http://h{i % 20}.test:{site.port}/{i}" for i in range(300)]
    urls += [f"http://slow.test:{site.port}/{i}" for i in range(3)]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, ["slow.test", *(f"h{i}.test" for i in range(20))]),
        timeout_s=60,
        tail_budget_s=0.5,
        shards=3,
    )
    begin = time.monotonic()
    results = run.run()
    assert time.monotonic() - begin < 10
    assert collections.Counter(outcome(r) for r in results.values()) == {
        ("kept", None): 300,
        ("failed", "out_of_budget"): 3,
    }


# ---- a process that is killed -----------------------------------------------------------------------------------


def test_kill_9_loses_no_url_and_fetches_none_twice_but_those_under_way(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 800)
    chance = random.Random(9)
    kills = 0
    while kills < 5:
        before = decided(run)
        child = start_child(run)
        aim = before + chance.randrange(20, 120)
        while decided(run) < aim and child.poll() is None:
            time.sleep(0.005)
        assert child.poll() is None, child.communicate()[1].decode()
        child.kill()
        child.communicate()
        kills += 1
    child = start_child(run)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors.decode()
    results = run.results()
    assert len(results) == 800
    assert collections.Counter(outcome(r) for r in results.values()) == {
        ("kept", None): 799,
        ("failed", "http_status"): 1,
    }
    assert run.check_warcs() > 4
    for url, row in results.items():
        if row["state"] == "kept":
            assert run.body(row).startswith(HTML + b"/" + url.rpartition("/")[2].encode())
    asked = collections.Counter(site.paths())
    assert set(asked) == {f"/{i}" for i in range(800)}
    assert sum(asked.values()) - 800 <= kills * 8  # one request under way at each of eight hosts
    stored = [e.url for f in (tmp_path / "warc").iterdir() for e in warc.index_warc(f)]
    assert len(stored) == len(set(stored)) == 799


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_fetch_with_whole_files(tmp_path: Path, site: Site, number: signal.Signals) -> None:
    run = killable(tmp_path, site, 200)
    child = start_child(run)
    while decided(run) < 30 and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(number)
    _, errors = child.communicate(timeout=10)
    assert child.returncode == (-signal.SIGTERM if number == signal.SIGTERM else -signal.SIGINT), errors.decode()
    assert run.check_warcs() >= 4
    assert 30 <= decided(run) < 200
    assert len(run.run()) == 200
    assert sum(collections.Counter(site.paths()).values()) <= 200 + 8


def test_torn_files_are_mended(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 40)
    run.run()
    shard = run.shards[0]
    journal = journal_path(shard.folder, 0)
    lines = journal.read_bytes().split(b"\n")
    kept = [json.loads(line) for line in lines if b'"kept"' in line]
    last = max(kept, key=lambda line: (line["part"], line["end"]))
    file = tmp_path / warc_name(last)
    # The machine went down: the journal's last line is torn, the last page is cut, and no mark vouches for it.
    lines = [line for line in lines if line and b'"mark"' not in line]
    journal.write_bytes(b"\n".join(lines) + b"\n" + b'{"index": 999, "sta')
    with open(file, "r+b") as f:
        f.truncate(last["end"] - 10)
    with pytest.raises(CorruptionError, match="expected at least"):
        finish_shard(shard, tmp_path)
    asked = len(site.paths())
    results = run.run()
    assert len(results) == 40
    assert len(site.paths()) - asked == 1  # that page alone
    assert run.check_warcs() >= 1


def warc_name(line: dict[str, Any]) -> str:
    return f"warc/00000-{line['part']:03d}.warc.gz"


def test_a_flipped_page_that_nothing_vouches_for_is_fetched_again(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 8)
    run.run()
    journal = journal_path(run.shards[0].folder, 0)
    lines = [line for line in journal.read_bytes().split(b"\n") if line and b'"mark"' not in line]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    line = next(json.loads(x) for x in lines if b'"kept"' in x)
    with open(tmp_path / warc_name(line), "r+b") as f:
        f.seek((line["offset"] + line["end"]) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 0x40]))
    results = run.run()
    assert all(run.body(row) for row in results.values() if row["state"] == "kept")
    assert run.check_warcs() >= 1


def test_whatever_a_power_cut_leaves_the_next_run_ends_whole(tmp_path: Path, site: Site) -> None:
    """Journal and pages lose random ends, independently of each other, as files do that were not synced in time."""
    run = killable(tmp_path, site, 24)
    first = {u: outcome(r) for u, r in run.run().items()}
    chance = random.Random(5)
    for _ in range(12):
        for shard in run.shards:
            journal = journal_path(shard.folder, shard.number)
            lines = [line for line in journal.read_bytes().split(b"\n") if line and b'"mark"' not in line]
            data = b"\n".join(lines) + b"\n"
            journal.write_bytes(data[: chance.randrange(len(data) + 1)])
        for file in (tmp_path / "warc").iterdir():
            fate = chance.randrange(4)
            size = file.stat().st_size
            if fate == 0:
                file.unlink()
            elif fate < 3:
                os.truncate(file, chance.randrange(size + 1))
            if fate == 2:
                os.truncate(file, size)  # the length was written, the blocks were not
        results = run.run()
        assert {u: outcome(r) for u, r in results.items()} == first
        assert run.check_warcs() >= 1
        for url, row in results.items():
            if row["state"] == "kept":
                assert run.body(row).startswith(HTML + b"/" + url.rpartition("/")[2].encode())


def test_a_full_disk_ends_the_run_and_leaves_no_half_record(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killable(tmp_path, site, 40)
    real, room = os.write, [60_000]

    def write(descriptor: int, data: bytes) -> int:
        if len(data) > 1000:  # pages, not journal lines
            if room[0] <= 0:
                raise OSError(28, "No space left on device")
            data = data[: room[0]]
            room[0] -= len(data)
        return real(descriptor, data)

    monkeypatch.setattr(warc.os, "write", write)
    with pytest.raises(StorageError, match="No space left"):
        run.run()
    room[0] = 1 << 30
    assert run.check_warcs() >= 1
    assert len(run.run()) == 40
    assert run.check_warcs() >= 1


def test_a_changed_list_fetches_only_what_is_new(tmp_path: Path, site: Site) -> None:
    site.default = response()
    base, allow = f"http://127.0.0.1:{site.port}", [f"127.0.0.1:{site.port}"]
    Crawl(tmp_path, [f"{base}/{i}" for i in range(6)], allow_addresses=allow).run()
    asked = len(site.paths())
    changed = [f"{base}/{i}" for i in (9, 5, 3, 8, 1)]  # other places in the list, some gone, some new
    results = Crawl(tmp_path, changed, allow_addresses=allow).run()
    assert [results[u]["index"] for u in changed] == list(range(5))
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    assert sorted(site.paths()[asked:]) == ["/8", "/9"]
    for url in changed:
        page = results[url]["page"]
        assert warc.read_response(tmp_path / page["warc_file"], page["warc_offset"]).url == url


def test_a_finished_fetch_asks_for_nothing(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 16)
    first = run.run()
    asked = len(site.requests)
    assert run.run() == first
    assert len(site.requests) == asked
