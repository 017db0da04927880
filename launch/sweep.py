"""Trials, one after another or several at a time: each a launch of its own, with its own run folder.

A sweep keeps no state. Started again it runs every trial again: one that had finished ends at once with 0, one that was
cut short goes on from its checkpoint, because that is what its command does. A trial that fails does not stop the
others; a signal does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import REQUEUE_EXIT_CODE, ConfigError, Gpus, LaunchConfig
from launch.machine import count_gpus
from launch.packed import KILLED, Share, run_packed, share_faults, shares
from launch.ranks import stop_signals
from launch.run import launch
from launch.words import to_words


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


def sweep(trials: Sequence[Trial], config: LaunchConfig, *, parallel: int = 1) -> list[TrialResult]:
    """Launch the trials in order; one result each, in the same order. What failed is named at the end.

    parallel: how many run at a time, each on its own share of this machine's cores and GPUs (launch.packed). Raises
    ConfigError when names or run folders repeat, or when `config` does not fit this machine.
    """
    faults = [
        f"trials: {what} {value} occurs more than once; each needs its own"
        for what, values in (("name", [t.name for t in trials]), ("run_dir", [str(t.run_dir) for t in trials]))
        for value in sorted({v for v in values if values.count(v) > 1})
    ]
    gpus = usable_gpus(config) if parallel != 1 else 0
    faults += share_faults(config, parallel, gpus)
    if faults:
        raise ConfigError(faults)
    parts = shares(parallel, gpus)
    results: list[TrialResult] = []
    with stop_signals() as received:
        if parallel > 1 and not config.dry_run:
            commands = [(t.name, _launcher(t, config)) for t in trials]
            ends = run_packed(commands, parts, received, say=_say)
            results = [TrialResult(t.name, code, seconds) for t, (code, seconds) in zip(trials, ends, strict=True)]
            trials = []
        for number, trial in enumerate(trials, start=1):
            if received or any(r.exit_code == REQUEUE_EXIT_CODE for r in results):
                results.append(TrialResult(trial.name, REQUEUE_EXIT_CODE, 0.0))
                continue
            _say(f"{number} of {len(trials)}: {trial.name}")
            began_s = time.monotonic()
            with _as_within(parts[(number - 1) % parallel], parallel):
                code = launch(config, trial.command, trial.run_dir)
            if received and code > KILLED:  # by the second signal, or by the first in its start
                code = REQUEUE_EXIT_CODE
            results.append(TrialResult(trial.name, code, time.monotonic() - began_s))
    for result in results:
        if result.exit_code not in (0, REQUEUE_EXIT_CODE):
            _say(f"{result.name}: failed ({result.exit_code})")
    if exit_code(results) == REQUEUE_EXIT_CODE:
        ended = sum(r.exit_code != REQUEUE_EXIT_CODE for r in results)
        _say(f"stopped with {ended} of {len(results)} trials ended; the same command goes on")
    return results


def usable_gpus(config: LaunchConfig) -> int:
    """GPUs of this machine that trials share; 0 where none matter."""
    return 0 if config.gpus is Gpus.none else count_gpus()


@contextlib.contextmanager
def _as_within(share: Share, parallel: int) -> Iterator[None]:
    """For a dry run of trials at a time: what is printed within is what a process with this share would start."""
    if parallel == 1:
        yield
        return
    where = f", GPUs {', '.join(share.gpus)}" if share.gpus is not None else ""
    print(f"# {parallel} at a time, on {len(share.cores)} cores{where}, when they are free")
    cores, environment = os.sched_getaffinity(0), dict(os.environ)
    os.sched_setaffinity(0, share.cores)
    os.environ.update(share.environment())
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.environ.clear()
        os.environ.update(environment)


def _launcher(trial: Trial, config: LaunchConfig) -> list[str]:
    """The trial's launch as a process of its own."""
    program = [sys.executable, "-I", str(Path(__file__).with_name("__main__.py"))]
    return [*program, str(trial.run_dir), *to_words(config), "--", *trial.command]


def exit_code(results: Sequence[TrialResult]) -> int:
    """Of the sweep: REQUEUE_EXIT_CODE when it was stopped, else the first failure's, else 0."""
    codes = [r.exit_code for r in results if r.exit_code]
    return REQUEUE_EXIT_CODE if REQUEUE_EXIT_CODE in codes else codes[0] if codes else 0


def _say(line: str) -> None:
    print(f"sweep: {line}", file=sys.stderr, flush=True)
