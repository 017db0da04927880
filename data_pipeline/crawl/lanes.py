"""How many requests are under way: a fast lane that `concurrency` bounds, and a slow lane for those that drag on.

A request that takes long gives its place in the fast lane to others; the slow lane has places and memory of its own. A
host that has not answered quickly yet may turn out to drip: such hosts leave a part of the fast lane to those that
have, and move over sooner. So a thousand dripping hosts neither stop the good ones nor fill the memory.
"""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.crawl.http.get import FetchError

SLOW_AFTER_S = 5.0
"""A request that takes longer than this moves to the slow lane and no longer counts against `concurrency`."""
NEW_SLOW_AFTER_S = 1.0
"""The same for a host that has not answered quickly yet."""
RESERVED_SHARE = 4
"""One place of so many in the fast lane is kept for hosts that answer quickly."""
SLOW_LANE_FACTOR = 8
"""Places of the slow lane, as a multiple of `concurrency`."""
SLOW_LANE_BYTES = 256 << 20
"""What all bodies of the slow lane may hold together; the request that goes beyond is cut."""


class Lanes:
    """`on_room` is called when a request has left the fast lane for the slow one."""

    def __init__(self, concurrency: int, on_room: Callable[[], None]) -> None:
        self.fast = self.fast_new = self.slow = self.slow_bytes = 0
        self.concurrency = concurrency
        self.slow_places = SLOW_LANE_FACTOR * concurrency
        self.on_room = on_room

    def has_room(self, *, new: bool) -> bool:
        """`new`: for a host that has not answered quickly yet."""
        places = self.concurrency - self.concurrency // RESERVED_SHARE
        return self.fast < self.concurrency and (not new or self.fast_new < places)


class Flight:
    """A request under way: which lane it is in and what it holds."""

    __slots__ = ("held_bytes", "lanes", "new", "slow")

    def __init__(self, lanes: Lanes, *, new: bool) -> None:
        self.lanes = lanes
        self.new = new
        self.slow = False
        self.held_bytes = 0
        lanes.fast += 1
        lanes.fast_new += new

    def slow_down(self) -> None:
        lanes = self.lanes
        if lanes.slow < lanes.slow_places:
            self.slow = True
            lanes.fast -= 1
            lanes.fast_new -= self.new
            lanes.slow += 1
            lanes.slow_bytes += self.held_bytes
            lanes.on_room()

    def on_bytes(self, size: int) -> None:
        """Told of every piece of body. Raises FetchError when the slow lane holds too much."""
        self.held_bytes += size
        if self.slow:
            self.lanes.slow_bytes += size
            if self.lanes.slow_bytes > SLOW_LANE_BYTES:
                raise FetchError("timeout", "slow, and slow responses hold too much memory together", passing=True)

    def land(self) -> None:
        if self.slow:
            self.lanes.slow -= 1
            self.lanes.slow_bytes -= self.held_bytes
        else:
            self.lanes.fast -= 1
            self.lanes.fast_new -= self.new
