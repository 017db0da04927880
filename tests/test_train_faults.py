"""Training with steps that are not to be trusted, a closer look at it, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_loop import plain_run
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)
from training import (
    Ranks,
    cut,
    entries_of,
    largest_difference,
    losses_of,
    play,
    read_metrics,
    settings,
    write_tokens,
    written_steps,
)

from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import VOCABULARY
from gpt2train import claim
from gpt2train.config import EvaluateConfig, TrainConfig
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.errors import REQUEUE_EXIT_CODE


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("corpus") / "tokens")


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """All runs with faults in their steps, and those that are looked at closely, in one start of two ranks."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, **changes: Any) -> dict[str, Any]:
        return {"name": name, "train": settings(tokens, folder / name, **changes)}

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
        cut(folder, "rewind zero1", "rewind zero1 before", 10),
        job("rewind zero1 before", **rewind, **often) | poison("loss", 16),
        cut(folder, "rewind zero1", "rewind zero1 after", 20),
        job("rewind zero1 after", **rewind, **often) | poison("loss", 16),
        job("spike", **spike, **often) | poison("spike", 16),
        job("no way back", **rewind, steps=25) | poison("loss", 12),
        job("limit", **skip, **for_ever, faults__limit=2),
        job("no room", steps=40),
        job("diverges", **for_ever),
        job("diverges zero0", zero__stage=0, **for_ever),
    ]
    closely = {"model__vocabulary": VOCABULARY, "data__path": str(write_tokens(folder / "text", vocabulary=VOCABULARY))}
    closely |= {"steps": 8, "optimizer__warmup_steps": 8}
    watched = closely | {
        "logging__tensorboard": True,
        "logging__layers_every_steps": 4,
        "evaluate__every_steps": 5,
        "evaluate__sample_prompt": "The rain",
        "evaluate__sample_tokens": 8,
    }
    looks = [
        job("watched zero3", **watched, zero__stage=3, profile__steps=[3, 4]),
        job("watched zero1", **watched, data__document_mask=True, data__reset_positions=True),
        job("watched bf16", **watched, precision="bf16"),
        job("unwatched", **closely, zero__stage=3),
    ]
    return folder, play(folder, [(2, [*faulty, *looks])])


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
    assert answers["no room"]["codes"] == [4, 4]
    assert "cannot be written" in answers["no room"]["messages"][0]
    assert 20 <= len(losses_of(folder / "no room")) < 40


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
        (
            settings(other_tokens, run, **short),
            2,
            r"data=[0-9a-f]+… \(/.*/other_tokens\): the run in .* has [0-9a-f]+… \(/.*\)\n",
        ),
        (settings(tokens, other, **short), 2, "holds thesis.txt and no run; give a new folder"),
        (settings(tmp_path, tmp_path / "new", **short), 2, ""),
        (settings(tokens, tmp_path / "new", **short | {"batch__micro": 3}), 2, "batch.micro=3"),
        (
            settings(tokens, tmp_path / "new", **short | {"model__vocabulary": 200}),
            2,
            "model.vocabulary=200: the tokens",
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
    assert not (tmp_path / "new").exists(), "what is refused leaves no folder"
    assert len(losses_of(run)) == 4  # the last start began anew
    told = ranks.stderr()
    assert "changed since the last start: optimizer.lr 0.001 → 0.002" in told
    assert "goes on from" in told


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tokens: Path, tmp_path: Path) -> None:
    """In an evaluation, which is finished, and in a start, which makes a step; one process."""
    job = {"train": settings(tokens, tmp_path / "run", steps=40, evaluate__every_steps=10)}
    places = [("evaluation", False), ("start", False), ("evaluation", True)]
    strikes = [{"rank": 0, "place": p, "count": 1, "signal": "SIGINT", "again": again} for p, again in places]
    ranks = Ranks(tmp_path / "start", [job | {"strike": strike} for strike in strikes], 1)
    assert ranks.wait(60) == [-signal.SIGINT], ranks.stderr()
    assert [answer["code"] for answer in ranks.answers()] == [REQUEUE_EXIT_CODE] * 2
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step_00000011", "step_00000012"]
    assert ranks.stderr().count("Ctrl-C: saves after this step and stops") == 3
    _, validation = read_metrics(tmp_path / "run")
    assert list(validation) == [10], "an evaluation that Ctrl-C met is finished"


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


@pytest.mark.parametrize(("documents", "sequences", "told"), [(20, 2, True), (400, 2, False), (400, 10_000, True)])
def test_a_small_validation_split_is_told(documents: int, sequences: int, told: bool, tmp_path: Path) -> None:
    split = TokenShards.open(write_tokens(tmp_path / "tokens", documents=documents)).split("validation")
    config = TrainConfig(evaluate=EvaluateConfig(sequences=sequences))
    lines = claim._few_to_validate(config, split, split.tokens // 16)
    assert len(lines) == told
    assert all(f": {documents // 10} documents, " in line and "tokenize.validation_fraction" in line for line in lines)
