"""The documents of a packed sequence: which token is of which, who may see whom, and where each begins.

Flows in: tokens. Flows out: numbers, a mask, positions. `<|endoftext|>` belongs to the document that it opens, as in a
sample that starts from it.

Shape letters: B sequences, T tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.tokenizer import END_OF_TEXT


def document_numbers(tokens_BT: Tensor) -> Tensor:
    """int64 [B, T]: which of the sequence's documents each token is of."""
    return (tokens_BT == END_OF_TEXT).cumsum(1)


def document_mask(tokens_BT: Tensor) -> Tensor:
    """Which keys a query may see, bool [B, 1, T, T]: those before it, and itself, of its own document."""
    document_BT = document_numbers(tokens_BT)
    T = tokens_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril()
    return ((document_BT[:, :, None] == document_BT[:, None, :]) & causal_TT)[:, None]


def document_positions(tokens_BT: Tensor) -> Tensor:
    """int64 [B, T]: how far each token lies behind its document's start, or the sequence's."""
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    starts_BT = torch.where(tokens_BT == END_OF_TEXT, positions_T, 0).cummax(1).values
    return positions_T - starts_BT
