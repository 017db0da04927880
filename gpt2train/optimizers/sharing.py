"""Which rank holds which part of which matrix, and how whole matrices come together and go back.

Flows in: for every rank, the parts of matrices in its flat tensor (ZeRO 1 and 2 cut all parameters, laid end to end,
into one piece a rank; ZeRO 3 cuts each parameter into equal pieces). Flows out: whole matrices, each on one rank, and
what is made of them back in its place. Each number travels once each way and only when another rank has the matrix:
at most the gradient's size, where all ranks gathering all matrices would take `ranks` times that.

A linear layer that makes queries, keys and values in one is three matrices here: they are orthogonalized one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A stretch of a parameter within this rank's flat tensor."""

    parameter: int
    """Place of the parameter in the list that all ranks have alike."""
    start: int
    """First number of the stretch, counted in the parameter."""
    numbers: int
    offset: int
    """First number of the stretch, counted in the flat tensor."""


@dataclass(frozen=True)
class Matrix:
    parameter: int
    start: int
    """First number of the matrix, counted in the parameter."""
    rows: int
    columns: int


def matrices_of(names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[Matrix]:
    """The matrices that parameters hold: one each, and three where queries, keys and values lie in one."""
    found = []
    for place, (name, (rows, columns)) in enumerate(zip(names, shapes, strict=True)):
        count = 3 if name.endswith("c_attn.weight") else 1
        for number in range(count):
            found.append(Matrix(place, number * (rows // count) * columns, rows // count, columns))
    return found


@dataclass(frozen=True)
class _Piece:
    """A stretch of a matrix on one rank."""

    matrix: int
    start: int
    """Counted in the matrix."""
    numbers: int
    offset: int
    """Counted in that rank's flat tensor."""


class Sharing:
    """Gathers the matrices in the flat tensors of all ranks, and scatters what is made of them.

        sharing = Sharing(matrices, parts_of_all_ranks, rank=0)
        mine = sharing.gather(flat)          # whole matrices, [rows, columns] each
        flat = sharing.scatter(updates, like=flat)

    All ranks build it from the same lists and call it together. A matrix goes to the rank that holds the most of it;
    of several, to the one with the least work so far.
    """

    def __init__(self, matrices: Sequence[Matrix], parts: Sequence[Sequence[Part]], rank: int) -> None:
        ranks = range(len(parts))
        pieces = [_pieces(matrices, of_rank) for of_rank in parts]
        owners = _owners(matrices, pieces)
        self._sizes = {n: (m.rows, m.columns) for n, m in enumerate(matrices) if owners[n] == rank}
        # What this rank holds, by who gets it; and what the ranks hold of what this one gets.
        self._held = [[p for p in pieces[rank] if owners[p.matrix] == to] for to in ranks]
        self._wanted = [[p for p in pieces[of] if owners[p.matrix] == rank] for of in ranks]

    def gather(self, flat: Tensor) -> list[Tensor]:
        """This rank's whole matrices, [rows, columns] each, in the dtype of `flat`."""
        parts = [flat[p.offset : p.offset + p.numbers] for pieces in self._held for p in pieces]
        received = _exchange(parts, self._held, self._wanted, flat)
        whole = {number: flat.new_empty(rows * columns) for number, (rows, columns) in self._sizes.items()}
        for p, numbers in zip(_flat(self._wanted), received, strict=True):
            whole[p.matrix][p.start : p.start + p.numbers] = numbers
        return [whole[number].view(size) for number, size in self._sizes.items()]

    def scatter(self, matrices: Sequence[Tensor], like: Tensor) -> Tensor:
        """A tensor as `like`, flat, whose parts are those of `matrices`, given in the order of `gather`.

        What belongs to no matrix (the padding of the last parts) is zero.
        """
        whole = {number: m.to(like.dtype).reshape(-1) for number, m in zip(self._sizes, matrices, strict=True)}
        parts = [whole[p.matrix][p.start : p.start + p.numbers] for pieces in self._wanted for p in pieces]
        received = _exchange(parts, self._wanted, self._held, like)
        flat = like.new_zeros(like.numel())
        for p, numbers in zip(_flat(self._held), received, strict=True):
            flat[p.offset : p.offset + p.numbers] = numbers
        return flat


def _flat(pieces: Sequence[Sequence[_Piece]]) -> list[_Piece]:
    return [p for of_rank in pieces for p in of_rank]


def _pieces(matrices: Sequence[Matrix], parts: Sequence[Part]) -> list[_Piece]:
    """Where the parts of parameters and the matrices overlap, in the order of the matrices."""
    found = []
    for part in parts:
        for number, matrix in enumerate(matrices):
            if matrix.parameter != part.parameter:
                continue
            start = max(matrix.start, part.start)
            stop = min(matrix.start + matrix.rows * matrix.columns, part.start + part.numbers)
            if start < stop:
                found.append(_Piece(number, start - matrix.start, stop - start, part.offset + start - part.start))
    return sorted(found, key=lambda p: (p.matrix, p.start))


def _owners(matrices: Sequence[Matrix], pieces: Sequence[Sequence[_Piece]]) -> list[int]:
    held = [[0] * len(pieces) for _ in matrices]
    for rank, of_rank in enumerate(pieces):
        for p in of_rank:
            held[p.matrix][rank] += p.numbers
    work, owners = [0] * len(pieces), []
    for number, matrix in enumerate(matrices):
        assert sum(held[number]) == matrix.rows * matrix.columns, "the ranks' parts are the whole matrix, once"
        owner = max(range(len(pieces)), key=lambda rank, n=number: (held[n][rank], -work[rank], -rank))  # type: ignore[misc]
        work[owner] += matrix.rows * matrix.columns * min(matrix.rows, matrix.columns)
        owners.append(owner)
    return owners


def _exchange(
    parts: Sequence[Tensor], outgoing: Sequence[Sequence[_Piece]], incoming: Sequence[Sequence[_Piece]], like: Tensor
) -> Sequence[Tensor]:
    """Sends `parts`, which are laid end to end those of `outgoing`; gives what `incoming` names, likewise."""
    if len(outgoing) == 1:
        return parts
    send = torch.cat([*parts, like.new_empty(0)])
    sizes_out = [sum(p.numbers for p in pieces) for pieces in outgoing]
    sizes_in = [sum(p.numbers for p in pieces) for pieces in incoming]
    received = like.new_empty(sum(sizes_in))
    torch.distributed.all_to_all_single(received, send, sizes_in, sizes_out)
    return received.split([p.numbers for p in _flat(incoming)])
