"""What was measured item by item → a task's scores, each with its standard error.

In: arrays of one row an item. Out: scores by name. Every score is a function of column sums: a mean of zeros and ones,
the exponential of a mean, BLEU of counts. Means have the error of a mean (binomial for zeros and ones); for all others
the items are drawn anew with replacement 1,000 times (Efron 1979), from a fixed seed, so the error repeats exactly.

ROUGE comes from rouge-score and BLEU from sacrebleu, the two that papers cite: `pip install gpt2train[eval]`.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2train.evaluation.items import Completions, TaskDataError
from gpt2train.evaluation.likelihood import (
    GREEDY,
    GREEDY_FILTERED,
    LAST_GREEDY,
    LAST_LOG_LIKELIHOOD,
    LOG_LIKELIHOOD,
    Request,
)

RESAMPLES = 1000
SUMMARY_SENTENCES = 3
"""Sentences of what was written that count as the summary (the paper, section 3.6)."""


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None
    """None where there is one item alone."""

    def as_json(self) -> dict[str, float | None]:
        """Numbers that are not finite become null."""
        numbers = {"value": self.value, "stderr": self.stderr}
        return {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}


def mean(values: np.ndarray) -> Score:
    """The mean of values[items] with the sample's standard error; of zeros and ones that is the binomial one."""
    n = len(values)
    return Score(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None)


def of_sums(columns: np.ndarray, value: Callable[[np.ndarray], float]) -> Score:
    """`value` of the column sums of columns[items, k]; the error by bootstrap over the items."""
    n = len(columns)
    whole = value(columns.sum(axis=0))
    if n < 2:
        return Score(whole, None)
    generator = np.random.default_rng(0)
    drawn = [
        value(generator.multinomial(n, np.full(n, 1 / n)) @ columns)  # how often each item was drawn
        for _ in range(RESAMPLES)
    ]
    return Score(whole, float(np.std(drawn, ddof=1)))


def perplexity(nats: np.ndarray) -> Score:
    """exp of the mean of nats[items]."""
    return of_sums(np.stack([nats, np.ones_like(nats)], axis=1), lambda sums: exp(sums[0] / sums[1]))


def exp(x: float) -> float:
    """e^x, infinite where a float cannot hold it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


# ------------------------------------------------------------------------------------------------------- likelihood


def completion_scores(items: Sequence[Completions], requests: Sequence[Request], table: np.ndarray) -> dict[str, Score]:
    """accuracy, accuracy_norm, accuracy_token_norm; requests and table[requests, columns] item by item, pair by pair.

    Of partial scoring, where all completions of an item are one, accuracy alone.

    The first of equally likely completions is taken. Characters count without the space that parts a completion from
    its context, as in lm-evaluation-harness.
    """
    right = np.empty((len(items), 3))
    begin = 0
    for k, item in enumerate(items):
        count = len(item.pairs)
        nats = table[begin : begin + count, LOG_LIKELIHOOD]
        characters = np.array([max(len(continuation.removeprefix(" ")), 1) for _, continuation in item.pairs])
        tokens = np.array([request.predicted for request in requests[begin : begin + count]])
        right[k] = [int(np.argmax(likely)) == item.gold for likely in (nats, nats / characters, nats / tokens)]
        begin += count
    names = ["accuracy", "accuracy_norm", "accuracy_token_norm"]
    if all(len({continuation for _, continuation in item.pairs}) == 1 for item in items):
        names = names[:1]
    return {name: mean(right[:, column]) for column, name in enumerate(names)}


def last_word_scores(table: np.ndarray) -> dict[str, Score]:
    """Of whole last words, with and without the stop-word filter, and of the last tokens."""
    return {
        "perplexity": perplexity(-table[:, LOG_LIKELIHOOD]),
        "accuracy": mean(table[:, GREEDY]),
        "accuracy_stop_words": mean(table[:, GREEDY_FILTERED]),
        "perplexity_last_token": perplexity(-table[:, LAST_LOG_LIKELIHOOD]),
        "accuracy_last_token": mean(table[:, LAST_GREEDY]),
    }


def stretch_scores(requests: Sequence[Request], table: np.ndarray, *, unit: str, per_token: float) -> dict[str, Score]:
    """Of a text's windows; `per_token`: units of the original for each of the model's tokens."""
    counts = np.array([request.predicted for request in requests], dtype=np.float64)
    columns = np.stack([-table[:, LOG_LIKELIHOOD], counts], axis=1)
    by_token = of_sums(columns, lambda sums: exp(sums[0] / sums[1]))
    if unit == "word":
        by_unit = {"perplexity": of_sums(columns, lambda sums: exp(sums[0] / (sums[1] * per_token)))}
    else:
        in_bits = of_sums(columns, lambda sums: float(sums[0] / (sums[1] * per_token) / math.log(2)))
        by_unit = {f"bits_per_{unit}": in_bits}
    return by_unit | {"perplexity_per_token": by_token}


# ------------------------------------------------------------------------------------------------------- generation


def written_scores(how: str, written: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Score]:
    """`how`: match, rouge or bleu. `answers[i]`: those that are right for `written[i]`. Raises TaskDataError."""
    return {"match": match_scores, "rouge": rouge_scores, "bleu": bleu_scores}[how](written, answers)


def match_scores(written: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Exact match and F1 of words, normalized as SQuAD does (Rajpurkar et al. 2016, section 6.1); the best answer's."""
    pairs = [
        [(normalized(text), normalized(answer)) for answer in of_item]
        for text, of_item in zip(written, answers, strict=True)
    ]
    exact = np.array([max(float(a == b) for a, b in of_item) for of_item in pairs])
    overlap = np.array([max(word_f1(a.split(), b.split()) for a, b in of_item) for of_item in pairs])
    return {"exact_match": mean(exact), "f1": mean(overlap)}


def normalized(text: str) -> str:
    """Small letters, no punctuation, no articles, single spaces."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def word_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """2·P·R / (P + R) of two bags of words; of two empty ones 1."""
    if not found or not wanted:
        return float(found == wanted)
    common = sum(min(found.count(word), wanted.count(word)) for word in set(found))
    return 2 * common / (len(found) + len(wanted))


def rouge_scores(written: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Score]:
    """F1 of ROUGE-1, -2 and -L of the first three sentences (Lin 2004), and their mean."""
    scorer = _package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(
        ["rouge1", "rouge2", "rougeLsum"], use_stemmer=True
    )
    columns = np.empty((len(written), 3))
    for i, (text, of_item) in enumerate(zip(written, answers, strict=True)):
        found = scorer.score_multi(list(of_item), "\n".join(sentences(text)[:SUMMARY_SENTENCES]))
        columns[i] = [found[name].fmeasure for name in ("rouge1", "rouge2", "rougeLsum")]
    scores = {name: mean(columns[:, k]) for k, name in enumerate(("rouge1", "rouge2", "rougeL"))}
    return scores | {"rouge_mean": mean(columns.mean(axis=1))}


def sentences(text: str) -> list[str]:
    """Cut behind . ! ? and at line ends."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def bleu_scores(written: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Corpus BLEU, 0 to 100, as sacrebleu has it by default (13a tokens, exponential smoothing; Post 2018)."""
    bleu = _package("sacrebleu.metrics", "sacrebleu").BLEU
    counter = bleu(effective_order=True)
    rows = []
    for text, of_item in zip(written, answers, strict=True):
        found = counter.sentence_score(text, list(of_item))
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def corpus(sums: np.ndarray) -> float:
        counts = sums.astype(int).tolist()  # sacrebleu writes them as whole numbers
        return float(bleu.compute_bleu(counts[:4], counts[4:8], *counts[8:], smooth_method="exp").score)

    return {"bleu": of_sums(np.array(rows, dtype=np.float64), corpus)}


def _package(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise TaskDataError(
            f"{package} is not installed; `pip install gpt2train[eval]`, or leave the task out"
        ) from None
