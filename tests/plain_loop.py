"""The reference that training is compared with: plain PyTorch, as one would write it by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data_pipeline.token_shards import TokenShards
from gpt2train.config import ModelConfig, OptimizerConfig
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.model import GPT
from gpt2train.optim import learning_rate


def plain_run(
    tokens: Path, steps: int, *, skip: tuple[int, ...] = (), shift: tuple[int, int] = (0, 0)
) -> tuple[list[float], list[float]]:
    """The same run in plain PyTorch, the whole batch at once, torch's own loss and AdamW: losses, gradient norms.

    No update is made at the steps `skip`; after step `shift[0]` the batches are those of `shift[1]` steps later.
    """
    shards = TokenShards.open(tokens)
    config = ModelConfig(layers=2, channels=16, heads=2, context=16, vocabulary=shards.vocabulary)
    optimizer_config = OptimizerConfig(lr=1e-3, warmup_steps=5)
    windows = TokenWindows(shards.split("train"), config.context)
    order = BatchOrder(1337, len(windows), 8)
    model = GPT(config, seed=1337)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, norms = [], []
    for step in range(steps):
        rows = torch.from_numpy(
            np.stack([windows[i] for i in order.indices(step + (shift[1] if step >= shift[0] else 0))]).astype(np.int64)
        )
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optimizer_config, step + 1, steps)
        if step + 1 not in skip:
            optimizer.step()
        losses.append(loss.item())
    return losses, norms
