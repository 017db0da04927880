"""What must not break the fetch, as docs/crawling.md lists it: that each attack has its test, and those that had none.

Bombs of two gigabytes, hops that lead astray late, credentials that a server tries to plant, URLs of other schemes that
come from a damaged list; on real servers, the memory measured in a process of its own.
"""

from __future__ import annotations

import ast
import json
import re
import ssl
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import brotli
import pytest
import trustme
import zstandard
from web import HTML, Crawl, Site, closing, names, outcome, redirect, response

from data_pipeline.crawl import warc

ROOT = Path(__file__).parent.parent
BOMB_MB = 2048


def test_each_attack_that_the_documentation_lists_has_its_test() -> None:
    text = (ROOT / "docs" / "crawling.md").read_text(encoding="utf-8")
    table = text.split("## What was tried against it")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 30
    defined: dict[str, set[str]] = {}
    for row in rows:
        named = re.findall(r"`(test_\w+)\.(test_\w+)`", row.rpartition(" | ")[2])
        assert named, row
        for file, test in named:
            if file not in defined:
                tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
                defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in defined[file], row


# ---- other schemes ----------------------------------------------------------------------------------------------

_opened: list[str] = []
_connects: list[Any] = []


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        _connects.append(args[1])
    elif event == "open" and isinstance(args[0], str):
        _opened.append(args[0])


sys.addaudithook(_on_event)  # CPython tells of every file that is opened and every connection that is made


@pytest.mark.parametrize("robots", [True, False])
def test_other_schemes_open_nothing(tmp_path: Path, site: Site, robots: bool) -> None:
    """The first stage lets none through; one in a damaged URL file must still be typed, and nothing else harmed."""
    site.default = response()
    secret = tmp_path / "secret.html"
    secret.write_bytes(HTML)
    odd = [
        f"file://{secret}",
        f"file://127.0.0.1:{site.port}{secret}",
        f"ftp://127.0.0.1:{site.port}/x",
        f"gopher://127.0.0.1:{site.port}/x",
        "data:text/html,<html>x",
        "javascript:alert(1)",
        f"//127.0.0.1:{site.port}/x",
        "",
        f"HTTP://127.0.0.1:{site.port}/x",  # not in normal form
        f"http://me:hunter2@127.0.0.1:{site.port}/x",
        "http://[::1/x",
        "http://a.test:eighty/x",
        "http:///etc/passwd",
    ]
    good = f"http://127.0.0.1:{site.port}/good"
    _opened.clear()
    _connects.clear()
    run = Crawl(tmp_path / "run", [*odd, good], allow_addresses=[f"127.0.0.1:{site.port}"], robots=robots)
    results = run.run()
    assert {outcome(results[u]) for u in odd} == {("dropped", "bad_scheme")}
    assert outcome(results[good]) == ("kept", None)
    assert set(_connects) == {("127.0.0.1", site.port)}
    assert site.paths() == ["/good"]
    assert str(secret) not in _opened


# ---- every hop --------------------------------------------------------------------------------------------------


def test_every_hop_is_vetted(tmp_path: Path, site: Site) -> None:
    """Pages and robots.txt that lead into private ranges after 1 to 5 redirects over good hosts."""

    async def lookup(host: str) -> list[str]:
        return ["10.0.0.7"] if host.startswith("inside") else ["127.0.0.1"]

    base = f"http://{{}}.test:{site.port}"
    site.default = response()
    site.pages = {"/robots.txt": response(b"", "404 Not Found")}
    pages: list[str] = []
    sites: list[str] = []
    for far in range(1, 6):
        for target in ("10.0.0.8", "[::ffff:192.168.0.1]", "169.254.169.254", "inside.test"):
            way = f"w{far}{len(pages)}"
            for hop in range(1, far):
                site.pages[f"/{way}/{hop}"] = redirect(base.format(f"g{hop}") + f"/{way}/{hop + 1}")
            site.pages[f"/{way}/{far}"] = redirect(f"http://{target}:{site.port}/latest/meta-data")
            pages.append(base.format("g0") + f"/{way}/1")
            site.pages[f"{way}.test/robots.txt"] = redirect(base.format("g0") + f"/{way}/1")
            sites.append(base.format(way) + "/page")
    _connects.clear()
    results = Crawl(tmp_path, pages + sites, allow_addresses=[f"127.0.0.1:{site.port}"]).run(lookup)
    assert {outcome(results[u]) for u in pages} == {("dropped", "blocked_address")}
    assert {outcome(results[u]) for u in sites[:-4]} == {("failed", "robots_unreachable")}
    # Six redirects: the last is not followed, and the file counts as not there (RFC 9309, 2.3.1.2).
    assert {outcome(results[u]) for u in sites[-4:]} == {("kept", None)}
    assert set(_connects) == {("127.0.0.1", site.port)}
    asked = [r.path for r in site.requests]
    for far, url in zip((f for f in range(1, 6) for _ in range(4)), pages, strict=True):
        way = url.split("/")[3]
        assert asked.count(f"/{way}/{far}") == 2, way  # the last hop was reached, for the page and for robots.txt


def test_no_cookie_and_no_credential_crosses_hosts_schemes_or_ports(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("a.test").configure_cert(context)
    with Site(tls=context) as secure, Site() as other:
        plants: dict[str, Any] = {
            "Set_Cookie": "id=hunter2; Domain=test; Path=/",
            "WWW_Authenticate": 'Basic realm="x"',
        }
        a, s, o = f"a.test:{site.port}", f"a.test:{secure.port}", f"a.test:{other.port}"
        site.pages = {
            "/same": response(b"", "302 Found", Location=f"http://me:hunter2@{a}/to-tls", **plants),
            "/to-tls": response(b"", "301 Moved", Location=f"https://me:hunter2@{s}/to-port", **plants),
            "/locked": response(b"", "401 Unauthorized", **plants),
            "/after": response(**plants),
        }
        secure.pages = {"/to-port": response(b"", "307 Temporary", Location=f"http://hunter2@{o}/to-host", **plants)}
        other.pages = {
            "/to-host": response(b"", "308 Permanent", Location=f"http://b.test:{site.port}/after", **plants)
        }
        run = Crawl(
            tmp_path / "run",
            [f"http://{a}{path}" for path in ("/same", "/locked", "/after")],
            allow_addresses=[f"127.0.0.1:{x.port}" for x in (site, secure, other)],
            hosts_file=names(tmp_path, ["a.test", "b.test"]),
            max_redirects=5,
        )
        results = run.run()
        ends = [outcome(results[f"http://{a}{path}"]) for path in ("/same", "/locked", "/after")]
        assert ends == [("kept", None), ("failed", "http_status"), ("kept", None)]
        requests = [*site.requests, *secure.requests, *other.requests]
        assert {r.path for r in requests} == {
            "/robots.txt",
            "/same",
            "/to-tls",
            "/to-port",
            "/to-host",
            "/locked",
            "/after",
        }
        assert all(
            r.headers.keys() <= {"host", "user-agent", "accept", "accept-encoding", "connection"} for r in requests
        )
        sent = list(run.folder.rglob("*.jsonl"))
        assert sent
        assert b"me:" not in b"".join(p.read_bytes() for p in sent)
        assert b"hunter2" not in b"".join(p.read_bytes() for p in sent)


# ---- two megabytes that would be two gigabytes ------------------------------------------------------------------


def bombs() -> dict[str, tuple[str, bytes]]:
    """Name → (content coding, 2 MB or less of it that are BOMB_MB of zeros); what one megabyte packs to, repeated."""
    block = bytes(1 << 20)
    deflate = zlib.compressobj(9, wbits=-15)
    first = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)  # from here on the coder remembers nothing
    stream = first * BOMB_MB + b"\x03\x00"
    packed = {
        "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + stream + bytes(8),
        "deflate": b"\x78\x9c" + stream + bytes(4),
        "raw deflate": stream,
        "zstd": zstandard.compress(block) * BOMB_MB,
        "br": brotli_bomb(),
        "twice": b"",
        "a million members": zlib.compress(b"", wbits=31) * 1_000_000,
        "members up to the bound": zlib.compress(b"", wbits=31) * 240_000,
    }
    packer = zlib.compressobj(9, wbits=31)
    packed["twice"] = packer.compress(packed["gzip"]) + packer.flush()
    codings = {"raw deflate": "deflate", "twice": "gzip, gzip"}
    return {n: ("gzip" if "members" in n else codings.get(n, n), body) for n, body in packed.items()}


def brotli_bomb() -> bytes:
    compressor = brotli.Compressor(quality=1)
    block = bytes(1 << 20)
    first, second, third = (compressor.process(block) + compressor.flush() for _ in range(3))
    assert second == third  # and so are all that follow
    return first + second * (BOMB_MB - 1) + compressor.finish()


BOMBED = textwrap.dedent(
    """
    import json, resource, sys
    from pathlib import Path
    from data_pipeline.config import FetchConfig
    from data_pipeline.crawl.fetch import FetchShard, fetch_shards

    def peak_kb():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    folder, config = Path(sys.argv[1]), FetchConfig(**json.loads(sys.argv[2]))
    shards = [FetchShard(folder / "urls" / f"{k:05d}.parquet", folder / "fetch", k) for k in range(2)]
    fetch_shards(shards[:1], config, folder, lambda done, total: None)  # an honest page: all is loaded that there is
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before = peak_kb()
    used = resource.getrusage(resource.RUSAGE_SELF)
    fetch_shards(shards[1:], config, folder, lambda done, total: None)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    print(json.dumps({"peak_mb": (peak_kb() - before) / 1024, "cpu_s": cpu_s}))
    """
)


def test_bombs_cost_no_more_than_a_large_page(tmp_path: Path, site: Site) -> None:
    """As pages, behind redirects, as the bodies of redirects and as robots.txt: at most 64 MB for any one response, and
    time by the bytes that came."""
    packed = bombs()
    assert all(len(body) < 3 << 20 for name, (_, body) in packed.items() if "members" not in name)
    assert zlib.decompressobj(wbits=31).decompress(packed["gzip"][1], 9 << 20) == bytes(9 << 20)
    assert zlib.decompressobj(wbits=-15).decompress(packed["raw deflate"][1], 9 << 20) == bytes(9 << 20)
    site.pages = {"/robots.txt": response(b"", "404 Not Found"), "/honest": response(), "/after": response()}
    urls: dict[str, tuple[str, str | None]] = {}
    for i, (name, (coding, body)) in enumerate(packed.items()):
        reason = "too_large" if "a million" in name or "members" not in name else "bad_encoding"
        site.pages[f"/page{i}"] = closing(response(body, Content_Encoding=coding))
        site.pages[f"/to-page{i}"] = redirect(f"/page{i}")
        site.pages[f"/redirect{i}"] = closing(response(body, "302 Found", Content_Encoding=coding, Location="/after"))
        site.pages[f"r{i}.test/robots.txt"] = closing(
            response(body, Content_Encoding=coding, Content_Type="text/plain")
        )
        urls[f"http://p.test:{site.port}/page{i}"] = ("failed", reason)
        urls[f"http://p.test:{site.port}/to-page{i}"] = ("failed", reason)
        urls[f"http://p.test:{site.port}/redirect{i}"] = ("kept", None)
        # What is read of a robots.txt is 500 KiB of NUL: a rule is not among them (RFC 9309, 2.5).
        refused = "members" in name
        urls[f"http://r{i}.test:{site.port}/after"] = ("failed", "robots_unreachable") if refused else ("kept", None)
    run = Crawl(
        tmp_path,
        [],
        shards=2,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, ["p.test", *(f"r{i}.test" for i in range(len(packed)))]),
        concurrency=1,
        timeout_s=60.0,
    )
    run.write(run.shards[0], [f"http://p.test:{site.port}/honest"])
    run.write(run.shards[1], list(urls), first=1)
    child = [sys.executable, "-c", BOMBED, str(tmp_path), json.dumps(run.config.__dict__)]
    done = subprocess.run(child, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    results = run.results()
    assert {u: outcome(results[u]) for u in urls} == urls
    assert figures["peak_mb"] < 64
    assert figures["cpu_s"] < 20  # 0.3 s; what is decoded whole takes minutes, and what is quadratic does not end
    archived = [e for f in (tmp_path / "warc").iterdir() for e in warc.index_warc(f)]
    assert len(archived) == 1 + sum(state == "kept" for state, _ in urls.values())


# ---- too long ---------------------------------------------------------------------------------------------------


def test_a_url_of_a_megabyte_is_not_followed(tmp_path: Path, site: Site) -> None:
    long = "a" * 1_000_000
    site.default = response()
    site.pages = {
        "/to-long": closing(redirect("/" + long)),
        "/to-rather-long": redirect("/" + long[:30_000]),
        "/robots.txt": response(b"", "404 Not Found"),
        "r.test/robots.txt": redirect("/" + long[:30_000]),
    }
    base = f"http://127.0.0.1:{site.port}"
    urls = {
        f"{base}/to-long": ("failed", "header_too_large"),
        f"{base}/to-rather-long": ("failed", "protocol"),
        f"http://r.test:{site.port}/": ("failed", "robots_unreachable"),
    }
    run = Crawl(
        tmp_path, list(urls), allow_addresses=[f"127.0.0.1:{site.port}"], hosts_file=names(tmp_path, ["r.test"])
    )
    results = run.run()
    assert {u[:80]: outcome(r) for u, r in results.items()} == {u[:80]: e for u, e in urls.items()}
    assert max(len(r.path) for r in site.requests) < 100
