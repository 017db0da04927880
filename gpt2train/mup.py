"""µP: how initial values, learning rates and multipliers follow the width, so that one learning rate serves all widths.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", table 8, the
form that goes with a tied embedding. Flows in: a `ModelConfig` with `mup_base`, the channels of the model that the
settings were found with. Flows out: factors, all of them 1 at that width and without `mup_base`. With m = channels /
mup_base:

    matrices of the blocks   initial standard deviation / √m, learning rate / m (AdamW) or / √m (Muon)
    embeddings, vectors      as they are: what comes in is not wider
    logits                   / m, in the forward pass; the head's own initial values and rate stay
    attention scores         √(mup_base_head) / D instead of 1 / √D, D channels of a head, where heads grow, too

Muon is not in the paper. Its update has all singular values alike, and 0.2·√max(rows, columns) for their size
(optimizers/muon.py) grows with √m, where a matrix between hidden layers may change by an operator norm that does not
grow at all (Yang, Simon and Bernstein 2023, "A Spectral Condition for Feature Learning", condition 1).

torch's AdamW, and our Muon, decay weights by rate · weight_decay: the decay is multiplied by what divides the rate, so
that a step shrinks the weights of every width by the same part.
"""

from __future__ import annotations

import math

from gpt2train.config import ModelConfig, OptimizerConfig, OptimizerName


def width_ratio(model: ModelConfig) -> float:
    """m: channels over those of the base; 1 without µP."""
    return model.channels / model.mup_base if model.mup_base else 1.0


def matrix_std_ratio(model: ModelConfig) -> float:
    """Initial standard deviation of the blocks' matrices over the standard one."""
    return 1.0 / math.sqrt(width_ratio(model))


def matrix_rate_ratio(width: float, optimizer: OptimizerName) -> float:
    """Learning rate of the blocks' matrices over `lr`, at the width ratio `width`; weight decay is divided by it."""
    return 1.0 / (math.sqrt(width) if optimizer is OptimizerName.muon else width)


def logit_ratio(model: ModelConfig) -> float:
    """What the logits are multiplied by."""
    return 1.0 / width_ratio(model)


def query_ratio(model: ModelConfig) -> float:
    """Attention's scores over those with 1 / √D; queries multiplied by it give the same without."""
    head = model.channels // model.heads
    return math.sqrt(model.mup_base_head / head) if model.mup_base and model.mup_base_head else 1.0


def attention_scale(model: ModelConfig) -> float | None:
    """What products of queries and keys are multiplied by; None: torch's own 1 / √D."""
    ratio = query_ratio(model)
    return None if ratio == 1.0 else ratio / math.sqrt(model.channels // model.heads)


def words(model: ModelConfig, optimizer: OptimizerConfig) -> list[str]:
    """What µP does to this model, in a line for people; none without it."""
    if not model.mup_base:
        return []
    rate = matrix_rate_ratio(width_ratio(model), optimizer.name)
    heads = f", attention scores × {query_ratio(model):.4g}" if query_ratio(model) != 1.0 else ""
    return [
        f"µP from {model.mup_base} channels: the blocks' matrices learn at {rate:.4g} × optimizer.lr = "
        f"{rate * optimizer.lr:.3g} and start at {matrix_std_ratio(model):.4g} × their size, logits × "
        f"{logit_ratio(model):.4g}{heads}"
    ]
