"""Tokens a second, days, cost, energy and disk of a run, before it starts.

Flows in: the settings, the number of ranks, a cluster. Flows out: a `Forecast`. The arithmetic:

    FLOPs a token      6·N + 12·layers·channels·context, N without padding (`config.flops_per_token`)
    compute time       FLOPs ÷ (peak × MFU), and for what activation checkpointing does again its share more
    exchange time      bytes that a rank sends at its ZeRO stage ÷ the link's rate (Rajbhandari et al. 2020, section 7)
    step time          the longer of the two where they overlap, their sum where they do not

MFU is measured (`plan.measured`), stated (`plan.mfu`) or the cluster's, and the plan says which.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2train.config import (
    ActivationCheckpointing,
    Precision,
    TrainConfig,
    flops_per_token,
    micro_batch,
    parameter_count,
)
from gpt2train.errors import ConfigError
from gpt2train.planning.memory import muon_count

TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", table 3."""
SELECTIVE_SHARE = 0.03
"""Norms and GELU made again: an allowance; Korthikanti et al. 2022, table 4, measured 2 to 4 % for their choice."""
CHECKPOINT_BYTES = 12
"""fp32 weight and both moments of a parameter."""
MOMENT_BYTES = 4
"""The one of these that Muon does without."""
TOKEN_BYTES = 2


@dataclass(frozen=True)
class Forecast:
    tokens_per_s: float
    """Of all ranks together."""
    mfu: float
    """That it rests on, before what a policy or the exchange takes off."""
    mfu_source: str
    tokens: int
    seconds: float
    cost: float | None
    """In the currency of cluster.gpu_hour_price; None where it is not known."""
    kilowatt_hours: float | None
    """Of the GPUs alone, at their rated power."""
    data_bytes: int
    """Token shards of one pass over `tokens`."""
    checkpoint_bytes: int
    """What the kept checkpoints take, and the one that is being written."""


def forecast(config: TrainConfig, ranks: int) -> Forecast | None:
    """None where neither the device's peak nor a rate is known."""
    found = utilization(config)
    peak = peak_flops(config)
    if found is None or peak <= 0:
        return None
    mfu, source = found
    compute_s = flops_per_token(config.model) / (peak * mfu) * (1 + _again(config))
    tokens_per_pass = micro_batch(config, ranks) * config.model.context
    passes = max(config.batch.sequences // (micro_batch(config, ranks) * ranks), 1)
    step_compute_s = compute_s * tokens_per_pass * passes
    exchange_s = _exchanged_bytes(config, ranks, passes) / (config.cluster.link_bytes_per_s or float("inf"))
    overlaps = not (config.zero.stage == 1 and config.precision is Precision.bf16)
    step_s = max(step_compute_s, exchange_s) if overlaps else step_compute_s + exchange_s
    rate = config.batch.sequences * config.model.context / step_s
    tokens = planned_tokens(config)
    seconds = tokens / rate
    gpu_hours = seconds * ranks / 3600
    kept = config.checkpoint.keep_last + 1
    if config.checkpoint.keep_every_steps:
        kept += tokens // (config.checkpoint.keep_every_steps * config.batch.sequences * config.model.context)
    return Forecast(
        tokens_per_s=rate,
        mfu=mfu,
        mfu_source=source,
        tokens=tokens,
        seconds=seconds,
        cost=gpu_hours * config.cluster.gpu_hour_price if config.cluster.gpu_hour_price else None,
        kilowatt_hours=gpu_hours * config.cluster.watts / 1000 if config.cluster.watts else None,
        data_bytes=tokens * TOKEN_BYTES,
        checkpoint_bytes=kept
        * (CHECKPOINT_BYTES * parameter_count(config.model, padded=True) - MOMENT_BYTES * muon_count(config)),
    )


def planned_tokens(config: TrainConfig) -> int:
    """Tokens of the whole run: `steps`, else `plan.tokens`, else 20 for each parameter."""
    if config.steps:
        return config.steps * config.batch.sequences * config.model.context
    return config.plan.tokens or TOKENS_PER_PARAMETER * parameter_count(config.model)


def peak_flops(config: TrainConfig) -> float:
    """Of one device in the run's precision; 0: unknown."""
    cluster = config.cluster
    return cluster.peak_bf16_flops if config.precision is Precision.bf16 else cluster.peak_fp32_flops


def utilization(config: TrainConfig) -> tuple[float, str] | None:
    """MFU to plan with, and where it is from. Raises ConfigError when `plan.measured` holds none."""
    if config.plan.measured:
        return _measured(config), f"measured: {config.plan.measured}"
    if config.plan.mfu:
        return config.plan.mfu, "as stated: plan.mfu"
    if config.cluster.mfu:
        return config.cluster.mfu, config.cluster.mfu_source
    return None


def _measured(config: TrainConfig) -> float:
    """The median over the steps of a run, or what a benchmark's JSON says of this model, else of any."""
    path = Path(config.plan.measured)
    try:
        if path.is_dir():
            from gpt2train.run_folder import VERSIONS, read_json, read_metrics, read_run_config

            ran = read_run_config(path)
            versions = read_json(path / VERSIONS)
            _refuse_other_device(config, str(versions.get("device", "")))
            entries = [e for e in read_metrics(path) if "tokens_per_s" in e][1:]  # the first one starts things up
            known = [e["mfu"] for e in entries if e.get("mfu")]
            if not known and (peak := peak_flops(config)):
                # The run may have had several ranks, of the same kind.
                ranks = versions.get("processes", 1)
                known = [e["tokens_per_s"] * flops_per_token(ran.model) / (peak * ranks) for e in entries]
            if known:
                return statistics.median(known)
        else:
            found = list(_mfus(json.loads(path.read_text(encoding="utf-8")), ""))
            own = [mfu for name, mfu in found if name == config.model.name]
            if found:
                return statistics.median(own or [mfu for _, mfu in found])
    except (OSError, ValueError) as error:
        raise ConfigError([f"plan.measured={path}: cannot be read ({error}); give a run folder"]) from None
    raise ConfigError([f"plan.measured={path}: holds no utilization (`mfu`); give a run of more than one step"])


def _refuse_other_device(config: TrainConfig, device: str) -> None:
    """Raises ConfigError for a run that was measured on another kind of device than the cluster's.

    device: as torch names it, "cpu", or "" of a run that did not record it. GPUs are told apart by their models' names
    ("H100"), where both have one.
    """
    cluster = config.cluster
    here, there = (set(re.findall(r"\b[A-Z]+\d+[A-Z]*\b", name)) for name in (cluster.device, device))
    other_model = bool(here and there and not here & there)
    if device and ((device == "cpu") == cluster.on_gpu or (cluster.on_gpu and other_model)):
        raise ConfigError(
            [
                f"plan.measured={config.plan.measured}: was measured on {device}, cluster={cluster.name} is "
                f"{cluster.device or 'of GPUs'}; give a run of such a device, or plan.mfu=0.4 and no plan.measured"
            ]
        )


def _mfus(content: Any, model: str) -> list[tuple[str, float]]:
    """(model, mfu) wherever an object of a JSON file has an `mfu`, named by the nearest `model` above it."""
    if isinstance(content, dict):
        name = content.get("model")
        model = name if isinstance(name, str) else model
        own = [(model, float(content["mfu"]))] if isinstance(content.get("mfu"), (int, float)) else []
        return own + [pair for key, value in content.items() for pair in _mfus(value, model or key)]
    return [pair for value in content for pair in _mfus(value, model)] if isinstance(content, list) else []


def _again(config: TrainConfig) -> float:
    """Part of a step's FLOPs that activation checkpointing does a second time."""
    if config.activation_checkpointing is ActivationCheckpointing.none:
        return 0.0
    if config.activation_checkpointing is ActivationCheckpointing.selective:
        return SELECTIVE_SHARE
    model = config.model
    embeddings = (model.vocabulary + model.context) * model.channels
    forward = 2 * (parameter_count(model) - embeddings) + 4 * model.layers * model.channels * model.context
    return forward / flops_per_token(model)


def _exchanged_bytes(config: TrainConfig, ranks: int, passes: int) -> float:
    """Bytes that one rank sends in a step, in rings."""
    if ranks == 1:
        return 0.0
    number = 2 if config.precision is Precision.bf16 else 4
    share = parameter_count(config.model, padded=True) * number * (ranks - 1) / ranks
    stage = config.zero.stage
    if stage <= 1:
        return 2 * share  # gradients reduced; ZeRO 0 hands the sums out, ZeRO 1 the new weights
    if stage == 2:
        return (passes + 1) * share  # gradients at every pass, weights once
    return 3 * passes * share  # weights for both directions, and gradients
