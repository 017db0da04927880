"""Hundreds of kills of a training run, by `make soak`: its losses must be the undisturbed run's, bit for bit.

GPT2TRAIN_KILLS (default 300) kills at most, and no new one after GPT2TRAIN_SOAK_S (default 3000) seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from training import TINY, Ranks, read_metrics, write_tokens

from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import VOCABULARY

STEPS = 20_000
MOMENTS = ("anywhere", "in a save", "in an evaluation", "in the start", "at an epoch's edge", "in a pruning")
SMALL = {
    "model.context": 8,
    "model.vocabulary": VOCABULARY,
    "batch.sequences": 4,
    "batch.micro": 1,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every_steps": 100,
    "evaluate.every_steps": 7,
    "evaluate.sequences": 4,
    "logging.every_steps": 1000,
    "distributed.timeout_s": 30.0,
}
"""Two forward passes a rank and step, so that a kill falls between them, too; a large vocabulary: a save lasts."""


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_hundreds_of_times_a_run_repeats_the_undisturbed_one(tmp_path: Path) -> None:
    """Two ranks, saves every 5 steps in the background, evaluations every 7; SIGKILL to one rank or to both."""
    kills, limit_s = int(os.environ.get("GPT2TRAIN_KILLS", "300")), float(os.environ.get("GPT2TRAIN_SOAK_S", "3000"))
    tokens = write_tokens(tmp_path / "tokens", documents=60)
    windows = (TokenShards.open(tokens).split("train").tokens - 1) // SMALL["model.context"]
    epoch_steps = windows / SMALL["batch.sequences"]
    settings = {**TINY, **SMALL, "data.path": str(tokens), "steps": STEPS}
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    seed = int.from_bytes(os.urandom(4), "big")
    rng, begin, done, late = random.Random(seed), time.monotonic(), dict.fromkeys(MOMENTS, 0), 0

    while sum(done.values()) < kills and time.monotonic() - begin < limit_s:
        moment = MOMENTS[sum(done.values()) % len(MOMENTS)]
        ranks = Ranks(tmp_path / "start", [{"train": {**settings, "run_dir": str(run)}}], 2)
        start, size, lines, beyond = time.monotonic(), _size(run), _saved_lines(run), rng.randint(1, 12)
        try:
            while not _reached(moment, run, size, lines, start, beyond, epoch_steps):
                assert time.monotonic() - start < 300, f"seed {seed}, {moment}:\n{ranks.stderr(0)[-3000:]}"
                if any(p.poll() is not None for p in ranks.processes):
                    break
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.02)
            victims = rng.choice([ranks.processes[:1], ranks.processes[1:], ranks.processes])
            struck = [process for process in victims if process.poll() is None]
            for process in struck:
                os.kill(process.pid, signal.SIGKILL)
            codes = ranks.wait(300)
            assert all(code in (7, -signal.SIGKILL, -signal.SIGABRT) for code in codes), f"seed {seed}: {codes}"
        finally:
            ranks.kill()
        if struck:
            done[moment] += 1
        else:  # the machine was so slow that the time limit came first
            late += 1
            assert late < 20, f"seed {seed}:\n{ranks.stderr(0)[-3000:]}"
        if sum(done.values()) % 25 == 0:
            print(f"{sum(done.values())} kills, {time.monotonic() - begin:.0f} s", flush=True)

    # To the next multiple of 100 and no further; the same number of steps without a disturbance.
    reached = max(read_metrics(run)[0])
    steps = min((reached // 100 + 1) * 100, STEPS)
    for folder in (run, undisturbed):
        # `steps` shapes the schedule of the learning rate, so the run is ended by a signal and not by a smaller one.
        _run_to(tmp_path / "end", settings | {"run_dir": str(folder)}, steps)
    disturbed, whole = read_metrics(run), read_metrics(undisturbed)
    common = min(max(disturbed[0]), max(whole[0]))
    assert common >= steps
    differing = [step for step in range(1, common + 1) if disturbed[0][step] != whole[0][step]]
    evaluations = [step for step in range(7, common + 1, 7) if disturbed[1][step] != whole[1][step]]
    weights = _differing_files(run, undisturbed)
    figures = {
        "kills": sum(done.values()),
        "moments": done,
        "ended_by_the_time_limit": late,
        "steps": common,
        "epochs": round(common / epoch_steps, 1),
        "differing_losses": len(differing),
        "differing_validation_losses": len(evaluations),
        "differing_weight_files": len(weights),
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(figures))
    assert not differing, f"seed {seed}: losses differ from step {differing[0]}"
    assert not evaluations, f"seed {seed}: validation losses differ from step {evaluations[0]}"
    assert not weights, f"seed {seed}: {weights}"
    assert sum(done.values()) >= min(kills, 10)


def _differing_files(one: Path, other: Path) -> list[str]:
    """Weights and moments that differ in the newest checkpoint that both have; there must be one."""
    common = {p.name for p in (one / "checkpoints").iterdir()} & {p.name for p in (other / "checkpoints").iterdir()}
    newest = max(common)
    files = sorted((one / "checkpoints" / newest).glob("*.safetensors"))
    assert len(files) == 4
    return [f.name for f in files if f.read_bytes() != (other / "checkpoints" / newest / f.name).read_bytes()]


def _size(run: Path) -> int:
    return (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0


def _reached(moment: str, run: Path, size: int, lines: int, start: float, beyond: int, epoch_steps: float) -> bool:
    """Whether a start has come to the point where it is to die: `beyond` steps behind its checkpoint, if anywhere."""
    if moment == "in the start":
        return time.monotonic() - start > beyond / 4
    if _size(run) == size or not (run / "metrics.jsonl").exists():
        return False
    if moment == "in a save":
        return any((run / "checkpoints").glob(".step_*.tmp"))
    if moment == "in a pruning":
        return any((run / "checkpoints").glob(".step_*.pruned"))
    if moment == "at an epoch's edge":
        last = (run / "metrics.jsonl").read_bytes().splitlines()[-1:]
        return bool(last) and int(_step(last[0]) / epoch_steps) != int((_step(last[0]) + 1) / epoch_steps)
    if moment == "in an evaluation":
        last = (run / "metrics.jsonl").read_bytes().splitlines()[-1:]
        return bool(last) and _step(last[0]) % 7 == 0
    return len((run / "metrics.jsonl").read_bytes().splitlines()) >= lines + beyond


def _saved_lines(run: Path) -> int:
    """Lines of metrics.jsonl that a start will keep: those up to the newest checkpoint."""
    newest = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)
    if not (run / "metrics.jsonl").exists():
        return 0
    return sum(0 <= _step(line) <= newest for line in (run / "metrics.jsonl").read_bytes().splitlines())


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except ValueError:  # caught while it was being written
        return -1


def _run_to(folder: Path, settings: dict[str, object], steps: int) -> None:
    ranks = Ranks(folder, [{"train": settings}], 2)
    try:
        end = time.monotonic() + 900
        run = Path(str(settings["run_dir"]))
        while not (run / "metrics.jsonl").exists() or max(read_metrics(run)[0], default=0) < steps:
            assert time.monotonic() < end, ranks.stderr(0)[-3000:]
            assert all(p.poll() is None for p in ranks.processes), ranks.stderr(0)[-3000:]
            time.sleep(0.2)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert ranks.wait(60) == [85, 85]
    finally:
        ranks.kill()
