"""A run with its shards and test sets, for tests of `evaluate`, and the plainest ways to the same numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.multiprocessing
from torch.nn import functional as F

from data_pipeline.token_writer import TokenShardWriter
from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint
from gpt2train.config import ModelConfig
from gpt2train.distributed import World
from gpt2train.model import GPT

TINY = ModelConfig("tiny", layers=2, channels=16, heads=2, context=128)
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def lively() -> GPT:
    """An untrained model whose likelihoods differ from token to token."""
    return tiny_models.lively(TINY, seed=1, spread=0.3)


def write_shards(folder: Path, texts: list[str], *, shard_tokens: int = 200) -> Path:
    tokenizer = load_tokenizer()
    folder.mkdir()
    with TokenShardWriter(folder, shard_tokens=shard_tokens, tokenizer_sha256=tokenizer.sha256) as writer:
        for i, text in enumerate(texts):
            ids = np.append(tokenizer.encode(text), np.uint16(END_OF_TEXT)).astype(np.uint16)
            digest = hashlib.sha256(text.encode()).hexdigest()
            split = "validation" if text.startswith("Held") else "train"
            writer.append(split, ids, index=i, url=f"http://d{i}.test/", digest=digest)
        writer.finish(made_from="texts of a test", settings={})
    return folder


SEEN = "Seven brave sailors crossed the wide and stormy sea before the winter came to their island."
UNSEEN = "Nobody in the quiet village had ever heard of such a strange and wonderful machine as this."


def eight_grams(text: str) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}


@pytest.fixture(name="run")
def run_fixture(tmp_path: Path) -> Path:
    """A run folder with a checkpoint and token shards that hold half of a test set."""
    model = lively()
    folder = tmp_path / "run"
    tensors = ((n, w, torch.zeros_like(w), torch.zeros_like(w)) for n, w in model.state_dict().items())
    checkpoint.save(folder, 40, tensors, {"step": 40, "tokens": 1280, "model": TINY.to_json()})
    shards = write_shards(tmp_path / "tokens", [SEEN, "Held out. " + "More words here. " * 60])
    (folder / "versions.json").write_text(json.dumps({"data": {"path": str(shards)}}))
    return folder


@pytest.fixture(name="data")
def data_fixture(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": SEEN.rstrip(".")}, {"text": UNSEEN.rstrip(".")}, {"text": "A third text of few words"}]
    (folder / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = [{"query": f"Cats and {i}", "choices": ["eat", "drink"], "gold": i % 2} for i in range(9)]
    (folder / "openbook_qa.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (folder / "ptb.test.txt").write_text(" no it was n't black monday \n but while <unk> fell \n" * 30)
    questions = [{"question": f"Who is {i}?", "answer": "Ann"} for i in range(5)]
    (folder / "triviaqa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def read_evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def plain_nats(model: GPT, tokens: np.ndarray, *, context: int, stride: int) -> float:
    """A sliding window, one at a time, from whole logits."""
    nats, done = 0.0, 0
    while done < len(tokens) - 1:
        end = min(max(done + stride, context), len(tokens) - 1)
        start = max(end - context, 0)
        ids = torch.from_numpy(tokens[start : end + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None, :-1])[0].double()
        nats += F.cross_entropy(logits, ids[1:], reduction="none")[done - start :].sum().item()
        done = end
    return nats
