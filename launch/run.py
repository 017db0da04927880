"""A command and a LaunchConfig → ranks, with the starter that was chosen; or, dry, the lines that would run.

Whatever can be known beforehand (settings, GPUs, a busy port) is told before anything starts, all of it together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import local, machine
from launch.config import ConfigError, Gpus, LaunchConfig, check


def launch(config: LaunchConfig, command: Sequence[str], run_dir: Path) -> int:
    """Run `command` as many processes on this machine; returns the exit code that launch.local describes.

    command: the arguments of one rank, for example [sys.executable, "-m", "gpt2train", "train", "model=small"]; no
    shell sees them. run_dir: where `logs/` goes unless `log_dir` is set. Raises ConfigError with all faults together.
    """
    gpus = 0 if config.gpus is Gpus.none else machine.count_gpus()
    faults = [*check(config), *machine_faults(config, gpus)]
    if faults:
        raise ConfigError(faults)
    processes = rank_count(config, gpus)
    log_dir = Path(config.log_dir) if config.log_dir else Path(run_dir) / "logs"
    port = config.port or machine.free_port()
    starts = local.plan(config.starter, command, processes=processes, port=port, log_dir=log_dir)
    if config.dry_run:
        print("\n".join(dry_run_lines(starts)))
        return 0
    return local.run_ranks(starts, processes=processes, log_dir=log_dir, stop_timeout_s=config.stop_timeout_s)


def rank_count(config: LaunchConfig, gpus: int | None = None) -> int:
    """How many processes `launch` would start: `processes`, or one per GPU, or one. `gpus`: where counted already."""
    if gpus is None:
        gpus = 0 if config.gpus is Gpus.none else machine.count_gpus()
    return config.processes or max(1, gpus)


def dry_run_lines(starts: Sequence[local.Start]) -> list[str]:
    """Lines for a POSIX shell that start the same processes: several run side by side, and the last line waits."""
    if len(starts) == 1:
        return [starts[0].line()]
    return [*(f"{start.line()} &" for start in starts), "wait"]


def machine_faults(config: LaunchConfig, gpus: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What this machine, with `gpus` GPUs, cannot give, one line each."""
    faults = []
    if config.gpus is Gpus.required and not gpus:
        hidden = " (CUDA_VISIBLE_DEVICES hides them)" if "CUDA_VISIBLE_DEVICES" in environment else ""
        faults.append(f"gpus=required: no GPU is visible here{hidden}; see nvidia-smi, or train with device=cpu")
    elif 0 < gpus < config.processes:
        faults.append(
            f"processes={config.processes}: each needs a GPU and {gpus} are visible; give processes={gpus}, or "
            f"gpus=none to train on the CPU"
        )
    if 0 < config.port < 65536 and not machine.port_is_free(config.port):
        faults.append(f"port={config.port}: in use at {machine.LOOPBACK}; give another, or leave it out for a free one")
    return faults
