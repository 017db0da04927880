"""A real Slurm on one machine: a controller and three nodes, in a network namespace of their own.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; `missing()` says what is not there. Nothing of the
machine's own configuration is read or written. Two partitions share nodes n1 and n2: a job in `urgent` preempts one in
`normal`, which is requeued after its grace time. `quiet` has n3, where nobody is preempted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from ssh_hosts import no_namespaces

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
TOOLS = ("ip", "nsenter", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort=6817
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MailProg=/bin/true
KillWait=5
InactiveLimit=0
SlurmctldTimeout=120
SlurmdTimeout=300
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=7001 CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=7002 CPUs=1
NodeName=n3 NodeHostname=localhost NodeAddr=127.0.0.1 Port=7003 CPUs=2
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=quiet Nodes=n3 PriorityTier=1 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty when there can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own in a network namespace needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return no_namespaces()


@dataclass
class Cluster:
    space: str
    folder: Path

    @property
    def inside(self) -> list[str]:
        """Words before a command; not `ip netns exec`, which hides the /sys/fs/cgroup that slurmd looks for."""
        return ["nsenter", f"--net=/run/netns/{self.space}"]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, words: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        """A command inside, as a user of the cluster would give it."""
        return subprocess.run(
            [*self.inside, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            **options,  # type: ignore[call-overload]
        )

    def state(self, job: str) -> str:
        """RUNNING, PENDING, …; `COMPLETED 0` or `FAILED 7` with the exit code once the job is over."""
        shown = self.run(["scontrol", "show", "job", job, "--oneliner"]).stdout
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        state = fields.get("JobState", "GONE")
        return f"{state} {fields['ExitCode'].split(':')[0]}" if state in ("COMPLETED", "FAILED") else state

    def wait(self, job: str, *states: str, timeout_s: float = 240) -> str:
        """Until the job is in one of these states."""
        deadline_s = time.monotonic() + timeout_s
        while not (state := self.state(job)).startswith(states):
            assert time.monotonic() < deadline_s, f"job {job} is {state}, not {states}:\n{self.logs()}"
            time.sleep(0.3)
        return state

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster whose nodes are idle; at the end every process in its namespace is killed."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    space = f"g2s{os.getpid()}"
    made = Cluster(space, folder)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    started: list[subprocess.Popen[bytes]] = []
    try:
        subprocess.run(["ip", "netns", "add", space], check=True)
        subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
        # With nothing but 127.0.0.1 a name does not resolve.
        subprocess.run(["ip", "-n", space, "address", "add", "10.77.0.1/32", "dev", "lo"], check=True)
        files = [f"--{what}={folder}/munge.{end}" for what, end in MUNGE_FILES.items()]
        daemons = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D"]]
        daemons += [["slurmd", "-D", "-N", node] for node in ("n1", "n2", "n3")]
        for words in daemons:
            with open(folder / "daemons.log", "ab") as log:
                process = subprocess.Popen(
                    [*made.inside, *words], env=made.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            started.append(process)
            if words[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), "munged", made, started)
        _until(
            lambda: made.run(["sinfo", "-h", "-N", "-o", "%N %t"]).stdout.split()[1::2] == IDLE, "nodes", made, started
        )
        yield made
    finally:
        for _ in range(3):  # what one process was about to start is found the next time
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for process in started:
            process.wait(30)


IDLE = ["idle"] * 5  # a line for each node of each partition

MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def _until(done: Callable[[], bool], what: str, made: Cluster, started: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline_s = time.monotonic() + 120
    while not done():
        if any(process.poll() is not None for process in started):
            pytest.skip(f"Slurm's own programs do not run here:\n{made.logs()}")
        assert time.monotonic() < deadline_s, f"{what} did not come up:\n{made.logs()}"
        time.sleep(0.1)
