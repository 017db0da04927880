"""Turns of hosts that several fetching processes may ask: where redirects lead to hosts of another one's shards.

A host's name flows in; leave to ask it now, or the seconds until then, flows out. One file in the fetch's folder holds
for each slot (a hash of the host's name) the time of its next turn; the lock on those eight bytes is held while a
request is under way, and the kernel frees it when a process dies. Four system calls a request, and only where there is
more than one process. Works over a shared folder as far as its file system locks.

Two hosts of one slot wait for each other: slower, never less polite.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from pathlib import Path

from data_pipeline.store import storage_errors

SLOTS = 1 << 20
"""The file grows to 8 MiB at most, and only where hosts are asked."""
BUSY_WAIT_S = 0.05
"""After which a host that another process is asking is looked at again."""
_MOMENT = struct.Struct("<d")


class SharedTurns:
    """`longest_s`: no turn is further away than this; what says so was written by a clock that has been set back."""

    def __init__(self, path: Path, longest_s: float) -> None:
        self.path, self.longest_s = path, longest_s
        self._held: set[int] = set()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @staticmethod
    def slot(host: str) -> int:
        return int.from_bytes(hashlib.blake2b(host.encode(), digest_size=8).digest(), "little") % SLOTS

    def claim(self, host: str) -> float:
        """0.0: `host` may be asked, by this process alone, until `release`. Else: seconds after which to try again."""
        slot = self.slot(host)
        if slot in self._held:  # a lock of one's own does not stop oneself
            return BUSY_WAIT_S
        at = slot * _MOMENT.size
        with storage_errors(self.path):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _MOMENT.size, at)
            except (BlockingIOError, PermissionError):  # POSIX lets a system choose between the two
                return BUSY_WAIT_S
            data = os.pread(self._file, _MOMENT.size, at)
            wait_s = _MOMENT.unpack(data)[0] - time.time() if len(data) == _MOMENT.size else 0.0
            if 0.0 < wait_s <= self.longest_s:
                fcntl.lockf(self._file, fcntl.LOCK_UN, _MOMENT.size, at)
                return wait_s
        self._held.add(slot)
        return 0.0

    def release(self, host: str, wait_s: float) -> None:
        """The turn is over; nobody asks `host` again for `wait_s` seconds."""
        slot = self.slot(host)
        self._held.remove(slot)
        at = slot * _MOMENT.size
        with storage_errors(self.path):
            os.pwrite(self._file, _MOMENT.pack(time.time() + wait_s), at)
            fcntl.lockf(self._file, fcntl.LOCK_UN, _MOMENT.size, at)

    def close(self) -> None:
        os.close(self._file)
