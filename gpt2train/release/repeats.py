"""How often stretches of tokens occur in a split.

Flows in: a token stream, which may be far larger than memory. Flows out: counts. A stretch of `length` tokens is known
by a 64-bit hash; each pass reads the stream once, in blocks, and hashes all its stretches at about 30 million tokens a
second. Of 10 billion different stretches about three pairs share a hash by chance, so a count may be one too high.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline.token_shards import TokenSplit
from data_pipeline.tokenizer import END_OF_TEXT

BLOCK_TOKENS = 4_000_000
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number without a pattern: 2⁶⁴ over the golden ratio (Knuth, The Art of Computer Programming 3, 6.4)."""
SAMPLED_WINDOWS = 2_000_000
"""Windows kept while repeated ones are looked for, at most about."""
_TABLE = np.random.Generator(np.random.Philox(key=0)).integers(0, 2**64, 65_536, dtype=np.uint64)
"""A random number for each token id."""


def window_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """uint64[len(tokens) - length + 1]: a polynomial hash of each stretch of `length` tokens, by doubling."""
    if len(tokens) < length:
        return np.empty(0, np.uint64)
    block, block_length = _TABLE[tokens], 1
    whole, whole_length = None, 0
    left = length
    while True:
        if left & 1:
            whole = block if whole is None else _joined(whole, block[whole_length:], block_length)
            whole_length += block_length
        left >>= 1
        if not left:
            assert whole is not None
            return whole
        block, block_length = _joined(block, block[block_length:], block_length), 2 * block_length


def _joined(first: np.ndarray, then: np.ndarray, then_length: int) -> np.ndarray:
    """Hashes of a stretch and the one behind it → of both together, modulo 2⁶⁴."""
    n = min(len(first), len(then))
    factor = np.uint64(pow(int(MULTIPLIER), then_length, 2**64))
    return first[:n] * factor + then[:n]


def blocks(split: TokenSplit, overlap: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position, tokens) over the whole split; each block but the last is followed by `overlap` tokens of the next."""
    for start in range(0, split.tokens, BLOCK_TOKENS):
        yield start, split.read(start, min(start + BLOCK_TOKENS + overlap, split.tokens))


def count_windows(split: TokenSplit, positions: Sequence[int], length: int) -> list[int]:
    """How often the split holds the `length` tokens that stand at each of `positions`; at least once."""
    wanted = np.array([window_hashes(split.read(p, p + length), length)[0] for p in positions], dtype=np.uint64)
    different, which = np.unique(wanted, return_inverse=True)
    counts = np.zeros(len(different), np.int64)
    for _, tokens in blocks(split, length - 1):
        hashes = window_hashes(tokens, length)
        at = np.minimum(np.searchsorted(different, hashes), len(different) - 1)
        counts += np.bincount(at[different[at] == hashes], minlength=len(different))
    return counts[which].tolist()


def repeated_windows(split: TokenSplit, length: int, *, most: int, seed: int) -> list[int]:
    """Positions of up to `most` stretches, each in one document, that the split holds more than once.

    Whether a stretch is looked at depends on its content, so all its copies are. Those taken are spread evenly over the
    powers of two of their number of copies, as most repeated text is repeated once.
    """
    keep = max(1, split.tokens // SAMPLED_WINDOWS)
    hashes, positions = [], []
    for start, tokens in blocks(split, length - 1):
        found = window_hashes(tokens, length)
        ends = np.concatenate([[0], np.cumsum(tokens == END_OF_TEXT)])
        inside = ends[length:] == ends[: len(ends) - length]
        chosen = np.flatnonzero(inside & ((found >> np.uint64(33)) % np.uint64(keep) == 0))
        hashes.append(found[chosen])
        positions.append(chosen + start)
    if not hashes:
        return []
    _, first, copies = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
    all_positions = np.concatenate(positions)
    generator = np.random.default_rng(seed)
    by_power: dict[int, list[int]] = {}
    for i in generator.permutation(np.flatnonzero(copies > 1)):
        by_power.setdefault(int(copies[i]).bit_length(), []).append(int(all_positions[first[i]]))
    taken: list[int] = []
    while len(taken) < most and any(by_power.values()):
        for power in sorted(by_power):
            if by_power[power] and len(taken) < most:
                taken.append(by_power[power].pop())
    return sorted(taken)


def count_texts(split: TokenSplit, texts: Sequence[Sequence[int]]) -> list[int]:
    """How often the split holds each of some token sequences of three tokens or more."""
    assert all(len(text) >= 3 for text in texts)
    if not texts:
        return []
    starts = np.array([window_hashes(np.array(text[:3], np.uint16), 3)[0] for text in texts], dtype=np.uint64)
    longest = max(map(len, texts))
    counts = [0] * len(texts)
    arrays = [np.array(text, np.uint16) for text in texts]
    by_start: dict[int, list[int]] = {}
    for i, start in enumerate(starts):
        by_start.setdefault(int(start), []).append(i)
    for _, tokens in blocks(split, longest - 1):
        hashes = window_hashes(tokens, 3)[:BLOCK_TOKENS]
        for at in np.flatnonzero(np.isin(hashes, starts)):
            for i in by_start[int(hashes[at])]:
                counts[i] += bool(np.array_equal(tokens[at : at + len(arrays[i])], arrays[i]))
    return counts
