"""Trials, one after another: each a launch of its own, with its own run folder.

A sweep keeps no state. Started again it runs every trial again: one that had finished ends at once with 0, one that was
cut short goes on from its checkpoint, because that is what its command does. A trial that fails does not stop the
others; a signal does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import REQUEUE_EXIT_CODE, ConfigError, LaunchConfig
from launch.ranks import stop_signals
from launch.run import launch


@dataclass(frozen=True)
class Trial:
    name: str
    command: list[str]
    """Arguments of one rank; run twice, it goes on."""
    run_dir: Path


@dataclass(frozen=True)
class TrialResult:
    name: str
    exit_code: int
    """As launch.local describes; REQUEUE_EXIT_CODE too for a trial that was not begun because the sweep was stopped."""
    seconds: float


def sweep(trials: Sequence[Trial], config: LaunchConfig) -> list[TrialResult]:
    """Launch the trials in order; one result each, in the same order. What failed is named at the end.

    Raises ConfigError when names or run folders repeat, or when `config` does not fit this machine.
    """
    faults = [
        f"trials: {what} {value} occurs more than once; each needs its own"
        for what, values in (("name", [t.name for t in trials]), ("run_dir", [str(t.run_dir) for t in trials]))
        for value in sorted({v for v in values if values.count(v) > 1})
    ]
    if faults:
        raise ConfigError(faults)
    results: list[TrialResult] = []
    with stop_signals() as received:
        for number, trial in enumerate(trials, start=1):
            if received or any(r.exit_code == REQUEUE_EXIT_CODE for r in results):
                results.append(TrialResult(trial.name, REQUEUE_EXIT_CODE, 0.0))
                continue
            _say(f"{number} of {len(trials)}: {trial.name}")
            began_s = time.monotonic()
            code = launch(config, trial.command, trial.run_dir)
            results.append(TrialResult(trial.name, code, time.monotonic() - began_s))
    for result in results:
        if result.exit_code:
            what = "stopped, goes on" if result.exit_code == REQUEUE_EXIT_CODE else f"failed ({result.exit_code})"
            _say(f"{result.name}: {what}")
    return results


def exit_code(results: Sequence[TrialResult]) -> int:
    """Of the sweep: REQUEUE_EXIT_CODE when it was stopped, else the first failure's, else 0."""
    codes = [r.exit_code for r in results if r.exit_code]
    return REQUEUE_EXIT_CODE if REQUEUE_EXIT_CODE in codes else codes[0] if codes else 0


def _say(line: str) -> None:
    print(f"sweep: {line}", file=sys.stderr, flush=True)
