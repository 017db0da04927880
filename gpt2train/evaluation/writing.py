"""Prompts → what a model writes after them, many at a time.

In: prompts as token ids. Out: new ids of each, up to a stop string, `<|endoftext|>` or a number of tokens. The writing
itself is `generation.decoding`'s; prompts of equal length go together, so that all of each is read in one pass. A
prompt's tokens are drawn by a generator that its text alone seeds, so no order, limit or rank matters.

Cost: the prompt once, then one position a token and prompt. Shapes: B prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from gpt2train.config import ModelConfig
from gpt2train.generation.decoding import Decoding
from gpt2train.generation.sampling import GREEDY, Sampling
from gpt2train.model import GPT

NOTHING = -1
"""Stands for a token in the rows of prompts that ended before others."""


@dataclass(frozen=True)
class Writing:
    """How to write: at most so many tokens, until one of some strings, among so many likeliest (1: greedy)."""

    max_new_tokens: int
    stops: tuple[str, ...]
    top_k: int
    stops_behind_text: bool = True
    """White space before any text may hold a stop string and does not end it."""


def prompt_ids(tokenizer: Tokenizer, prompt: str, cue: str, *, limit: int, cut_end: bool) -> tuple[np.ndarray, bool]:
    """At most `limit` ids of the prompt and its cue, and whether the prompt lost its end or its start for that."""
    ids, cue_ids = tokenizer.encode(prompt), tokenizer.encode(cue)
    room = max(limit - len(cue_ids), 0)
    if len(ids) > room:
        ids = ids[:room] if cut_end else ids[len(ids) - room :]
        return np.concatenate([ids, cue_ids])[-limit:], True
    found = np.concatenate([ids, cue_ids])
    return (found if len(found) else np.array([END_OF_TEXT], np.uint16)), False


def room_for_prompt(config: ModelConfig, how: Writing) -> int:
    """Tokens of a prompt that leave room to write; at least one, and then less is written."""
    return max(config.context - how.max_new_tokens, config.context // 2, 1)


def batches(prompts: Sequence[np.ndarray], how: Writing, config: ModelConfig, *, budget: int) -> list[list[int]]:
    """Prompts by equal length, longest first, as many at once as `budget` tokens of cache hold."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    made = []
    for length in sorted(by_length, reverse=True):
        rows = max(budget // min(length + how.max_new_tokens, config.context), 1)
        of_length = by_length[length]
        made += [of_length[k : k + rows] for k in range(0, len(of_length), rows)]
    return made


def write(model: GPT, prompts: Sequence[np.ndarray], how: Writing, tokenizer: Tokenizer) -> np.ndarray:
    """float64 [B, max_new_tokens]: the ids written after the prompts, then NOTHING."""
    found = np.full((len(prompts), how.max_new_tokens), NOTHING, dtype=np.float64)
    drawn = GREEDY if how.top_k == 1 else Sampling(top_k=how.top_k)
    rows = Decoding(
        model,
        [ids.tolist() for ids in prompts],
        drawn,
        seeds=[_seed(ids) for ids in prompts],
        max_new_tokens=how.max_new_tokens,
    )
    count = [0] * len(prompts)
    for row, token in rows:
        found[row, count[row]] = token
        count[row] += 1
        if how.stops and _stop_in(text_of(found[row], tokenizer), how) is not None:
            rows.finish(row)
    return found


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of one row of `write`."""
    return tokenizer.decode(ids[ids != NOTHING].astype(np.int64))


def until_stop(text: str, how: Writing) -> str:
    """What was written before the first stop string; without white space at its ends where that does not count."""
    end = _stop_in(text, how)
    text = text if end is None else text[:end]
    return text.strip() if how.stops_behind_text else text


def _stop_in(text: str, how: Writing) -> int | None:
    """Where the first stop string begins."""
    begin = len(text) - len(text.lstrip()) if how.stops_behind_text else 0
    places = [place for stop in how.stops if (place := text.find(stop, begin)) >= 0]
    return min(places, default=None)


def _seed(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(ids.astype("<u2").tobytes()).digest()[:7], "little")
