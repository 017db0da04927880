"""Pages per second, pages per CPU second and memory of the fetch, beside bare loops and beside Scrapy.

A local nginx (or a server in Python where there is none) answers on a hundred loopback addresses with gzipped HTML.
Each way fetches the same URLs, one at a time from each host, in a process of its own; imports are done before its clock
starts. The bare loops obey and keep nothing: one over the fetch's own client, one over aiohttp. The fetch does more:
robots.txt, delays (of 0 s), decoding, the rules for pages, WARC records with digests, journal and audit log, and the
stage's tables at the end. Scrapy obeys robots.txt with as many requests at once, first keeping nothing, then writing
WARC files with warcio as the fetch does; it is installed into a virtual environment that goes away again, and left out
where it cannot be.

    python -m benchmarks.fetch [--pages 10000] [--kilobytes 30] [--long] [--no-scrapy] [--json out.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import uvloop

from benchmarks.web_server import HOSTS, serving
from data_pipeline.config import FetchConfig
from data_pipeline.crawl.fetch import FetchShard, fetch_shards, finish_shard
from data_pipeline.crawl.http.get import HttpClient
from data_pipeline.entrances import ROWS_PER_SHARD
from data_pipeline.records import URL_SCHEMA


def bare_client(urls: list[str], port: int) -> None:
    """The least that the fetch's own client can do: GET, read, drop; addresses vetted, nothing decoded."""

    async def main() -> None:
        client = HttpClient(_config(port))
        left = iter(urls)

        async def one_place() -> None:
            for url in left:
                reply = await client.get(url, timeout_s=60.0, max_bytes=5_000_000)
                assert reply.status == 200
                assert reply.body

        await asyncio.gather(*(one_place() for _ in HOSTS))
        await client.close()

    uvloop.run(main())


def bare_aiohttp(urls: list[str]) -> None:
    """The least that aiohttp can do: GET, read, drop; nothing decoded."""

    async def main() -> None:
        left = iter(urls)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

            async def one_place() -> None:
                for url in left:
                    async with session.get(url) as response:
                        assert response.status == 200
                        assert await response.read()

            await asyncio.gather(*(one_place() for _ in HOSTS))

    uvloop.run(main())


def _config(port: int) -> FetchConfig:
    return FetchConfig(allow_addresses=[f"{h}:{port}" for h in HOSTS], concurrency=len(HOSTS), delay_s=0.0)


def write_shards(urls: list[str], folder: Path) -> list[FetchShard]:
    """URL shards as the pipeline's first stage leaves them."""
    (folder / "urls").mkdir(parents=True)
    shards = []
    for k in range(-(-len(urls) // ROWS_PER_SHARD)):
        part = urls[k * ROWS_PER_SHARD : (k + 1) * ROWS_PER_SHARD]
        rows = [{"index": i, "url": u, "domain": "bench.test"} for i, u in enumerate(part)]
        shards.append(FetchShard(folder / "urls" / f"{k:05d}.parquet", folder / "fetch", k))
        pq.write_table(pa.Table.from_pylist(rows, schema=URL_SCHEMA), shards[-1].urls)
    return shards


def ours(shards: list[FetchShard], port: int, folder: Path) -> None:
    """The stage as the pipeline runs it."""
    fetch_shards(shards, _config(port), folder, lambda done, total: None)
    kept = wanted = 0
    for shard in shards:
        pages, verdicts = finish_shard(shard, folder)
        kept, wanted = kept + pages.num_rows, wanted + verdicts.num_rows
    assert kept == wanted, f"{kept} of {wanted} pages kept"


SCRAPY = """
import io, json, resource, sys, time
from scrapy import Request, Spider
from scrapy.crawler import CrawlerProcess
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

urls = open(sys.argv[1]).read().split()
writer = WARCWriter(open(sys.argv[3], "wb"), gzip=True) if len(sys.argv) > 3 else None

class Pages(Spider):
    name = "pages"
    kept = 0
    async def start(self):
        for url in urls:
            yield Request(url)
    def parse(self, response):
        assert len(response.text) > 1000
        Pages.kept += 1
        if writer:
            fields = [(k.decode(), v.decode()) for k, values in response.headers.items() for v in values]
            head = StatusAndHeaders(f"{response.status} OK", fields, protocol="HTTP/1.1")
            record = writer.create_warc_record(response.url, "response", io.BytesIO(response.body), http_headers=head)
            sent = [(k.decode(), v.decode()) for k, values in response.request.headers.items() for v in values]
            line = StatusAndHeaders(f"GET {response.url} HTTP/1.1", sent, is_http_request=True)
            request = writer.create_warc_record(response.url, "request", io.BytesIO(b""), http_headers=line)
            writer.write_request_response_pair(request, record)

process = CrawlerProcess({
    "LOG_ENABLED": False, "ROBOTSTXT_OBEY": True, "DOWNLOAD_DELAY": 0, "TELNETCONSOLE_ENABLED": False,
    "CONCURRENT_REQUESTS": int(sys.argv[2]), "CONCURRENT_REQUESTS_PER_DOMAIN": 1,
})
process.crawl(Pages)
before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
process.start()
after, wall_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - begin
assert Pages.kept == len(urls), Pages.kept
cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
peak_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_kb / 1024, "pages": len(urls)}))
"""


def scrapy(urls: list[str], folder: Path) -> dict[str, dict[str, float] | str]:
    """Figures of Scrapy's crawls, or why there are none."""
    python = folder / "scrapy" / "bin" / "python"
    install = [
        [sys.executable, "-m", "venv", str(folder / "scrapy")],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "scrapy>=2.13", "warcio"],
    ]
    for command in install:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1][:200]
            return {"Scrapy": f"cannot be installed ({reason})"}
    (folder / "urls.txt").write_text("\n".join(urls))
    figures: dict[str, dict[str, float] | str] = {}
    for name, more in {"Scrapy": [], "Scrapy with warcio": [str(folder / "scrapy.warc.gz")]}.items():
        command = [str(python), "-W", "ignore", "-c", SCRAPY, str(folder / "urls.txt"), str(len(HOSTS)), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
        failed = done.returncode and f"failed ({done.stderr.strip().splitlines()[-1][:200]})"
        figures[name] = failed or json.loads(done.stdout)
    return figures


def measured(pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    pa.array(["imports what Arrow imports at its first use"])
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work(*arguments)
    after, wall_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - begin
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # Not ru_maxrss: a new process begins with its parent's.
    status = Path("/proc/self/status").read_text(encoding="ascii").split("\n")
    peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    pipe.send({"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_kb / 1024})


def in_process(pages: int, work: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of `work(*arguments)` in a new process."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=measured, args=(there, work, arguments))
    child.start()
    there.close()
    figures: dict[str, float] = here.recv()
    child.join()
    return figures | {"pages": pages}


def run(arguments: argparse.Namespace, folder: Path) -> tuple[str, dict[str, dict[str, float] | str]]:
    """(the server's name; name of each way → its figures, or why there are none)."""
    figures: dict[str, dict[str, float] | str] = {}

    def urls(pages: int) -> list[str]:
        return [f"http://{HOSTS[i % len(HOSTS)]}:{port}/{i}" for i in range(pages)]

    def fetch(name: str, pages: int) -> None:
        place = folder / "fetch"
        figures[name] = in_process(pages, ours, write_shards(urls(pages), place), port, place)
        shutil.rmtree(place)

    with serving(folder / "server", arguments.kilobytes) as (server, port):
        pages = arguments.pages
        fetch("crawl.fetch", pages)
        figures["its client, bare"] = in_process(pages, bare_client, urls(pages), port)
        figures["aiohttp, bare"] = in_process(pages, bare_aiohttp, urls(pages))
        if arguments.scrapy:
            figures |= scrapy(urls(min(pages, 4000)), folder)
        fetch("crawl.fetch, again", pages)  # what the machine's mood is worth
        if arguments.long:
            fetch("crawl.fetch, long", 10 * pages)
    return server, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=10_000)
    parser.add_argument("--kilobytes", type=int, default=30, help="size of a page before compression")
    parser.add_argument("--long", action="store_true", help="ten times the pages as well, for the memory")
    parser.add_argument("--no-scrapy", dest="scrapy", action="store_false", help="leave Scrapy out")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, figures = run(arguments, Path(folder))
    print(f"pages of {arguments.kilobytes} kB, gzip, {len(HOSTS)} hosts, {server}, {platform.machine()}")
    print(f"{'':<24}{'pages':>9}{'pages/s':>10}{'pages/CPU s':>13}{'peak MB':>9}")
    for name, row in figures.items():
        if isinstance(row, str):
            print(f"{name:<24}{row}")
            continue
        row["pages_per_s"], row["pages_per_cpu_s"] = row["pages"] / row["wall_s"], row["pages"] / row["cpu_s"]
        print(
            f"{name:<24}{row['pages']:>9,.0f}{row['pages_per_s']:>10,.0f}{row['pages_per_cpu_s']:>13,.0f}"
            f"{row['peak_mb']:>9,.0f}"
        )
    mine = figures["crawl.fetch"]
    for name in ("its client, bare", "aiohttp, bare", "Scrapy", "Scrapy with warcio"):
        other = figures.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            wall, cpu = (mine[key] / other[key] for key in ("pages_per_s", "pages_per_cpu_s"))
            print(f"crawl.fetch / {name}: {wall:.2f} in pages/s, {cpu:.2f} in pages per CPU second")
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({"arguments": settings, "server": server, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
