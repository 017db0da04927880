"""The optimizer: which parameters decay, which are Muon's, and the learning rate of a step.

Flows in: a model and the settings. Flows out: torch's own AdamW, fused where the device has it (no compiler is needed),
or Muon beside it; and a learning rate that is a function of the step alone, so that a resumed run needs no scheduler
state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gpt2train.config import LRSchedule, OptimizerConfig, OptimizerName
from gpt2train.model import GPT
from gpt2train.mup import matrix_rate_ratio, width_ratio
from gpt2train.optimizers.muon import Muon

SHORT_RUN_WARMUP = 10
"""A warm-up that is left to us takes at most one part in this many of the run."""
DEFAULT_WARMUP_STEPS = 700
"""About 375 million tokens at 524,288 a step, the warm-up of Brown et al. 2020 (GPT-3), appendix B."""


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, width: float = 1.0
) -> list[dict[str, Any]]:
    """Named parameters → groups: matrices (embeddings too) decay; biases and gains do not.

    Embeddings and a head stand apart where they have a learning rate of their own; for Muon, and for a width ratio
    other than 1 (mup.py), the blocks' matrices do. A group holds `lr_ratio`, its learning rate over that of the
    schedule, and `muon` where it is for Muon.
    """
    groups: dict[tuple[bool, float, float, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        ratio, decay = 1.0, config.weight_decay if parameter.ndim >= 2 else 0.0
        if name in ("wte.weight", "wpe.weight"):
            ratio = config.embedding_lr_ratio
        elif name == "lm_head.weight":
            ratio = config.head_lr_ratio
        elif is_hidden_matrix(name, parameter.ndim):
            ratio = matrix_rate_ratio(width, config.name)
            decay /= ratio
        muon = config.name is OptimizerName.muon and is_hidden_matrix(name, parameter.ndim)
        group = {"params": [], "weight_decay": decay, "lr_ratio": ratio}
        if config.name is OptimizerName.muon:
            group["muon"] = muon
        groups.setdefault((parameter.ndim >= 2, decay, ratio, muon), group)["params"].append(parameter)
    return list(groups.values())


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether this parameter is a matrix between hidden layers, so neither embedding nor head: what Muon is for."""
    return name.startswith("h.") and dimensions == 2


def make_optimizer(
    model: GPT, config: OptimizerConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """What `config.name` says, over the groups of `parameter_groups`; Muon orthogonalizes its matrices in `dtype`."""
    if config.name is OptimizerName.adamw:
        return adamw(model, config, device)
    return Muon(
        parameter_groups(model.named_parameters(), config, width_ratio(model.config)),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        momentum=config.muon_momentum,
        dtype=dtype,
        fused=_fused(device),
    )


def adamw(model: GPT, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `model`, with the groups of `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config, width_ratio(model.config)),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=_fused(device),
    )


def _fused(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda") and "fused" in inspect.signature(torch.optim.AdamW).parameters


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
    elif config.schedule is LRSchedule.wsd:
        height = min(max((steps - step) / (config.cooldown * steps), 0.0), 1.0)
    else:
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Gives every parameter group of an optimizer its part of `lr`."""
    for group in groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
