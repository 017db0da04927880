"""A command and a LaunchConfig → ranks, wherever they are to run; or, dry, what would run.

Whatever can be known beforehand (settings, hosts, GPUs, a busy port) is told before anything starts, all together.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

from launch import hosts, local, logs, machine, slurm
from launch.config import ConfigError, Gpus, LaunchConfig, Launcher, check
from launch.dry import dry_run_lines, host_lines
from launch.machine import machine_faults
from launch.outcome import Outcome
from launch.place import Place, plan
from launch.ranks import stop_signals
from launch.restarts import run_attempts


def launch(config: LaunchConfig, command: Sequence[str], run_dir: Path) -> int:
    """Run `command` as many processes, here or elsewhere; returns the exit code that launch.outcome describes.

    command: the arguments of one rank, for example [sys.executable, "-m", "gpt2train", "train", "model=small"]; no
    shell sees them. run_dir: where `logs/` goes unless `log_dir` is set, and where `metrics.jsonl` tells how far the
    command has come. With launcher=slurm the job is submitted: 0. Raises ConfigError with all faults together.
    """
    faults = check(config)
    if faults:
        raise ConfigError(faults)
    prefixed = [*config.prefix, *command]
    run_dir = Path(run_dir)
    log_dir = Path(config.log_dir) if config.log_dir else run_dir / "logs"
    match config.launcher:
        case Launcher.local:
            return _local(config, prefixed, run_dir, log_dir)
        case Launcher.hosts:
            return _hosts(config, prefixed, run_dir, log_dir)
        case Launcher.slurm:
            name = run_dir.absolute().name
            return slurm.submit(config, [slurm.Job(name, list(command), run_dir)], name=name, folder=log_dir)


def rank_count(config: LaunchConfig, gpus: int | None = None) -> int:
    """How many processes `launch` would start. gpus: of this machine, where they are counted already.

    Hosts that have to be asked for their GPUs are connected to. Raises ConfigError or LaunchError about hosts.
    """
    match config.launcher:
        case Launcher.hosts:
            return sum(hosts.ask_slots(config, hosts.read_hosts(config)))
        case Launcher.slurm:
            return slurm.processes_of(config)
        case Launcher.local:
            if gpus is None:
                gpus = 0 if config.gpus is Gpus.none else machine.count_gpus()
            return config.processes or max(1, gpus)


def _local(config: LaunchConfig, command: Sequence[str], run_dir: Path, log_dir: Path) -> int:
    gpus = 0 if config.gpus is Gpus.none else machine.count_gpus()
    if faults := machine_faults(config, gpus):
        raise ConfigError(faults)
    processes = rank_count(config, gpus)

    def starts(restart: int) -> list[local.Start]:
        place = Place((processes,), port=config.port or machine.free_port(), restart=restart)
        return plan(config.starter, command, place=place, log_dir=log_dir)

    if config.dry_run:
        print("\n".join(dry_run_lines(starts(0))))
        return 0

    def attempt(number: int) -> Outcome:
        logs.rotate(log_dir, keep=config.keep_attempts)
        return local.run_ranks(
            starts(number), processes=processes, log_dir=log_dir, stop_timeout_s=config.stop_timeout_s
        )

    with logs.own(log_dir), stop_signals() as received:
        logs.note(f"launch of {processes} processes: {shlex.join(command)}")
        return run_attempts(
            attempt,
            run_dir=run_dir,
            restarts=config.restarts,
            first_pause_s=config.restart_pause_s,
            received=received,
        )


def _hosts(config: LaunchConfig, command: Sequence[str], run_dir: Path, log_dir: Path) -> int:
    machines = hosts.read_hosts(config)
    if config.dry_run:
        print("\n".join(host_lines(config, command, machines, log_dir=log_dir)))
        return 0
    slots = hosts.ask_slots(config, machines)
    # A launcher that is stopped by Ctrl-Z would fall silent, and the hosts would end their ranks.
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        with logs.own(log_dir), stop_signals() as received:
            where = ", ".join(f"{m.name} ({n})" for m, n in zip(machines, slots, strict=True))
            logs.note(f"launch of {sum(slots)} processes on {where}: {shlex.join(command)}")

            def attempt(number: int) -> Outcome:
                logs.rotate(log_dir, keep=config.keep_attempts)
                return hosts.run_hosts(
                    config,
                    command,
                    machines,
                    slots,
                    run_dir=run_dir,
                    log_dir=log_dir,
                    restart=number,
                    received=received,
                )

            return run_attempts(
                attempt,
                run_dir=run_dir,
                restarts=config.restarts,
                first_pause_s=config.restart_pause_s,
                received=received,
                begun_before=int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0,
            )
    finally:
        signal.signal(signal.SIGTSTP, before)
