"""Settings of a launch: how many processes of a command are started, where, and with what beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

REQUEUE_EXIT_CODE = 85
"""Exit code of a command that saved and stopped because it was told to (the same as gpt2train.config's)."""


class LaunchError(Exception):
    """Ends the launch with `exit_code` and one clear line."""

    exit_code = 1


class ConfigError(LaunchError):
    """Settings that cannot work: `faults` holds one line each (field, value, bound, remedy)."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__(self.faults)  # as its arguments, so that it comes whole through a pickle from a worker

    def __str__(self) -> str:
        return "\n".join(self.faults)


class Launcher(Enum):
    local = "local"


class Starter(Enum):
    """The program that starts the ranks."""

    plain = "plain"
    torchrun = "torchrun"
    deepspeed = "deepspeed"


class Gpus(Enum):
    """What a launch expects of this machine's GPUs."""

    auto = "auto"
    none = "none"
    required = "required"


@dataclass
class LaunchConfig:
    launcher: Launcher = Launcher.local
    """local: all processes on this machine."""
    processes: int = 0
    """Processes on this machine; 0: one per GPU, or one where there is none."""
    gpus: Gpus = Gpus.auto
    """auto: where there are GPUs, each process needs one. none: they do not matter (training on the CPU). required:
    each process needs one."""
    starter: Starter = Starter.plain
    """plain: the launcher itself; torchrun or deepspeed: through that program. Logs, signals and exit codes are the
    same with all three; the other two take some seconds longer to start."""
    port: int = 0
    """TCP port of the rendezvous on 127.0.0.1; 0: a free one."""
    log_dir: str = ""
    """Folder for each rank's output; empty: `logs/` in the run's folder."""
    stop_timeout_s: float = 600.0
    """Processes that were told to save and stop, and have not ended after this many seconds, are killed."""
    dry_run: bool = False
    """Print exactly what would run, and stop."""


def check(config: LaunchConfig) -> list[str]:
    """All faults of `config`, one line each; empty when it can run."""
    faults = []
    if config.processes < 0:
        faults.append(f"processes={config.processes}: must be 0 (one per GPU) or more; give processes=2")
    if not 0 <= config.port < 65536:
        faults.append(f"port={config.port}: must lie in 0..65535; give port=29500 or leave it out")
    if not config.stop_timeout_s > 0:
        faults.append(f"stop_timeout_s={config.stop_timeout_s}: must be above 0 s; leave it out")
    return faults
