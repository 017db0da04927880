"""Token shards → the batch of a step, from seed and step alone.

A split of T tokens holds (T - 1) // context windows; window i is the tokens [i·context, i·context + context], one more
than the context so that every position has a target. An epoch visits each window once, in an order that only the seed
and the epoch's number decide. Batches are cut from the endless row of epochs, so a batch may hold the end of one and
the start of the next, and nothing depends on the number of GPUs, on accumulation or on restarts.

An order is a keyed permutation that is computed where it is needed: 512 windows of 10 billion cost as much as 512 of a
thousand, and no shuffled list is held or saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_pipeline.token_shards import TokenSplit

FEISTEL_ROUNDS = 8
"""Four rounds make a pseudo-random permutation of ideal round functions (Luby and Rackoff 1988, SIAM J. Comput. 17(2));
twice that for a mixing function that is fast rather than ideal."""

# The 64-bit finalizer "Mix13" of Stafford (2011), as used in SplitMix64 (Steele, Lea and Flood 2014, OOPSLA).
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = 2**64 - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 → uint64, a bijection in which every input bit moves about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def derive_seed(*numbers: int) -> int:
    """A 64-bit key from whole numbers, in order."""
    key = 0
    for number in numbers:
        key = int(_mix(np.array([((key ^ (number & _MASK_64)) + _GOLDEN) & _MASK_64], dtype=np.uint64))[0])
    return key


def permute(positions: np.ndarray, size: int, *, seed: int, epoch: int, inverse: bool = False) -> np.ndarray:
    """Where `positions` of 0..size-1 go in this epoch's permutation: int64 → int64, same shape.

    A Feistel network over the smallest power of two that holds `size`, walked on until the value is below `size`
    ("cycle walking", Black and Rogaway 2002, CT-RSA), which keeps it a permutation; fewer than two walks on average.
    `inverse`: where they come from; the rounds in the other order undo each walk.
    """
    bits = max((size - 1).bit_length(), 2)
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [(number, np.uint64(derive_seed(seed, epoch, size, number))) for number in range(FEISTEL_ROUNDS)]
    if inverse:
        keys.reverse()

    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        walking = result[outside]
        low, high = walking & low_mask, walking >> low_bits
        for number, key in keys:
            # The halves may differ by a bit, so they are changed in turn instead of being swapped.
            if number % 2 == 0:
                high ^= _mix(low ^ key) & high_mask
            else:
                low ^= _mix(high ^ key) & low_mask
        result[outside] = (high << low_bits) | low
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


class BatchOrder:
    """Which windows a step's global batch holds, in order, for ever.

        order = BatchOrder(seed=1337, windows=len(token_windows), sequences=512)
        order.indices(0)    # int64 [512]: the first step's windows

    Raises ValueError when there is no window.
    """

    def __init__(self, seed: int, windows: int, sequences: int) -> None:
        if windows < 1:
            raise ValueError(f"windows={windows}: must be above 0; give a longer corpus or a smaller model.context")
        if sequences < 1:
            raise ValueError(f"sequences={sequences}: must be above 0; give batch.sequences=512")
        self.seed, self.windows, self.sequences = seed, windows, sequences

    def indices(self, step: int) -> np.ndarray:
        """Windows of the global batch of `step` (counted from 0), int64 [sequences]."""
        row = step * self.sequences + np.arange(self.sequences, dtype=np.int64)
        epochs, positions = row // self.windows, row % self.windows
        result = np.empty_like(row)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            result[inside] = permute(positions[inside], self.windows, seed=self.seed, epoch=epoch)
        return result

    def places(self, windows: np.ndarray, epoch: int) -> np.ndarray:
        """Where in the endless row of sequences `windows` stand in `epoch` (both counted from 0): int64, same shape.

        Place p belongs to step p // sequences, as its sequence p % sequences.
        """
        return epoch * self.windows + permute(windows, self.windows, seed=self.seed, epoch=epoch, inverse=True)

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, that the first sequence of `step` belongs to."""
        return step * self.sequences // self.windows


class TokenWindows:
    """A split as windows of `context` + 1 tokens; the last token of a window is the first of the next.

    Tokens behind the last whole window are left out. Nothing is copied until a window is read.
    """

    def __init__(self, split: TokenSplit, context: int) -> None:
        self.split, self.context = split, context

    def __len__(self) -> int:
        return max(self.split.tokens - 1, 0) // self.context

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`: uint16 [context + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index}: there are {len(self)}")
        start, stop = self.span(index)
        return self.split.read(start, stop)

    def span(self, index: int) -> tuple[int, int]:
        """The window's tokens [start, stop) in the split, the last target included."""
        start = index * self.context
        return start, start + self.context + 1

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Windows → int64 [len(indices), context + 1]; inputs are `[:, :-1]`, targets `[:, 1:]`."""
        return np.stack([self[int(index)] for index in indices]).astype(np.int64)


def micro_batches(
    indices: np.ndarray, *, micro: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """A rank's share of a global batch, as (place in the global batch, window indices [micro]) for each forward pass.

    The batch is dealt out as [accumulation, rank, micro], so the same sequences stand together whatever the number of
    ranks, and `place` names a forward pass of the global batch without regard to who makes it.
    """
    assert indices.shape[0] % (micro * world_size) == 0
    for place in range(rank, indices.shape[0] // micro, world_size):
        yield place, indices[place * micro : (place + 1) * micro]
