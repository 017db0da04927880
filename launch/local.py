"""All ranks of a command on this machine: started, watched, told to stop, and never left behind.

In: a command, how many ranks, and the folder of their logs. Out: one exit code, and a log file per rank.

    0     every rank ended with 0
    85    they were told to stop, and saved (REQUEUE_EXIT_CODE)
    else  that of the rank that failed first (128 + N when signal N killed it); its last lines are shown

Whatever the starter, a rank runs inside launch.rank, which writes its log and its exit code and goes down with the
launcher. Signals go straight to the ranks, past the starter. When a rank fails, the others have PEER_GRACE_S to end
with a message of their own; then they are killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launch import rank as around_rank
from launch.config import REQUEUE_EXIT_CODE, ConfigError, LaunchError, Starter
from launch.machine import LOOPBACK, count_cores
from launch.rank import LAUNCHER_PID, file_of

POLL_S = 0.05
PEER_GRACE_S = 10.0  # what gloo and NCCL take to notice a dead peer, and gpt2train to say so
STARTER_GRACE_S = 10.0  # for torchrun or deepspeed to notice that its ranks are gone, and end
SETTLE_S = 1.0  # for the last files of ranks whose starter is gone
LAST_LINES = 20
STARTER_LOG = "starter.log"
# A closed terminal is a request to stop, like SIGTERM; the others are handed on as they are.
HANDED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
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


def plan(
    starter: Starter,
    command: Sequence[str],
    *,
    processes: int,
    port: int,
    log_dir: Path,
    environment: Mapping[str, str] = os.environ,
) -> list[Start]:
    """What to start for `processes` ranks of `command` that meet at 127.0.0.1:`port`.

    Threads: each rank gets its share of the cores, unless OMP_NUM_THREADS is set already.
    """
    shared = {
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(max(1, count_cores() // processes)),
        "PYTHONUNBUFFERED": "1",
    }
    # By its path, isolated: it needs the standard library alone, and no file in the working folder can pass for it.
    rank = [sys.executable, "-I", "-S", around_rank.__file__, str(log_dir.absolute()), *command]
    match starter:
        case Starter.plain:
            rendezvous = {"WORLD_SIZE": str(processes), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
            return [
                Start(
                    rank,
                    {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(processes), **rendezvous, **shared},
                    rank=r,
                )
                for r in range(processes)
            ]
        case Starter.torchrun:
            options = ["--nnodes=1", f"--nproc-per-node={processes}", "--node-rank=0"]
            options += [f"--master-addr={LOOPBACK}", f"--master-port={port}", "--no-python"]
            # After `--` torchrun does not take the command's own options for abbreviations of its own.
            return [Start([sys.executable, "-m", "torch.distributed.run", *options, "--", *rank], shared)]
        case Starter.deepspeed:
            # --no_local_rank, or the command gets `--local_rank=N`; no hostfile, or /job/hostfile would be obeyed.
            options = ["--hostfile=/dev/null", f"--num_gpus={processes}", "--no_local_rank", "--no_python"]
            options += [f"--master_addr={LOOPBACK}", f"--master_port={port}"]
            return [Start([sys.executable, "-m", "deepspeed.launcher.runner", *options, *rank], shared)]


class _Note:
    """A signal handler that notes what is asked for, here and where stop signals were noted before."""

    def __init__(self) -> None:
        self.received: deque[signal.Signals] = deque()
        self.before = {number: signal.getsignal(number) for number in HANDED_ON}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(HANDED_ON[signal.Signals(number)])
        outer = self.before[signal.Signals(number)]
        if isinstance(outer, _Note):
            outer(number, frame)


@contextlib.contextmanager
def stop_signals() -> Iterator[deque[signal.Signals]]:
    """Collect SIGTERM, SIGINT, SIGUSR1 and SIGHUP while the block runs; only in the main thread.

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
class _Ranks:
    """What is known of the ranks, from the files that launch.rank writes."""

    log_dir: Path
    count: int
    started: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    killed: set[int] = field(default_factory=set)
    log_starts: list[int] = field(default_factory=list)
    """Bytes that each rank's log held before this launch."""

    def __post_init__(self) -> None:
        logs = [file_of(self.log_dir, rank, "log") for rank in range(self.count)]
        self.log_starts = [log.stat().st_size if log.exists() else 0 for log in logs]

    def look(self) -> None:
        for rank in range(self.count):
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

    def failures(self, told: signal.Signals | None) -> list[int]:
        """Ranks that ended badly, the first first. One that died of the very signal that asked it to stop, before it
        could listen, did not: it has nothing to lose."""
        fine = {0, REQUEUE_EXIT_CODE} | ({-told} if told else set())
        return sorted(
            (r for r, e in self.ended.items() if e["code"] not in fine), key=lambda r: self.ended[r]["ended_s"]
        )


def run_ranks(starts: Sequence[Start], *, processes: int, log_dir: Path, stop_timeout_s: float) -> int:
    """Start, watch and end `processes` ranks; returns the exit code that the module's docstring describes.

    Rank 0's output goes to standard output too. SIGTERM, SIGINT and SIGUSR1 are handed on to all ranks once; a second
    one kills them. Raises LaunchError when another launch uses `log_dir`.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError([f"log_dir={log_dir}: {e.strerror}; give a folder that can be written to"]) from e
    with _own(log_dir), stop_signals() as received:
        for kind in ("started", "ended"):
            for stale in log_dir.glob(f"rank_*.{kind}"):
                stale.unlink()
        ranks = _Ranks(log_dir, processes)
        terminal = _Tail(file_of(log_dir, 0, "log"), ranks.log_starts[0])
        began_s = time.monotonic()
        starters: list[subprocess.Popen[bytes]] = []
        try:
            with open(log_dir / STARTER_LOG, "wb") as log:
                for start in starts:
                    environment = {**os.environ, **start.environment, LAUNCHER_PID: str(os.getpid())}
                    starters.append(
                        subprocess.Popen(
                            start.arguments,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # so that Ctrl-C reaches the launcher alone
                        )
                    )
            told = _watch(ranks, starts, starters, received, terminal, stop_timeout_s)
        finally:
            _clear_away(ranks, starters)
            terminal.copy()
    return _conclude(ranks, told, began_s)


def _watch(
    ranks: _Ranks,
    starts: Sequence[Start],
    starters: Sequence[subprocess.Popen[bytes]],
    received: deque[signal.Signals],
    terminal: _Tail,
    stop_timeout_s: float,
) -> signal.Signals | None:
    """Until every rank has ended, or none can be expected to any more. Returns the signal that asked for a stop."""
    told: signal.Signals | None = None
    kill_at_s = float("inf")
    starters_gone_s: float | None = None
    failed = False
    while True:
        # In this order: what ended before its starter was seen to be gone has left its `ended` file.
        gone = [starter.poll() for starter in starters]
        ranks.look()
        terminal.copy()
        now_s = time.monotonic()
        for start, code in zip(starts, gone, strict=True):
            if start.rank is not None and code is not None:
                ranks.mourn(start.rank, code)
        if len(ranks.ended) == ranks.count:
            return told
        if None not in gone:
            if not ranks.running():
                return told
            if starters_gone_s is None:
                starters_gone_s = now_s
            elif now_s > starters_gone_s + SETTLE_S:
                _say(f"the starter is gone (exit code {gone[0]}) and its ranks run on: killing them")
                return told
        while received:
            number = received.popleft()
            if told:
                _say(f"{number.name} again: killing the ranks")
                kill_at_s = now_s
            else:
                _say(f"{number.name}: the ranks are told to save and stop, and have {stop_timeout_s:g} s for it")
                told, kill_at_s = number, min(kill_at_s, now_s + stop_timeout_s)
        if told:
            ranks.tell(told)
        if not failed and (failures := ranks.failures(told)):
            failed, kill_at_s = True, min(kill_at_s, now_s + PEER_GRACE_S)
            _say(f"rank {failures[0]} {_end_of(ranks, failures[0])}; the others have {PEER_GRACE_S:g} s to end")
        if now_s >= kill_at_s:
            ranks.kill()
        time.sleep(POLL_S)


def _clear_away(ranks: _Ranks, starters: Sequence[subprocess.Popen[bytes]]) -> None:
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


def _conclude(ranks: _Ranks, told: signal.Signals | None, began_s: float) -> int:
    """Say what became of the ranks, the first failure first, and give the exit code."""
    failures = ranks.failures(told)
    if failures:
        first = failures[0]
        log = file_of(ranks.log_dir, first, "log")
        after_s = ranks.ended[first]["ended_s"] - began_s
        _say(f"rank {first} of {ranks.count} {_end_of(ranks, first)} after {after_s:.1f} s; from {log}:")
        _quote(log, ranks.log_starts[first])
        for rank in failures[1:]:
            _say(f"then rank {rank} {_end_of(ranks, rank)}; see {file_of(ranks.log_dir, rank, 'log')}")
        code = int(ranks.ended[first]["code"])
        return code if code > 0 else 128 - code
    missing = [rank for rank in range(ranks.count) if rank not in ranks.ended]
    if missing and not (told and not ranks.started):
        _say(f"rank {missing[0]} of {ranks.count} was not started or has left no exit code; from {STARTER_LOG}:")
        _quote(ranks.log_dir / STARTER_LOG)
        return 1
    if missing or any(e["code"] != 0 for e in ranks.ended.values()):
        _say("stopped as told; the same command goes on from the newest checkpoint")
        return REQUEUE_EXIT_CODE
    return 0


def _end_of(ranks: _Ranks, rank: int) -> str:
    code = ranks.ended[rank]["code"]
    if rank in ranks.killed:
        return "had not ended and was killed by the launcher"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class _Tail:
    """Copies what is appended to a file to standard output."""

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._position = path, start
        self._read_on = True

    def copy(self) -> None:
        if not self._read_on or not self._path.exists():
            return
        try:
            with open(self._path, "rb") as f:
                f.seek(self._position)
                while block := f.read(1 << 16):
                    self._position += len(block)
                    sys.stdout.buffer.write(block)  # as it is, whatever the encoding of this terminal
            sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads any more (`| head`): the run itself goes on, and Python's last flush finds an open door.
            self._read_on = False
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _own(log_dir: Path) -> Iterator[None]:
    """The log folder belongs to one launch at a time; the kernel frees the lock of a dead one."""
    with open(log_dir / ".lock", "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LaunchError(f"{log_dir}: another launch is running there; wait for it, or stop it") from None
        yield


def _quote(log: Path, start: int = 0) -> None:
    """The last lines of a log from byte `start` on, indented."""
    lines: list[str] = []
    if log.exists():
        with open(log, "rb") as f:
            f.seek(max(start, log.stat().st_size - (1 << 16)))
            lines = f.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
    print("\n".join(f"    {line}" for line in lines), file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
