"""A real sweep, killed with SIGKILL in mid-trial, and then one of its trials: the same command goes on, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import nobody_left
from training import TINY, Ranks, losses_of, read_metrics, written_steps

from data_pipeline.token_writer import TokenShardWriter

pytestmark = pytest.mark.soak

STEPS, RATES, CHECKPOINT, VOCABULARY = 400, ("0.002", "0.004"), 40, 256
SETTINGS = TINY | {
    "model.vocabulary": VOCABULARY,
    "steps": STEPS,
    "batch.micro": 8,
    "evaluate.every_steps": STEPS // 2,
    "checkpoint.every_steps": CHECKPOINT,
    "checkpoint.keep_last": 2,
    "distributed.timeout_s": 600.0,
}
AT_A_TIME = min(2, len(os.sched_getaffinity(0)))


def small_tokens(folder: Path) -> Path:
    """Token shards of a small vocabulary: many short steps, so that a kill finds one of them."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with TokenShardWriter(
        folder, shard_tokens=4096, tokenizer_sha256="0" * 64, vocabulary=VOCABULARY, end_of_text=VOCABULARY - 1
    ) as writer:
        for index in range(400):
            ids = np.append(generator.integers(0, 50, 40), VOCABULARY - 1).astype(np.uint16)
            split = "train" if index < 350 else "validation"
            writer.append(split, ids, index=index, url=f"https://example.com/{index}", digest=f"{index:064x}")
        writer.finish(made_from="a test", settings={})
    return folder


def start(tokens: Path, out: Path) -> subprocess.Popen[bytes]:
    """`gpt2train sweep` over RATES; its output goes to out.log."""
    words = [
        *(f"{name}={value}" for name, value in SETTINGS.items()),
        f"optimizer.lr={','.join(RATES)}",
        f"data={tokens}",
        f"out={out}",
        f"parallel={AT_A_TIME}",
        "forecast=",
        "restart_pause_s=0.1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gpt2train", "sweep", *words], stdout=log, stderr=log, env=environment
        )


def newest_checkpoint(run: Path) -> int:
    """Step of the newest one that is published; 0: none."""
    return max((int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")), default=0)


def wait_for(holds: Any, sweep: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + 600
    while not holds():
        assert sweep.poll() is None, f"ended with {sweep.returncode}: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.005)


@pytest.mark.timeout(1200)
def test_killed_in_mid_trial_a_sweep_goes_on_bit_for_bit(tmp_path: Path) -> None:
    tokens, out = small_tokens(tmp_path / "corpus" / "tokens"), tmp_path / "sweep"
    log = out.with_suffix(".log")
    runs = [out / f"optimizer.lr={rate}" for rate in RATES]
    undisturbed = [tmp_path / f"undisturbed {rate}" for rate in RATES]
    jobs = [
        {"train": SETTINGS | {"data.path": str(tokens), "run_dir": str(folder), "optimizer.lr": float(rate)}}
        for folder, rate in zip(undisturbed, RATES, strict=True)
    ]
    assert Ranks(tmp_path / "ranks", jobs, 1).wait(600) == [0]

    # The sweep itself, when a trial is behind its first checkpoint
    sweep = start(tokens, out)
    wait_for(lambda: max(map(newest_checkpoint, runs)) > 0, sweep, log)
    sweep.kill()
    assert sweep.wait(60) == -signal.SIGKILL
    assert nobody_left(out, within_s=60), "trials end with their sweep"
    reached = [written_steps(run) for run in runs]
    assert min(reached) < STEPS, "killed too late to show anything"

    # One trial, when the same command has brought it further
    sweep = start(tokens, out)
    victim = runs[reached.index(min(reached))]
    stood = newest_checkpoint(victim)
    wait_for(lambda: newest_checkpoint(victim) > stood, sweep, log)
    rank = json.loads((victim / "logs" / "rank_0.started").read_text())["rank_pid"]
    os.kill(rank, signal.SIGKILL)
    assert sweep.wait(600) == 0, log.read_text()[-3000:]

    told = log.read_text()
    assert "launch: rank 0 of 1 was killed by SIGKILL" in told
    assert f"goes on from {victim}" in told
    for run, reference in zip(runs, undisturbed, strict=True):
        assert losses_of(run) == losses_of(reference)
        assert len(losses_of(run)) == STEPS
        assert read_metrics(run)[1] == read_metrics(reference)[1], "validation, too"
    content = json.loads((out / "scaling.json").read_text())
    assert [(run["finished"], run["steps_done"]) for run in content["runs"]] == [(True, STEPS)] * 2
