"""torch's layers without initial values of their own: `GPT.initialize` draws all of them, in one order, from one seed.

Torch would draw its own, to be thrown away: 0.6 CPU seconds for 124 million. Its way around that, the meta device,
takes in torch's compiler and sympy: two seconds of every start of a command that makes no optimizer.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """y = x Wᵀ + b, W [out, in]."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Rows of W [tokens, channels]."""

    def reset_parameters(self) -> None:
        pass
