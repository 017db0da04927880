"""1,043 real pages, served over loopback under their own host names, go through the whole pipeline."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from data_pipeline.token_shards import TokenShards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(shared: Path) -> Iterator[tuple[str, list[str], set[str]]]:
    """(ip:port, one URL a page, host names) of a server that knows each page by its own host and path."""
    pages: dict[tuple[str, str], Path] = {}
    gold = {p.stem: json.loads(p.read_text()) for p in sorted((shared / "pages" / "gold").glob("*.json"))}
    for name, meta in gold.items():
        parts = urlsplit(meta.get("url") or "")
        host = (parts.hostname or f"page-{name}.test").lower()
        path = parts.path or "/"
        if (host, path) in pages or not path.isascii() or "%" in path or "//" in path or path.endswith(".pdf"):
            path = f"/page/{name}"
        pages[host, path] = shared / "pages" / "html" / f"{name}.html"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            host = self.headers["Host"].rsplit(":", 1)[0]
            page = pages.get((host, self.path))
            body = page.read_bytes() if page else b"not found"
            self.send_response(200 if page else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    yield f"127.0.0.1:{port}", [f"http://{host}:{port}{path}" for host, path in pages], {host for host, _ in pages}
    server.shutdown()
    server.server_close()


def build(folder: Path, out: Path, address: str, recipe: str = "webtext") -> dict[str, Any]:
    """The summary of a corpus of the pages of `folder`/urls.txt."""
    command = [
        *(sys.executable, "-m", "gpt2train", "corpus"),
        f"urls={folder / 'urls.txt'}",
        f"out={out}",
        f"recipe={recipe}",
        f"fetch.allow_addresses=[{address}]",
        f"fetch.hosts_file={folder / 'hosts'}",
        "fetch.contact=https://example.org/crawler",
        "fetch.delay_s=0",
        "progress=false",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3_000, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    print(result.stderr)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.mark.soak
@pytest.mark.timeout(6_000)
def test_each_recipe_has_its_funnel(site: tuple[str, list[str], set[str]], tmp_path: Path) -> None:
    address, urls, hosts = site
    (tmp_path / "urls.txt").write_text("\n".join(urls) + "\n")
    (tmp_path / "hosts").write_text("".join(f"127.0.0.1 {host}\n" for host in sorted(hosts)))
    kept: dict[str, int] = {}
    table = ["| recipe | stage | in | kept | dropped | the most frequent reasons |", "|---|---|---:|---:|---:|---|"]
    for recipe in ("webtext", "openwebtext", "gopher", "c4", "fineweb", "extract_only"):
        # In the folder of the recipe before: what does not differ stands, responses and most extractions among them.
        summary = build(tmp_path, tmp_path / "out", address, recipe)
        ends, stages = summary["urls"], summary["stages"]
        assert ends["in"] == len(urls) == ends["kept"] + ends["dropped"] + ends["failed"]
        assert summary["recipe"] == recipe
        for before, after in pairwise(stages):
            assert after["in"] == before["kept"]
        for stage in stages:
            assert stage["in"] == stage["kept"] + stage["dropped"] + stage["failed"]
            assert sum(stage["reasons"].values()) == stage["dropped"] + stage["failed"]
            if stage["dropped"] + stage["failed"]:
                top = sorted(stage["reasons"].items(), key=lambda item: -item[1])[:4]
                reasons = ", ".join(f"{reason.partition(':')[2]} {n}" for reason, n in top)
                gone = stage["dropped"] + stage["failed"]
                table.append(f"| {recipe} | {stage['stage']} | {stage['in']} | {stage['kept']} | {gone} | {reasons} |")
        kept[recipe] = ends["kept"]
    print("\n".join(table))
    assert kept["extract_only"] == max(kept.values())
    assert kept["fineweb"] < kept["gopher"]  # its rules are Gopher's and more


@pytest.mark.timeout(600)
def test_every_page_is_accounted_for(site: tuple[str, list[str], set[str]], tmp_path: Path) -> None:
    address, urls, hosts = site
    assert len(urls) == 1043
    (tmp_path / "urls.txt").write_text("\n".join(urls) + "\n")
    (tmp_path / "hosts").write_text("".join(f"127.0.0.1 {host}\n" for host in sorted(hosts)))
    out = tmp_path / "out"
    summary = build(tmp_path, out, address)
    ends = summary["urls"]
    assert ends["in"] == 1043 == ends["kept"] + ends["dropped"] + ends["failed"]
    rows = [row for f in sorted((out / "ledger").glob("*.parquet")) for row in pq.read_table(f).to_pylist()]
    assert sorted(row["index"] for row in rows) == list(range(1043))
    assert all(row["reason"] for row in rows if row["state"] != "kept")
    fetch = next(s for s in summary["stages"] if s["stage"] == "fetch")
    assert fetch["failed"] == 0, fetch["reasons"]  # the server answers all
    assert ends["kept"] > 600  # measured: see docs/performance.md
    shards = TokenShards.open(out / "tokens")
    assert shards.split("train").tokens + shards.split("validation").tokens > 500_000
