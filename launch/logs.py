"""The folder of a launch's logs: one launch at a time, one sub-folder for each attempt that is over.

launch.log        what the launches in this folder have said, with the time: attempts, failures, restarts
rank_N.log        all that rank N printed in this attempt (or the last one)
starter.log       what torchrun or the deepspeed launcher said; starter_K.log on host K of several
host_NAME.log     what ssh or srun, and the host itself, said beside
attempt_0001/ …   the last four of attempts before, oldest first; `keep` of these folders stay
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launch.config import ConfigError, InUseError

LAST_LINES = 20
LAST_BYTES = 1 << 16
ATTEMPT = "attempt_"
JOURNAL = "launch.log"
_ROTATED = ("rank_*.log", "rank_*.started", "rank_*.ended", "starter*.log", "host_*.log")


def starter_log(log_dir: Path, node: int = 0) -> Path:
    return log_dir / (f"starter_{node}.log" if node else "starter.log")


def make(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError([f"log_dir={log_dir}: {e.strerror}; give a folder that can be written to"]) from e


@contextlib.contextmanager
def own(log_dir: Path) -> Iterator[None]:
    """The log folder belongs to one launch at a time; the kernel frees the lock of a dead one.

    Raises InUseError, with the process that owns it.
    """
    make(log_dir)
    with open(log_dir / ".lock", "a+b", buffering=0) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            f.seek(0)
            owner = f.read(200).decode(errors="replace").strip()
            raise InUseError(
                f"{log_dir}: another launch is running there{f', {owner}' * bool(owner)}; wait for it, or stop it"
            ) from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _journals.append(log_dir / JOURNAL)
        try:
            yield
        finally:
            _journals.pop()


def rotate(log_dir: Path, *, keep: int, ranks: Iterable[int] | None = None) -> None:
    """Move what an attempt before has left into a folder of its own; of such folders the `keep` newest stay, 0: all.

    ranks: of these alone, on a machine that shares the folder with nobody.
    """
    patterns = _ROTATED if ranks is None else [f"rank_{rank}.*" for rank in ranks]
    files = sorted({path for pattern in patterns for path in log_dir.glob(pattern)})
    if files:
        before = attempts(log_dir)
        folder = log_dir / f"{ATTEMPT}{int(before[-1].name.removeprefix(ATTEMPT)) + 1 if before else 1:04d}"
        folder.mkdir(exist_ok=True)
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, folder / path.name)
    if keep:
        for old in attempts(log_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def attempts(log_dir: Path) -> list[Path]:
    """Folders of attempts that are over, oldest first."""
    found = [p for p in log_dir.glob(f"{ATTEMPT}*") if p.name.removeprefix(ATTEMPT).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(ATTEMPT)))


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log, without reading all of it; none where there is no log."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - LAST_BYTES))
            return f.read().decode("utf-8", "replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


_journals: list[Path] = []
"""Of the log folder that this process owns."""


def quote(lines: Sequence[str]) -> None:
    """Lines for people, indented."""
    _print("", [f"    {line}" for line in lines])


def say(line: str) -> None:
    """One line of the launcher's for people: on standard error, and in the journal of the folder that it owns."""
    _print("launch: ", [line])


def note(line: str) -> None:
    """One line for the journal alone."""
    _write_down([line])


def _print(start: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{start}{line}", file=sys.stderr, flush=True)
    _write_down(lines)


def _write_down(lines: Sequence[str]) -> None:
    if _journals:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # A full disk ends the run soon enough, with its own message.
        with contextlib.suppress(OSError), open(_journals[-1], "a", encoding="utf-8") as f:
            f.writelines(f"{now} {line}\n" for line in lines)


class Tail:
    """What is appended to a file, block by block."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def read(self) -> Iterator[bytes]:
        """What was appended since the last call."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as f:
            f.seek(self._position)
            while block := f.read(LAST_BYTES):
                self._position += len(block)
                yield block


class Shown:
    """Standard output, as long as somebody reads it."""

    def __init__(self) -> None:
        self._read_on = True

    def write(self, data: bytes) -> None:
        if not self._read_on:
            return
        try:
            sys.stdout.buffer.write(data)  # as it is, whatever the encoding of this terminal
            sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads any more (`| head`): the run itself goes on, and Python's last flush finds an open door.
            self._read_on = False
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
