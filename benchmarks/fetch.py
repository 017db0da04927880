"""Pages per second and CPU per page of the fetch, beside a bare aiohttp loop that obeys and keeps nothing.

A server in a process of its own answers on eight loopback addresses with gzipped HTML from memory. Both ways fetch the
same URLs with the same number of requests under way. The fetch does more: robots.txt, delays (of 0 s), decoding,
WARC records with digests, journal and audit log.

    python benchmarks/fetch.py [--pages 4000] [--kilobytes 30] [--json out.json]
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
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import uvloop

from data_pipeline.config import FetchConfig
from data_pipeline.crawl.fetch import FetchShard, fetch_shards, finish_shard
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


def timed(work: object) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process) of `work()`."""
    assert callable(work)
    wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter() - wall, after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime


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


def ours(urls: list[str], hosts: list[str], port: int, concurrency: int, folder: Path) -> int:
    """Pages kept."""
    rows = [{"index": i, "url": u, "domain": "bench.test"} for i, u in enumerate(urls)]
    (folder / "urls").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=URL_SCHEMA), folder / "urls" / "00000.parquet")
    (folder / "hosts").write_text("".join(f"{ADDRESSES[i % 8]} {host}\n" for i, host in enumerate(hosts)))
    config = FetchConfig(
        allow_addresses=[f"{a}:{port}" for a in ADDRESSES],
        hosts_file=str(folder / "hosts"),
        concurrency=concurrency,
        delay_s=0.0,
    )
    shard = FetchShard(folder / "urls" / "00000.parquet", folder / "fetch", 0)
    fetch_shards([shard], config, folder, lambda done, total: None)
    pages, _ = finish_shard(shard, folder)
    return pages.num_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=4000)
    parser.add_argument("--kilobytes", type=int, default=30, help="size of a page before compression")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, arguments.kilobytes), daemon=True)
    server.start()
    port = here.recv()
    hosts = [f"h{i}.bench.test" for i in range(8 * HOSTS_PER_ADDRESS)]
    concurrency = len(hosts)
    figures: dict[str, dict[str, float]] = {}
    by_address = [f"http://{ADDRESSES[i % 8]}:{port}/{i}" for i in range(arguments.pages)]
    by_name = [f"http://{hosts[i % len(hosts)]}:{port}/{i}" for i in range(arguments.pages)]
    with tempfile.TemporaryDirectory() as folder:
        for name, work in {
            "bare aiohttp + uvloop": lambda: bare(by_address, concurrency),
            "data_pipeline.crawl.fetch": lambda: ours(by_name, hosts, port, concurrency, Path(folder)),
        }.items():
            wall_s, cpu_s = timed(work)
            figures[name] = {"pages_per_s": arguments.pages / wall_s, "cpu_us_per_page": cpu_s / arguments.pages * 1e6}
    server.terminate()
    server.join()
    print(f"{arguments.pages} pages of {arguments.kilobytes} kB, gzip, {concurrency} at once, {platform.machine()}")
    print(f"{'':<24}{'pages/s':>10}{'CPU µs/page':>14}")
    for name, row in figures.items():
        print(f"{name:<24}{row['pages_per_s']:>10.0f}{row['cpu_us_per_page']:>14.0f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"arguments": vars(arguments) | {"json": None}, "figures": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
