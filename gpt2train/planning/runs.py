"""Run folders → what each run has come to, for tables, pictures and laws.

Flows in: run folders (config.yaml, metrics.jsonl), whether their runs are over or not. Flows out: a `RunSummary` each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2train.charts import Point
from gpt2train.config import ModelConfig, TrainConfig, flops_per_token, parameter_count
from gpt2train.run_folder import last_value, read_metrics, read_run_config, series


@dataclass(frozen=True)
class RunSummary:
    """What one run has come to."""

    name: str
    parameters: int
    """All of them, the vocabulary without padding."""
    body_parameters: int
    """Without token and position embeddings, as Kaplan et al. 2020 count (section 1.3)."""
    steps_done: int
    steps: int
    tokens: int
    """Trained on so far."""
    flops: float
    """Of training so far."""
    train_loss: float | None
    """Mean of the last 5 % of the steps done: one step's loss is noisy."""
    validation_loss: float | None
    """The last one measured."""
    tokens_per_s: float | None
    """Median over the steps."""
    curve: list[Point]
    """(tokens, train loss) of the steps done."""
    model: str = ""
    lr: float = 0.0
    """Peak learning rate."""
    kind: str = ""
    """Recipe, data and parametrization: only runs of one kind follow one law."""
    mup: bool = False
    """Whether the learning rate is one for all widths (gpt2train/mup.py)."""

    @property
    def finished(self) -> bool:
        return self.steps > 0 and self.steps_done >= self.steps


def body_parameter_count(model: ModelConfig) -> int:
    """Parameters without token and position embeddings."""
    return parameter_count(model) - (model.vocabulary + model.context) * model.channels


def kind_of(config: TrainConfig) -> str:
    """Recipe, data and parametrization, which a law and a learning-rate rule are of."""
    mup = f", µP from {config.model.mup_base} channels" if config.model.mup_base else ""
    return f"{config.recipe}, {Path(config.data.path).parent.name or 'data'}{mup}"


def summary(run_dir: Path, name: str) -> RunSummary:
    """What the run in `run_dir` has come to; raises ConfigError when there is none."""
    config = read_run_config(run_dir)
    metrics = read_metrics(run_dir)
    losses = series(metrics, "loss")
    tail = [loss for _, loss in losses[-max(len(losses) // 20, 1) :]]
    speeds = [speed for _, speed in series(metrics, "tokens_per_s")]
    tokens_by_step = dict(series(metrics, "tokens"))
    tokens = int(max(tokens_by_step.values(), default=0))
    return RunSummary(
        name=name,
        parameters=parameter_count(config.model),
        body_parameters=body_parameter_count(config.model),
        steps_done=losses[-1][0] if losses else 0,
        steps=config.steps,
        tokens=tokens,
        flops=float(flops_per_token(config.model)) * tokens,
        train_loss=float(np.mean(tail)) if tail else None,
        validation_loss=last_value(metrics, "validation_loss"),
        tokens_per_s=float(np.median(speeds)) if speeds else None,
        curve=[(tokens_by_step[step], loss) for step, loss in losses if step in tokens_by_step],
        model=config.model.name,
        lr=config.optimizer.lr,
        kind=kind_of(config),
        mup=bool(config.model.mup_base),
    )
