"""Logits → the next token.

Flows in: fp32 logits of the last position of each row, and what the row has said so far. Flows out: one token id a row.
Each row draws from a generator of its own, so its text does not depend on who else is in the batch. On the CPU a row
costs a few passes over the vocabulary in numpy, whose operations on a vector of this size start sooner than torch's;
nothing is sorted but what top-p needs (`next_token`). On a GPU all rows are chosen there at once, and their ids alone
come back (`next_tokens`): 64 rows' logits are 13 MB a token, and their choice on the CPU takes longer than the pass.

A token is drawn by one uniform number: the first whose cumulative probability exceeds it, in the order of the ids, not
of likelihood, since two tokens of nearly the same likelihood may change places by rounding.

Shape letters: B rows, V vocabulary, K tokens that top-k and top-p leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2train.errors import NonFiniteError
from gpt2train.generation.watermark import Watermark

FIRST_NUCLEUS, NUCLEUS_GROWTH = 256, 16
"""Tokens that top-p looks at first, and by how much more each time that they do not reach its probability. A trained
model's nucleus mostly has fewer than 256; to find the largest 256 of 50,257 costs a quarter of sorting all."""

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""A smaller one would be 0 in fp32; the likeliest token is certain long before."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The order is: watermark, repetition penalty, temperature, top-k, top-p."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    watermark: Watermark | None = None


GREEDY = Sampling(temperature=0.0)


def kept_tokens(logits_V: NDArray[np.float32], k: int, p: float) -> NDArray[np.int64] | None:
    """Ids that top-k, and then top-p, leave, in ascending order; None: all. At least one is left.

    Top-k keeps the `k` largest logits; 0: all. Top-p keeps the fewest of these that together reach probability `p`
    (nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1); 1: all.
    Logits equal to the last one kept stay too.
    """
    if not 0 < k < logits_V.size:
        return None if p >= 1 else np.flatnonzero(logits_V >= _least_in_nucleus(logits_V, p))
    ids_K = np.flatnonzero(logits_V >= np.partition(logits_V, logits_V.size - k)[logits_V.size - k])
    if p >= 1:
        return ids_K
    logits_K = logits_V[ids_K]
    return ids_K[logits_K >= _least_in_nucleus(logits_K, p)]


def _least_in_nucleus(logits_V: NDArray[np.float32], p: float) -> np.float32:
    """The smallest logit that top-p keeps. The largest are sorted alone, more of them until they reach `p`."""
    largest = logits_V.max()
    wanted = p * np.exp(logits_V - largest).sum(dtype=np.float64)
    most = FIRST_NUCLEUS
    while True:
        some = logits_V if most >= logits_V.size else np.partition(logits_V, logits_V.size - most)[-most:]
        descending = np.sort(some)[::-1]
        reached = np.exp(descending - largest).cumsum(dtype=np.float64)
        if reached[-1] >= wanted or some is logits_V:
            # Where rounding leaves the sum short of `wanted`, everything is needed.
            return descending[min(int(reached.searchsorted(wanted)), descending.size - 1)]
        most *= NUCLEUS_GROWTH


def penalize_repetition(logits_V: Tensor, said: Sequence[int], penalty: float) -> Tensor:
    """Logits of the tokens in `said` divided by `penalty` where positive, multiplied where negative; 1: unchanged.

    Keskar et al. 2019, "CTRL", section 4.1, as transformers applies it: the prompt counts, and once however often.
    """
    if penalty == 1 or not said:
        return logits_V
    ids = torch.tensor(sorted(set(said)))
    ids = ids[ids < logits_V.shape[-1]]
    chosen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def not_finite() -> NonFiniteError:
    """What to say of a model whose logits are not finite."""
    return NonFiniteError("the model's logits are not finite; choose an earlier checkpoint")


def next_token(logits_V: Tensor, sampling: Sampling, said: Sequence[int], generator: torch.Generator) -> int:
    """One token id; `said` is all of the row so far, prompt included. A drawn token takes one number of `generator`.

    Raises NonFiniteError when a logit is not finite, as in a model whose training diverged.
    """
    # A sum is finite only if all it is made of is; large finite logits may overflow it, so that is looked at again.
    if not bool(logits_V.sum().isfinite()) and not bool(logits_V.isfinite().all()):
        raise not_finite()
    if sampling.watermark is not None and said:
        logits_V = sampling.watermark.prefer(logits_V, said[-1])
    logits_V = penalize_repetition(logits_V, said, sampling.repetition_penalty)
    logits: NDArray[np.float32] = logits_V.numpy()
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Less the largest, no logit overflows at a small temperature but to -inf, whose probability is 0 as it should be.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(max(sampling.temperature, LEAST_TEMPERATURE))
    ids = kept_tokens(scaled, sampling.top_k, sampling.top_p)
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    drawn = _drawn(scaled if ids is None else scaled[ids], uniform)
    return drawn if ids is None else int(ids[drawn])


def chooses_rows_at_once(sampling: Sampling) -> bool:
    """Whether `next_tokens` knows this way of choosing; a watermark and a penalty look at what each row has said."""
    return sampling.watermark is None and sampling.repetition_penalty == 1


NOT_FINITE = -1
"""In place of a token of a row with a logit that is not finite."""


def next_tokens(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One token id a row, int64 [B], or `NOT_FINITE`, on the logits' device: `next_token`'s rule for all rows at once.

    Args:
        logits_BV: fp32, on any device with fp64.
        sampling: one that `chooses_rows_at_once`.
        uniforms_B: fp64, a number in [0, 1) for each row, there too; greedy does not look at them.
    """
    finite_B = logits_BV.isfinite().all(dim=1)
    if sampling.temperature == 0:
        return torch.where(finite_B, logits_BV.argmax(dim=1), NOT_FINITE)
    scaled_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)) / max(sampling.temperature, LEAST_TEMPERATURE)
    V, k, p = logits_BV.shape[1], sampling.top_k, sampling.top_p
    top_k = 0 < k < V
    if top_k or p < 1:
        descending_BK = scaled_BV.topk(k, dim=1).values if top_k else scaled_BV.sort(dim=1, descending=True).values
        least_B1 = descending_BK[:, -1:]
        if p < 1:
            # Logits equal to the last one that top-k keeps count, too, as they stay.
            of_all_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
            wanted_B1 = p * of_all_BV.exp().sum(dim=1, keepdim=True, dtype=torch.float64)
            reached_BK = descending_BK.exp().cumsum(dim=1, dtype=torch.float64)
            place_B1 = torch.searchsorted(reached_BK, wanted_B1).clamp(max=descending_BK.shape[1] - 1)
            least_B1 = descending_BK.gather(1, place_B1)
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    reached_BV = scaled_BV.exp().cumsum(dim=1, dtype=torch.float64)
    total_B1 = reached_BV[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(reached_BV, uniforms_B[:, None] * total_B1, right=True)
    last_B1 = torch.searchsorted(reached_BV, total_B1)  # as in `_drawn`
    return torch.where(finite_B, torch.minimum(drawn_B1, last_B1)[:, 0], NOT_FINITE)


def _drawn(logits_K: NDArray[np.float32], uniform: float) -> int:
    """Index of the token at `uniform`, in [0, 1), of the cumulative distribution; its sums are made in fp64."""
    # torch sums several times as fast as numpy here.
    reached = torch.from_numpy(np.exp(logits_K)).cumsum(0, dtype=torch.float64).numpy()
    # Rounding may put the product at the very end: then the last token that is possible at all.
    last = int(reached.searchsorted(reached[-1]))
    return min(int(reached.searchsorted(uniform * reached[-1], side="right")), last)
