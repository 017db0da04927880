"""Training as a whole, with real processes on this machine: parity, resume, signals, and what is refused.

One start of two ranks does many jobs (see train_worker.py), since a start costs more than a tiny run.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training import TINY, Ranks, read_metrics, write_tokens, written_steps

from data_pipeline.token_shards import TokenShards
from gpt2train.config import REQUEUE_EXIT_CODE, ModelConfig, OptimizerConfig
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.model import GPT
from gpt2train.optim import learning_rate

STEPS = 50
AGAIN = ("zero0", "zero2", "zero3", "bf16 zero1", "bf16 zero2", "bf16 zero3")
"""Runs that are taken up again in their own layout; ZeRO 1 in fp32 has its own test, with kills."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("corpus") / "tokens")


def settings(tokens: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return {**TINY, "data.path": str(tokens), "run_dir": str(run_dir), "steps": STEPS, **dotted}


def plain_run(
    tokens: Path, steps: int, *, skip: tuple[int, ...] = (), shift: tuple[int, int] = (0, 0)
) -> tuple[list[float], list[float]]:
    """The same run in plain PyTorch, the whole batch at once, torch's own loss and AdamW: losses, gradient norms.

    No update is made at the steps `skip`; after step `shift[0]` the batches are those of `shift[1]` steps later.
    """
    config = ModelConfig(layers=2, channels=16, heads=2, context=16)
    optimizer_config = OptimizerConfig(lr=1e-3, warmup_steps=5)
    windows = TokenWindows(TokenShards.open(tokens).split("train"), config.context)
    order = BatchOrder(1337, len(windows), 8)
    model = GPT(config, seed=1337)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, norms = [], []
    for step in range(steps):
        rows = torch.from_numpy(
            np.stack([windows[i] for i in order.indices(step + (shift[1] if step >= shift[0] else 0))]).astype(np.int64)
        )
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optimizer_config, step + 1, steps)
        if step + 1 not in skip:
            optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """All runs that need no disturbance: one start of one rank, one of two, one of one again."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, **changes: Any) -> dict[str, Any]:
        return {"name": name, "train": settings(tokens, folder / name, **changes)}

    def cut(source: str, target: str, step: int) -> dict[str, Any]:
        return {"name": f"cut {target}", "cut": [str(folder / source), str(folder / target), step]}

    def again(name: str) -> list[dict[str, Any]]:
        low = name.startswith("bf16")
        stage, changes = int(name[-1]), {"precision": "bf16", "steps": 25} if low else {}
        return [cut(name, f"{name} again", 20 if low else 40), job(f"{name} again", zero__stage=stage, **changes)]

    def poison(kind: str, step: int) -> dict[str, Any]:
        """Spoils one sequence of the batch of `step`."""
        windows = TokenWindows(TokenShards.open(tokens).split("train"), 16)
        window = int(BatchOrder(1337, len(windows), 8).indices(step - 1)[5])
        return {"poison": {"kind": kind, "rows": [windows[window][:-1].tolist()]}}

    skip, rewind = {"faults__nonfinite": "skip"}, {"faults__nonfinite": "rewind"}
    spike = {
        "faults__spike_sigma": 20.0,
        "faults__spike_window": 10,
        "faults__spike_action": "rewind",
        "zero__stage": 0,
    }
    often = {"checkpoint__every_steps": 10, "steps": 25}
    for_ever = {"optimizer__lr": 1e30, "optimizer__warmup_steps": 0, "steps": 10}
    (folder / "no room").mkdir()
    (folder / "no room" / "checkpoints").write_text("a file where a folder should be")
    faulty = [
        *(job(f"skip zero{s}", **skip, zero__stage=s, steps=25) | poison("gradient", 12) for s in (0, 2, 3)),
        job("skip bf16", **skip, precision="bf16", steps=25) | poison("loss", 12),
        *(job(f"rewind zero{s}", **rewind, **often, zero__stage=s) | poison("loss", 16) for s in (1, 2, 3)),
        cut("rewind zero1", "rewind zero1 before", 10),
        job("rewind zero1 before", **rewind, **often) | poison("loss", 16),
        cut("rewind zero1", "rewind zero1 after", 20),
        job("rewind zero1 after", **rewind, **often) | poison("loss", 16),
        job("spike", **spike, **often) | poison("spike", 16),
        job("no way back", **rewind, steps=25) | poison("loss", 12),
        job("limit", **skip, **for_ever, faults__limit=2),
        job("no room", steps=40),
    ]
    watched = {
        "logging__tensorboard": True,
        "logging__layers_every_steps": 4,
        "evaluate__every_steps": 5,
        "evaluate__sample_prompt": "The rain",
        "evaluate__sample_tokens": 8,
        "steps": 8,
        "optimizer__warmup_steps": 8,
    }
    looks = [
        job("watched zero3", **watched, zero__stage=3, profile__steps=[3, 4]),
        job("watched zero1", **watched, data__document_mask=True, data__reset_positions=True),
        job("watched bf16", **watched, precision="bf16"),
        job("unwatched", steps=8, optimizer__warmup_steps=8, zero__stage=3),
    ]
    parity = [job(f"zero{stage}", zero__stage=stage) for stage in (0, 1, 2, 3)]
    low = [job(f"bf16 zero{stage}", zero__stage=stage, precision="bf16", steps=25) for stage in (1, 2, 3)]
    dropout = [job("dropout", model__dropout=0.1, steps=10)]
    starts = [
        (
            1,
            [
                job("one"),
                job("dropout alone", model__dropout=0.1, steps=10),
                job("recomputed zero1", activation_checkpointing="selective", steps=10),
            ],
        ),
        (
            2,
            [
                *parity,
                *low,
                *dropout,
                # ranks 1 → 2 (→ 1 below); ZeRO 1 → 3 → 1; bf16 ZeRO 1 → 3
                cut("one", "one-two", 20),
                job("one-two"),
                cut("zero1", "zero1-3", 20),
                job("zero1-3", zero__stage=3),
                cut("zero1-3", "zero1-3-1", 40),
                job("zero1-3-1"),
                cut("bf16 zero1", "bf16 zero1-3", 20),
                job("bf16 zero1-3", zero__stage=3, precision="bf16", steps=25),
                # the same layout again from a checkpoint
                *(part for name in AGAIN for part in again(name)),
                job("recomputed zero3", zero__stage=3, activation_checkpointing="full", steps=10),
                job("in front", checkpoint__background=False, steps=25, precision="bf16"),
                job("diverges", **for_ever),
                job("diverges zero0", zero__stage=0, **for_ever),
                *faulty,
                *looks,
            ],
        ),
        (
            1,
            [
                cut("one-two", "one-two-one", 40),
                job("one-two-one"),
                job("one", steps=STEPS),
                job("one", steps=STEPS + 5),
            ],
        ),
    ]
    answers: dict[str, dict[str, Any]] = {}
    for number, (ranks, jobs) in enumerate(starts):
        started = Ranks(folder / f"start{number}", jobs, ranks)
        started.wait(400)
        for index, done in enumerate(jobs):
            by_rank = [started.answers(rank)[index] for rank in range(ranks)]
            answers[done["name"] + ("" if number < 2 else " later")] = {
                "codes": [answer["code"] for answer in by_rank],
                "messages": [answer["message"] for answer in by_rank],
                "stderr": started.stderr(0),
            }
    return folder, answers


def losses_of(run: Path) -> list[float]:
    losses, _ = read_metrics(run)
    assert list(losses) == list(range(1, len(losses) + 1))
    return list(losses.values())


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)  # it makes the runs that the tests after it look at
def test_losses_equal_plain_pytorch_at_every_zero_stage(tokens: Path, runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    plain, norms = plain_run(tokens, STEPS)
    assert plain[-1] < plain[0] - 0.3, "the run must learn something, or equal losses say little"
    for name in ("one", "zero0", "zero1", "zero2", "zero3"):
        assert set(answers[name]["codes"]) == {0}
        assert largest_difference(losses_of(folder / name)[:STEPS], plain) < 1e-5, name
        entries = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        got = [entry["grad_norm"] for entry in entries if "grad_norm" in entry][:STEPS]
        assert got == pytest.approx(norms, rel=1e-3), name


def test_bf16_stays_within_its_noise(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    assert "CPU Virtual Memory" not in answers["bf16 zero1"]["stderr"], "DeepSpeed's figures are not the user's"
    exact = losses_of(folder / "zero1")[:6]  # the schedules part with the end of the warm-up
    for stage in (1, 2, 3):
        name = f"bf16 zero{stage}"
        assert set(answers[name]["codes"]) == {0}
        got = losses_of(folder / name)
        assert largest_difference(got[:6], exact) < 2e-3, name
        assert largest_difference(got, losses_of(folder / "bf16 zero1")) < 5e-3, name


def test_other_ranks_and_stages_go_on_within_rounding(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    for name, reference in (
        ("one-two", "one"),
        ("one-two-one", "one"),
        ("zero1-3", "zero1"),
        ("zero1-3-1", "zero1"),
    ):
        assert set(answers.get(name, answers.get(f"{name} later"))["codes"]) == {0}
        got = losses_of(folder / name)
        assert largest_difference(got, losses_of(folder / reference)[: len(got)]) < 1e-5, name
    # Ten steps have another schedule than fifty once the warm-up of five is over.
    for name in ("recomputed zero3", "recomputed zero1"):
        assert largest_difference(losses_of(folder / name)[:6], losses_of(folder / "zero1")[:6]) < 1e-5
    assert largest_difference(losses_of(folder / "bf16 zero1-3"), losses_of(folder / "bf16 zero1")) < 0.01


def test_the_same_layout_goes_on_bit_for_bit(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    for name in AGAIN:
        assert answers[f"{name} again"]["codes"] == [0, 0]
        assert losses_of(folder / f"{name} again") == losses_of(folder / name), name
        last = sorted((folder / name / "checkpoints").iterdir())[-1].name
        for file in (folder / name / "checkpoints" / last).glob("*.safetensors"):
            other = folder / f"{name} again" / "checkpoints" / last / file.name
            assert other.read_bytes() == file.read_bytes(), (name, file.name)


def test_dropout_does_not_depend_on_the_ranks(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    one, two = losses_of(folder / "dropout alone"), losses_of(folder / "dropout")
    assert largest_difference(one, two) < 1e-5
    assert largest_difference(two[:1], losses_of(folder / "zero1")[:1]) > 1e-4


def test_validation_losses_are_of_all_ranks(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    one = read_metrics(folder / "one")[1]
    assert list(one)[:2] == [25, 50]
    for name in ("zero0", "zero1", "zero2", "zero3"):
        assert read_metrics(folder / name)[1] == pytest.approx({k: v for k, v in one.items() if k <= 50}, abs=1e-5)


def test_a_complete_run_says_so_and_goes_on_when_asked_for_more(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    assert answers["one later"]["codes"] == [0]
    told = answers["one later"]["stderr"]
    assert f"one: complete at step {STEPS}; nothing to do for steps={STEPS}" in told
    assert "changed since the last start: steps 50 → 55" in told
    assert "follows the cosine schedule of 55 steps; the part behind was of 50" in told
    assert len(losses_of(folder / "one")) == STEPS + 5


def test_an_update_that_is_not_finite_is_not_made(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    for name in ("diverges", "diverges zero0"):
        assert answers[name]["codes"] == [6, 6]
        message = answers[name]["messages"][0]
        assert "the update was not made. Its " in message
        assert "https://example.com/" in message
        # The step that the message names is the one that has no line.
        step = int(message.split()[1].rstrip(":"))
        assert losses_of(folder / name)[-1:] != []
        assert len(losses_of(folder / name)) == step - 1


def entries_of(run: Path) -> list[dict[str, Any]]:
    """Lines of steps, without what the clock says."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in entries if "loss" in entry]


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(
    tokens: Path, runs: tuple[Path, dict[str, Any]]
) -> None:
    folder, answers = runs
    plain, _ = plain_run(tokens, 25, skip=(12,))
    assert largest_difference(plain[12:], plain_run(tokens, 25)[0][12:]) > 1e-4, "one update less must be seen"
    for stage in (0, 2, 3):
        name = f"skip zero{stage}"
        assert answers[name]["codes"] == [0, 0]
        assert largest_difference(losses_of(folder / name), plain) < 1e-5, name
        assert [e["step"] for e in entries_of(folder / name) if "skipped" in e] == [12]
        state = json.loads((folder / name / "checkpoints" / "step_00000025" / "state.json").read_text())
        assert (state["faults"]["skipped"], state["updates"]) == ([12], 24)
    assert "step 12: gradient norm" in answers["skip zero2"]["stderr"]
    low = entries_of(folder / "skip bf16")
    assert (low[11]["loss"], low[11]["skipped"]) == (None, "loss nan")
    assert all(np.isfinite(entry["loss"]) for entry in low if entry["step"] != 12)


def test_a_rewound_run_goes_on_from_the_checkpoint_with_the_batches_behind_the_faulty_one(
    tokens: Path, runs: tuple[Path, dict[str, Any]]
) -> None:
    folder, answers = runs
    plain, _ = plain_run(tokens, 25, shift=(10, 6))
    for name in ("rewind zero1", "rewind zero2", "rewind zero3", "spike"):
        assert answers[name]["codes"] == [0, 0]
        assert largest_difference(losses_of(folder / name), plain) < 1e-5, name
        entries = entries_of(folder / name)
        assert [e["step"] for e in entries if "rewound_from" in e] == [11]
        assert [e["batch"] for e in entries if "batch" in e] == list(range(17, 32))
        state = json.loads((folder / name / "checkpoints" / "step_00000025" / "state.json").read_text())
        assert state["faults"]["rewinds"] == [{"from": 16, "to": 10}]
        assert state["data"]["next_sequence"] == (25 + 6) * 8
    # Taken up before the rewind, which then happens again, or after it: the same run, bit for bit.
    for name in ("rewind zero1 before", "rewind zero1 after"):
        assert entries_of(folder / name) == entries_of(folder / "rewind zero1"), name
        assert read_metrics(folder / name)[1] == read_metrics(folder / "rewind zero1")[1]
    assert "step 16: loss nan; the update was not made. Its " in answers["rewind zero1"]["stderr"]
    assert re.search(r"a spike: [\d.]+σ above", answers["spike"]["stderr"])
    assert answers["no way back"]["codes"] == [6, 6]
    assert "There is no checkpoint to rewind to yet" in answers["no way back"]["messages"][0]


def test_a_closer_look_shows_the_run_and_does_not_change_it(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    assert losses_of(folder / "watched zero3") == losses_of(folder / "unwatched")
    for name in ("watched zero3", "watched zero1", "watched bf16"):
        assert answers[name]["codes"] == [0, 0]
        entries = entries_of(folder / name)
        assert [e["step"] for e in entries if "layers" in e] == [4, 8]
        for entry in entries:
            if "layers" in entry:
                assert set(entry["layers"]) == {"wte", "wpe", "h.0", "h.1", "ln_f"}
                whole = sum(layer["grad_norm"] ** 2 for layer in entry["layers"].values()) ** 0.5
                assert whole == pytest.approx(entry["grad_norm"], rel=1e-3), name
                assert all(layer["weight_norm"] > 0 for layer in entry["layers"].values())
        lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        samples = [line["sample"] for line in map(json.loads, lines) if "sample" in line]
        assert len(samples) == 2
        assert all(sample.startswith("The rain") and len(sample) > len("The rain") for sample in samples)
        assert list((folder / name / "tensorboard").glob("events.out.tfevents.*"))
    (trace,) = (folder / "watched zero3" / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::embedding" for event in events) >= 2 * 2  # two steps of two passes
    assert not (folder / "watched zero1" / "profile").exists()
    # Documents are shorter than the context, so what a token may see matters from the first loss on.
    assert losses_of(folder / "watched zero1")[0] != losses_of(folder / "unwatched")[0]


def test_faults_without_end_stop_the_run(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    assert answers["limit"]["codes"] == [6, 6]
    skipped = [entry["step"] for entry in entries_of(folder / "limit") if "skipped" in entry]
    assert len(skipped) == 2
    assert answers["limit"]["messages"][0].startswith(f"step {skipped[-1] + 1}: ")


def test_a_save_that_fails_in_the_background_ends_the_run_with_its_cause(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    assert answers["no room"]["codes"] == [5, 5]
    assert "cannot be written" in answers["no room"]["messages"][0]
    assert 20 <= len(losses_of(folder / "no room")) < 40


def test_saving_in_the_background_writes_the_same_bytes(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    in_front = folder / "in front" / "checkpoints" / "step_00000025"
    files = sorted(in_front.glob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (folder / "bf16 zero1" / "checkpoints" / in_front.name / file.name).read_bytes()


def test_a_run_says_what_it_will_do_and_keeps_what_it_ran_with(tokens: Path, runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    assert (
        "batch: 8 sequences × 16 tokens = 128 tokens a step; 1 processes × micro batch 2 × 4 accumulated, ZeRO 1"
        in (answers["one"]["stderr"])
    )
    state = json.loads((folder / "zero3" / "checkpoints" / "step_00000050" / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (50, 50 * 8 * 16)
    assert state["layout"] == {"processes": 2, "zero_stage": 3, "precision": "fp32"}
    versions = json.loads((folder / "zero3" / "versions.json").read_text())
    assert versions["data"]["fingerprint"] == TokenShards.open(tokens).fingerprint
    assert {"torch", "deepspeed"} <= versions["versions"].keys()
    assert sorted(p.name for p in (folder / "zero3" / "checkpoints" / "step_00000050").iterdir()) == [
        "manifest.json",
        *(f"moments_0000{rank}.safetensors" for rank in (0, 1)),
        "state.json",
        *(f"weights_0000{rank}.safetensors" for rank in (0, 1)),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_stopped_and_told_to_stop_a_run_repeats_the_undisturbed_one_bit_for_bit(
    tokens: Path, tmp_path: Path
) -> None:
    """Two ranks: kill -9 at five moments, one of them during a save; SIGTERM to one rank; SIGSTOP of one rank."""
    run = tmp_path / "disturbed"
    limit_s = 8.0
    job = {"train": settings(tokens, run, steps=60, checkpoint__every_steps=7, checkpoint__keep_last=2)}
    job["train"]["distributed.timeout_s"] = limit_s
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))
    starts = 0

    def start() -> Ranks:
        nonlocal starts
        starts += 1
        return Ranks(tmp_path / f"start{starts}", [job], 2)

    def wait_for(ranks: Ranks, reached: Any) -> None:
        end = time.monotonic() + 90
        while not reached():
            if time.monotonic() > end or any(p.poll() is not None for p in ranks.processes):
                ranks.kill()
                raise AssertionError(f"did not come to the point:\n{ranks.stderr(0)[-3000:]}")
            time.sleep(0.001)

    # Before the first checkpoint; then at random moments; then while a checkpoint is being written.
    for moment in ("first", "any", "any", "any", "save"):
        ranks = start()
        if moment == "save":
            wait_for(ranks, lambda: any((run / "checkpoints").glob(".step_*.tmp")))
        else:
            at = 3 if moment == "first" else written_steps(run) % 100 + rng.randint(1, 6)
            wait_for(ranks, lambda at=at: written_steps(run) >= at)
            time.sleep(rng.random() * 0.05)
        victim = rng.randrange(2)
        os.kill(ranks.processes[victim].pid, signal.SIGKILL)
        codes = ranks.wait(60)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] in (7, -signal.SIGABRT), ranks.stderr(1 - victim)[-3000:]

    ranks = start()
    before = written_steps(run)
    wait_for(ranks, lambda: written_steps(run) != before)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait(60) == [REQUEUE_EXIT_CODE] * 2
    assert "stopped by a signal after step" in ranks.stderr(0)

    ranks = start()
    before = written_steps(run)
    wait_for(ranks, lambda: written_steps(run) != before)
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        assert ranks.processes[0].wait(limit_s + 20) == 7, ranks.stderr(0)[-3000:]
        assert time.monotonic() - stopped < limit_s + 10
        assert "another rank died" in ranks.stderr(0)
    finally:
        ranks.kill()

    ranks = start()
    assert ranks.wait(120) == [0, 0]
    assert starts == 8

    undisturbed = tmp_path / "undisturbed"
    job["train"]["run_dir"] = str(undisturbed)
    assert start().wait(120) == [0, 0]
    assert losses_of(run) == losses_of(undisturbed)
    assert read_metrics(run)[1] == read_metrics(undisturbed)[1]
    last = "checkpoints/step_00000060"
    for part in ("weights_00000", "weights_00001", "moments_00000", "moments_00001"):
        name = f"{last}/{part}.safetensors"
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000056", "step_00000060"]


def test_what_cannot_go_on_is_refused(tokens: Path, tmp_path: Path) -> None:
    """One process, many mistakes: each has its line and its exit code, and nothing of the run is touched."""
    run, other = tmp_path / "run", tmp_path / "other"
    other_tokens = write_tokens(tmp_path / "other_tokens", seed=1)
    other.mkdir()
    (other / "thesis.txt").write_text("do not touch")
    short = {"steps": 4, "checkpoint__every_steps": 2, "evaluate__every_steps": 0}
    cases: list[tuple[dict[str, Any], int, str]] = [
        (settings(tokens, run, **short), 0, ""),
        (settings(tokens, run, **short | {"model__layers": 3}), 2, "model.layers=3: the run in .* has 2"),
        (settings(tokens, run, **short | {"seed": 5}), 2, "seed=5: the run in .* has 1337"),
        (settings(tokens, run, **short | {"batch__sequences": 16}), 2, "batch.sequences=16: the run in .* has 8"),
        (settings(other_tokens, run, **short), 2, "data=[0-9a-f]+…: the run in .* has [0-9a-f]+…"),
        (settings(tokens, other, **short), 2, "holds thesis.txt and no run; give a new folder"),
        (settings(tmp_path, tmp_path / "new", **short), 2, ""),
        (settings(tokens, tmp_path / "new", **short | {"batch__micro": 3}), 2, "batch.micro=3"),
        (
            settings(tokens, tmp_path / "new", **short | {"model__vocabulary": 300}),
            2,
            "model.vocabulary=300: the tokens",
        ),
        (settings(tokens, tmp_path / "new", **short | {"model__context": 10**6}), 2, "are fewer than one sequence"),
        (settings(tokens, run, **short | {"steps": 5, "optimizer__lr": 2e-3}), 0, ""),
        (settings(tokens, run, **short | {"seed": 5, "overwrite": True}), 0, ""),
    ]
    ranks = Ranks(tmp_path / "start", [{"train": case[0]} for case in cases], 1)
    ranks.wait(120)
    answers = ranks.answers()
    for (_, code, message), answer in zip(cases, answers, strict=True):
        assert answer["code"] == code, answer
        assert re.search(message, answer["message"]), (message, answer)
    assert (other / "thesis.txt").read_text() == "do not touch"
    assert len(losses_of(run)) == 4  # the last start began anew
    told = ranks.stderr()
    assert "changed since the last start: optimizer.lr 0.001 → 0.002" in told
    assert "goes on from" in told


def test_two_runs_in_one_folder_and_lost_checkpoints(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = {"train": settings(tokens, run, steps=100_000, checkpoint__every_steps=5, evaluate__every_steps=0)}
    first = Ranks(tmp_path / "first", [job], 1)
    try:
        end = time.monotonic() + 60
        while written_steps(run) < 12:
            assert time.monotonic() < end, first.stderr()
            time.sleep(0.01)
        second = Ranks(tmp_path / "second", [job], 1)
        assert second.wait(60) == [3]
        assert f"in use by process {first.processes[0].pid} on " in second.answers()[0]["message"]
        os.kill(first.processes[0].pid, signal.SIGUSR1)
        assert first.wait(60) == [REQUEUE_EXIT_CODE]
    finally:
        first.kill()
    (run / "checkpoints").rename(tmp_path / "taken away")
    third = Ranks(tmp_path / "third", [job], 1)
    assert third.wait(60) == [5]
    assert "was published and is gone; restore it" in third.answers()[0]["message"]
