"""Pages per second, pages per CPU second and memory of the fetch, beside a bare aiohttp loop and beside Scrapy.

A server in a process of its own answers on eight loopback addresses with gzipped HTML from memory. Each way fetches the
same pages with the same number of requests under way, in a process of its own. The bare loop obeys and keeps nothing.
The fetch does more: robots.txt, delays (of 0 s), decoding, WARC records with digests, journal and audit log; it runs
once more with zlib at level 3 for the WARC, to show what the compressor costs. Scrapy obeys robots.txt and keeps
nothing; it is installed into a virtual environment that goes away again, and left out where it cannot be.

    python -m benchmarks.fetch [--pages 4000] [--kilobytes 30] [--long] [--no-scrapy] [--json out.json]
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import multiprocessing
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import uvloop

from data_pipeline.config import FetchConfig
from data_pipeline.crawl import warc
from data_pipeline.crawl.fetch import FetchShard, fetch_shards, finish_shard
from data_pipeline.pipeline import ROWS_PER_SHARD
from data_pipeline.records import URL_SCHEMA

ADDRESSES = [f"127.0.0.{i}" for i in range(1, 9)]
HOSTS_PER_ADDRESS = 8  # one request at a time for each host: as many hosts as requests under way
WORDS = "the of and to in is was for on that with as by at from his her were are which have had not be this".split()


def html(kilobytes: int, seed: int) -> bytes:
    """A page of about so many kilobytes that packs like text does."""
    chance = random.Random(seed)
    paragraphs = []
    size = 0
    while size < kilobytes * 1000:
        words = " ".join(chance.choice(WORDS) + str(chance.randrange(50)) for _ in range(80))
        paragraphs.append(f"<p class='text'>{words}.</p>\n")
        size += len(paragraphs[-1])
    return ("<!doctype html><html><head><title>A page</title></head><body>" + "".join(paragraphs)).encode()


class Server(asyncio.Protocol):
    """Answers every request head with the same page; /robots.txt is not there."""

    page = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            self.transport.write(missing if head.startswith(b"GET /robots.txt") else self.page)


def serve(pipe: Connection, kilobytes: int) -> None:
    body = gzip.compress(html(kilobytes, 1))
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    Server.page = head.encode() + body

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Server, ADDRESSES[0], 0)
        port = server.sockets[0].getsockname()[1]
        for address in ADDRESSES[1:]:
            await loop.create_server(Server, address, port)
        pipe.send(port)
        await asyncio.Event().wait()

    uvloop.run(main())


def bare(urls: list[str], concurrency: int) -> None:
    """The least that aiohttp can do: GET, decode, drop."""

    async def main() -> None:
        places = asyncio.Semaphore(concurrency)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(url: str) -> None:
                async with places, session.get(url) as response:
                    assert response.status == 200
                    await response.read()

            await asyncio.gather(*(one(url) for url in urls))

    uvloop.run(main())


def ours(urls: list[str], hosts: list[str], port: int, concurrency: int, folder: Path) -> None:
    """The stage as the pipeline runs it, 5,000 URLs a shard."""
    (folder / "urls").mkdir(parents=True)
    shards = []
    for k in range(-(-len(urls) // ROWS_PER_SHARD)):
        part = urls[k * ROWS_PER_SHARD : (k + 1) * ROWS_PER_SHARD]
        rows = [{"index": i, "url": u, "domain": "bench.test"} for i, u in enumerate(part)]
        shards.append(FetchShard(folder / "urls" / f"{k:05d}.parquet", folder / "fetch", k))
        pq.write_table(pa.Table.from_pylist(rows, schema=URL_SCHEMA), shards[-1].urls)
    (folder / "hosts").write_text("".join(f"{ADDRESSES[i % 8]} {host}\n" for i, host in enumerate(hosts)))
    config = FetchConfig(
        allow_addresses=[f"{a}:{port}" for a in ADDRESSES],
        hosts_file=str(folder / "hosts"),
        concurrency=concurrency,
        delay_s=0.0,
    )
    fetch_shards(shards, config, folder, lambda done, total: None)
    kept = sum(finish_shard(shard, folder)[0].num_rows for shard in shards)
    assert kept == len(urls), f"{kept} of {len(urls)} pages kept"


def with_zlib(*arguments: Any) -> None:
    """The same with the standard library's zlib at level 3 for the WARC files."""
    vars(warc)["isal_zlib"], vars(warc)["COMPRESSION_LEVEL"] = zlib, 3
    ours(*arguments)


SCRAPY = """
import json, resource, sys, time
from scrapy import Request, Spider
from scrapy.crawler import CrawlerProcess

urls = sys.argv[1] and open(sys.argv[1]).read().split()

class Pages(Spider):
    name = "pages"
    kept = 0
    async def start(self):
        for url in urls:
            yield Request(url)
    def parse(self, response):
        assert len(response.text) > 1000
        Pages.kept += 1

process = CrawlerProcess({
    "LOG_ENABLED": False, "ROBOTSTXT_OBEY": True, "DOWNLOAD_DELAY": 0, "TELNETCONSOLE_ENABLED": False,
    "CONCURRENT_REQUESTS": int(sys.argv[2]), "CONCURRENT_REQUESTS_PER_DOMAIN": int(sys.argv[2]) // 8,
})
process.crawl(Pages)
before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
process.start()
after, wall_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - begin
assert Pages.kept == len(urls), Pages.kept
cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": after.ru_maxrss / 1024}))
"""


def scrapy(urls: list[str], concurrency: int, folder: Path) -> dict[str, float] | str:
    """Figures of a Scrapy crawl, or why there are none."""
    python = folder / "scrapy" / "bin" / "python"
    install = [
        [sys.executable, "-m", "venv", str(folder / "scrapy")],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "scrapy>=2.13"],
    ]
    for command in install:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"cannot be installed ({(done.stderr.strip() or 'no reason given').splitlines()[-1][:200]})"
    (folder / "urls.txt").write_text("\n".join(urls))
    command = [str(python), "-W", "ignore", "-c", SCRAPY, str(folder / "urls.txt"), str(concurrency)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        return f"failed ({done.stderr.strip().splitlines()[-1][:200]})"
    figures: dict[str, float] = json.loads(done.stdout)
    return {**figures, "pages": len(urls)}


def measured(pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work(*arguments)
    after, wall_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - begin
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    pipe.send({"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": after.ru_maxrss / 1024})


def in_process(work: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of `work(*arguments)` in a new process."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=measured, args=(there, work, arguments))
    child.start()
    there.close()
    figures: dict[str, float] = here.recv()
    child.join()
    return figures


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float] | str]:
    """Name of each way → its figures, or why there are none."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, arguments.kilobytes), daemon=True)
    server.start()
    port = here.recv()
    hosts = [f"h{i}.bench.test" for i in range(8 * HOSTS_PER_ADDRESS)]
    concurrency = len(hosts)

    def by_address(pages: int) -> list[str]:
        return [f"http://{ADDRESSES[i % 8]}:{port}/{i}" for i in range(pages)]

    def by_name(pages: int) -> list[str]:
        return [f"http://{hosts[i % len(hosts)]}:{port}/{i}" for i in range(pages)]

    figures: dict[str, dict[str, float] | str] = {}
    pages = arguments.pages
    try:
        for name, work in {"crawl.fetch": ours, "crawl.fetch, zlib 3": with_zlib}.items():
            figures[name] = in_process(work, by_name(pages), hosts, port, concurrency, folder / name) | {"pages": pages}
        figures["bare aiohttp"] = in_process(bare, by_address(pages), concurrency) | {"pages": pages}
        for size in (10_000, 100_000) if arguments.long else (10_000,):
            name = f"crawl.fetch, {size:,}"
            figures[name] = in_process(ours, by_name(size), hosts, port, concurrency, folder / name) | {"pages": size}
            shutil.rmtree(folder / name)
        if arguments.scrapy:
            figures["Scrapy"] = scrapy(by_address(min(pages, 2000)), concurrency, folder)
    finally:
        server.terminate()
        server.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=4000)
    parser.add_argument("--kilobytes", type=int, default=30, help="size of a page before compression")
    parser.add_argument("--long", action="store_true", help="memory at 100,000 pages as well as at 10,000")
    parser.add_argument("--no-scrapy", dest="scrapy", action="store_false", help="leave Scrapy out")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(arguments, Path(folder))
    print(f"pages of {arguments.kilobytes} kB, gzip, {8 * HOSTS_PER_ADDRESS} at once, {platform.machine()}")
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
    for name in ("bare aiohttp", "crawl.fetch, zlib 3", "Scrapy"):
        other = figures.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            wall, cpu = (mine[key] / other[key] for key in ("pages_per_s", "pages_per_cpu_s"))
            print(f"crawl.fetch / {name}: {wall:.2f} in pages/s, {cpu:.2f} in pages per CPU second")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"arguments": vars(arguments) | {"json": None}, "figures": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
