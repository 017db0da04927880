"""A text → how likely a model finds it, token by token, and what that says of who wrote it.

Flows in: a model and token ids. Flows out: for each token its log-probability, its rank and the moments of the
distribution it was drawn from; for the text three scores, each higher for text that a model like this one wrote:

    log_likelihood  mean log-probability
    log_rank        minus the mean logarithm of the rank (Gehrmann et al. 2019, "GLTR"; Su et al. 2023, "DetectLLM")
    curvature       how much likelier the text is than what the model would write in its place, in standard deviations
                    (Bao et al. 2024, "Fast-DetectGPT", arXiv:2310.05130, the model scoring itself)

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from gpt2train.model import GPT

SCORES = ("log_likelihood", "log_rank", "curvature")
BINS = (10, 100, 1000)
"""GLTR's borders of rank: green, yellow, red, and violet beyond."""
CHUNK_POSITIONS = 128
"""Positions whose distributions exist at once; 128 × 50,257 in fp32 are 26 MB."""


@dataclass(frozen=True)
class Tokens:
    """What the model says of each token of a text, float64 [T] each."""

    log_probability: np.ndarray
    rank: np.ndarray
    """1 for the likeliest."""
    expected: np.ndarray
    """Mean log-probability under the model's own distribution: minus its entropy."""
    variance: np.ndarray
    """Variance of the log-probability under it."""

    def scores(self) -> dict[str, float]:
        """`SCORES` of the whole text. A text without a token has 0 in all."""
        if not len(self.rank):
            return dict.fromkeys(SCORES, 0.0)
        spread = math.sqrt(self.variance.sum())
        return {
            "log_likelihood": float(self.log_probability.mean()),
            "log_rank": float(-np.log(self.rank).mean()),
            "curvature": float((self.log_probability - self.expected).sum() / spread) if spread else 0.0,
        }

    def bins(self) -> list[float]:
        """Share of tokens within each of GLTR's ranks: ≤ 10, ≤ 100, ≤ 1,000, beyond."""
        counts = np.bincount(np.searchsorted(BINS, self.rank), minlength=4)
        return (counts / max(counts.sum(), 1)).tolist()


@torch.no_grad()
def read_tokens(model: GPT, ids: Sequence[int]) -> Tokens:
    """Every token of `ids`, the first one after `<|endoftext|>`; over a longer text the context slides by half."""
    context, device = model.config.context, model.wte.weight.device
    stream = [END_OF_TEXT, *ids]
    parts: list[list[np.ndarray]] = [[], [], [], []]
    done = 0  # tokens of `ids` that were read
    while done < len(ids):
        start = 0 if done == 0 else max(done - max(context // 2, 1) + 1, 0)
        window = stream[start : start + context]
        logits_TV = model(torch.tensor([window], device=device))[0, :, :VOCABULARY]
        targets = torch.tensor(stream[start + 1 : start + context + 1], device=device)
        first = done - start
        for at in range(first, len(targets), CHUNK_POSITIONS):
            chunk = slice(at, min(at + CHUNK_POSITIONS, len(targets)))
            log_p_TV = logits_TV[chunk].float().log_softmax(-1)
            chosen_T = log_p_TV.gather(1, targets[chunk, None])
            p_TV = log_p_TV.exp()
            mean_T = (p_TV * log_p_TV).sum(-1)
            second_T = (p_TV * log_p_TV.square()).sum(-1)
            rank_T = (log_p_TV > chosen_T).sum(-1) + 1
            for part, value in zip(parts, (chosen_T[:, 0], rank_T, mean_T, second_T - mean_T.square()), strict=True):
                part.append(value.double().cpu().numpy())
        done = start + len(targets)
    empty = np.empty(0)
    return Tokens(*(np.concatenate(part) if part else empty for part in parts))


def roc(scores: Sequence[float], generated: Sequence[bool]) -> dict[str, float]:
    """`auc`, and `found_at_1_percent`: the share of generated texts above the threshold that at most 1 % of the others
    reach. Ties count half in the area (Fawcett 2006, "An introduction to ROC analysis").
    """
    values, labels = np.asarray(scores, float), np.asarray(generated, bool)
    positive, negative = values[labels], values[~labels]
    if not len(positive) or not len(negative):
        return {"auc": math.nan, "found_at_1_percent": math.nan}
    below = np.searchsorted(np.sort(negative), positive, side="left")
    not_above = np.searchsorted(np.sort(negative), positive, side="right")
    auc = (below + not_above).sum() / 2 / len(positive) / len(negative)
    allowed = int(0.01 * len(negative))  # others that may lie above the threshold
    threshold = np.sort(negative)[::-1][allowed]
    return {"auc": float(auc), "found_at_1_percent": float((positive > threshold).mean())}
