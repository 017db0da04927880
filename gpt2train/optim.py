"""What AdamW gets: which parameters decay, and the learning rate of a step.

Flows in: a model and the settings. Flows out: torch's own AdamW, fused where the device has it (no compiler is needed),
and a learning rate that is a function of the step alone, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gpt2train.config import LRSchedule, OptimizerConfig

SHORT_RUN_WARMUP = 10
"""A warm-up that is left to us takes at most one part in this many of the run."""
DEFAULT_WARMUP_STEPS = 700
"""About 375 million tokens at 524,288 a step, the warm-up of Brown et al. 2020 (GPT-3), appendix B."""


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Named parameters → two groups for AdamW: matrices (embeddings too) decay; biases and gains do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `model`, with the groups of `parameter_groups`."""
    fused = device.type in ("cpu", "cuda") and "fused" in inspect.signature(torch.optim.AdamW).parameters
    return torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`: the setting, or for -1 700 and in short runs a tenth."""
    if config.warmup_steps >= 0:
        return config.warmup_steps
    return min(DEFAULT_WARMUP_STEPS, steps // SHORT_RUN_WARMUP)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of the update that ends `step`, counted from 1, in a run of `steps`.

    It rises in equal parts to `lr` at the last step of the warm-up and falls, by the schedule, to `lr · min_lr_ratio`
    at the last step of the run (cosine: Loshchilov and Hutter 2017, "SGDR", without restarts).
    """
    warmup = warmup_steps(config, steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if config.schedule is LRSchedule.constant:
        height = 1.0
    elif config.schedule is LRSchedule.linear:
        height = 1.0 - progress
    else:
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Gives `lr` to every parameter group of an optimizer."""
    for group in groups:
        group["lr"] = lr
