"""Training as a whole, with real processes on this machine: the same losses as plain PyTorch, and on other layouts.

One start of two ranks does many jobs (see train_worker.py), since a start costs more than a tiny run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plain_loop import plain_run
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)
from training import (
    STEPS,
    cut,
    largest_difference,
    losses_of,
    play,
    read_metrics,
    settings,
    write_tokens,
)

from data_pipeline.token_shards import TokenShards

AGAIN = ("zero0", "zero2", "zero3", "bf16 zero1", "bf16 zero2", "bf16 zero3", "offload zero3")
"""Runs that are taken up again in their own layout; ZeRO 1 in fp32 has its own test, with kills."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("corpus") / "tokens")


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """All runs that need no disturbance: one start of one rank, one of two, one of one again."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, **changes: Any) -> dict[str, Any]:
        return {"name": name, "train": settings(tokens, folder / name, **changes)}

    def again(name: str) -> list[dict[str, Any]]:
        low, changes = not name.startswith("zero"), dict(short[name]) if name in short else {}
        changes |= {} if low else {"zero__stage": int(name[-1])}
        return [cut(folder, name, f"{name} again", 20 if low else 40), job(f"{name} again", **changes)]

    parity = [job(f"zero{stage}", zero__stage=stage) for stage in (0, 1, 2, 3)]
    short: dict[str, dict[str, Any]] = {
        f"bf16 zero{stage}": {"zero__stage": stage, "precision": "bf16", "steps": 25} for stage in (1, 2, 3)
    }
    short |= {
        "offload zero2": {"zero__stage": 2, "zero__offload": "optimizer", "steps": 25},
        "offload zero3": {"zero__stage": 3, "zero__offload": "optimizer", "steps": 25},
        "offload all": {"zero__stage": 3, "zero__offload": "parameters", "steps": 25},
        "offload bf16": {"zero__stage": 2, "zero__offload": "optimizer", "precision": "bf16", "steps": 25},
    }
    low = [job(name, **changes) for name, changes in short.items()]
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
                cut(folder, "one", "one-two", 20),
                job("one-two"),
                cut(folder, "zero1", "zero1-3", 20),
                job("zero1-3", zero__stage=3),
                cut(folder, "zero1-3", "zero1-3-1", 40),
                job("zero1-3-1"),
                cut(folder, "bf16 zero1", "bf16 zero1-3", 20),
                job("bf16 zero1-3", zero__stage=3, precision="bf16", steps=25),
                # the same layout again from a checkpoint
                *(part for name in AGAIN for part in again(name)),
                job("recomputed zero3", zero__stage=3, activation_checkpointing="full", steps=10),
                job("in front", checkpoint__background=False, steps=25, precision="bf16"),
            ],
        ),
        (
            1,
            [
                cut(folder, "one-two", "one-two-one", 40),
                job("one-two-one"),
                job("one", steps=STEPS),
                job("one", steps=STEPS + 5),
            ],
        ),
    ]
    return folder, play(folder, starts)


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


def test_offloaded_state_changes_no_loss(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = runs
    for name in ("offload zero2", "offload zero3", "offload all"):
        assert answers[name]["codes"] == [0, 0]
        got = losses_of(folder / name)
        # The whole run of 25 steps against the one of bf16's schedule would not do: it is within rounding of itself.
        assert largest_difference(got, losses_of(folder / "offload zero2")) < 1e-5, name
        assert largest_difference(got[:6], losses_of(folder / "zero1")[:6]) < 1e-5, name
    assert largest_difference(losses_of(folder / "offload bf16"), losses_of(folder / "bf16 zero2")) < 5e-3


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
