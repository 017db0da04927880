"""Texts → hidden states by layer.

Flows in: a model and a text's tokens. Flows out: fp32 [layers + 1, T, C]: the embeddings that enter the first block,
then what leaves each block, the last one through the final layer norm. That is what transformers gives as
`hidden_states` of a GPT-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2train.model import GPT


@torch.no_grad()
def hidden_states(model: GPT, tokens: Sequence[int]) -> Tensor:
    """fp32 [layers + 1, T, C] on the CPU. Raises ValueError when T passes the model's context."""
    states: list[Tensor] = []

    def entering(_: Any, arguments: tuple[Any, ...]) -> None:
        states.append(arguments[0])

    def leaving(_: Any, __: tuple[Any, ...], output: Tensor) -> None:
        states.append(output)

    hooks = [model.h[0].register_forward_pre_hook(entering)]
    hooks += [block.register_forward_hook(leaving) for block in model.h[:-1]]
    hooks.append(model.ln_f.register_forward_hook(leaving))
    try:
        model(torch.tensor([list(tokens)], device=model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([state[0].float().cpu() for state in states])
