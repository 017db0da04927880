"""A local web server for the fetch's benchmark: nginx where it is installed, else one in Python.

One page of HTML and a robots.txt with rules, served on a hundred loopback addresses: as many hosts as a polite crawler
wants, without a name server.
"""

from __future__ import annotations

import asyncio
import gzip
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import uvloop

HOSTS = [f"127.0.1.{i}" for i in range(1, 101)]
WORDS = "the of and to in is was for on that with as by at from his her were are which have had not be this".split()
ROBOTS = b"""User-agent: *
Disallow: /admin/
Disallow: /search?
Disallow: /*/print$
Disallow: /cgi-bin/
Allow: /cgi-bin/about
Disallow: /login

User-agent: badbot
Disallow: /
"""


def html(kilobytes: int, seed: int) -> bytes:
    """A page of about so many kilobytes that packs like text does."""
    chance = random.Random(seed)
    paragraphs = []
    size = 0
    while size < kilobytes * 1000:
        words = " ".join(chance.choice(WORDS) + str(chance.randrange(50)) for _ in range(80))
        paragraphs.append(f"<p class='text'>{words}.</p>\n")
        size += len(paragraphs[-1])
    head = '<title>A page</title><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(paragraphs)}</body></html>".encode()


@contextmanager
def serving(folder: Path, kilobytes: int) -> Iterator[tuple[str, int]]:
    """(name of the server, its port on all of HOSTS) while it runs."""
    page = gzip.compress(html(kilobytes, 1))
    if shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        with _nginx(folder, page) as port:
            yield "nginx", port
    else:
        with _python(page) as port:
            yield "a server in Python", port


NGINX = """
{user}
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 1000000;
  open_file_cache max=10;
  open_file_cache_valid 1h;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    {listen}
    root {folder}/www;
    location = /robots.txt {{ default_type text/plain; }}
    location / {{ default_type text/html; add_header Content-Encoding gzip; try_files /page.gz =404; types {{ }} }}
  }}
}}
"""


@contextmanager
def _nginx(folder: Path, page: bytes) -> Iterator[int]:
    (folder / "www").mkdir(parents=True)
    (folder / "www" / "page.gz").write_bytes(page)
    (folder / "www" / "robots.txt").write_bytes(ROBOTS)
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        port = probe.getsockname()[1]
    listen = " ".join(f"listen {host}:{port};" for host in HOSTS)
    user = "user root;" if os.geteuid() == 0 else ""  # the folder is this user's alone
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, listen=listen, user=user))
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    program = shutil.which("nginx", path=path) or "nginx"
    server = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex((HOSTS[-1], port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait()


class _Server(asyncio.Protocol):
    """Answers every request head with the same page, and /robots.txt with its own."""

    page = robots = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            self.transport.write(self.robots if head.startswith(b"GET /robots.txt") else self.page)


def _serve(pipe: Connection, page: bytes) -> None:
    def response(body: bytes, fields: str) -> bytes:
        return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{fields}\r\n\r\n".encode() + body

    _Server.page = response(page, "Content-Type: text/html\r\nContent-Encoding: gzip")
    _Server.robots = response(ROBOTS, "Content-Type: text/plain")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Server, HOSTS[0], 0)
        port = server.sockets[0].getsockname()[1]
        for host in HOSTS[1:]:
            await loop.create_server(_Server, host, port)
        pipe.send(port)
        await asyncio.Event().wait()

    uvloop.run(main())


@contextmanager
def _python(page: bytes) -> Iterator[int]:
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, page), daemon=True)
    server.start()
    try:
        yield here.recv()
    finally:
        server.terminate()
        server.join()
