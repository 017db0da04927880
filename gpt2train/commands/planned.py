"""`gpt2train plan`: settings, complete or not, → what the run would take; and what a launch makes of a plan.

Without torch, in under a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpt2train.bounds import check
from gpt2train.commands.table import DATA
from gpt2train.compose import CONFIG_FOLDER, compose
from gpt2train.config import Device, TrainConfig
from gpt2train.errors import ConfigError
from gpt2train.planning.choose import (
    PICKED,
    applied,
    host_bytes,
    misfit,
    planned_ranks,
    room_bytes,
    settings_of,
    with_kept,
)

NOT_NEEDED = ("data=", "run_dir=", "steps=", "batch.micro=")
"""What a run needs and a plan does not; a micro batch that does not divide is the plan's to choose."""


def plan_run(overrides: Sequence[str]) -> int:
    from gpt2train.planning.table import plan

    def faults_of(config: TrainConfig) -> list[str]:
        return [f for f in check(config, world_size=planned_ranks(config)) if not f.startswith(NOT_NEEDED)]

    config = compose(TrainConfig, with_kept(overrides), groups=CONFIG_FOLDER / "train", aliases=DATA, check=faults_of)
    if config.steps < 0:
        raise ConfigError([f"steps={config.steps}: must be above 0; leave it out"])
    return plan(config)


def planned_overrides(config: TrainConfig, overrides: Sequence[str], ranks: int, *, here: bool) -> list[str]:
    """The overrides that a launch of `ranks` hands to each: with the plan's choice written out where it was asked for.

    Raises ConfigError for what cannot fit on the cluster, or, where the ranks are started `here`, on this CPU.
    """
    if here and config.device is Device.cpu and not config.cluster.memory_bytes:
        cluster = replace(config.cluster, on_gpu=False, memory_bytes=host_bytes())
        config = replace(config, cluster=cluster)
    if config.plan.apply:
        config = applied(config, ranks)
    if faults := misfit(config, ranks, room_bytes(config, ranks)):
        raise ConfigError(faults)
    if not config.plan.apply:
        return list(overrides)
    rest = [o for o in overrides if o.split("=", 1)[0] not in ("plan.apply", "plan.keep", *PICKED)]
    return [*rest, *settings_of(config, ranks)]
