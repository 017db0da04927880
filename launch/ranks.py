"""The ranks of this machine while they run: started, watched, told to stop, cleared away.

In: what to start (launch.place), the folder of the logs, and orders that come in meanwhile (`Orders`). Out: what is
known of every rank's end, through the files that launch.rank writes; the same with every starter. Costs a look at two
small files a rank, twenty times a second, until both are there.

Signals go straight to the ranks, past the starter. When a rank fails, the others have PEER_GRACE_S to end with a
message of their own; then they are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launch.outcome import Ended, blame, cut_short
from launch.rank import LAUNCHER_PID, file_of

POLL_S = 0.05
PEER_GRACE_S = 10.0  # what gloo and NCCL take to notice a dead peer, and gpt2train to say so
STARTER_GRACE_S = 10.0  # for torchrun or deepspeed to notice that its ranks are gone, and end
SETTLE_S = 1.0  # for the last files of ranks whose starter is gone

# Ctrl-C and a closed terminal are requests to stop. The ranks get them as SIGTERM: SIGINT would end with a traceback
# whatever does not handle it, a rank that still imports first of all.
HANDED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


@dataclass(frozen=True)
class Start:
    """A process that the launcher starts: a rank, or a starter that starts them all."""

    arguments: list[str]
    environment: dict[str, str]
    """What is added to this process's environment."""
    rank: int | None = None
    """The rank that it is; None for a starter that starts them all."""

    def line(self) -> str:
        """As a POSIX shell takes it."""
        return shlex.join(["env", *(f"{k}={v}" for k, v in self.environment.items()), *self.arguments])


class _Note:
    """A signal handler that notes what is asked for, here and where stop signals were noted before."""

    def __init__(self) -> None:
        self.received: deque[signal.Signals] = deque()
        self.before = {number: signal.getsignal(number) for number in HANDED_ON}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        outer = self.before[signal.Signals(number)]
        if isinstance(outer, _Note):
            outer(number, frame)


@contextlib.contextmanager
def stop_signals() -> Iterator[deque[signal.Signals]]:
    """Collect SIGTERM, SIGINT, SIGUSR1 and SIGHUP as they come while the block runs; only in the main thread.

    A signal that was ignored before (nohup) stays ignored. Blocks nest: the outer one is told too.
    """
    note = _Note()
    for number, handler in note.before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield note.received
    finally:
        for number, handler in note.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@dataclass
class Ranks:
    """What is known of some ranks, from the files that launch.rank writes."""

    log_dir: Path
    numbers: Sequence[int]
    started: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    killed: set[int] = field(default_factory=set)

    def look(self) -> None:
        for rank in self.numbers:
            for kind, known in (("started", self.started), ("ended", self.ended)):
                if rank not in known:
                    with contextlib.suppress(FileNotFoundError):
                        known[rank] = json.loads(file_of(self.log_dir, rank, kind).read_text(encoding="utf-8"))

    def mourn(self, rank: int, code: int) -> None:
        """The process around `rank` is gone, with exit code `code`. Without an `ended` file it was killed, and the rank
        with it; whatever the rank had started goes now."""
        if rank not in self.ended:
            if rank in self.started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.started[rank]["rank_pid"], signal.SIGKILL)
            self.ended[rank] = {"code": code, "ended_s": time.monotonic()}

    def running(self) -> list[int]:
        return [rank for rank in self.started if rank not in self.ended]

    def all_ended(self) -> bool:
        return len(self.ended) == len(self.numbers)

    def tell(self, number: signal.Signals) -> None:
        """Hand `number` to each running rank, once."""
        for rank in self.running():
            if rank not in self.told:
                self.told.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.started[rank]["pid"], number)

    def kill(self) -> None:
        for rank in self.running():
            self.killed.add(rank)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.started[rank]["rank_pid"], signal.SIGKILL)

    def ends(self, began_s: float = 0.0) -> dict[int, Ended]:
        """Every rank's end so far; began_s: of the attempt, on the monotonic clock."""
        return {
            rank: Ended(
                code=int(end["code"]),
                after_s=float(end["ended_s"]) - began_s,
                killed=rank in self.killed,
                log=str(file_of(self.log_dir, rank, "log")),
            )
            for rank, end in self.ended.items()
        }


@dataclass
class Orders:
    """What comes in from outside while ranks run."""

    signals: deque[signal.Signals] = field(default_factory=deque)
    """Stop signals; the first is handed on (HANDED_ON says as which), another one kills, unless `patient`."""
    patient: bool = False
    """Another stop signal changes nothing: a batch system sends several."""
    kill: bool = False
    """Kill the ranks now."""
    peer_failed: bool = False
    """A rank on another machine failed: those here have a short while."""


def start_all(starts: Sequence[Start], ranks: Ranks, starter_log: Path) -> list[subprocess.Popen[bytes]]:
    """Processes for `starts`, whose own output goes to `starter_log`. They end when this process does."""
    for rank in ranks.numbers:
        for kind in ("started", "ended"):
            file_of(ranks.log_dir, rank, kind).unlink(missing_ok=True)
    starters: list[subprocess.Popen[bytes]] = []
    try:
        with open(starter_log, "wb") as log:
            for start in starts:
                starters.append(
                    subprocess.Popen(
                        start.arguments,
                        env={**os.environ, **start.environment, LAUNCHER_PID: str(os.getpid())},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # so that Ctrl-C reaches the launcher alone
                    )
                )
    except BaseException:
        for starter in starters:
            starter.kill()
            starter.wait()
        raise
    return starters


def watch(
    ranks: Ranks,
    starts: Sequence[Start],
    starters: Sequence[subprocess.Popen[bytes]],
    orders: Orders,
    *,
    stop_timeout_s: float,
    peer_grace_s: float,
    say: Callable[[str], None],
    each_look: Callable[[], None],
) -> signal.Signals | None:
    """Until every rank has ended, or none can be expected to any more. Returns the signal that they were told to
    stop with.

    stop_timeout_s: for ranks that were told to stop; peer_grace_s: for those whose peer has failed; then they are
    killed. say: takes lines for people. each_look: called after each look at the ranks' files.
    """
    told: signal.Signals | None = None
    kill_at_s = float("inf")
    starters_gone_s: float | None = None
    failed = False
    while True:
        # In this order: what ended before its starter was seen to be gone has left its `ended` file.
        gone = [starter.poll() for starter in starters]
        ranks.look()
        now_s = time.monotonic()
        for start, code in zip(starts, gone, strict=True):
            if start.rank is not None and code is not None:
                ranks.mourn(start.rank, code)
        each_look()
        if ranks.all_ended():
            return told
        if None not in gone:
            if not ranks.running():
                return told
            if starters_gone_s is None:
                starters_gone_s = now_s
            elif now_s > starters_gone_s + SETTLE_S:
                say(f"the starter is gone (exit code {gone[0]}) and its ranks run on: killing them")
                return told
        while orders.signals:
            number = orders.signals.popleft()
            if told and not orders.patient:
                say(f"{number.name} again: killing the ranks")
                kill_at_s = now_s
            elif not told:
                say(f"{number.name}: the ranks are told to save and stop, and have {stop_timeout_s:g} s for it")
                told, kill_at_s = HANDED_ON[number], min(kill_at_s, now_s + stop_timeout_s)
        if told:
            ranks.tell(told)
        if not failed and (failures := blame(ends := ranks.ends(), told)):
            failed, kill_at_s = True, min(kill_at_s, now_s + peer_grace_s)
            say(f"rank {failures[0]} {ends[failures[0]].how()}; the others have {peer_grace_s:g} s to end")
        elif not failed and cut_short(ends, told):
            failed, kill_at_s = True, min(kill_at_s, now_s + peer_grace_s)
        if not failed and orders.peer_failed:
            failed, kill_at_s = True, min(kill_at_s, now_s + peer_grace_s)
        if orders.kill or now_s >= kill_at_s:
            ranks.kill()
        time.sleep(POLL_S)


def clear_away(ranks: Ranks, starters: Sequence[subprocess.Popen[bytes]]) -> None:
    """Nothing that was started here goes on after this."""
    deadline_s = time.monotonic() + STARTER_GRACE_S
    while time.monotonic() < deadline_s:
        ranks.look()
        ranks.kill()
        if not ranks.running() and all(starter.poll() is not None for starter in starters):
            return
        time.sleep(POLL_S)
    for starter in starters:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)
        starter.wait()
