"""One run at a time over a corpus in a bucket; a dead run's place is taken over.

    .lease/00000007.json    who holds it; made by a conditional put, so that of two runs one alone gets a number
    .lease/00000007.beat    written anew every third of `lease_s`; "released" when the run ended in order

The holder is whoever made the highest number. A run that comes next takes number + 1 when the holder has released it,
is a dead process of this machine, or has not changed its beat for the holder's own `lease_s`, watched from here: no two
machines' clocks are compared. A holder that finds a higher number stops and writes nothing more.

A store without a conditional put (neither S3 nor GCS) makes this best effort: two runs begun in the same moment may
both go on. They write the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.config import StorageConfig
from data_pipeline.records import LockedError, PipelineError
from data_pipeline.storage.bucket import Bucket

FOLDER = ".lease"
RELEASED = b"released"
BEATS = 3
"""Beats in a lease's time: one may be lost on its way."""
LOOKS = 10
"""How often a beat is looked at in a lease's time before it is held for still."""


class Lease:
    """Held from `acquire` to `release`; a thread keeps it alive."""

    def __init__(self, address: str, config: StorageConfig, say: Callable[[str], None]) -> None:
        self.bucket = Bucket(address, retry_s=config.retry_s)
        # A beat that is tried for longer than a lease's time says nothing to anybody.
        self._beats = Bucket(address, retry_s=config.lease_s / BEATS)
        self.lease_s = config.lease_s
        self._say = say
        self.number = 0
        self.lost = False
        """Another run has taken over."""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> int:
        """Number of the last lease before this one (0: none). Raises LockedError while another run holds it."""
        before = self._highest()
        if before:
            self._require_free(before)
        mine = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "lease_s": self.lease_s}
        content = json.dumps({**mine, "token": uuid.uuid4().hex, **_process()}).encode()
        if not self.bucket.create(_name(before + 1, "json"), content):
            raise self._in_use(before + 1)
        self.number = before + 1
        self._beat(0)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        stale = [name for name in self.bucket.list(FOLDER) if int(name[-13:-5]) < self.number]
        self.bucket.remove(stale)
        return before

    def require(self) -> None:
        """Raises LockedError when another run has taken over."""
        if self.lost:
            raise self._in_use(self._highest())

    def release(self) -> None:
        """Let go, in one try; a run that could not say so is taken over after its time."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            if not self.lost:
                with contextlib.suppress(PipelineError, OSError):
                    self._beats.put(_name(self.number, "beat"), RELEASED)

    def _highest(self) -> int:
        return max((int(n[-13:-5]) for n in self.bucket.list(FOLDER) if n.endswith(".json")), default=0)

    def _require_free(self, number: int) -> None:
        holder, beat = self._holder(number), self.bucket.read(_name(number, "beat"))
        if beat == RELEASED:
            return
        dead = _is_dead(holder)
        if dead is None:  # of another machine: only waiting tells
            lease_s = float(holder.get("lease_s", self.lease_s))
            self._say(f"{self.bucket.address}: held by {holder['owner']}; waiting {lease_s:g} s to see if it is alive")
            dead = True
            for _ in range(LOOKS):  # so many, however late this process wakes up: the other may be as late
                time.sleep(lease_s / LOOKS)
                now = self.bucket.read(_name(number, "beat"))
                if now == RELEASED:
                    return
                if now != beat:
                    dead = False
                    break
        if not dead:
            raise self._in_use(number)
        self._say(f"{self.bucket.address}: taken over from {holder['owner']}, which is dead")

    def _in_use(self, number: int) -> LockedError:
        owner = self._holder(number)["owner"]
        return LockedError(f"out={self.bucket.address}: in use by {owner}; wait for it, or give another place")

    def _holder(self, number: int) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            holder = json.loads(self.bucket.read(_name(number, "json")) or b"{}")
            if isinstance(holder, dict):
                return {"owner": "another run", **holder}
        return {"owner": "another run"}

    def _keep(self) -> None:
        count = 0
        while not self._end.wait(self.lease_s / BEATS):
            count += 1
            with contextlib.suppress(PipelineError, OSError):  # unreachable: so it is for others
                if any(int(n[-13:-5]) > self.number for n in self._beats.list(FOLDER) if n.endswith(".json")):
                    self.lost = True
                    return
                self._beat(count)

    def _beat(self, count: int) -> None:
        self._beats.put(_name(self.number, "beat"), f"{count} {uuid.uuid4().hex}".encode())


def _name(number: int, kind: str) -> str:
    return f"{FOLDER}/{number:08d}.{kind}"


def _process() -> dict[str, Any]:
    """This process, told from all others: machine since its start, process namespace, number, time of its start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "pid": os.getpid(), "start": _start("self")}
    except OSError:
        return {}


def _start(process: int | str) -> str:
    """When a process began, in the kernel's ticks; empty when it is dead."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # proc_pid_stat(5): state is field 3, starttime field 22


def _is_dead(holder: dict[str, Any]) -> bool | None:
    """Whether a process of this machine is dead; None for one of another machine."""
    here = _process()
    if not here or holder.get("machine") != here["machine"]:
        return None
    return _start(holder["pid"]) != holder["start"]
