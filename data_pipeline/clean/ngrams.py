"""Words of a text → 64-bit hashes of its word n-grams; what deduplication and the contamination report count with.

In: normalized text, words parted by single spaces. Out: uint64 arrays. The function is fixed by `HASH_VERSION` and by
nothing else: integer arithmetic modulo 2^64, the same on every machine, in every process and version of a library.
Cost: about 20 µs a kilobyte.

A word's hash is a polynomial over its UTF-8 bytes, an n-gram's a sum of its mixed word hashes with one odd multiplier
for each place; both are mixed by the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 19). Two
different n-grams meet with a probability of about 2^-64 in ordinary text; the function is no defense against text made
to collide.
"""

from __future__ import annotations

import numpy as np

HASH_VERSION = 1

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: SplitMix64's increment
_BASE = 0xD1342543DE82EF95  # odd; a multiplier of good spectral score (Steele and Vigna, arXiv:2001.05304)
_MASK = (1 << 64) - 1


def splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, element by element: uint64 → uint64, one to one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_uint64(count: int, seed: int) -> np.ndarray:
    """The first `count` outputs of SplitMix64 from `seed`; constants that need no table."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return splitmix(steps + np.uint64(seed & _MASK))


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_CHUNK = 1 << 16
# base^i and base^-i modulo 2^64 (an odd number has an inverse), for the places of a stretch of text.
_UP, _DOWN = _powers(_BASE, _CHUNK), _powers(pow(_BASE, -1, 1 << 64), _CHUNK)


def hash_words(normalized: str) -> np.ndarray:
    """uint64[words]: the hash of each word of a text whose words are parted by single spaces."""
    if not normalized:
        return np.empty(0, np.uint64)
    data = np.frombuffer(normalized.encode(), np.uint8)
    ends = np.append(np.flatnonzero(data == 32), len(data))
    starts = np.append(0, ends[:-1] + 1)
    # Prefix sums of byte * base^place; places start anew in each chunk, so that the tables stay small, and a word
    # over a chunk's edge is put together from its parts.
    places = np.arange(len(data), dtype=np.int64)
    terms = (data.astype(np.uint64) + np.uint64(1)) * _power_at(places)
    sums = np.append(np.uint64(0), np.add.accumulate(terms))
    return splitmix((sums[ends] - sums[starts]) * _inverse_power_at(starts))


def _power_at(places: np.ndarray) -> np.ndarray:
    low = _UP[places % _CHUNK]
    return low if places[-1] < _CHUNK else low * _chunk_powers(_BASE, places)


def _inverse_power_at(places: np.ndarray) -> np.ndarray:
    low = _DOWN[places % _CHUNK]
    return low if places[-1] < _CHUNK else low * _chunk_powers(pow(_BASE, -1, 1 << 64), places)


def _chunk_powers(base: int, places: np.ndarray) -> np.ndarray:
    """base^(_CHUNK * (place // _CHUNK)): what the tables lack for places beyond their end."""
    chunks = places // _CHUNK
    return _powers(pow(base, _CHUNK, 1 << 64), int(chunks[-1]) + 1)[chunks]


def hash_ngrams(normalized: str, n: int) -> np.ndarray:
    """uint64[max(0, words - n + 1)]: the hash of each run of `n` words, in their order."""
    return hash_runs(hash_words(normalized), n)


def hash_runs(words: np.ndarray, n: int) -> np.ndarray:
    """`hash_ngrams` of a text by its words' hashes (uint64[words], `hash_words`)."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for place, multiplier in enumerate(random_uint64(n, seed=n) | np.uint64(1)):
        total += words[place : place + count] * multiplier
    return splitmix(total)
