"""Batches of work over the ranks of a run, each result kept as it comes, so that a killed evaluation goes on.

In: batches by number, a function that does one, and a folder for what is done. Out: their rows, on every rank. A
batch's result depends on the batch alone, so it does not matter which rank does it, nor in which start; results that
were kept are used as if they had just been made, bit for bit.

What is done stands in `rank_0.jsonl`, …: a line that names the work (a hash of the weights and of all that is asked),
then a line a batch. A torn last line, or a file of other work, counts for nothing. Rank 0 alone reads, and tells the
others what is left. Ranks take the batches that are left in turn and make equally many, as ZeRO 3 gathers weights
within each forward pass; one that has none left does the first again and throws it away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gpt2train.distributed import World
from gpt2train.errors import write_error


def shared_out(
    work: Callable[[int], np.ndarray],
    sizes: Sequence[int],
    width: int,
    *,
    world: World,
    folder: Path | None = None,
    key: str = "",
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[np.ndarray]:
    """`work(i)` for each batch: float64 [sizes[i], width], the same on every rank.

    `folder`: where results are kept, under `key`; None: nowhere. `told(done, of)` hears of every turn on rank 0.
    """
    kept = _read(folder, key, sizes, width) if folder is not None and world.rank == 0 else {}
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    table = np.zeros((int(starts[-1]), width))
    done = np.zeros(len(sizes))
    for i, rows in kept.items():
        table[starts[i] : starts[i + 1]], done[i] = rows, 1
    left = np.flatnonzero(summed(done, world) == 0).tolist()
    journal = _Journal(folder, key, world.rank) if folder is not None and left else None
    try:
        for turn in range(-(-len(left) // world.size)):
            mine = turn * world.size + world.rank
            i = left[mine] if mine < len(left) else left[0]
            rows = work(i)
            assert rows.shape == (sizes[i], width), f"batch {i}: {rows.shape}, expected {(sizes[i], width)}"
            if mine < len(left):
                table[starts[i] : starts[i + 1]] = rows
                if journal is not None:
                    journal.write(i, rows)
            told(len(sizes) - len(left) + min((turn + 1) * world.size, len(left)), len(sizes))
    finally:
        if journal is not None:
            journal.close()
    table = summed(table, world)  # every entry is zero on all ranks but one, so the sum is exact
    return [table[starts[i] : starts[i + 1]] for i in range(len(sizes))]


def summed(values: np.ndarray, world: World) -> np.ndarray:
    """The element-wise sum of float64 values over all ranks."""
    if world.size == 1:
        return values
    numbers = torch.from_numpy(values).to(world.device)
    dist.all_reduce(numbers, group=world.group)
    return numbers.cpu().numpy()


def _read(folder: Path, key: str, sizes: Sequence[int], width: int) -> dict[int, np.ndarray]:
    """Batches that earlier starts have done, from all ranks' files."""
    found: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        head, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]  # what follows the last newline is torn, or nothing
        if _parsed(head) != {"key": key}:
            continue
        for line in lines:
            entry = _parsed(line)
            i = entry.get("batch")
            if not isinstance(i, int) or not 0 <= i < len(sizes):
                continue
            rows = np.asarray(entry.get("rows"), dtype=np.float64)
            if rows.shape == (sizes[i], width):
                found[i] = rows
    return found


def _parsed(line: bytes) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _Journal:
    """One rank's file, opened to go on behind its last whole line, or begun anew for other work."""

    def __init__(self, folder: Path, key: str, rank: int) -> None:
        self._path = path = folder / f"rank_{rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
            whole = before[: before.rfind(b"\n") + 1]
            same = _parsed(whole.split(b"\n")[0]) == {"key": key}
            self._file = open(path, "r+b" if path.exists() else "wb", buffering=0)  # noqa: SIM115 (open for the work)
            self._file.truncate(len(whole) if same else 0)
            self._file.seek(0, 2)
        except OSError as error:
            raise write_error(path, error) from error
        if not same:
            self._line({"key": key})

    def write(self, batch: int, rows: np.ndarray) -> None:
        self._line({"batch": batch, "rows": rows.tolist()})

    def _line(self, entry: dict[str, object]) -> None:
        line = json.dumps(entry).encode() + b"\n"  # floats in the shortest form that reads back as the same number
        try:
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()
