"""The batch of a step: every window once an epoch, from seed and step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import write_tokens

from data_pipeline.token_shards import TokenShards
from gpt2train.data import BatchOrder, TokenWindows, micro_batches, permute


class Counting:
    """range(n) as a token split."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.tokens
        return np.arange(start, stop, dtype=np.uint16)


def counting(tokens: int, context: int) -> TokenWindows:
    split: Any = Counting(tokens)
    return TokenWindows(split, context)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 31, 64, 65, 1000, 4096, 4097, 100_003])
def test_an_epoch_is_a_permutation(size: int) -> None:
    for seed, epoch in ((0, 0), (1337, 7), (-5, 2**40)):
        assert np.array_equal(np.sort(permute(np.arange(size), size, seed=seed, epoch=epoch)), np.arange(size))
        moved = permute(np.arange(size), size, seed=seed, epoch=epoch)
        assert np.array_equal(permute(moved, size, seed=seed, epoch=epoch, inverse=True), np.arange(size))


@given(st.integers(1, 2**40), st.integers(0, 2**63 - 1), st.integers(0, 2**20), st.data())
def test_positions_stay_apart_in_spaces_too_large_to_list(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    moved = permute(np.array(positions), size, seed=seed, epoch=epoch)
    assert len(set(moved.tolist())) == len(positions)
    assert moved.min() >= 0
    assert moved.max() < size


def test_permutations_look_uniform() -> None:
    """Where position 0 goes, and who its neighbour is: chi-square over 12 places, 4,000 epochs."""
    size, epochs = 12, 4000
    rows = np.stack([permute(np.arange(size), size, seed=1, epoch=e) for e in range(epochs)])
    for values in (rows[:, 0], rows[:, 7], (rows[:, 3] - rows[:, 4]) % size):
        counts = np.bincount(values, minlength=size)
        counts = counts[counts > 0]  # a difference is never 0
        expected = epochs / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 40  # p < 1e-4 at 11 degrees of freedom


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [permute(np.arange(500), 500, seed=s, epoch=e).tolist() for s in (0, 1, 2) for e in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9


@pytest.mark.parametrize(("windows", "sequences"), [(100, 8), (97, 8), (7, 8), (3, 16), (1, 4), (64, 64)])
def test_every_window_once_an_epoch_across_batch_borders(windows: int, sequences: int) -> None:
    order = BatchOrder(3, windows, sequences)
    steps = -(-windows * 5 // sequences)
    row = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(5):
        assert np.array_equal(np.sort(row[epoch * windows : (epoch + 1) * windows]), np.arange(windows))
    for step in range(steps):
        assert order.epoch(step) == step * sequences // windows


def test_a_window_knows_its_places() -> None:
    order = BatchOrder(7, windows=10**10, sequences=512)
    for step in (0, 5, 10**8):  # the last one is in another epoch
        indices = order.indices(step)
        epochs = (step * 512 + np.arange(512)) // order.windows
        assert len(set(epochs.tolist())) == 1
        assert np.array_equal(order.places(indices, int(epochs[0])), step * 512 + np.arange(512))


def test_a_batch_needs_no_history() -> None:
    far = BatchOrder(3, 10**10, 512)
    assert np.array_equal(far.indices(123_456_789), BatchOrder(3, 10**10, 512).indices(123_456_789))
    assert not np.array_equal(far.indices(0), far.indices(1))


def test_tokens_are_seen_once_with_their_successors() -> None:
    context = 5
    windows = counting(1 + 40 * context + 3, context)
    assert len(windows) == 40
    order = BatchOrder(1, len(windows), 10)
    rows = np.concatenate([windows.read(order.indices(step)) for step in range(4)])
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows[:, :-1].flatten()), np.arange(40 * context))
    assert np.array_equal(rows[:, 1:], rows[:, :-1] + 1)


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (5, 0), (6, 1), (10, 1), (11, 2)])
def test_a_window_needs_its_last_target(tokens: int, windows: int) -> None:
    assert len(counting(tokens, 5)) == windows


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1), (2, 1)])
def test_ranks_share_the_same_batch(world_size: int, micro: int) -> None:
    indices = BatchOrder(2, 1000, 8).indices(5)
    dealt: dict[int, np.ndarray] = {}
    for rank in range(world_size):
        shares = list(micro_batches(indices, micro=micro, rank=rank, world_size=world_size))
        assert len(shares) == 8 // micro // world_size
        for place, share in shares:
            assert place not in dealt
            dealt[place] = share
    # The same forward passes whatever the number of ranks: place names the sequences.
    assert np.array_equal(np.concatenate([dealt[p] for p in sorted(dealt)]), indices)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="windows=0: must be above 0"):
        BatchOrder(0, 0, 8)
    with pytest.raises(ValueError, match="sequences=0: must be above 0"):
        BatchOrder(0, 8, 0)
    with pytest.raises(IndexError, match="window 1: there are 1"):
        counting(6, 5)[1]


def test_windows_of_real_shards_cross_files(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens")
    files = sorted(folder.glob("train_*.bin"))
    assert len(files) > 1
    stream = np.concatenate([np.fromfile(file, dtype="<u2") for file in files])
    windows = TokenWindows(TokenShards.open(folder).split("train"), 16)
    assert len(windows) == (len(stream) - 1) // 16
    everything = windows.read(np.arange(len(windows)))
    for index, row in enumerate(everything):
        assert np.array_equal(row, stream[index * 16 : index * 16 + 17])
    assert windows.span(3) == (48, 65)
    assert windows.split.tokens == len(stream)
