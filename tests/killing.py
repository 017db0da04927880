"""Kills a corpus run again and again, at moments spread over all of its work; for the soak tests."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def copy_archive(out: Path, to: Path) -> Path:
    """A new corpus folder that holds the responses alone."""
    for name in ("warc", "urls", "fetch"):
        shutil.copytree(out / name, to / name)
    shutil.copy(out / "shards.json", to / "shards.json")
    return to


def finished_steps(out: Path) -> int:
    return sum(1 for _ in out.rglob("*.done.json"))


def half_written(out: Path) -> bool:
    """Whether a file, or the folder of token shards, is being made at this moment."""
    with contextlib.suppress(FileNotFoundError):  # a folder that went while it was looked into
        return any(out.rglob(".*.tmp")) or (out / ".tokens.partial").exists() or (out / ".tokens.old").exists()
    return True


def kill_again_and_again(
    start: Callable[[], subprocess.Popen[str]], out: Path, *, kills: int, steps: int, seed: int
) -> list[str]:
    """Start, wait for a moment, kill the whole group with SIGKILL, and so on; what was under way at each kill.

    The moments go with the steps that are finished, of `steps` in all, so that each start comes further than the last;
    every second kill then waits for a file half written, the others for up to a quarter of a second.
    """
    rng, moments = random.Random(seed), []
    for number in range(kills):
        process = start()
        reach = finished_steps(out) if number == 0 else (number * (steps - 1)) // kills
        while process.poll() is None and finished_steps(out) < reach:
            time.sleep(0.005)
        if number % 2:
            give_up = time.monotonic() + 20
            while process.poll() is None and not half_written(out) and time.monotonic() < give_up:
                pass
        else:
            time.sleep(rng.uniform(0.0, 0.25))
        moment = "half written" if half_written(out) else "between"
        ended = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        moments.append(moment if ended is None else f"ended by itself with {ended}")
    return moments
