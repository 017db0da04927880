"""Logits → the next token.

Flows in: fp32 logits of the last position of each row, on the CPU, and what the row has said so far. Flows out: one
token id a row. Each row draws from a generator of its own, so its text does not depend on who else is in the batch.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2train.errors import NonFiniteError
from gpt2train.generation.watermark import Watermark


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


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """The `k` largest logits, the others -inf; 0: all. Logits equal to the k-th stay too."""
    if k <= 0 or k >= logits_V.shape[-1]:
        return logits_V
    least = torch.topk(logits_V, k).values[..., -1:]
    return logits_V.masked_fill(logits_V < least, -torch.inf)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens that together reach probability `p`, the others -inf; always at least one.

    Nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    if p >= 1:
        return logits_V
    ascending, order = torch.sort(logits_V, descending=False)
    # A token goes when it and all less likely ones together have at most 1 - p.
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits_V.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


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


def next_token(logits_V: Tensor, sampling: Sampling, said: Sequence[int], generator: torch.Generator) -> int:
    """One token id; `said` is all of the row so far, prompt included.

    Raises NonFiniteError when a logit is not finite, as in a model whose training diverged.
    """
    if not bool(logits_V.isfinite().all()):
        raise NonFiniteError("the model's logits are not finite; choose an earlier checkpoint")
    if sampling.watermark is not None and said:
        logits_V = sampling.watermark.prefer(logits_V, said[-1])
    logits_V = penalize_repetition(logits_V, said, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Less the largest, no logit overflows at a small temperature, and the probabilities stay the same.
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    kept_V = keep_top_p(keep_top_k(scaled_V, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(kept_V.softmax(-1), 1, generator=generator))
