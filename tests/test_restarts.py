"""When a failed launch is started again, and when that would be of no use."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from pathlib import Path

import pytest

from launch import restarts
from launch.config import REQUEUE_EXIT_CODE
from launch.outcome import Outcome
from launch.restarts import last_step, run_attempts


def play(
    folder: Path, script: list[tuple[int, Outcome]], *, limit: int = 3, begun_before: bool = False
) -> tuple[int, int]:
    """Attempts that reach a step and end as `script` says. Returns the exit code and how many attempts were made."""
    made = []

    def attempt(number: int) -> Outcome:
        assert number == len(made)
        step, outcome = script[number]
        made.append(number)
        if step:
            (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
        return outcome

    code = run_attempts(
        attempt, run_dir=folder, restarts=limit, first_pause_s=1e-4, received=deque(), begun_before=begun_before
    )
    return code, len(made)


CRASH = Outcome(1, last_line="CUDA error on rank 3 at 0x7f12")
OTHER = Outcome(1, last_line="NCCL error")
KILLED = Outcome(137)
FULL = Outcome(4, last_line="metrics.jsonl: cannot be written (No space left on device)")
LOST = Outcome(7, lost=True, last_line="host n2 is gone")
PEER = Outcome(7, last_line="rank 0: another rank died")
DONE = Outcome(0)
TOLD = Outcome(REQUEUE_EXIT_CODE, told=True)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([(9, DONE)], (0, 1)),
        ([(5, KILLED), (9, DONE)], (0, 2)),
        ([(5, LOST), (5, LOST), (9, DONE)], (0, 3)),
        ([(0, LOST), (9, DONE)], (0, 2)),
        ([(0, PEER), (9, DONE)], (0, 2)),
        # Progress: the count begins anew, however often it fails.
        ([(step, CRASH) for step in range(1, 9)] + [(9, DONE)], (0, 9)),
        # Without progress: the limit.
        ([(5, LOST)] * 4, (7, 4)),
        # The same step in the same way, but for numbers: twice is enough. In another way it is tried again.
        ([(5, CRASH), (5, Outcome(1, last_line="CUDA error on rank 1 at 0x7fff"))], (1, 2)),
        ([(5, CRASH), (5, OTHER), (5, KILLED), (9, DONE)], (0, 4)),
        ([(5, CRASH), (7, CRASH), (9, DONE)], (0, 3)),
        # Room may come back: the same step twice does not say that a third time would be of no use.
        ([(5, FULL), (5, FULL), (9, DONE)], (0, 3)),
        ([(5, FULL)] * 4, (4, 4)),
        ([(0, FULL)], (4, 1)),
        # A first attempt that does not reach a step: not set up.
        ([(0, CRASH)], (1, 1)),
        ([(5, CRASH), (5, Outcome(2))], (2, 2)),
        ([(5, Outcome(6))], (6, 1)),
        ([(5, Outcome(127))], (127, 1)),
        ([(0, Outcome(3))], (3, 1)),
        # After a crash the lock of the dead run may be held for a moment.
        ([(5, CRASH), (5, Outcome(3)), (9, DONE)], (0, 3)),
        ([(5, TOLD)], (REQUEUE_EXIT_CODE, 1)),
        ([(5, Outcome(137, told=True))], (137, 1)),
    ],
)
def test_what_is_started_again(tmp_path: Path, script: list[tuple[int, Outcome]], expected: tuple[int, int]) -> None:
    assert play(tmp_path, script) == expected


def test_no_restarts_when_none_are_wanted(tmp_path: Path) -> None:
    assert play(tmp_path, [(5, LOST)], limit=0) == (7, 1)


def test_a_job_that_goes_on_may_fail_before_its_first_step(tmp_path: Path) -> None:
    assert play(tmp_path, [(0, CRASH), (9, DONE)], begun_before=True) == (0, 2)


def test_progress_of_an_earlier_launch_is_none_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 1.0}\n')
    assert play(tmp_path, [(0, CRASH)]) == (1, 1)


def test_a_run_that_goes_on_from_far_behind_has_made_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 1.0}\n')
    assert play(tmp_path, [(35, CRASH), (50, DONE)]) == (0, 2)


def test_the_pause_doubles_and_is_short_again_after_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(restarts, "_wait", lambda pause_s, received: pauses.append(pause_s) or True)

    def attempt(number: int) -> Outcome:
        step = 5 if number < 4 else 6
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        return LOST if number < 5 else DONE

    assert run_attempts(attempt, run_dir=tmp_path, restarts=9, first_pause_s=200, received=deque()) == 0
    assert pauses == [200, 400, 600, 600, 200]


def test_the_restarts_are_counted_from_the_last_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    assert play(tmp_path, [(8, LOST), (16, LOST), (16, LOST), (17, DONE)]) == (0, 4)
    told = [line.partition("(")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "attempt 2; restart 1 of 3 since step 8)",
        "attempt 3; restart 1 of 3 since step 16)",
        "attempt 4; restart 2 of 3 since step 16)",
    ]


def test_a_signal_ends_a_pause(tmp_path: Path) -> None:
    received: deque[signal.Signals] = deque()
    before = signal.signal(signal.SIGALRM, lambda *_: received.append(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    began_s = time.monotonic()
    try:
        code = run_attempts(lambda _: LOST, run_dir=tmp_path, restarts=3, first_pause_s=300, received=received)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert code == REQUEUE_EXIT_CODE
    assert time.monotonic() - began_s < 100


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (None, 0),
        ("", 0),
        ('{"step": 3, "loss": 1}\n{"step": 4, "lo', 3),
        ('{"step": 3}\n{"step": 4, "validation_loss": 2.5}\n', 4),
        ("null\n[]\n", 0),
    ],
)
def test_how_far_a_run_has_come(tmp_path: Path, text: str | None, step: int) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert last_step(tmp_path) == step
