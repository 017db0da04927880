"""Settings of a launch: how many processes of a command are started, where, and with what beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

REQUEUE_EXIT_CODE = 85
"""Exit code of a command that saved and stopped because it was told to (the same as gpt2train.config's)."""
PEER_EXIT_CODE = 7
"""Exit code of a rank that ends because another one is gone (the same as gpt2train.config's)."""
IN_USE_EXIT_CODE = 3
"""Exit code of a command whose folder another process owns (the same as gpt2train.config's)."""
STORAGE_EXIT_CODE = 4
"""Exit code of a command that found no room to write in (the same as gpt2train.errors's)."""


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


class InUseError(LaunchError):
    """Another launch owns the folder of the logs."""

    exit_code = IN_USE_EXIT_CODE


class Launcher(Enum):
    local = "local"
    hosts = "hosts"
    slurm = "slurm"


class Starter(Enum):
    """The program that starts the ranks."""

    plain = "plain"
    torchrun = "torchrun"
    deepspeed = "deepspeed"


class Gpus(Enum):
    """What a launch expects of a machine's GPUs."""

    auto = "auto"
    none = "none"
    required = "required"


class Over(Enum):
    """The program that reaches another machine."""

    ssh = "ssh"
    srun = "srun"


HANDED_OVER = (
    *("PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_DEVICE_*", "CUBLAS_*", "NCCL_*", "GLOO_*", "TORCH_*"),
    *("TORCHINDUCTOR_*", "PYTORCH_*", "OMP_*", "DS_*", "WANDB_*", "HF_*", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy"),
)
"""Variables that hosts get from the launcher's environment. Not CUDA_VISIBLE_DEVICES: it numbers one machine's GPUs."""


@dataclass
class HostsConfig:
    file: str = ""
    """File with one host a line: `[user@]name [slots=N]`, `#` begins a comment; the first one is where all meet."""
    names: list[str] = field(default_factory=list)
    """Hosts by name, instead of a file: [node1,node2]."""
    over: Over = Over.ssh
    """ssh; or srun within a Slurm allocation, whose nodes are then the hosts."""
    ssh: list[str] = field(default_factory=list)
    """More arguments of ssh, such as [-p,2222,-i,key]. Keys, known hosts and names are as ssh's own settings say; it
    never asks for a password."""
    setup: list[str] = field(default_factory=list)
    """Lines for each host's shell before anything is started there: ['module load cuda','. venv/bin/activate']."""
    python: str = ""
    """Python on the hosts; empty: the path of the one that runs the launch."""
    environment: list[str] = field(default_factory=list)
    """More variables that the hosts get from here, by name or pattern, beside those of Python, CUDA, NCCL, Gloo, torch,
    OpenMP, DeepSpeed, Weights & Biases, Hugging Face and proxies; 'NAME=VALUE' sets one. They go through the
    connection, never on a command line. srun takes the environment along by itself."""
    address: str = ""
    """Where the ranks meet: a name or address of the first host that all others reach; empty: its name in the file."""
    connect_timeout_s: float = 60.0
    """Hosts that have not answered after this many seconds are named, and nothing is started."""
    silence_timeout_s: float = 60.0
    """A host that is not heard of for this long is lost, and all others end; a host that does not hear of the launcher
    for this long ends its ranks."""


@dataclass
class SlurmConfig:
    nodes: int = 1
    """Nodes of the job."""
    partition: str = ""
    """Partitions that it may run in, with commas between; empty: Slurm's default."""
    account: str = ""
    """Account that it is charged to; empty: Slurm's default."""
    qos: str = ""
    """Quality of service; empty: Slurm's default."""
    time: str = ""
    """Time limit as Slurm writes it: 30 (minutes), 8:00:00, 2-12:00:00; empty: the partition's own."""
    cpus_per_node: int = 0
    """Cores that a node gives; 0: `exclusive`, or as many as there are processes."""
    memory: str = ""
    """Memory that a node gives, as Slurm writes it (64G; 0: all of it); empty: the partition's own."""
    exclusive: bool = False
    """Whole nodes, shared with nobody."""
    constraint: str = ""
    """Features that a node must have."""
    warning_s: int = 300
    """Seconds before the time limit at which the run is told to save and the job requeues itself: at least what a save
    takes."""
    requeue: bool = True
    """A job that was preempted, or has come to its time limit, goes back into the queue and resumes."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, one each: ['--mail-type=END,FAIL','--reservation=night']."""
    setup: list[str] = field(default_factory=list)
    """Lines of the script before anything is started: ['module load cuda','. venv/bin/activate']."""
    array_limit: int = 0
    """Trials of a sweep that run at the same time; 0: as many as Slurm lets."""


@dataclass
class LaunchConfig:
    launcher: Launcher = Launcher.local
    """local: all processes on this machine. hosts: on several, started and restarted together. slurm: a job that
    requeues itself when it is preempted or comes to its time limit."""
    processes: int = 0
    """Processes on each machine; 0: one per GPU, or one where there is none (hosts: `slots` in the file come first)."""
    gpus: Gpus = Gpus.auto
    """auto: where there are GPUs, each process needs one. none: they do not matter (training on the CPU). required:
    each process needs one."""
    starter: Starter = Starter.plain
    """plain: the launcher itself; torchrun or deepspeed: through that program. Logs, signals, restarts and exit codes
    are the same with all three; the other two take some seconds longer to start."""
    prefix: list[str] = field(default_factory=list)
    """Words before the command of each rank, for a container: [apptainer,exec,--nv,image.sif]."""
    python: str = ""
    """Python that runs the ranks, for one within a container; empty: the one that runs the launch."""
    port: int = 0
    """TCP port where the ranks meet, on the first machine; 0: a free one, and another one at each restart."""
    restarts: int = 3
    """Attempts in a row without progress that may follow a failure; 0: none. A setting that cannot work, a loss that is
    not finite, a failure before the very first step, or the same step that fails the same way twice is not tried
    again."""
    restart_pause_s: float = 10.0
    """Pause before a restart; it doubles with each attempt without progress, up to 600 s."""
    log_dir: str = ""
    """Folder for each rank's output; empty: `logs/` in the run's folder. Each attempt before has a folder in it."""
    keep_attempts: int = 20
    """Attempts before whose logs stay; 0: all."""
    stop_timeout_s: float = 600.0
    """Processes that were told to save and stop, and have not ended after this many seconds, are killed."""
    dry_run: bool = False
    """Print exactly what would run, and stop."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


# sbatch(1), --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, with minutes, with seconds.
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
# sbatch(1), --mem: a whole number and K, M, G or T; megabytes without.
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_HOST = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_\[:][\w.:\]-]*")
_SIGNAL_LATEST_S = 65_535  # sbatch(1), --signal: "sig_time" lies between 0 and 65535


def check(config: LaunchConfig) -> list[str]:
    """All faults of `config`, one line each; empty when it can run."""
    faults = []
    if config.processes < 0:
        faults.append(f"processes={config.processes}: must be 0 (one per GPU) or more; give processes=2")
    if not 0 <= config.port < 65536:
        faults.append(f"port={config.port}: must lie in 0..65535; give port=29500 or leave it out")
    if config.restarts < 0:
        faults.append(f"restarts={config.restarts}: must be 0 (never) or more; leave it out")
    if config.keep_attempts < 0:
        faults.append(f"keep_attempts={config.keep_attempts}: must be 0 (all) or more; leave it out")
    seconds = {
        "restart_pause_s": config.restart_pause_s,
        "stop_timeout_s": config.stop_timeout_s,
        "hosts.connect_timeout_s": config.hosts.connect_timeout_s,
        "hosts.silence_timeout_s": config.hosts.silence_timeout_s,
    }
    faults += [f"{name}={value}: must be above 0 s; leave it out" for name, value in seconds.items() if not value > 0]
    if config.launcher is Launcher.hosts:
        faults += _check_hosts(config.hosts)
    if config.launcher is Launcher.slurm:
        faults += _check_slurm(config)
    return faults


def host_is_name(text: str) -> bool:
    """Can `text` be a host's name or address, with `user@` or without? Never what ssh would take for an option."""
    return bool(_HOST.fullmatch(text))


def _check_hosts(hosts: HostsConfig) -> list[str]:
    faults = []
    if hosts.over is Over.ssh:
        if hosts.file and hosts.names:
            faults.append(f"hosts.names={hosts.names}: hosts.file={hosts.file} is given too; give one of them")
        if not hosts.file and not hosts.names:
            faults.append("hosts.file='': launcher=hosts needs hosts; give hosts.file=FILE or hosts.names=[a,b]")
        bad = [name for name in hosts.names if not host_is_name(name)]
        faults += [f"hosts.names={name}: not a host's name; give [user@]name" for name in bad]
        faults += [
            f"hosts.names={name}: is there twice; give each host once, and its processes with processes="
            for name in sorted({n for n in hosts.names if hosts.names.count(n) > 1})
        ]
    elif hosts.file or hosts.names:
        faults.append(
            "hosts.over=srun: the hosts are the nodes of the allocation; leave hosts.file and hosts.names out"
        )
    for entry in hosts.environment:
        name = entry.partition("=")[0]
        if not re.fullmatch(r"[A-Za-z_*?][A-Za-z0-9_*?]*", name) or ("=" in entry and re.search(r"[*?]", name)):
            faults.append(f"hosts.environment={name}: must be NAME, a pattern such as NCCL_*, or NAME=VALUE")
    return faults


def _seconds(time: str) -> int:
    """A time limit of Slurm's form in seconds; 0 for none, or one that is not of that form."""
    if not _TIME.fullmatch(time) or not time[0].isdigit():
        return 0
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # With days hours come first; without, minutes, but for three numbers.
    factors = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(p * f for p, f in zip(parts, factors, strict=False))


def _check_slurm(config: LaunchConfig) -> list[str]:
    slurm = config.slurm
    faults = []
    if slurm.nodes < 1:
        faults.append(f"slurm.nodes={slurm.nodes}: must be 1 or more")
    if config.processes == 0 and config.gpus is not Gpus.none:
        faults.append("processes=0: this machine cannot count a node's GPUs; give the number, such as processes=8")
    if slurm.time and not _TIME.fullmatch(slurm.time):
        faults.append(f"slurm.time={slurm.time}: not of Slurm's form; give minutes, 8:00:00 or 2-12:00:00")
    if slurm.memory and not _MEMORY.fullmatch(slurm.memory):
        faults.append(f"slurm.memory={slurm.memory}: not of Slurm's form; give 64G, or 0 for all of a node's")
    if slurm.cpus_per_node < 0:
        faults.append(f"slurm.cpus_per_node={slurm.cpus_per_node}: must be 0 or more")
    if slurm.array_limit < 0:
        faults.append(f"slurm.array_limit={slurm.array_limit}: must be 0 (no limit) or more")
    if not 0 <= slurm.warning_s <= _SIGNAL_LATEST_S:
        faults.append(f"slurm.warning_s={slurm.warning_s}: must lie in 0..{_SIGNAL_LATEST_S} (Slurm's own bound)")
    elif slurm.requeue and (limit_s := _seconds(slurm.time)) and limit_s <= slurm.warning_s:
        faults.append(
            f"slurm.time={slurm.time}: ends before slurm.warning_s={slurm.warning_s}: the job would stop at its start; "
            f"give more time, or a smaller slurm.warning_s"
        )
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(slurm, name)
        # In a line of #SBATCH nothing is quoted: Slurm splits at spaces.
        if value and not re.fullmatch(r"[\w.,:&|()\[\]*+@/-]+", value):
            faults.append(f"slurm.{name}={value}: holds a character that no name in Slurm has")
    for option in slurm.options:
        if not re.fullmatch(r"-[^\n]+", option):
            faults.append(f"slurm.options={option}: must be one option of sbatch each, such as --reservation=night")
    for line in slurm.setup:
        if "\n" in line:
            faults.append(f"slurm.setup={line!r}: one line each; give several entries")
    return faults
