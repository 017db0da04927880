"""Runs of several sizes → one table, one picture and one JSON file of loss over size.

Flows in: run folders (config.yaml, metrics.jsonl), whether their runs are over or not. Flows out: `scaling.json`,
`scaling.png` and a table on standard output. With three finished sizes or more the law L(N) = E + A / N^a is fitted to
the final validation losses (Kaplan et al. 2020, section 1.2, with the constant of Hoffmann et al. 2022, section 3.3);
its residuals are given with it, and with three sizes, as many as it has parameters, they say nothing.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2train.charts import Point, png_of_scaling
from gpt2train.config import ConfigError, ModelConfig, flops_per_token, parameter_count
from gpt2train.run_folder import last_value, read_metrics, read_run_config, replace_file, series

LAW_PARAMETERS = 3
"""E, A and a."""


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

    @property
    def finished(self) -> bool:
        return self.steps > 0 and self.steps_done >= self.steps


@dataclass(frozen=True)
class ScalingLaw:
    """L(N) = E + A / N^a in nats a token, N without embeddings."""

    E: float
    A: float
    a: float
    points: int
    residuals: dict[str, float]
    """Measured - fitted, by run."""
    left_out_errors: dict[str, float]
    """Measured - forecast by the law fitted without that run; from four sizes on."""

    def loss(self, body_parameters: float) -> float:
        return self.E + self.A / body_parameters**self.a


def body_parameter_count(model: ModelConfig) -> int:
    """Parameters without token and position embeddings."""
    return parameter_count(model) - (model.vocabulary + model.context) * model.channels


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
    )


def fit(runs: Sequence[RunSummary]) -> ScalingLaw | None:
    """The law of the finished runs; None below three sizes, or where their losses follow no such law."""
    points = [r for r in runs if r.finished and r.validation_loss is not None and math.isfinite(r.validation_loss)]
    if len({r.body_parameters for r in points}) < LAW_PARAMETERS:
        return None
    found = _fit(points)
    if found is None:
        return None
    residuals = {r.name: float(r.validation_loss or 0) - _law(found, r.body_parameters) for r in points}
    left_out = {}
    for r in points:
        others = [o for o in points if o is not r]
        if len({o.body_parameters for o in others}) >= LAW_PARAMETERS and (without := _fit(others)) is not None:
            left_out[r.name] = float(r.validation_loss or 0) - _law(without, r.body_parameters)
    return ScalingLaw(*found, points=len(points), residuals=residuals, left_out_errors=left_out)


def _law(law: tuple[float, float, float], body_parameters: float) -> float:
    E, A, a = law
    return E + A / body_parameters**a


def _fit(points: Sequence[RunSummary]) -> tuple[float, float, float] | None:
    """Least squares. For a given exponent the law is linear in E and A, so only the exponent is searched for."""
    from scipy.optimize import minimize_scalar

    sizes = np.array([r.body_parameters for r in points], dtype=np.float64)
    losses = np.array([r.validation_loss for r in points], dtype=np.float64)
    scale = sizes.min()

    def solve(a: float) -> tuple[float, float, float]:
        x = (sizes / scale) ** -a
        (slope, constant), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], axis=1), losses, rcond=None)
        if constant < 0:  # the loss of endless size is not below 0
            constant, slope = 0.0, float(x @ losses / (x @ x))
        return float(((constant + slope * x - losses) ** 2).sum()), float(constant), float(slope)

    grid = np.geomspace(0.01, 4, 60)
    best = int(np.argmin([solve(a)[0] for a in grid]))
    if best in (0, len(grid) - 1):
        return None  # the exponent runs off to 0 or without bound: the points do not bend like a power law
    low, high = grid[best - 1], grid[best + 1]
    a = float(minimize_scalar(lambda a: solve(a)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x)
    _, constant, slope = solve(a)
    return (constant, slope * float(scale) ** a, a) if slope > 0 else None


def summarize(run_dirs: Sequence[Path], out: Path) -> int:
    """Prints the table and writes scaling.json and scaling.png into the folder `out`."""
    if not run_dirs:
        raise ConfigError(["runs=[]: must name at least one run folder; give runs=[runs/a,runs/b]"])
    names = [folder.resolve().name for folder in run_dirs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in run_dirs]
    runs = [summary(folder, name) for folder, name in zip(run_dirs, names, strict=True)]
    runs.sort(key=lambda r: (r.body_parameters, r.name))
    law = fit(runs)
    out.mkdir(parents=True, exist_ok=True)
    content = {"runs": [_as_json(r) for r in runs], "law": asdict(law) if law else None}
    replace_file(out / "scaling.json", (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    points = [(r.name, r.body_parameters, r.validation_loss, r.finished) for r in runs]
    curves = [(r.name, r.curve) for r in runs]
    replace_file(out / "scaling.png", png_of_scaling(points, curves, law.loss if law else None))
    _print(runs, law)
    return 0


def _as_json(run: RunSummary) -> dict[str, Any]:
    """Without the curve; a loss that is not finite is null, as JSON has no other word for it."""
    found: dict[str, Any] = {k: v for k, v in asdict(run).items() if k != "curve"} | {"finished": run.finished}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def _print(runs: Sequence[RunSummary], law: ScalingLaw | None) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for name in ("parameters", "without embeddings", "steps", "tokens", "FLOPs", "train", "validation", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for r in runs:
        table.add_row(
            Text(r.name),
            f"{r.parameters:,}",
            f"{r.body_parameters:,}",
            f"{r.steps_done:,} of {r.steps:,}",
            f"{r.tokens:,}",
            f"{r.flops:.3g}",
            _number(r.train_loss, ".4f"),
            _number(r.validation_loss, ".4f"),
            _number(r.tokens_per_s, ",.0f"),
            "" if r.finished else "unfinished",
        )
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    if law is None:
        console.print(f"no scaling law: it takes {LAW_PARAMETERS} finished sizes whose losses bend like a power law")
        return
    console.print(f"L(N) = {law.E:.4f} + {law.A:.4g} / N^{law.a:.4f} over {law.points} runs, N without embeddings")
    if law.points == LAW_PARAMETERS:
        console.print("  three runs fix its three parameters: there is nothing left to tell how well it holds")
        return
    worst = max(law.residuals.values(), key=abs)
    console.print(f"  largest residual {worst:+.4f} nats")
    for name, error in law.left_out_errors.items():
        console.print(Text(f"  {name}: {error:+.4f} nats off the law of the others"))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
