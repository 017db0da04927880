"""What must not come through: wrong addresses, hostile bodies and headers, unverified TLS; on real servers."""

from __future__ import annotations

import collections
import gzip
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
from web import (
    HTML,
    Crawl,
    Handler,
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

from data_pipeline.crawl import warc
from data_pipeline.records import ConfigError

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
    assert time.monotonic() - begin < 20  # measured: 3; one server is silent for a minute
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


def test_every_oddity_of_http_ends_typed_and_leaves_the_next_answer_alone(tmp_path: Path, site: Site) -> None:
    ok, page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n", b"<html>honest"
    chunked = ok + b"Transfer-Encoding: chunked\r\n\r\n"
    whole = b"c\r\n" + page + b"\r\n0\r\n"
    kept: tuple[str, str | None] = ("kept", None)
    cases: dict[str, tuple[bytes | Handler, tuple[str, str | None]]] = {
        "/http-0.9": (closing(b"<html>HTTP/0.9 has no header"), ("failed", "protocol")),
        "/http-2": (closing(b"\0\0\x12\x04\0\0\0\0\0"), ("failed", "protocol")),
        "/flood-of-1xx": (drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 50, 0.01), ("failed", "protocol")),
        "/hints": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + response(page), kept),
        "/upgrade": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", ("failed", "protocol")),
        "/204-with-body": (response(page, "204 No Content") + response(b"<html>smuggled"), ("failed", "http_status")),
        "/304-with-body": (response(page, "304 Not Modified") + response(b"<html>x"), ("failed", "http_status")),
        "/extensions": (closing(chunked + (b"1;" + b"x" * 2000 + b"\r\na\r\n") * 100), ("failed", "protocol")),
        "/chunks-of-one": (closing(chunked + b"1\r\na\r\n" * 99_999), ("failed", "protocol")),
        "/trailers": (chunked + whole + b"Set-Cookie: a=b\r\nX-Robots-Tag: noindex\r\n\r\n", kept),
        "/endless-trailers": (drip(chunked + whole, b"T: x\r\n" * 5000, 0.01), ("failed", "protocol")),
        "/both-lengths": (ok + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + whole + b"\r\n", kept),
        "/cr": (closing(ok + b"X: a\rb\r\n\r\n"), ("failed", "protocol")),
        "/nul": (closing(ok + b"X: a\0b\r\n\r\n"), ("failed", "protocol")),
        "/error-that-drips": (
            drip(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9000\r\n\r\n", b"X"),
            ("failed", "http_status"),
        ),
        "/error-without-end": (drip(b"HTTP/1.1 404 No\r\n\r\n", b"X" * 9000, 0.001), ("failed", "http_status")),
        "/after-negative": (response(b"", "503 Busy", Retry_After="-5"), ("failed", "http_status")),
        "/after-huge": (response(b"", "503 Busy", Retry_After="9" * 400), ("failed", "retry_after")),
        "/after-9999": (
            response(b"", "429 Slow", Retry_After="Fri, 31 Dec 9999 23:59:59 GMT"),
            ("failed", "retry_after"),
        ),
        "/after-nonsense": (
            response(b"", "503 Busy", Retry_After="\xb2 Feb -1 99:99:99 +9999"),
            ("failed", "http_status"),
        ),
        "/to-itself-by-backslash": (redirect("\\\\good.test\\\\x"), ("dropped", "blocked_address")),
        "/to-control": (redirect("/x\x01\x7f y"), kept),
        "/to-long": (redirect("/" + "a" * 20_000), ("failed", "protocol")),
        "/to-credentials": (redirect("ftp://me:hunter2@x.test/"), ("dropped", "bad_scheme")),
        "/to-port": (redirect("http://x.test:99999/"), ("failed", "protocol")),
        "/to-newline": (redirect("/x?\ty"), kept),
    }
    site.pages = {f"{p}": answer for p, (answer, _) in cases.items()}
    site.default = response(page)  # what stands behind odd redirects, and follows on the same connection
    hosts = [f"h{i}.test" for i in range(len(cases))]
    urls = {f"http://{h}:{site.port}{p}": p for h, p in zip(hosts, cases, strict=True)}
    after = [f"http://{h}:{site.port}/after{i}" for h in hosts for i in range(2)]
    run = Crawl(
        tmp_path,
        [*urls, *after],
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=str(tmp_path / "hosts"),
        robots=False,
        timeout_s=3.0,
    )
    names(tmp_path, hosts)
    with open(tmp_path / "hosts", "a") as f:
        f.write("10.0.0.1 good.test\n127.0.0.1 x.test\n")
    results = run.run()
    assert {p: outcome(results[u]) for u, p in urls.items()} == {p: expected for p, (_, expected) in cases.items()}
    for url in after:
        assert outcome(results[url]) == kept
        assert run.body(results[url]) == page
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    told = b"".join(gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files)
    assert b"smuggled" not in told
    assert b"hunter2" not in told
    assert run.check_warcs() == 1


def test_the_environment_opens_no_other_door(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no netrc, whatever the variables say."""
    site.default = response()
    (tmp_path / "netrc").write_text("default login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Site(default=response(b"<html>the proxy's")) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://me:hunter2@127.0.0.1:{proxy.port}")
        (row,) = crawl(tmp_path, site, ["/"]).values()
        assert outcome(row) == ("kept", None)
        assert proxy.requests == []
    assert not any({"authorization", "proxy-authorization"} & r.headers.keys() for r in site.requests)


def test_a_url_cannot_smuggle_a_second_request(tmp_path: Path, site: Site) -> None:
    """URL files are the first stage's, and in normal form; one that is not must still be one request or none."""
    site.default = response()
    base = f"http://127.0.0.1:{site.port}"
    odd = [
        f"{base}/a b",
        f"{base}/a\r\nX: y",
        f"{base}/a HTTP/1.1\r\nHost: x\r\n\r\nGET /b",
        f"{base}/\u00e9",
        f"{base}/\0",
    ]
    run = Crawl(tmp_path, [*odd, f"{base}/good"], allow_addresses=[f"127.0.0.1:{site.port}"], robots=False)
    results = run.run()
    assert {outcome(results[u]) for u in odd} == {("failed", "protocol")}
    assert outcome(results[f"{base}/good"]) == ("kept", None)
    assert site.paths() == ["/good"]
