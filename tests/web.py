"""A web on loopback: a server that does what it is told, the fetch over it, and a process to be killed."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import brotli
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from warcio.checker import Checker

from data_pipeline.config import FetchConfig
from data_pipeline.crawl import warc
from data_pipeline.crawl.fetch import FetchShard, fetch_shards, finish_shard, read_journal
from data_pipeline.crawl.fetch_journal import journal_path
from data_pipeline.records import URL_SCHEMA

HTML = b"<!doctype html><title>t</title><p>A page of some words."


# ---- a server that does what it is told -------------------------------------------------------------------------


@dataclass
class Request:
    at: float
    host: str
    path: str
    headers: dict[str, str]


Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes = HTML, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Type": "text/html", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{k}: {v}\r\n" for k, v in fields.items() if v)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


NOT_FOUND = response(b"", "404 Not Found")


@dataclass
class Site:
    """An HTTP server on 127.0.0.1 in a thread; `pages` maps a path, or "host/path", to bytes or to a handler."""

    pages: dict[str, bytes | Handler] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    default: bytes | Handler = NOT_FOUND
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> Site:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self, started: threading.Event) -> None:
        async def main() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=self.tls, limit=1 << 20)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await self._stop.wait()
            server.close()
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._loop.run_until_complete(main())
        self._loop.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                start, *lines = head.decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
                name = headers.get("host", "").partition(":")[0]
                request = Request(time.monotonic(), name, start.split(" ")[1], headers)
                self.requests.append(request)
                page = self.pages.get(name + request.path) or self.pages.get(request.path) or self.default
                if isinstance(page, bytes):
                    writer.write(page)
                else:
                    await page(request, writer)
                await writer.drain()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def paths(self) -> list[str]:
        return [r.path for r in self.requests if r.path != "/robots.txt"]


def drip(head: bytes, piece: bytes, every_s: float = 0.05) -> Handler:
    """`head`, then `piece` again and again."""

    async def handle(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            await writer.drain()
            await asyncio.sleep(every_s)
            writer.write(piece)

    return handle


def closing(data: bytes) -> Handler:
    """`data`, then the end of the connection."""

    async def handle(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return handle


def redirect(to: str) -> bytes:
    return response(b"", "302 Found", Location=to)


def bomb(coding: str, megabytes: int) -> bytes:
    """So many megabytes of zeros, packed."""
    block = b"\0" * (1 << 20)
    if coding == "br":
        compressor = brotli.Compressor(quality=1)
        return b"".join(compressor.process(block) for _ in range(megabytes)) + compressor.finish()
    if coding == "zstd":
        z = zstandard.ZstdCompressor().compressobj()
        return b"".join(z.compress(block) for _ in range(megabytes)) + z.flush()
    c = zlib.compressobj(9, wbits=31 if coding == "gzip" else 15)
    return b"".join(c.compress(block) for _ in range(megabytes)) + c.flush()


# ---- running the fetch ------------------------------------------------------------------------------------------


class Crawl:
    """A corpus folder with URL shards, and the fetch over them."""

    def __init__(self, folder: Path, urls: list[str], shards: int = 1, **config: Any) -> None:
        self.folder = folder
        self.shards = [FetchShard(folder / "urls" / f"{k:05d}.parquet", folder / "fetch", k) for k in range(shards)]
        (folder / "urls").mkdir(parents=True, exist_ok=True)
        for k, shard in enumerate(self.shards):
            self.write(shard, urls[k::shards], first=k, step=shards)
        settings = {"contact": "https://example.org/crawler", "delay_s": 0.0, "retries": 0, "timeout_s": 5.0}
        self.config = FetchConfig(**{**settings, **config})

    def write(self, shard: FetchShard, urls: list[str], first: int = 0, step: int = 1) -> None:
        rows = [{"index": first + i * step, "url": u, "domain": "test"} for i, u in enumerate(urls)]
        pq.write_table(pa.Table.from_pylist(rows, schema=URL_SCHEMA), shard.urls)

    def run(self, lookup: Any = None) -> dict[str, dict[str, Any]]:
        """url → verdict, and under "page" the row of the pages table."""
        fetch_shards(self.shards, self.config, self.folder, lambda done, total: None, lookup)
        return self.results()

    def results(self) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            pages, verdicts = finish_shard(shard, self.folder)
            assert verdicts.num_rows == pq.read_metadata(shard.urls).num_rows
            results |= {v["url"]: v for v in verdicts.to_pylist()}
            for page in pages.to_pylist():
                results[page["url"]]["page"] = page
        return results

    def body(self, row: dict[str, Any]) -> bytes:
        page = row["page"]
        return warc.read_response(self.folder / page["warc_file"], page["warc_offset"]).body

    def check_warcs(self) -> int:
        """warcio's own check over all files; the number of files."""
        files = sorted((self.folder / "warc").glob("*.warc.gz"))

        options = argparse.Namespace(inputs=[str(f) for f in files], verbose=False)
        assert Checker(options).process_all() == 0
        return len(files)


def crawl(folder: Path, site: Site, paths: list[str], **config: Any) -> dict[str, dict[str, Any]]:
    """Fetch `paths` of `site`; path → verdict."""
    base = f"http://127.0.0.1:{site.port}"
    results = Crawl(folder, [base + p for p in paths], allow_addresses=[f"127.0.0.1:{site.port}"], **config).run()
    return {url.removeprefix(base): row for url, row in results.items()}


def outcome(row: dict[str, Any]) -> tuple[str, str | None]:
    return row["state"], row["reason"]


def names(folder: Path, hosts: list[str]) -> str:
    file = folder / "hosts"
    file.write_text("".join(f"127.0.0.1 {h}\n" for h in hosts))
    return str(file)


CHILD = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from data_pipeline.config import FetchConfig
    from data_pipeline.crawl.fetch import FetchShard, fetch_shards
    folder, shards, config = Path(sys.argv[1]), json.loads(sys.argv[2]), FetchConfig(**json.loads(sys.argv[3]))
    own_shards = [FetchShard(folder / "urls" / f"{k:05d}.parquet", folder / "fetch", k) for k in shards]
    fetch_shards(own_shards, config, folder, lambda done, total: None)
    """
)


def start_child(run: Crawl, shards: list[int] | None = None) -> subprocess.Popen[bytes]:
    """A process that fetches `shards` of `run`, by default all."""
    numbers = shards if shards is not None else list(range(len(run.shards)))
    arguments = [str(run.folder), json.dumps(numbers), json.dumps(run.config.__dict__)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.PIPE)


def decided(run: Crawl) -> int:
    return sum(len(read_journal(journal_path(s.folder, s.number))) for s in run.shards)


def killable(tmp_path: Path, site: Site, urls: int) -> Crawl:
    async def slowly(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        writer.write(response(HTML + request.path.encode() + os.urandom(3000).hex().encode()))

    site.default = slowly
    site.pages = {"/robots.txt": response(b"", "404 Not Found"), "/7": response(b"", "404 Not Found")}
    hosts = [f"h{i}.test" for i in range(8)]
    return Crawl(
        tmp_path,
        [f"http://{hosts[i % 8]}:{site.port}/{i}" for i in range(urls)],
        shards=4,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, hosts),
        max_warc_bytes=100_000,
    )
