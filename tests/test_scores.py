"""Items' numbers → scores, against sacrebleu, rouge-score and by hand; and what a model writes, many at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evaluations import lively
from tiny_models import one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.evaluation import likelihood, metrics, writing
from gpt2train.evaluation.items import Completions
from gpt2train.evaluation.writing import Writing
from gpt2train.generation.decoding import sample

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
