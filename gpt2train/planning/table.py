"""The plan of a run as a table that a person reads at once. Flows in: settings. Flows out: standard output; the picked
settings, where `plan.apply=true`, as a line that train and launch take, alone on its own."""

from __future__ import annotations

import sys
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2train import mup
from gpt2train.config import (
    ModelConfig,
    TrainConfig,
    flops_per_token,
    micro_batch,
    parameter_count,
)
from gpt2train.planning.choose import Option, best, options, planned_ranks, room_bytes, settings_of
from gpt2train.planning.forecast import Forecast, planned_tokens
from gpt2train.planning.memory import GIB, memory

WIDTH = 132
"""Columns where standard output is no terminal."""


def plan(config: TrainConfig) -> int:
    """`gpt2train plan`: prints what the run takes. Exit code 1 where nothing fits."""
    ranks = planned_ranks(config)
    found = options(config, ranks)
    pick = best(found)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(Text("\n".join(_head(config, ranks))))
    console.print(_table(config, ranks, found, pick))
    if pick is None:
        room = room_bytes(config, ranks) / GIB
        more = "take more or larger GPUs" if config.cluster.on_gpu else "take fewer processes or more memory"
        console.print(Text(f"nothing fits in {room:.1f} GiB: {more}, or a smaller model"))
        return 1
    console.print(Text("\n".join(_foot(config, ranks, pick))))
    if config.plan.apply:
        print(" ".join(settings_of(pick.config, ranks)))
    return 0


def _head(config: TrainConfig, ranks: int) -> list[str]:
    model, cluster = config.model, config.cluster
    lines = [f"{model.name}: {parameter_count(model):,} parameters: {_counts(model)}"]
    padded = parameter_count(model, padded=True)
    if padded != parameter_count(model):
        lines.append(f"  {padded:,} in memory: the embedding has {model.padded_vocabulary:,} rows for speed")
    lines += [f"  {line}" for line in mup.words(model, config.optimizer)]
    room = room_bytes(config, ranks)
    each = f", {room / GIB:.1f} GiB each" if room else ""
    if cluster.name:
        lines.append(f"{cluster.name}: {ranks} × {cluster.device}{each}, {config.precision.value}")
    else:
        lines.append("no cluster: give cluster=8xh100, say, for what fits and how fast it is")
    per_step = config.batch.sequences * model.context
    tokens = planned_tokens(config)
    asked = f"{config.steps:,} steps" if config.steps else f"steps={-(-tokens // per_step)}"
    why = "" if config.steps or config.plan.tokens else ", 20 a parameter (Hoffmann et al. 2022)"
    lines.append(
        f"{tokens:,} tokens = {asked} of {config.batch.sequences} sequences × {model.context}{why}; "
        f"{flops_per_token(model) * tokens:.3g} FLOPs"
    )
    return lines


def _counts(model: ModelConfig) -> str:
    """Parameters by part; they add up to all of them."""
    bare = replace(model, layers=0)
    embedding = parameter_count(replace(bare, context=0))
    positions = parameter_count(bare) - embedding
    block = (parameter_count(model) - parameter_count(bare)) // model.layers
    return f"{embedding:,} embedding and last norm, {positions:,} positions, {model.layers} blocks of {block:,}"


def _table(config: TrainConfig, ranks: int, found: list[Option], pick: Option | None) -> Table:
    """Components at the picked micro batch, so that rows compare; then what each row can do at its own largest."""
    micro = pick.micro if pick else micro_batch(config, ranks)
    device = "GPU" if config.cluster.on_gpu else "process"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        title=f"GiB a {device} at the worst moment of a step with micro batch {micro}",
        title_justify="left",
    )
    for name in ("", "ZeRO", "policy"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "grads", "optimizer", "activations", "logits", "buffers", "other", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("micro ≤", "tokens/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    room = room_bytes(config, ranks)
    last_stage = None
    for option in found:
        if last_stage not in (None, option.config.zero.stage):
            table.add_section()
        last_stage = option.config.zero.stage
        same = replace(option.config, batch=replace(option.config.batch, micro=micro))
        m = memory(same, ranks, on_gpu=config.cluster.on_gpu)
        fits = not room or m.total <= room
        parts = (m.weights, m.gradients, m.master + m.moments, m.activations, m.logits, m.buffers, m.overhead, m.total)
        expected = option.forecast if option.fits else None
        table.add_row(
            "►" if option is pick else "",
            str(option.config.zero.stage),
            option.config.activation_checkpointing.value,
            *(f"{part / GIB:.1f}" for part in parts[:-1]),
            f"{parts[-1] / GIB:.1f}" + ("" if fits else " ✗"),
            str(option.micro) if option.fits else "none",
            f"{expected.tokens_per_s:,.0f}" if expected else "–",
            duration(expected.seconds) if expected else "–",
            style="bold" if option is pick else "dim" if not option.fits else "",
        )
    return table


def _foot(config: TrainConfig, ranks: int, pick: Option) -> list[str]:
    lines = [f"► {' '.join(settings_of(pick.config, ranks))}"]
    if pick.forecast is not None:
        lines += summary(pick.forecast, config, ranks)
    lines.append(
        f"  memory {pick.memory.total / GIB:.1f} GiB; logits are made {min(2048, pick.micro * config.model.context):,} "
        f"positions at a time; “other” is what CUDA and NCCL keep and 4 % of fragmentation"
        if config.cluster.on_gpu
        else f"  memory {pick.memory.total / GIB:.2f} GiB a process"
    )
    if not config.plan.apply:
        lines.append("  plan.apply=true prints these settings alone on the last line; train and launch take it too")
    return lines


def summary(f: Forecast, config: TrainConfig, ranks: int) -> list[str]:
    """A forecast in words, for the plan and for a run's beginning."""
    device = "GPU" if config.cluster.on_gpu else "process"
    cost = f"{f.cost:,.0f} at {config.cluster.gpu_hour_price:g} a {device} hour" if f.cost is not None else None
    energy = f"{f.kilowatt_hours:,.0f} kWh at rated power" if f.kilowatt_hours is not None else None
    hours = [f"{f.seconds * ranks / 3600:,.0f} {device} hours", cost or "cost unknown (give cluster.gpu_hour_price)"]
    told = [
        f"  {f.tokens_per_s:,.0f} tokens/s ({f.tokens_per_s / ranks:,.0f} each) at MFU {_percent(f.mfu)} "
        f"({f.mfu_source})",
        f"  {', '.join([duration(f.seconds), *hours, *([energy] if energy else [])])}",
        f"  disk: {_size(f.data_bytes)} of token shards for one pass, {_size(f.checkpoint_bytes)} of checkpoints",
    ]
    return told


def _percent(share: float) -> str:
    """45.0%, or of less than a hundredth its first two digits, so that none is told as nothing: 0.0031%."""
    return f"{share:.1%}" if share >= 0.01 or not share else f"{100 * share:.2g}%"


def duration(seconds: float) -> str:
    """43 s, 12 min, 5.3 h or 2.1 days."""
    for bound, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < bound:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{seconds / 86_400:,.1f} days"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
