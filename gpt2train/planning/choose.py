"""Every ZeRO stage and activation policy on a cluster, the fastest that fits, and the refusal of what does not.

Flows in: the settings and the number of ranks. Flows out: `Option`s, and settings with the best one in place. Nothing
here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2train.bounds import check
from gpt2train.config import ActivationCheckpointing, TrainConfig, micro_batch
from gpt2train.errors import ConfigError
from gpt2train.planning.forecast import Forecast, forecast
from gpt2train.planning.memory import GIB, Memory, memory

PICKED = ("batch.micro", "zero.stage", "activation_checkpointing")
"""What a plan chooses."""
MAX_MICRO_TOKENS = 1 << 16
"""Tokens of one forward pass beyond which a GPU gains nothing more."""
SMALL_MICRO = 8
"""Sequences below which a pass is too small to keep a GPU busy, whatever the forecast says."""
PROCESS_BYTES = 0.5 * GIB
"""A training process on a CPU before it has a model: Python, torch and DeepSpeed, measured."""


@dataclass(frozen=True)
class Option:
    """One ZeRO stage and activation policy, with the largest micro batch that fits."""

    config: TrainConfig
    """With these three in place; `batch.micro` is the smallest possible where nothing fits."""
    fits: bool
    memory: Memory
    forecast: Forecast | None

    @property
    def micro(self) -> int:
        return self.config.batch.micro


def planned_ranks(config: TrainConfig) -> int:
    """Ranks of the cluster."""
    return max(config.cluster.nodes * config.cluster.gpus, 1)


def room_bytes(config: TrainConfig, ranks: int) -> float:
    """Memory that one rank has on the cluster; 0: unknown. On a CPU the ranks of a machine share it."""
    cluster = config.cluster
    if cluster.on_gpu or not cluster.memory_bytes:
        return cluster.memory_bytes
    return cluster.memory_bytes / -(-ranks // max(cluster.nodes, 1)) - PROCESS_BYTES


def options(config: TrainConfig, ranks: int) -> list[Option]:
    """All that the settings allow, by stage and policy. Settings in `plan.keep` stay as they are."""
    stages = [config.zero.stage] if "zero.stage" in config.plan.keep else [0, 1, 2, 3]
    policies = list(ActivationCheckpointing)
    if "activation_checkpointing" in config.plan.keep:
        policies = [config.activation_checkpointing]
    faults = set(check(config, world_size=ranks))
    found = []
    for stage in stages:
        for policy in policies:
            tried = replace(config, zero=replace(config.zero, stage=stage), activation_checkpointing=policy)
            own = {f for f in check(tried, world_size=ranks) if f.startswith(("zero.", "activation", "compile"))}
            if own - faults:
                continue
            found.append(_largest(tried, ranks))
    return found


def _largest(config: TrainConfig, ranks: int) -> Option:
    room = room_bytes(config, ranks)
    share = max(config.batch.sequences // ranks, 1)
    if "batch.micro" in config.plan.keep and config.batch.micro:
        micros: Sequence[int] = [config.batch.micro]
    else:
        most = max(MAX_MICRO_TOKENS // config.model.context, 1)
        micros = [m for m in range(min(share, most), 0, -1) if share % m == 0]
    tried = [replace(config, batch=replace(config.batch, micro=m)) for m in micros]
    for candidate in tried:
        if not room or memory(candidate, ranks, on_gpu=config.cluster.on_gpu).total <= room:
            return _option(candidate, ranks, fits=True)
    return _option(tried[-1], ranks, fits=False)


def _option(config: TrainConfig, ranks: int, *, fits: bool) -> Option:
    found = memory(config, ranks, on_gpu=config.cluster.on_gpu)
    return Option(config, fits, found, forecast(config, ranks))


def best(found: Sequence[Option]) -> Option | None:
    """The fastest that fits; of equals (within 1 %) the one that splits and computes again the least. None: none."""
    fitting = [o for o in found if o.fits]
    if not fitting:
        return None
    rates = [o.forecast.tokens_per_s if o.forecast else 0.0 for o in fitting]
    near = [o for o, rate in zip(fitting, rates, strict=True) if rate >= 0.99 * max(rates)]
    policies = list(ActivationCheckpointing)

    def cost(option: Option) -> tuple[int, int, int]:
        c = option.config
        return -min(option.micro, SMALL_MICRO), policies.index(c.activation_checkpointing), c.zero.stage

    return min(near, key=cost)


def applied(config: TrainConfig, ranks: int) -> TrainConfig:
    """The settings with the plan's choice in place; raises ConfigError when nothing fits."""
    found = best(options(config, ranks))
    if found is None:
        least = min(options(config, ranks), key=lambda o: o.memory.total)
        raise ConfigError([_too_large(least.config, least.memory.total, room_bytes(config, ranks), ranks, None)])
    return found.config


def settings_of(config: TrainConfig, ranks: int) -> list[str]:
    """The three as overrides that train and launch take."""
    return [
        f"batch.micro={micro_batch(config, ranks)}",
        f"zero.stage={config.zero.stage}",
        f"activation_checkpointing={config.activation_checkpointing.value}",
    ]


def with_kept(overrides: Sequence[str]) -> list[str]:
    """Overrides of a command line that a plan is made for, with those of PICKED that it gives named in `plan.keep`."""
    given = [name for name in PICKED if any(o.split("=", 1)[0] == name for o in overrides)]
    if not given or any(o.startswith("plan.keep=") for o in overrides):
        return list(overrides)
    return [*overrides, f"plan.keep=[{','.join(given)}]"]


def misfit(config: TrainConfig, ranks: int, room: float) -> list[str]:
    """What does not fit in `room` bytes a rank, as a fault with its remedy; empty where it does, or room is unknown."""
    if not config.plan.refuse or room <= 0:
        return []
    needed = memory(config, ranks, on_gpu=config.cluster.on_gpu).total
    if needed <= room:
        return []
    roomy = replace(config, cluster=replace(config.cluster, memory_bytes=room))
    if not config.cluster.on_gpu:
        roomy = replace(roomy, cluster=replace(roomy.cluster, nodes=ranks, memory_bytes=room + PROCESS_BYTES))
    return [_too_large(config, needed, room, ranks, best(options(roomy, ranks)))]


def _too_large(config: TrainConfig, needed: float, room: float, ranks: int, remedy: Option | None) -> str:
    where = "GPU" if config.cluster.on_gpu else "process"
    give = (
        f"give {' '.join(settings_of(remedy.config, ranks))}"
        if remedy
        else f"nothing fits on {ranks} of them; give a smaller model, or more"
    )
    return (
        f"model.name={config.model.name}: with {' '.join(settings_of(config, ranks))} a {where} needs "
        f"{needed / GIB:.1f} GiB and has {room / GIB:.1f}; {give} (plan.refuse=false tries all the same)"
    )


def host_bytes(root: Path = Path("/")) -> float:
    """Memory of this machine, or of the container that this process is in; 0 where the kernel does not tell.

    Not what is free at this moment: all processes of a run must come to the same answer.
    """
    limits = []
    for path, name, unit in (("proc/meminfo", "MemTotal:", 1024), ("sys/fs/cgroup/memory.max", "", 1)):
        try:
            lines = (root / path).read_text().splitlines()
        except OSError:
            continue
        limits += [float(line.removeprefix(name).split()[0]) * unit for line in lines if line.startswith(name)
                   and line.removeprefix(name).split()[0].isdigit()]  # fmt: skip
    return min(limits, default=0.0)
