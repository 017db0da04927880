"""Likelihoods against transformers and GLTR's published ones, token by token; batches that change no number."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from evaluations import lively
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.evaluation import likelihood, measure, sources
from gpt2train.evaluation.items import Completions
from gpt2train.evaluation.tasks import TASKS
from gpt2train.release.hf import load_model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A GPT2LMHeadModel, and the folder that transformers saved it to."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=128, initializer_range=0.3, attn_implementation="eager")
    ).eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


# -- the same weights, ours and transformers'


@torch.no_grad()
def their_log_likelihood(model: Any, tokens: np.ndarray, predicted: int) -> tuple[float, bool]:
    """One sequence at a time, its softmax in float64."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    log_p = model(ids[None, :-1], logits_to_keep=predicted).logits[0].double().log_softmax(-1)
    wanted = ids[-predicted:]
    return log_p.gather(1, wanted[:, None]).sum().item(), bool((log_p.argmax(-1) == wanted).all())


def our_table(folder: Path, name: str, items: list[Any], budget: int = 1024) -> tuple[list[Any], np.ndarray]:
    model, tokenizer = load_model(folder), load_tokenizer()
    test_set = sources.TestSet(items, "a test", "")
    prepared = measure.prepare(TASKS[name], test_set, tokenizer, model.config, stride=64, budget=budget)
    found = [
        likelihood.score(likelihood.plain_forward(model), batch, prepared.requests, device="cpu")
        for batch in prepared.rows
    ]
    return prepared.requests, likelihood.scattered(prepared.rows, found, len(prepared.requests))


@pytest.mark.parametrize(("name", "count"), [("lambada", 500), ("hellaswag", 200)])
def test_log_likelihoods_equal_transformers(shared: Path, theirs: tuple[Any, Path], name: str, count: int) -> None:
    """Tokens cut and joined by transformers' own tokenizer's rule: all of context and continuation, encoded once."""
    model, folder = theirs
    found = sources.find(TASKS[name], [str(shared / "eval")])
    assert found is not None
    items = sources.read(TASKS[name], found).items[:count]
    requests, table = our_table(folder, name, items)
    tokenizer = load_tokenizer()
    pairs = [
        pair
        for item in items
        for pair in (item.pairs if isinstance(item, Completions) else [(item.context, item.word)])
    ]
    assert len(pairs) == len(requests) == count * (1 if name == "lambada" else 4)
    for (context, continuation), row, request in zip(pairs, table, requests, strict=True):
        whole, bare = tokenizer.encode(context + continuation), tokenizer.encode(context)
        predicted = len(whole) - len(bare)
        expected, greedy = their_log_likelihood(model, whole[-129:], predicted)
        assert row[likelihood.LOG_LIKELIHOOD] == pytest.approx(expected, abs=1e-4)
        assert row[likelihood.GREEDY] == greedy
        assert request.truncated == (len(whole) > 129)


@pytest.mark.parametrize("count", [6_000, pytest.param(258_659, marks=pytest.mark.soak)])
def test_wikitext_equals_transformers(shared: Path, theirs: tuple[Any, Path], count: int) -> None:
    """WikiText-2's validation set by a sliding window over the raw file, each token predicted once."""
    model, folder = theirs
    text = (shared / "lm" / "wikitext-2_valid.txt").read_text(encoding="utf-8")
    tokenizer = load_tokenizer()
    tokens = np.concatenate([[END_OF_TEXT], tokenizer.encode(text)]).astype(np.uint16)
    assert len(tokens) == 258_660
    ours = load_model(folder)
    requests = likelihood.windows(tokens[: count + 1], context=128, stride=64)
    rows = likelihood.batches(requests, budget=1024)
    found = [likelihood.score(likelihood.plain_forward(ours), batch, requests, device="cpu") for batch in rows]
    table = likelihood.scattered(rows, found, len(requests))
    assert sum(request.predicted for request in requests) == count
    for request, row in zip(requests, table, strict=True):
        expected, _ = their_log_likelihood(model, request.tokens, request.predicted)
        assert row[likelihood.LOG_LIKELIHOOD] == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_the_filter_and_the_last_token(theirs: tuple[Any, Path]) -> None:
    """Columns of last words, from whole logits: the first choice that is no stop word, and the last token alone."""
    model, folder = theirs
    ours, tokenizer = load_model(folder), load_tokenizer()
    ids = tokenizer.encode("The king went to his old")
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    requests = [likelihood.Request(np.append(ids, np.uint16(token)), 1) for token in (best, second)]
    rows = likelihood.batches(requests, budget=1024)
    assert len(rows) == 1, "the same input is one row"
    assert len(rows[0]) == 1
    for filtered, expected in ((None, [1, 0]), (torch.tensor([best]), [0, 1]), (torch.tensor([best, second]), [0, 0])):
        table = likelihood.score(likelihood.plain_forward(ours), rows[0], requests, device="cpu", filtered=filtered)
        assert table[:, likelihood.GREEDY].tolist() == [1, 0]
        assert table[:, likelihood.GREEDY_FILTERED].tolist() == expected
        assert table[:, likelihood.LAST_LOG_LIKELIHOOD].tolist() == table[:, likelihood.LOG_LIKELIHOOD].tolist()
    stop = likelihood.first_tokens(tokenizer, ["the", "unbelievableness"])
    assert [tokenizer.decode([token]) for token in stop.tolist()] == [" the", " The"]


def test_inputs_that_begin_others_share_their_rows() -> None:
    """Four requests, two of them within others: two rows, and each number as when it is asked alone."""
    model = lively()
    tokens = np.arange(1000, 1040, dtype=np.uint16)
    requests = [
        likelihood.Request(tokens[:20], 3),
        likelihood.Request(np.append(tokens[:9], np.uint16(7)), 1),
        likelihood.Request(tokens, 39),
        likelihood.Request(tokens[5:30], 2),
    ]
    rows = likelihood.batches(requests, budget=10_000)
    assert [[row.requests for row in batch] for batch in rows] == [[[0, 1, 2], [3]]]
    together = likelihood.scattered(
        rows, [likelihood.score(likelihood.plain_forward(model), rows[0], requests, device="cpu")], 4
    )
    for i, request in enumerate(requests):
        ((row,),) = likelihood.batches([request], budget=1)
        alone = likelihood.score(likelihood.plain_forward(model), [row], [request], device="cpu")
        assert together[i] == pytest.approx(alone[0], abs=1e-4)


def test_batches_keep_their_bounds() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 200, size=300)
    requests = [
        likelihood.Request(generator.integers(0, 50_000, size=n).astype(np.uint16), 1 + n // 3) for n in lengths
    ]
    rows = likelihood.batches(requests, budget=1000)
    assert sorted(i for batch in rows for row in batch for i in row.requests) == list(range(300))
    for batch in rows:
        longest = max(len(row.tokens) for row in batch)
        assert longest * len(batch) <= 1000 or len(batch) == 1
    padded = sum(max(len(row.tokens) for row in batch) * len(batch) for batch in rows)
    assert padded < 1.05 * sum(len(request.tokens) - 1 for request in requests), "like lengths stand together"


@pytest.mark.parametrize(
    ("context", "continuation", "predicted"),
    [("Hello", " world", 1), ("Hello ", "world", 1), ("", "Hello world", 2), ("Hel", "lo", 1), ("a\n\n", "b", 3)],
)
def test_where_a_continuation_begins(context: str, continuation: str, predicted: int) -> None:
    tokenizer = load_tokenizer()
    made = likelihood.request(tokenizer, context, continuation, limit=10)
    whole = tokenizer.encode(context + continuation).tolist()
    start = [END_OF_TEXT] if len(whole) == predicted else []
    assert made.tokens.tolist() == start + whole
    assert made.predicted == predicted


# -- GLTR: GPT-2's own numbers for known texts


def gltr_files(shared: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((shared / "gltr").glob("*.json"))]


def byte_signs() -> dict[str, int]:
    """GPT-2's printable sign of each byte → the byte (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def test_gltrs_pieces_are_ours(shared: Path) -> None:
    tokenizer, signs = load_tokenizer(), byte_signs()
    for file in gltr_files(shared):
        pieces = file["result"]["bpe_strings"]
        assert pieces[0] == "<|endoftext|>"
        ours = [tokenizer.decode_bytes([i]) for i in tokenizer.encode(file["request"]["text"]).tolist()]
        assert ours == [bytes(signs[sign] for sign in piece) for piece in pieces[1:]]


@pytest.mark.skipif(
    "GPT2TRAIN_GPT2_SMALL" not in os.environ,
    reason="GPT2TRAIN_GPT2_SMALL does not name a folder with OpenAI's 124M weights in Hugging Face format",
)
def test_gltrs_ranks_and_probabilities_are_ours(shared: Path) -> None:
    """Rank (0: the likeliest) and probability of every token, as GLTR had them from GPT-2 117M."""
    model, tokenizer = load_model(os.environ["GPT2TRAIN_GPT2_SMALL"]), load_tokenizer()
    for file in gltr_files(shared):
        ids = np.concatenate([[END_OF_TEXT], tokenizer.encode(file["request"]["text"])]).astype(np.int64)[:1024]
        with torch.no_grad():
            p = model(torch.from_numpy(ids[None, :-1]))[0].double().softmax(-1)
        own = p.gather(1, torch.from_numpy(ids[1:, None]))
        ranks = (p > own).sum(-1)
        wanted = file["result"]["real_topk"][: len(ids) - 1]
        assert own[:, 0].tolist() == pytest.approx([w[1] for w in wanted], abs=2e-4)
        assert sum(a != w[0] for a, w in zip(ranks.tolist(), wanted, strict=True)) <= len(wanted) // 100
