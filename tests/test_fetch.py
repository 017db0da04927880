"""The way of a page through the fetch, redirects, robots.txt, many hosts; on real servers over loopback."""

from __future__ import annotations

import asyncio
import collections
import gzip
import itertools
import json
import os
import time
import zlib
from pathlib import Path

import brotli
import pytest
import zstandard
from web import (
    HTML,
    Crawl,
    Handler,
    Request,
    Site,
    bomb,
    closing,
    crawl,
    drip,
    names,
    outcome,
    redirect,
    response,
)

from data_pipeline.crawl import scheduler, warc
from data_pipeline.crawl.fetch_journal import audit_path

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
    assert time.monotonic() - begin < 30
    reasons = collections.Counter(outcome(r) for r in results.values())
    assert reasons == {("kept", None): 20, ("failed", "timeout"): 100}
    # One after the other in twelve places, the drippers would hold the good ones up for half a minute.
    assert max(r.at for r in site.requests if r.host in good) - begin < 15


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
