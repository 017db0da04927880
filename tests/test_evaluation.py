"""Scores against transformers, sacrebleu, rouge-score and lm-evaluation-harness; ranks, kills, contamination."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import training
from safetensors.torch import save_file
from torch.nn import functional as F

from data_pipeline.token_shards import TokenShards
from data_pipeline.token_writer import TokenShardWriter
from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint
from gpt2train.config import ModelConfig
from gpt2train.distributed import World
from gpt2train.errors import ConfigError, NonFiniteError
from gpt2train.evaluate import evaluate
from gpt2train.evaluation import contamination, likelihood, measure, metrics, sources, suite, tasks, writing
from gpt2train.evaluation.config import EvaluateCommandConfig
from gpt2train.evaluation.items import Completions, LastWord
from gpt2train.evaluation.tasks import TASKS
from gpt2train.evaluation.work import shared_out
from gpt2train.evaluation.writing import Writing
from gpt2train.generation.decoding import sample
from gpt2train.model import GPT
from gpt2train.release.card import model_card
from gpt2train.release.hf import hf_config, load_model, to_hf_state
from gpt2train.report import report

TINY = ModelConfig("tiny", layers=2, channels=16, heads=2, context=128)
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(config: ModelConfig = TINY) -> GPT:
    """An untrained model whose likelihoods differ from token to token."""
    model, generator = GPT(config, seed=1), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3, generator=generator)
        model.wte.weight[config.vocabulary :] = 0
    return model.eval()


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


# -- scores


def test_means_and_bootstraps_agree() -> None:
    values = (np.random.default_rng(1).random(400) < 0.3).astype(float)
    by_mean = metrics.mean(values)
    p = values.mean()
    assert by_mean.stderr == pytest.approx(math.sqrt(p * (1 - p) / 399))
    columns = np.stack([values, np.ones(400)], axis=1)
    by_bootstrap = metrics.of_sums(columns, lambda sums: sums[0] / sums[1])
    assert by_bootstrap.value == pytest.approx(by_mean.value)
    assert by_bootstrap.stderr == pytest.approx(by_mean.stderr, rel=0.1)
    assert metrics.of_sums(columns, lambda sums: sums[0] / sums[1]) == by_bootstrap
    assert metrics.mean(np.ones(1)).stderr is None
    assert metrics.Score(math.inf, math.nan).as_json() == {"value": None, "stderr": None}


def test_completion_scores_by_hand() -> None:
    items = [Completions((("c", " aaaa"), ("c", " bb")), 0), Completions((("c", " a"), ("c", " bbbb")), 0)]
    requests = [likelihood.Request(np.zeros(9, np.uint16), n) for n in (4, 1, 2, 1)]
    table = np.zeros((4, len(likelihood.COLUMNS)))
    table[:, likelihood.LOG_LIKELIHOOD] = [-4.0, -3.0, -1.0, -2.0]
    scores = {name: score.value for name, score in metrics.completion_scores(items, requests, table).items()}
    # Sums: the second, the first. Per character: -1 over -1.5; -1 under -.5. Per token: -1 over -3; -.5 over -2.
    assert scores == {"accuracy": 0.5, "accuracy_norm": 0.5, "accuracy_token_norm": 1.0}
    partial = [Completions((("x", " c"), ("y", " c")), 1)]
    assert list(metrics.completion_scores(partial, requests[:2], table[:2])) == ["accuracy"]


def test_answers_as_squad_compares_them() -> None:
    scores = metrics.match_scores(["The Eiffel Tower!", "in Paris"], [["eiffel tower"], ["London", "Paris, France"]])
    assert scores["exact_match"].value == 0.5
    assert scores["f1"].value == pytest.approx((1 + 0.5) / 2)


WRITTEN = ["The cat sat on the mat today.", "It is raining in the big city now.", "", "A small dog runs."]
WANTED = [["The cat is on the mat."], ["It rains in the city now."], ["Nothing."], ["A small dog runs."]]


def test_bleu_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.corpus_bleu(WRITTEN, [[refs[0] for refs in WANTED]]).score
    assert metrics.bleu_scores(WRITTEN, WANTED)["bleu"].value == pytest.approx(expected)


def test_rouge_is_of_three_sentences() -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeLsum"], use_stemmer=True)
    written, wanted = "One dog. Two dogs!\nThree cats? Four hens.", "One dog.\nThree cats."
    scores = metrics.rouge_scores([written, written], [[wanted], ["Nothing"]])
    expected = rouge.score(wanted, "One dog.\nTwo dogs!\nThree cats?")
    assert scores["rouge1"].value == pytest.approx(expected["rouge1"].fmeasure / 2)
    assert scores["rougeL"].value == pytest.approx(expected["rougeLsum"].fmeasure / 2)


# -- writing


def test_writing_together_is_writing_alone() -> None:
    """Greedy, four prompts of two lengths, also beyond the context: the tokens of `sample`, one prompt at a time."""
    model, tokenizer = lively(), load_tokenizer()
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, 50_000, size=n).astype(np.uint16) for n in (5, 5, 9, 120)]
    sampling = Writing(12, (), 1)
    made = writing.batches(prompts, sampling, model.config, budget=64)
    assert made == [[3], [2], [0, 1]]
    for batch in made:
        found = writing.write(model, [prompts[i] for i in batch], sampling, tokenizer)
        for i, row in zip(batch, found, strict=True):
            expected = list(
                sample(model, prompts[i].tolist(), max_new_tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0)
            )
            written = row[row != writing.NOTHING].astype(int).tolist()
            assert written == expected


def test_sampling_depends_on_the_prompt_alone() -> None:
    model, tokenizer = lively(), load_tokenizer()
    prompts = [np.array([i, 2, 3], np.uint16) for i in range(4)]
    sampling = Writing(10, (), 2)
    together = writing.write(model, prompts, sampling, tokenizer)
    alone = np.concatenate([writing.write(model, [ids], sampling, tokenizer) for ids in reversed(prompts)])[::-1]
    assert np.array_equal(together, alone)
    assert not np.array_equal(together, writing.write(model, prompts, Writing(10, (), 1), tokenizer))


def test_a_stop_string_ends_what_is_written() -> None:
    behind, strict = Writing(9, ("\n",), 1), Writing(9, ("\n", " x"), 1, stops_behind_text=False)
    assert writing.until_stop("\n an onion\nQuestion", behind) == "an onion"
    assert writing.until_stop(" an onion x\nQuestion", strict) == " an onion"
    assert writing.until_stop("\nonion", strict) == ""
    tokenizer, model = load_tokenizer(), lively()
    prompt = np.array([1, 2, 3], np.uint16)
    free = writing.write(model, [prompt], Writing(12, (), 1), tokenizer)[0]
    text = writing.text_of(free, tokenizer)
    stop = tokenizer.decode(free[4:5].astype(int))
    stopped = writing.write(model, [prompt], Writing(12, (stop,), 1), tokenizer)[0]
    assert stop in text
    assert (stopped != writing.NOTHING).sum() < 12
    assert writing.text_of(stopped, tokenizer) == text[: len(writing.text_of(stopped, tokenizer))]


def test_a_long_article_loses_its_end_and_keeps_its_cue() -> None:
    tokenizer = load_tokenizer()
    ids, cut = writing.prompt_ids(tokenizer, "one two three four", "\nTL;DR:", limit=6, cut_end=True)
    assert (tokenizer.decode(ids), cut) == ("one\nTL;DR:", True)
    ids, cut = writing.prompt_ids(tokenizer, "one two three four", "", limit=2, cut_end=False)
    assert (tokenizer.decode(ids), cut) == (" three four", True)
    assert writing.prompt_ids(tokenizer, "", "", limit=2, cut_end=False)[0].tolist() == [END_OF_TEXT]


# -- work that is shared out, and killed


def _blocking_work(folder: str, stop_after: int) -> None:
    done = []

    def work(i: int) -> np.ndarray:
        if len(done) == stop_after:
            multiprocessing.Event().wait()  # until it is killed
        done.append(i)
        return np.full((2, 3), i / 7)

    shared_out(work, [2] * 9, 3, world=ALONE, folder=Path(folder), key="k")


def test_work_that_was_killed_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_blocking_work, args=(str(tmp_path), 4))
    process.start()
    journal = tmp_path / "rank_0.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.is_alive()
        process.join(0.05)
    process.kill()
    process.join()
    with open(journal, "ab") as file:
        file.write(b'{"batch": 4, "rows": [[')  # as a crash in the middle of a line leaves it
    again: list[int] = []

    def work(i: int) -> np.ndarray:
        again.append(i)
        return np.full((2, 3), i / 7)

    rows = shared_out(work, [2] * 9, 3, world=ALONE, folder=tmp_path, key="k")
    assert again == [4, 5, 6, 7, 8]
    assert np.array_equal(np.concatenate(rows)[:, 0], np.repeat(np.arange(9) / 7, 2))
    again.clear()
    shared_out(work, [2] * 9, 3, world=ALONE, folder=tmp_path, key="k")
    assert again == []
    shared_out(work, [2] * 9, 3, world=ALONE, folder=tmp_path, key="other")
    assert again == list(range(9)), "results of other work count for nothing"


def _rank(rank: int, world_size: int, store: str, out: str, run: str, data: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # not used: the ranks meet at the file
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, torch.device("cpu"))
    made: list[int] = []

    def work(i: int) -> np.ndarray:
        made.append(i)
        return np.array([[i / 3, rank]])

    rows = shared_out(work, [1] * 5, 2, world=world, folder=Path(out), key="k")
    Path(out, f"{rank}.json").write_text(json.dumps([made, np.concatenate(rows).tolist()]))
    assert evaluate(of_all_kinds(run, data, f"{out}/ours")) == 0
    torch.distributed.destroy_process_group()


def of_all_kinds(run: str, data: str, out: str) -> EvaluateCommandConfig:
    return EvaluateCommandConfig(
        run=run, tasks=["lambada", "ptb", "openbookqa", "triviaqa"], task_data=[data], stride=16, batch=1, out=out
    )


def _words() -> sources.TestSet:
    items = [LastWord(f"Text {i} of the {'very ' * (i % 7)}small", f" number{i}") for i in range(40)]
    return sources.TestSet(list(items), "words", "")


def test_two_ranks_share_the_work_and_agree_with_one(run: Path, data: Path, tmp_path: Path) -> None:
    """Batches in turn, one of them done before; and the whole command writes what one process writes, bit for bit."""
    (tmp_path / "rank_7.jsonl").write_text('{"key": "k"}\n{"batch": 2, "rows": [[0.5, 9]]}\n')
    arguments = (2, str(tmp_path / "store"), str(tmp_path), str(run), str(data))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
    (made_0, rows_0), (made_1, rows_1) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert (made_0, made_1) == ([0, 3], [1, 4])
    assert rows_0 == rows_1 == [[0, 0], [1 / 3, 1], [0.5, 9], [1, 0], [4 / 3, 1]]
    assert evaluate(of_all_kinds(str(run), str(data), str(tmp_path / "alone"))) == 0
    ours, alone = read_evaluation(tmp_path / "ours"), read_evaluation(tmp_path / "alone")
    assert ours == alone
    assert all("contamination" in record for record in ours["tasks"])


def test_a_model_that_diverged_is_told() -> None:
    model = lively()
    with torch.no_grad():
        model.ln_f.weight.fill_(math.nan)
    prepared = measure.prepare(TASKS["lambada"], _words(), load_tokenizer(), TINY, stride=64, budget=256)
    with pytest.raises(NonFiniteError, match="lambada: the model's log-likelihoods are not finite"):
        measure.measure(prepared, suite.subject(model, EvaluateCommandConfig().precision), load_tokenizer())
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        writing.write(model, [np.array([1], np.uint16)], Writing(2, (), 1), load_tokenizer())


# -- contamination


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


@pytest.mark.parametrize("block_tokens", [7, 50, 1 << 20])
def test_overlap_is_counted_exactly(tmp_path: Path, block_tokens: int) -> None:
    """Against sets of strings; whatever the blocks, no document is cut and none counts twice."""
    filler = [f"Document {i} speaks of {'many ' * (i % 9)}things, of rain and of {i * i} stones." for i in range(40)]
    texts = [*filler[:20], f"As they say: {SEEN.upper()}", *filler[20:], f"Held out: {UNSEEN}"]
    shards = TokenShards.open(write_shards(tmp_path / "tokens", texts))
    sets = {"half": [SEEN, UNSEEN], "none": [UNSEEN], "short": ["Too few words"]}
    found = contamination.overlaps(sets, shards, load_tokenizer(), world=ALONE, block_tokens=block_tokens)
    train = set().union(*(eight_grams(text) for text in texts[:-1]))
    for name, of_set in sets.items():
        wanted = set().union(*(eight_grams(text) for text in of_set))
        assert (found[name]["ngrams"], found[name]["found"]) == (len(wanted), len(wanted & train))
    assert 0 < found["half"]["share"] < 1
    assert found["none"]["share"] == found["short"]["share"] == 0
    split = shards.split("train")
    starts = range(0, split.tokens, block_tokens)
    documents = [
        load_tokenizer().decode(tokens)
        for start in starts
        for tokens in contamination.documents(split, start, min(start + block_tokens, split.tokens), reach=3)
    ]
    assert documents == texts[:-1]


# -- the command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint and token shards that hold half of a test set."""
    model = lively()
    folder = tmp_path / "run"
    tensors = ((n, w, torch.zeros_like(w), torch.zeros_like(w)) for n, w in model.state_dict().items())
    checkpoint.save(folder, 40, tensors, {"step": 40, "tokens": 1280, "model": TINY.to_json()})
    shards = write_shards(tmp_path / "tokens", [SEEN, "Held out. " + "More words here. " * 60])
    (folder / "versions.json").write_text(json.dumps({"data": {"path": str(shards)}}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
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


def test_the_command_measures_and_records(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateCommandConfig(
        run=str(run), tasks=["table3", "openbookqa", "triviaqa"], task_data=[str(data)], stride=32
    )
    assert evaluate(config) == 0
    said = capsys.readouterr()
    assert "cbt_cn: left out, no folder of task_data holds cbtest_CN_valid_2000ex.txt" in said.err
    assert "45.99 %" in said.out
    first = read_evaluation(run)
    by_name = {record["name"]: record for record in first["tasks"]}
    assert list(by_name) == ["lambada", "ptb", "openbookqa", "triviaqa"]
    assert first["weights_sha256"] == measure.weights_sha256(lively())
    assert first["results"][0]["name"] == "validation"
    ptb = by_name["ptb"]
    assert ptb["units"] == 30 * 12
    tokens = np.concatenate(
        [[END_OF_TEXT], load_tokenizer().encode("no it wasn't black monday\nbut while <unk> fell\n" * 30)]
    )
    nats = plain_nats(lively(), tokens, context=128, stride=32)
    assert ptb["scores"]["perplexity"]["value"] == pytest.approx(math.exp(nats / 360), rel=1e-5)
    words = [(SEEN.rstrip("."), 0), (UNSEEN.rstrip("."), 1)]
    lambada = by_name["lambada"]
    assert lambada["items"] == 3
    wanted = eight_grams(words[0][0]) | eight_grams(words[1][0])
    assert lambada["contamination"]["ngrams"] == len(wanted)
    assert lambada["contamination"]["found"] == len(eight_grams(words[0][0]))
    assert lambada["data"]["sha256"] == hashlib.sha256((data / "lambada_test.jsonl").read_bytes()).hexdigest()
    assert not (run / "evaluation").exists()

    # Again: nothing is asked of the model. Other data or again=true, and all is.
    monkeypatch.setattr(likelihood, "score", None)
    assert evaluate(dataclasses.replace(config, validation=False, tasks=["lambada"])) == 0
    assert "lambada: measured before" in capsys.readouterr().err
    assert read_evaluation(run) == first
    with pytest.raises(TypeError):
        evaluate(dataclasses.replace(config, validation=False, tasks=["lambada"], again=True))
    corrected = (data / "openbook_qa.jsonl").read_text().replace('"gold": 1', '"gold": 0')
    (data / "openbook_qa.jsonl").write_text(corrected)
    with pytest.raises(TypeError):
        evaluate(dataclasses.replace(config, validation=False, tasks=["openbookqa"]))


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


def _killed_evaluation(run: str, data: str, after: int) -> None:
    torch.set_num_threads(1)
    real, calls = likelihood.score, []

    def score(*arguments: Any, **more: Any) -> np.ndarray:
        if len(calls) == after:
            multiprocessing.Event().wait()
        calls.append(1)
        return real(*arguments, **more)

    likelihood.score = score  # type: ignore[assignment]
    evaluate(settings_of(run, data))


def settings_of(run: str, data: str) -> EvaluateCommandConfig:
    return EvaluateCommandConfig(
        run=run, tasks=["lambada", "ptb", "openbookqa"], task_data=[data], stride=16, batch=1, validation=False
    )


def test_an_evaluation_that_was_killed_ends_as_an_undisturbed_one(run: Path, data: Path, tmp_path: Path) -> None:
    """Killed within the second task: the first is not done again, the second goes on, the record is the same."""
    undisturbed = tmp_path / "undisturbed"
    evaluate(dataclasses.replace(settings_of(str(run), str(data)), out=str(undisturbed)))
    expected = read_evaluation(undisturbed)
    batches_of_lambada = 1
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_evaluation, args=(str(run), str(data), batches_of_lambada + 3)
    )
    process.start()
    journal = run / "evaluation" / "ptb" / "rank_0.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.is_alive()
        process.join(0.05)
    process.kill()
    process.join()
    assert [record["name"] for record in read_evaluation(run)["tasks"]] == ["lambada"]
    calls = []
    real = likelihood.score
    patch = pytest.MonkeyPatch()
    patch.setattr(likelihood, "score", lambda *a, **k: calls.append(1) or real(*a, **k))
    try:
        evaluate(settings_of(str(run), str(data)))
    finally:
        patch.undo()
    assert read_evaluation(run) == expected
    model, tokenizer = lively(), load_tokenizer()
    ready = suite.prepare(
        ["lambada", "ptb", "openbookqa"],
        [str(data)],
        tokenizer,
        suite.subject(model, EvaluateCommandConfig().precision),
        config=settings_of(str(run), str(data)),
        tell=print,
    )
    assert len(ready[0].rows) == batches_of_lambada
    assert len(calls) == len(ready[1].rows) - 3 + len(ready[2].rows)


def test_an_exported_model_has_the_same_hash_and_scores(run: Path, data: Path, tmp_path: Path) -> None:
    """A Hugging Face folder, and `out` for its record; bf16 rounds; a limit is told."""
    model = lively()
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(TINY)))
    save_file(to_hf_state(model.state_dict(), TINY), folder / "model.safetensors")
    config = EvaluateCommandConfig(
        run=str(folder), tasks=["lambada"], task_data=[str(data)], out=str(tmp_path / "out"), limit=2
    )
    assert evaluate(config) == 0
    found = read_evaluation(tmp_path / "out")
    assert found["weights_sha256"] == measure.weights_sha256(model)
    (record,) = found["tasks"]
    assert (record["items"], record["of_items"]) == (2, 3)
    assert "contamination" not in record, "no training data is known"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    rounded = dataclasses.replace(config, precision=type(config.precision).bf16)
    assert evaluate(rounded) == 0
    (bf16,) = read_evaluation(tmp_path / "out")["tasks"]
    exact, near = (r["scores"]["perplexity"]["value"] for r in (record, bf16))
    assert near != exact
    assert near == pytest.approx(exact, rel=0.2)


def test_all_faults_come_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(
            EvaluateCommandConfig(
                run=str(tmp_path / "none"),
                limit=-1,
                tasks=["lambda"],
                harness_path=str(tmp_path / "no"),
                out=str(Path(__file__)),
            )
        )
    assert [fault.split("=")[0] for fault in caught.value.faults] == ["run", "limit", "harness_path", "out", "tasks"]


def test_tasks_need_gpt2s_vocabulary(tmp_path: Path, data: Path) -> None:
    small = ModelConfig("small", layers=1, channels=8, heads=1, context=16, vocabulary=100)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(small)))
    save_file(to_hf_state(GPT(small).state_dict(), small), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="its 100 tokens are fewer than GPT-2's 50257"):
        evaluate(EvaluateCommandConfig(run=str(tmp_path), tasks=["lambada"], task_data=[str(data)]))


# -- lm-evaluation-harness

LAMBADA_YAML = """task: local_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
CHOICE_YAML = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE_YAML = """task: local_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING_YAML = """task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness and what it imports warn of their own affairs
def test_lm_evaluation_harness_has_the_same_numbers(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both have a task: the harness's own code around our scoring, beside our own tasks."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yaml = tmp_path / "yaml"
    yaml.mkdir()
    for name, text, file in (
        ("lambada", LAMBADA_YAML, "lambada_test.jsonl"),
        ("choice", CHOICE_YAML, "openbook_qa.jsonl"),
        ("write", WRITE_YAML, "triviaqa.jsonl"),
        ("rolling", ROLLING_YAML, "lambada_test.jsonl"),
    ):
        (yaml / f"{name}.yaml").write_text(text.format(file=data / file))
    names = ["local_lambada", "local_choice", "local_write", "local_rolling"]
    config = EvaluateCommandConfig(
        run=str(run),
        tasks=["lambada", "openbookqa"],
        task_data=[str(data)],
        harness=names,
        harness_path=str(yaml),
        validation=False,
    )
    assert evaluate(config) == 0
    found = read_evaluation(run)
    ours = {record["name"]: {k: s["value"] for k, s in record["scores"].items()} for record in found["tasks"]}
    theirs = {name: found["harness"][name]["scores"] for name in names}
    assert theirs["local_lambada"]["perplexity,none"] == pytest.approx(ours["lambada"]["perplexity"], rel=1e-6)
    assert theirs["local_lambada"]["acc,none"] == ours["lambada"]["accuracy"]
    assert theirs["local_choice"]["acc,none"] == ours["openbookqa"]["accuracy"]
    assert theirs["local_choice"]["acc_norm,none"] == ours["openbookqa"]["accuracy_norm"]
    assert theirs["local_write"]["exact_match,none"] == 0
    texts = [json.loads(line)["text"] for line in (data / "lambada_test.jsonl").read_text().split("\n")]
    nats = [
        plain_nats(lively(), np.concatenate([[END_OF_TEXT], load_tokenizer().encode(t)]), context=128, stride=128)
        for t in texts
    ]
    expected = math.exp(sum(nats) / sum(len(t.encode()) for t in texts))
    assert theirs["local_rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)
    assert "lm-evaluation-harness" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_the_harness_does_not_know_is_told(run: Path) -> None:
    """Reading the names of all its tasks takes it long."""
    with pytest.raises(ConfigError, match=r"harness=no_such_task: lm-evaluation-harness .* has no such task"):
        evaluate(EvaluateCommandConfig(run=str(run), harness=["no_such_task"], validation=False))


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


def test_scores_are_in_the_report_and_in_the_model_card(run: Path, data: Path) -> None:
    """The report has the table, escaped, beside GPT-2's sizes; the model card each main score with its overlap."""
    (run / "config.yaml").write_text("run_dir: x\n")
    evaluate(EvaluateCommandConfig(run=str(run), tasks=["lambada"], task_data=[str(data)], validation=False))
    found = read_evaluation(run)
    found["tasks"][0]["title"] = "LAMBADA <b>"
    (run / "evaluation.json").write_text(json.dumps(found))
    lines = [
        {"step": s, "loss": 9.0, "lambada/accuracy_last_token": s / 9, "copa/accuracy": 0.5, "ptb/perplexity": 90.0}
        for s in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run).read_text()
    assert "lambada/accuracy_last_token" in page
    assert "ptb/perplexity" in page
    assert "LAMBADA &lt;b&gt;" in page
    assert "45.99 %" in page
    assert "1542M" in page
    assert tasks.TASKS["lambada"].source.split(",")[0] in page
    newest = run / "checkpoints" / "step_00000040"
    card = model_card(newest, checkpoint.read_state(newest))
    assert r"accuracy\_last\_token (3 items, 47.37% of its 8-grams in the training data) | 0.00 % ± 0.00 %" in card


# -- while a model trains


def test_tasks_while_training(tmp_path: Path, data: Path) -> None:
    """Two ranks at ZeRO 3: the scores in metrics.jsonl are those of `evaluate` on the checkpoint of the same step."""
    tokens = training.write_tokens(tmp_path / "tokens")
    settings = training.TINY | {
        "data.path": str(tokens),
        "run_dir": str(tmp_path / "run"),
        "steps": 4,
        "zero.stage": 3,
        "evaluate.every_steps": 0,
        "evaluate.tasks": ["lambada", "ptb", "openbookqa"],
        "evaluate.task_data": [str(data)],
        "evaluate.tasks_every_steps": 2,
        "checkpoint.every_steps": 2,
    }
    ranks = training.Ranks(tmp_path / "ranks", [{"train": settings}], 2)
    assert ranks.wait() == [0, 0], ranks.stderr()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n") if line]
    scores = {line["step"]: line for line in lines if "lambada/accuracy_last_token" in line}
    assert sorted(scores) == [2, 4]
    for step in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08}"
        config = EvaluateCommandConfig(
            run=str(folder),
            tasks=["lambada", "ptb", "openbookqa"],
            task_data=[str(data)],
            stride=8,
            out=str(tmp_path / f"out{step}"),
            validation=False,
            contamination=False,
        )
        assert evaluate(config) == 0
        for record in read_evaluation(tmp_path / f"out{step}")["tasks"]:
            for metric in {record["metric"], *(p["metric"] for p in record["published"])}:
                found = scores[step][f"{record['name']}/{metric}"]
                assert found == pytest.approx(record["scores"][metric]["value"], rel=1e-4)
    assert scores[2]["ptb/perplexity"] != scores[4]["ptb/perplexity"]
