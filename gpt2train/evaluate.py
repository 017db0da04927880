"""Validation loss, and the perplexity of texts.

Flows in: a model and the validation split of token shards, or text files. Flows out: mean nats a token and what follows
from it (perplexity, bits a byte). The validation loss costs one forward pass over every sequence; a text costs
context / stride passes over itself.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
import torch.distributed
from torch import nn

from data_pipeline.token_shards import TokenSplit

from .config import ConfigError
from .data import TokenWindows


def validation_loss(
    model: nn.Module,
    split: TokenSplit,
    *,
    context: int,
    sequences: int,
    micro: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Mean nats per token over the first `sequences` windows of `split` (0: all), the same on every rank.

    `model(tokens_BT, targets_BT)` gives the mean cross-entropy; it is put into eval mode and back. Ranks take micro
    batches in turn, whose composition does not depend on `world_size`, and the sum is made in float64 in the order of
    the data: any number of ranks gives the same number. Every rank makes equally many forward passes, as ZeRO 3 gathers
    weights within them; one that has no micro batch left runs the first one and throws the result away.

    Raises ConfigError when the split is too short for one window.
    """
    windows = TokenWindows(split, context)
    count = len(windows) if sequences == 0 else min(sequences, len(windows))
    if count <= 0:
        raise ConfigError(
            [
                f"validation split: its {split.tokens} tokens are fewer than one sequence of model.context={context} "
                f"and its target; raise tokenize.validation_fraction or give evaluate.every_steps=0"
            ]
        )
    device = torch.device(device)
    starts = range(0, count, micro)
    nats = torch.zeros(len(starts), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for turn in range(-(-len(starts) // world_size)):
            mine = turn * world_size + rank
            start = starts[mine] if mine < len(starts) else 0
            stop = min(start + micro, count)
            batch_BT = torch.from_numpy(windows.read(np.arange(start, stop))).to(device)
            with torch.no_grad(), _autocast(device, autocast_dtype):
                loss = model(batch_BT[:, :-1], batch_BT[:, 1:])
            if mine < len(starts):
                nats[mine] = loss.double().item() * (stop - start)  # host-device sync, once a micro batch
    finally:
        model.train(was_training)
    if world_size > 1:
        nats = nats.to(device)
        torch.distributed.all_reduce(nats)  # every entry is zero on all ranks but one, so the sum is exact
        nats = nats.cpu()
    return nats.sum().item() / count


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def perplexity(nats_per_token: float) -> float:
    """exp of the loss; infinite where a float cannot hold it."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf
