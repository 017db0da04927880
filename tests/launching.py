"""What the tests of launching share: a rank that tells what it sees, and a look at the processes that are left."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import termios
import time
from pathlib import Path
from typing import Any

HARMLESS = ["a b", "$(touch bad)", "q'\"", "*", "--log", "-m"]

# A rank as gpt2train's: it saves and leaves with 85 when told to stop, and otherwise does what its argument says.
RANK = """
import json, os, pathlib, signal, subprocess, sys, time
told = []
what, note = sys.argv[1], pathlib.Path(sys.argv[2]) / f"rank {os.environ['RANK']}"
if what == "unprepared" and os.environ["RANK"] == "0":
    pass  # as in its imports
elif what not in ("deaf", "unprepared"):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, f: told.append(n))
else:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
seen = {**{n: os.environ.get(n) for n in names}, "arguments": sys.argv[3:], "pids": [os.getpid(), helper.pid]}
note.with_suffix(".part").write_text(json.dumps(seen))
note.with_suffix(".part").rename(note)
print("hello from rank", os.environ["RANK"], "ü", flush=True)
if what == "quick":
    sys.exit(0)
if what.startswith("all:") or what.startswith("fail:") and os.environ["RANK"] == "1":
    print("the cause of it", flush=True)
    sys.exit(int(what.partition(":")[2]))
for _ in range(1200):
    if told:
        print("saved after", signal.Signals(told[0]).name, flush=True)
        sys.exit(85)
    time.sleep(0.05)
"""


class Terminal:
    """A terminal of its own for one process, which leads its session."""

    def __init__(self) -> None:
        self._hand, self._inside = os.openpty()
        self.options: dict[str, Any] = {
            "stdin": self._inside,
            "start_new_session": True,
            "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        }
        """Of subprocess.Popen, for the process that it is for."""

    def ctrl_c(self) -> None:
        """Type it: all processes in the foreground get SIGINT."""
        os.write(self._hand, b"\x03")

    def __del__(self) -> None:
        os.close(self._hand)
        os.close(self._inside)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def processes_in(folder: Path) -> list[int]:
    """Processes whose command line or directory names `folder`: starters, ranks and whatever stands around them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                named = str(folder) in (entry / "cmdline").read_text() + os.readlink(entry / "cwd")
            except OSError:
                continue
            if named and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def freeze(run_dir: Path, ranks: int) -> list[int]:
    """Stop the ranks of a run where they are, so that what a test does next comes in the middle of it. Their pids."""
    pids = [json.loads((run_dir / "logs" / f"rank_{n}.started").read_text())["rank_pid"] for n in range(ranks)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def nobody_left(folder: Path, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while processes_in(folder):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True
