"""Training that is disturbed from outside: kills at exact and at random places, stopped peers, signals."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Ranks, losses_of, read_metrics, settings, write_tokens, written_steps

from data_pipeline.token_shards import TokenShards
from gpt2train.data import TokenWindows
from gpt2train.errors import REQUEUE_EXIT_CODE


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_stopped_and_told_to_stop_a_run_repeats_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    """Two ranks: SIGKILL and SIGSTOP of one of them at exact places, SIGKILL at a random moment, SIGTERM to one."""
    tokens = write_tokens(tmp_path / "tokens", documents=110)
    run = tmp_path / "disturbed"
    windows = len(TokenWindows(TokenShards.open(tokens).split("train"), 16))
    edge = windows // 8 + 1
    assert 22 < edge < 49, "the step that holds the end of an epoch and the start of the next lies within the run"
    assert windows % 8
    job = {"train": settings(tokens, run, steps=60, checkpoint__every_steps=7, checkpoint__keep_last=2)}
    job["train"] |= {"evaluate.every_steps": 10}
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))
    starts = 0

    def start(strike: dict[str, Any] | None = None, **changes: Any) -> Ranks:
        nonlocal starts
        starts += 1
        settings_now = job["train"] | {name.replace("__", "."): value for name, value in changes.items()}
        return Ranks(tmp_path / f"start{starts}", [{"train": settings_now, "strike": strike}], 2)

    def saved() -> int:
        return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)

    # A step has two forward passes on each rank, a save four files on rank 0; the run has come further each time.
    kills: list[tuple[int, str, int]] = [
        (1, "accumulation", 6),
        (0, "save", 3),
        (0, "evaluation", 1),
        (0, "pruning", 1),
        (1, "start", 1),
        (1, "accumulation", edge),
        (0, "publishing", 2),
    ]
    for victim, place, count in kills:
        if count == edge:
            count = 2 * (edge - saved())
        ranks = start({"rank": victim, "place": place, "count": count, "signal": "SIGKILL"})
        codes = ranks.wait(200)
        assert codes[victim] == -signal.SIGKILL, (place, codes, ranks.stderr(0)[-3000:])
        assert codes[1 - victim] in (7, -signal.SIGABRT), (place, ranks.stderr(1 - victim)[-3000:])
        assert f"struck at {place}" in ranks.stderr(victim)

    # At a random moment, from outside.
    ranks = start()
    before = written_steps(run)
    _wait_for(ranks, lambda: written_steps(run) != before)
    time.sleep(rng.random() * 0.05)
    victim = rng.randrange(2)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    assert ranks.wait(200)[victim] == -signal.SIGKILL

    # A stopped peer ends the run, in a step as in an evaluation, a save and a start.
    limit_s = 8.0
    for place in ("accumulation", "evaluation", "save", "start"):
        strike = {"rank": 1, "place": place, "count": 1, "signal": "SIGSTOP"}
        ranks = start(strike, steps=60, distributed__timeout_s=limit_s, evaluate__every_steps=2)
        try:
            _wait_for(ranks, lambda ranks=ranks, place=place: f"struck at {place}" in ranks.stderr(1), ended=True)
            stopped = time.monotonic()
            assert ranks.processes[0].wait(limit_s + 120) == 7, (place, ranks.stderr(0)[-3000:])
            assert time.monotonic() - stopped < limit_s + 60, place  # both cores may be at work for others
            told = ranks.stderr(0)
            assert "another rank died" in told, (place, told[-3000:])
        finally:
            ranks.kill()

    ranks = start()
    before = written_steps(run)
    _wait_for(ranks, lambda: written_steps(run) != before)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait(200) == [REQUEUE_EXIT_CODE] * 2
    assert "stopped by a signal after step" in ranks.stderr(0)

    assert start().wait(200) == [0, 0]
    undisturbed = tmp_path / "undisturbed"
    assert start(run_dir=str(undisturbed)).wait(200) == [0, 0]
    assert losses_of(run) == losses_of(undisturbed)
    assert read_metrics(run)[1] == read_metrics(undisturbed)[1]
    last = "checkpoints/step_00000060"
    for part in ("weights_00000", "weights_00001", "moments_00000", "moments_00001"):
        name = f"{last}/{part}.safetensors"
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000056", "step_00000060"]


def _wait_for(ranks: Ranks, reached: Callable[[], bool], *, ended: bool = False) -> None:
    end = time.monotonic() + 200
    while not reached():
        if time.monotonic() > end or (not ended and any(p.poll() is not None for p in ranks.processes)):
            ranks.kill()
            raise AssertionError(f"did not come to the point:\n{ranks.stderr(0)[-3000:]}")
        time.sleep(0.001)
