"""Test sets and a run's training shards → what share of each set's 8-grams the model was trained on.

In: the texts of test sets, and token shards. Out: for each set the number of its distinct n-grams, how many of them the
training split holds, and their share: the paper's measure (Radford et al. 2019, section 4), with exact hashes where it
has a Bloom filter. The tokens themselves are read: what was trained on, whatever became of the corpus.

The n-grams are those of the pipeline's own decontamination (`data_pipeline.clean.contamination`), so that both count
the same thing. Cost: about 10 MB of text a second and rank; blocks of documents go to the ranks in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipeline.clean.contamination import NgramFinder, ngram_finder, ngram_hashes
from data_pipeline.token_shards import TokenShards, TokenSplit
from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from gpt2train.distributed import World
from gpt2train.evaluation.work import summed

NGRAM_WORDS = 8
"""The paper's (section 4)."""
BLOCK_TOKENS = 1 << 20
"""Tokens that a rank reads at a time; a document belongs to the block in which it starts."""


def overlaps(
    sets: Mapping[str, Iterable[str]],
    shards: TokenShards,
    tokenizer: Tokenizer,
    *,
    world: World,
    told: Callable[[int, int], None] = lambda done, of: None,
    block_tokens: int = BLOCK_TOKENS,
) -> dict[str, dict[str, Any]]:
    """By the sets' names: `ngram` (words), `ngrams`, `found`, `share`, `data_fingerprint`; the same on every rank."""
    hashes = {name: _unique(ngram_hashes(text, NGRAM_WORDS) for text in texts) for name, texts in sets.items()}
    finder = ngram_finder(list(hashes.values()))
    split = shards.split("train")
    seen = np.zeros(len(finder.hashes))
    starts = range(0, split.tokens, block_tokens)
    for number, start in enumerate(starts):
        if number % world.size == world.rank:
            seen[_found(finder, split, start, min(start + block_tokens, split.tokens), tokenizer)] = 1
        told(number + 1, len(starts))
    everything = finder.hashes[summed(seen, world) > 0]
    report = {}
    for name, of_set in hashes.items():
        found = int(np.isin(of_set, everything).sum())
        report[name] = {
            "ngram": NGRAM_WORDS,
            "ngrams": len(of_set),
            "found": found,
            "share": found / len(of_set) if len(of_set) else 0.0,
            "data_fingerprint": shards.fingerprint,
        }
    return report


def _unique(hashes: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def _found(finder: NgramFinder, split: TokenSplit, start: int, stop: int, tokenizer: Tokenizer) -> np.ndarray:
    """Places in `finder.hashes` of the n-grams of the documents that start in [start, stop)."""
    hits = [np.empty(0, np.uint64)]
    for tokens in documents(split, start, stop):
        hits.append(finder.find(ngram_hashes(tokenizer.decode(tokens), NGRAM_WORDS)))
    return np.searchsorted(finder.hashes, np.unique(np.concatenate(hits)))


def documents(split: TokenSplit, start: int, stop: int, *, reach: int = 1 << 16) -> Iterator[np.ndarray]:
    """Tokens of each document that starts in [start, stop), without its `<|endoftext|>`; `reach`: read on in steps."""
    tokens = split.read(max(start - 1, 0), stop)
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    if start > 0:  # the first token is the one before the block: does a document start right behind it?
        if not len(ends):
            return
        tokens, ends = tokens[ends[0] + 1 :], ends[1:] - ends[0] - 1
    begin = 0
    for end in ends.tolist():
        yield tokens[begin:end]
        begin = end + 1
    rest = [tokens[begin:]]
    if not len(rest[0]):
        return
    while stop < split.tokens:  # the last one goes on beyond the block
        more = split.read(stop, min(stop + reach, split.tokens))
        ends = np.flatnonzero(more == END_OF_TEXT)
        rest.append(more[: ends[0]] if len(ends) else more)
        if len(ends):
            break
        stop += reach
    yield np.concatenate(rest)
