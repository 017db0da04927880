"""A thousand hosts that drip and some that do not, served by a process of its own at next to no cost.

In the process of the fetch, it would take the interpreter's lock from it: then a test would measure itself.

Written to standard output: the port; then, once standard input is closed, one JSON line of what was seen. Hosts whose
name begins with `d` send a head at once and a byte of body every so many seconds, each at its own moment; all others
send a page. Nobody has a robots.txt.

    python drip_server.py EVERY_S
"""

from __future__ import annotations

import asyncio
import collections
import json
import resource
import statistics
import sys
import time
from typing import cast

import uvloop

PAGE = b"<!doctype html><title>t</title><p>A page of some words."
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(PAGE), PAGE)
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
DRIP_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
SLOTS = 50
"""Moments within EVERY_S at which drops fall: one timer serves all hosts, and they do not all drip at once."""


class Wheel:
    """Each dripping connection in the slot at which its next drop falls."""

    def __init__(self, every_s: float) -> None:
        self.step_s = every_s / SLOTS
        self.slots: list[set[asyncio.WriteTransport]] = [set() for _ in range(SLOTS)]
        self.now = self.drops = 0
        self.begin = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.loop.call_later(self.step_s, self.turn)

    def add(self, transport: asyncio.WriteTransport) -> set[asyncio.WriteTransport]:
        slot = self.slots[self.now]
        slot.add(transport)
        return slot

    def turn(self) -> None:
        due = int((time.monotonic() - self.begin) / self.step_s)
        for at in range(max(self.now + 1, due - SLOTS + 1), due + 1):
            slot = self.slots[at % SLOTS]
            for transport in slot:
                transport.write(b"X")
            self.drops += len(slot)
        self.now = due % SLOTS
        self.begin = time.monotonic() - self.now * self.step_s
        self.loop.call_later(self.step_s, self.turn)


class Seen:
    def __init__(self) -> None:
        self.pages: collections.Counter[str] = collections.Counter()
        self.first_at = self.last_good_at = 0.0
        self.last_by_host: dict[str, float] = {}
        self.gaps: list[float] = []
        self.dripping = self.most_dripping = 0

    def good_page(self, host: str, now: float) -> None:
        self.pages[host] += 1
        self.last_good_at = now
        if host in self.last_by_host:
            self.gaps.append(now - self.last_by_host[host])
        self.last_by_host[host] = now


class Talk(asyncio.Protocol):
    def __init__(self, wheel: Wheel, seen: Seen) -> None:
        self.wheel, self.seen = wheel, seen
        self.slot: set[asyncio.WriteTransport] | None = None
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.buffer.endswith(b"\r\n\r\n"):
            return
        start, _, rest = self.buffer.partition(b"\r\nHost: ")
        host = rest[: rest.index(b":")].decode()
        self.buffer = b""
        self.seen.first_at = self.seen.first_at or time.monotonic()
        if b"/robots.txt " in start:
            self.transport.write(NOT_FOUND)
        elif host[0] == "d":
            self.transport.write(DRIP_HEAD)
            self.slot = self.wheel.add(self.transport)
            self.seen.dripping += 1
            self.seen.most_dripping = max(self.seen.most_dripping, self.seen.dripping)
        else:
            self.transport.write(ANSWER)
            self.seen.good_page(host, time.monotonic())

    def connection_lost(self, error: Exception | None) -> None:
        if self.slot is not None:
            self.slot.discard(self.transport)
            self.seen.dripping -= 1


async def main() -> None:
    loop = asyncio.get_running_loop()
    wheel, seen = Wheel(float(sys.argv[1])), Seen()
    server = await loop.create_server(lambda: Talk(wheel, seen), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    figures = {
        "pages": seen.pages,
        "first_at": seen.first_at,
        "last_good_at": seen.last_good_at,
        "median_gap_s": statistics.median(seen.gaps),
        "most_dripping": seen.most_dripping,
        "drops": wheel.drops,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main())
