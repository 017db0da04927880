"""When a response that comes in crumbs is read again.

Each piece that a server sends costs a turn of the event loop, however small it is; a thousand servers that send a byte
every millisecond would leave time for nothing else. So a response whose pieces are small is left alone between them, a
share of its age each time: the kernel gathers what comes meanwhile. Whatever it does, a response of 60 s wakes us up
fewer than 100 times (the first `FREE_PIECES`; 8 steps of `REST_TICK_S` to 0.4 s; then its age grows by an eighth from
one to the next) and once for every `SMALL_PIECE_BYTES`, and none ends later than by that eighth and two ticks.

What is to be called and after how long flows in; one timer serves all, so that those that are due together wake us up
once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SMALL_PIECE_BYTES = 4096
"""Larger pieces are worth being woken up for; the bound of a body bounds how many there are."""
FREE_PIECES = 16
"""So many small ones of a response are taken as they come."""
REST_SHARE = 8
"""Then each is followed by a rest of one part in so many of the response's age."""
REST_TICK_S = 0.05
"""Rests end in steps of this."""


def rest_s(age_s: float) -> float:
    """How long a response of this age rests."""
    return age_s / REST_SHARE


class Rests:
    """Calls that are due after a while. Create it within a running event loop; close it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: dict[int, list[Callable[[], None]]] = {}  # by tick
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Callable[[], None], after_s: float) -> None:
        """`call` comes no sooner than after `after_s`, and at most two ticks later."""
        tick = int((self._loop.time() + after_s) / REST_TICK_S) + 1
        self._due.setdefault(tick, []).append(call)
        if self._timer is None:
            self._timer = self._loop.call_later(REST_TICK_S, self._turn)

    def _turn(self) -> None:
        now = int(self._loop.time() / REST_TICK_S)
        for tick in [tick for tick in self._due if tick <= now]:
            for call in self._due.pop(tick):
                call()
        self._timer = self._loop.call_later(REST_TICK_S, self._turn) if self._due else None

    def close(self) -> None:
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
