"""Attempts of a launch, until one ends well or another one would be of no use.

In: a function that makes one attempt, and the run's folder. Out: the exit code of the last attempt. What a failed
attempt has reached is read from the last line of `metrics.jsonl`; the ranks resume by themselves.

Started again, after a pause that doubles (up to MAX_PAUSE_S) and is short again after progress:
    whatever failed after it got further than the attempt before, and a lost machine or peer in any case
Not started again:
    told to stop (85); a setting that cannot work (2); a folder in use (3) at the first attempt; a loss that is not
    finite (6: it would be so again); a command that cannot be started (126, 127)
    a first attempt that failed before its first step: something is not set up, and whoever started it is still there
    the same step that failed the same way twice in a row (exit code and last line, numbers aside); a disk without room
    (4) excepted, which someone may mend meanwhile
    more than `restarts` attempts in a row that got no further
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from launch import logs
from launch.config import IN_USE_EXIT_CODE, PEER_EXIT_CODE, REQUEUE_EXIT_CODE, STORAGE_EXIT_CODE
from launch.outcome import Outcome

MAX_PAUSE_S = 600.0
METRICS = "metrics.jsonl"
LOOK_S = 0.1
NEVER_AGAIN = {
    2: "a setting cannot work",
    6: "a loss or gradient is not finite, and would be so again",
    126: "the command cannot be run",
    127: "the command cannot be started",
}


def run_attempts(
    attempt: Callable[[int], Outcome],
    *,
    run_dir: Path,
    restarts: int,
    first_pause_s: float,
    received: deque[signal.Signals],
    begun_before: bool = False,
) -> int:
    """Call `attempt` with 0, 1, … as this module's docstring says; returns the exit code of the last one.

    restarts: attempts in a row without progress that may follow a failure. received: fills when a signal asks to stop,
    which also ends a pause. begun_before: this launch goes on one that had been running (a job that was requeued).
    """
    best, begun_with = last_step(run_dir), _stamp(run_dir)
    before: tuple[int, int, str] | None = None
    tries = 0  # restarts since the last progress, the coming one too
    number = 0
    while True:
        outcome = attempt(number)
        if outcome.code == 0 or outcome.told or outcome.code == REQUEUE_EXIT_CODE or received:
            return outcome.code
        step = last_step(run_dir)
        further, best = step > best, max(best, step)
        failure = (step, outcome.code, re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?", "#", outcome.last_line))
        passing = outcome.lost or outcome.code == PEER_EXIT_CODE
        tries = 1 if further else tries + 1
        if not restarts:
            return outcome.code
        if why := _no_more(
            outcome,
            first=number == 0 and not begun_before,
            moved=_stamp(run_dir) != begun_with,
            passing=passing,
            repeated=failure == before and not passing and outcome.code != STORAGE_EXIT_CODE,
            step=step,
            exhausted=tries > restarts,
            restarts=restarts,
        ):
            logs.say(f"not started again: {why}")
            return outcome.code
        before = failure
        pause_s = min(first_pause_s * 2 ** (tries - 1), MAX_PAUSE_S)
        logs.say(
            f"started again in {pause_s:g} s, from the newest checkpoint "
            f"(attempt {number + 2}; restart {tries} of {restarts} since step {best})"
        )
        if not _wait(pause_s, received):
            return REQUEUE_EXIT_CODE
        number += 1


def _no_more(
    outcome: Outcome,
    *,
    first: bool,
    moved: bool,
    passing: bool,
    repeated: bool,
    step: int,
    exhausted: bool,
    restarts: int,
) -> str:
    """Why there is to be no further attempt; empty when there is."""
    if outcome.code in NEVER_AGAIN:
        return f"exit code {outcome.code}, {NEVER_AGAIN[outcome.code]}"
    if first and outcome.code == IN_USE_EXIT_CODE:
        return f"exit code {outcome.code}, the folder is in use"
    if first and not moved and not passing:
        return "it failed before its first step; when it is mended, give the same command again"
    if repeated:
        where = f"after step {step}" if step else "before the first step"
        return f"it failed {where} in the same way twice (exit code {outcome.code}); look at the log above"
    if exhausted:
        return f"restarts={restarts} attempts in a row got no further than step {step}"
    return ""


def _wait(pause_s: float, received: deque[signal.Signals]) -> bool:
    """False when a signal asked to stop meanwhile."""
    end_s = time.monotonic() + pause_s
    while not received and (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(LOOK_S, left_s))
    return not received


def _stamp(run_dir: Path) -> tuple[int, int] | None:
    """Changes when a step is written, also by a run that goes on from a checkpoint far behind the last step."""
    try:
        found = os.stat(run_dir / METRICS)
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def last_step(run_dir: Path) -> int:
    """The step of the last whole line of the run's metrics; 0 without any."""
    for line in reversed(logs.last_lines(run_dir / METRICS)):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
