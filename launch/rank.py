"""Around one rank: its log file, its exit code, and its end when the launcher ends.

    python rank.py LOG_DIR COMMAND [ARGUMENT …]

Every starter runs this in place of the command, because none of them hands on what a launcher needs: torchrun and the
deepspeed launcher turn a rank's exit code into their own, kill ranks 30 seconds after a SIGTERM (a large checkpoint
takes longer to save), and leave ranks behind when they are killed. This process, one a rank, does only that:

    rank_N.log      appended: everything that rank N prints
    rank_N.started  JSON: pid (of this process), rank_pid (of the command)
    rank_N.ended    JSON: code (as subprocess gives it, -N for signal N), ended_s (monotonic clock of this machine)

SIGTERM, SIGINT and SIGUSR1 go on to the command. The command leads a session of its own, and whatever is left in it is
killed when the command ends, or when the launcher (the process in GPT2TRAIN_LAUNCHER_PID) is gone. This process itself
ends with 0 once `ended` is written, so that its starter never takes a decision. POSIX, Linux >= 5.3 (pidfd_open).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_PID = "GPT2TRAIN_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
CANNOT_START = 127  # what a shell returns for a command that is not there


def file_of(log_dir: Path, rank: int, kind: str) -> Path:
    """The `log`, `started` or `ended` file of a rank."""
    return log_dir / f"rank_{rank}.{kind}"


def run_rank(log_dir: Path, command: Sequence[str], rank: int, launcher_pid: int | None) -> None:
    """Run `command` to its end and write its exit code. The command inherits this process's environment."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in FORWARDED:
        signal.signal(number, lambda *_: None)  # the wake-up pipe brings the number to the loop below
    launcher_fd = _pidfd(launcher_pid) if launcher_pid else None
    with open(file_of(log_dir, rank, "log"), "ab", buffering=0) as log:
        log.write(f"── {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} rank {rank}\n".encode())
        prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

        def die_with_parent() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(CANNOT_START)

        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as e:
            log.write(f"{command[0]}: cannot be started: {e.strerror}\n".encode())
            _write(file_of(log_dir, rank, "ended"), {"code": CANNOT_START, "ended_s": time.monotonic()})
            return
    child_fd = os.pidfd_open(child.pid)
    _write(file_of(log_dir, rank, "started"), {"pid": os.getpid(), "rank_pid": child.pid})
    poll = select.poll()
    for descriptor in (wake_read, child_fd, *([launcher_fd] if launcher_fd is not None else [])):
        poll.register(descriptor, select.POLLIN)
    if launcher_pid and launcher_fd is None:
        _kill_session(child.pid)  # it was gone before this process began
    while child_fd not in (ready := [descriptor for descriptor, _ in poll.poll()]):
        if wake_read in ready:
            for byte in os.read(wake_read, 64):
                if byte in FORWARDED:
                    child.send_signal(byte)
        if launcher_fd in ready:
            _kill_session(child.pid)
            poll.unregister(launcher_fd)
    ended_s = time.monotonic()
    _kill_session(child.pid)  # before the wait: until then its number cannot be another's
    _write(file_of(log_dir, rank, "ended"), {"code": child.wait(), "ended_s": ended_s})


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    of_launcher = os.environ.get(LAUNCHER_PID)
    run_rank(Path(sys.argv[1]), sys.argv[2:], int(os.environ["RANK"]), int(of_launcher) if of_launcher else None)
