"""Steps ↔ documents: against the tokens themselves, and against looking at every step there was."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_pipeline.token_shards import TokenShards
from data_pipeline.token_writer import TokenShardWriter
from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import trace as trace_module
from gpt2train.config import BatchConfig, DataConfig, ModelConfig, TraceConfig, TrainConfig
from gpt2train.data import BatchOrder
from gpt2train.errors import ConfigError
from gpt2train.trace import documents_of_step, documents_of_url, steps_of_url, trace

CONTEXT, SEQUENCES, STEPS = 16, 3, 60
DONE = 45
LENGTHS = [1, 2, 16, 17, 40, 5, 3, 90, 33, 8, 170, 11, 16, 31, 64]
"""Tokens of the documents that are trained on, `<|endoftext|>` included."""
URLS = [f"https://site{i}.test/page?q=[b]{i}[/b]" for i in range(len(LENGTHS))]
TWICE = 12
"""Has the URL of the document before it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose every token but the last is the document's own number."""
    folder = tmp_path_factory.mktemp("tokens")
    with TokenShardWriter(folder, shard_tokens=120, tokenizer_sha256=load_tokenizer().sha256) as writer:
        for i, length in enumerate(LENGTHS):
            ids = np.array([i] * (length - 1) + [END_OF_TEXT], dtype=np.uint16)
            url = URLS[TWICE - 1] if i == TWICE else URLS[i]
            writer.append("train", ids, index=i, url=url, digest=hashlib.sha256(ids).hexdigest())
        ids = np.array([100] * 40 + [END_OF_TEXT], dtype=np.uint16)
        writer.append("validation", ids, index=99, url="https://held.test/out", digest=hashlib.sha256(ids).hexdigest())
        writer.finish(made_from="a test", settings={})
    return folder


@pytest.fixture
def config(data: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig("tiny", layers=1, channels=8, heads=1, context=CONTEXT),
        data=DataConfig(path=str(data)),
        batch=BatchConfig(sequences=SEQUENCES),
        steps=STEPS,
        seed=11,
    )


@pytest.fixture
def run(data: Path, config: TrainConfig, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    fingerprint = TokenShards.open(data).fingerprint
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in range(1, DONE + 1)))
    (folder / "versions.json").write_text(json.dumps({"data": {"path": str(data), "fingerprint": fingerprint}}))
    return folder


def test_a_step_is_its_tokens(data: Path, config: TrainConfig) -> None:
    """The parts of a sequence, one after another, spell exactly the tokens that the step trained on."""
    split = TokenShards.open(data).split("train")
    order = BatchOrder(config.seed, (sum(LENGTHS) - 1) // CONTEXT, SEQUENCES)
    for step in range(1, STEPS + 1):
        seen = documents_of_step(split, config, step)
        for sequence, window in enumerate(order.indices(step - 1)):
            parts = [part for part in seen if part.sequence == sequence]
            assert parts[0].start == window * CONTEXT
            assert parts[-1].stop == window * CONTEXT + CONTEXT + 1
            assert all(a.stop == b.start for a, b in pairwise(parts))
            for part in parts:
                assert part.document.start <= part.start < part.stop <= part.document.stop
                number = URLS.index(part.document.url)
                inside = set(split.read(part.start, part.stop).tolist()) - {END_OF_TEXT}
                assert inside <= {number, TWICE if number == TWICE - 1 else number}
        assert {part.step for part in seen} == {step}


def test_epochs_run_on_within_a_batch(data: Path, config: TrainConfig) -> None:
    split = TokenShards.open(data).split("train")
    windows = (sum(LENGTHS) - 1) // CONTEXT
    assert windows % SEQUENCES, "some batch holds the end of an epoch and the start of the next"
    for step in range(1, STEPS + 1):
        for part in documents_of_step(split, config, step):
            assert part.epoch == ((step - 1) * SEQUENCES + part.sequence) // windows


@pytest.mark.parametrize("rewound", [False, True])
@pytest.mark.parametrize("last_step", [1, 7, STEPS])
def test_the_steps_of_a_url_are_those_that_show_it(
    data: Path, config: TrainConfig, last_step: int, rewound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "SCAN_TOKENS", 50)  # documents lie across these borders
    split = TokenShards.open(data).split("train")
    # Rewound twice: from step 11 to 6, from 33 to 30.
    batches = {s: s + (5 if s <= 30 else 8) for s in range(7, STEPS + 1)} if rewound else {}
    steps = range(1, last_step + 1)
    everything = [part for step in steps for part in documents_of_step(split, config, step, batches=batches)]
    found = 0
    for url in URLS:
        expected = [part for part in everything if part.document.url == url]
        assert steps_of_url(split, config, url, last_step=last_step, batches=batches) == expected
        found += len(expected)
    assert found == len(everything) > 0


def test_a_url_may_have_several_documents(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "SCAN_TOKENS", 7)
    split = TokenShards.open(data).split("train")
    assert [d.stop - d.start for d in documents_of_url(split, URLS[TWICE - 1])] == LENGTHS[TWICE - 1 : TWICE + 1]
    assert [d.stop - d.start for d in documents_of_url(split, URLS[10])] == [170]
    assert documents_of_url(split, "https://site1.test/") == []


def test_the_table_shows_each_part_whole(run: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(TraceConfig(run=str(run), step=5)) == 0
    lines = capsys.readouterr().out.splitlines()
    seen = documents_of_step(TokenShards.open(config.data.path).split("train"), config, 5)
    assert lines[0] == f"step 5: {SEQUENCES} sequences, {len(seen)} parts of documents"
    rows = [line.split() for line in lines if "https://" in line]
    assert [row[-1] for row in rows] == [part.document.url for part in seen], "brackets are no markup"
    assert [row[3] for row in rows] == [f"{part.start}..{part.stop}" for part in seen]


def test_a_step_that_is_to_come_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(TraceConfig(run=str(run), step=DONE)) == 0
    assert "not done yet" not in capsys.readouterr().out
    assert trace(TraceConfig(run=str(run), step=DONE + 1)) == 0
    assert f"not done yet, the run stands at step {DONE}" in capsys.readouterr().out


def test_a_url_names_its_steps(run: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(TraceConfig(run=str(run), url=URLS[7])) == 0
    out = capsys.readouterr().out
    steps = [int(line.split()[0]) for line in out.splitlines() if line.split()[-1:] == [URLS[7]]]
    split = TokenShards.open(config.data.path).split("train")
    assert steps == [part.step for part in steps_of_url(split, config, URLS[7], last_step=DONE)]
    assert len(steps) > 5


@pytest.mark.parametrize(
    ("url", "reason"),
    [("https://held.test/out", "it is in the validation split"), ("https://no.test/", "no document of .* exactly")],
)
def test_why_a_url_was_not_seen(run: Path, url: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(TraceConfig(run=str(run), url=url)) == 0
    captured = capsys.readouterr()
    assert re.search(reason, captured.err)
    assert "seen 0 times" in captured.out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"run": "", "step": 1}, "run='': must name a run's folder"),
        ({}, "exactly one is needed"),
        ({"step": 1, "url": "https://a.test/"}, "exactly one is needed"),
        ({"step": STEPS + 1}, rf"step={STEPS + 1}: must lie in 1\.\.{STEPS}"),
        ({"step": -1}, rf"step=-1: must lie in 1\.\.{STEPS}"),
    ],
)
def test_wrong_settings_are_named(run: Path, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        trace(TraceConfig(**({"run": str(run)} | options)))


def test_other_tokens_in_the_place_of_the_runs_are_refused(run: Path) -> None:
    """A step of other data would name documents that were never seen."""
    versions = json.loads((run / "versions.json").read_text())
    versions["data"]["fingerprint"] = "0" * 64
    (run / "versions.json").write_text(json.dumps(versions))
    with pytest.raises(ConfigError, match=f"trained on token shards with the fingerprint {'0' * 64}"):
        trace(TraceConfig(run=str(run), step=1))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, run: Path, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        trace(TraceConfig(run=str(tmp_path), step=1))
    (run / "versions.json").unlink()
    untrained = replace(config, data=DataConfig())
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(untrained)))
    with pytest.raises(ConfigError, match="has not trained on any data yet"):
        trace(TraceConfig(run=str(run), step=1))
