"""All ranks of a command on several machines: started together, watched, told to stop together, ended together.

In: hosts, a command, and how to reach them. Out: an `Outcome`, whose exit code is as launch.outcome says, and a log
file per rank in a folder that the hosts share. An attempt is

    connect    to all hosts at once; each says what it has
    check      working folder, run folder (the same on all), Python, GPUs, port: all faults of all hosts, together
    start      all ranks; they meet at the first host, at a port that is free there
    watch      until all have ended; a rank that fails, or a host that falls silent, ends all others

torchrun's own restarts over several machines do not come back (a new rendezvous is needed on all of them at once), so a
restart is a new attempt, from here.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import logs, ranks
from launch.config import HANDED_OVER, PEER_EXIT_CODE, ConfigError, Gpus, LaunchConfig, LaunchError, Over, host_is_name
from launch.connection import Connection, Host, arguments, handed_over
from launch.node import BEATS_PER_SILENCE
from launch.outcome import Ended, Outcome, blame, conclude, cut_short

LOOK_S = 0.1
PACKAGE_FOLDER = str(Path(__file__).parents[1])


def read_hosts(config: LaunchConfig) -> list[Host]:
    """The hosts of a launch, in the order of ranks. Raises ConfigError with all that is wrong with the file."""
    if config.hosts.over is Over.srun:
        return _allocation()
    if config.hosts.names:
        return [Host(name) for name in config.hosts.names]
    path = Path(config.hosts.file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError([f"hosts.file={path}: {reason}; give a file with one host a line"]) from None
    hosts: list[Host] = []
    faults: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, *rest = words
        slots = [word.removeprefix("slots=") for word in rest]
        if not host_is_name(name) or len(rest) > 1 or any(not word.startswith("slots=") for word in rest):
            faults.append(f"{path}, line {number}: {line.strip()!r} is not of the form [user@]name [slots=N]")
        elif slots and not (slots[0].isdecimal() and int(slots[0]) > 0):
            faults.append(f"{path}, line {number}: slots={slots[0]}: must be 1 or more")
        elif any(host.name == name for host in hosts):
            faults.append(f"{path}, line {number}: {name} is there twice; give each host once, with all its slots")
        else:
            hosts.append(Host(name, int(slots[0]) if slots else 0))
    if not hosts and not faults:
        faults.append(f"hosts.file={path}: names no host; give one a line")
    if faults:
        raise ConfigError(faults)
    return hosts


def _allocation() -> list[Host]:
    """The nodes of the Slurm job that this process is in."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ConfigError(["hosts.over=srun: there is no Slurm allocation here; use launcher=slurm, or salloc first"])
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"scontrol show hostnames {nodes}: {error}") from error
    return [Host(name) for name in listed.stdout.split()]


def slots_of(config: LaunchConfig, hosts: Sequence[Host]) -> tuple[int, ...] | None:
    """Processes of each host, where settings and file say them; None: the hosts have to be asked for their GPUs."""
    said = [host.slots or config.processes or (1 if config.gpus is Gpus.none else 0) for host in hosts]
    return tuple(said) if all(said) else None


def ask_slots(config: LaunchConfig, hosts: Sequence[Host]) -> tuple[int, ...]:
    """Processes of each host: one per GPU where nothing else is said; connects to find out."""
    said = slots_of(config, hosts)
    if said is not None:
        return said
    with tempfile.TemporaryDirectory() as folder, _Lines(config, hosts, Path(folder)) as lines:
        lines.connect()
        return tuple(
            host.slots or config.processes or max(1, int(hello["gpus"]))
            for host, hello in zip(hosts, lines.hellos, strict=True)
        )


def run_hosts(
    config: LaunchConfig,
    command: Sequence[str],
    hosts: Sequence[Host],
    slots: tuple[int, ...],
    *,
    run_dir: Path,
    log_dir: Path,
    restart: int,
    received: deque[signal.Signals],
) -> Outcome:
    """One attempt. received: stop signals that came to the launcher.

    At the first attempt (`restart` 0) a host that cannot be reached or used raises LaunchError or ConfigError, which
    name them all; later it is a lost machine, which may come back, or is not yet all there after its own start.
    """
    with _Lines(config, hosts, log_dir) as lines:
        try:
            lines.connect()
            lines.check(command, slots, run_dir, log_dir)
        except LaunchError as error:
            if restart == 0:
                raise
            for line in str(error).split("\n"):
                logs.say(line)
            return Outcome(PEER_EXIT_CODE, last_line=str(error), lost=True)
        lines.start(command, slots, log_dir, restart)
        return lines.watch(sum(slots), received)


@dataclass
class _Lines:
    """The connections of one attempt."""

    config: LaunchConfig
    hosts: Sequence[Host]
    log_dir: Path
    open: list[Connection] = field(default_factory=list)
    hellos: list[dict[str, Any]] = field(default_factory=list)
    arrived: queue.Queue[tuple[int, Any]] = field(default_factory=queue.Queue)

    def __enter__(self) -> _Lines:
        logs.make(self.log_dir)
        return self

    def __exit__(self, *_: object) -> None:
        for line in self.open:
            line.close()

    def connect(self) -> None:
        how = self.config.hosts
        python = how.python or sys.executable
        for number, host in enumerate(self.hosts):
            command = arguments(host, how, python, PACKAGE_FOLDER)
            try:
                self.open.append(Connection(number, host, command, self.log_dir / host.file_name, self.arrived))
            except OSError as error:
                raise ConfigError([f"hosts.over={how.over.value}: {command[0]}: {error.strerror}"]) from None
        for line in self.open:
            line.send("alive", silence_timeout_s=max(how.connect_timeout_s, how.silence_timeout_s))
        self.hellos = self._answers("hello", range(len(self.hosts)), how.connect_timeout_s)

    def _answers(self, kind: str, numbers: Sequence[int], within_s: float) -> list[dict[str, Any]]:
        """One message of `kind` from each of these hosts. Raises LaunchError that names those that do not send it."""
        found: dict[int, dict[str, Any]] = {}
        end_s = time.monotonic() + within_s
        while missing := [n for n in numbers if n not in found and not self.open[n].gone]:
            try:
                number, message = self.arrived.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                break
            if message is None:
                self.open[number].gone = True
            elif message["is"] == kind:
                found[number] = message
        missing = [n for n in numbers if n not in found]
        if missing:
            faults = []
            for number in missing:
                line = self.open[number]
                reason = f"did not answer within {within_s:g} s" if not line.gone else "cannot be reached or used"
                faults.append(": ".join([f"host {line.host.name} {reason}", *line.said()[-3:]]))
            raise LaunchError("\n".join(faults))
        return [found[n] for n in numbers]

    def check(self, command: Sequence[str], slots: tuple[int, ...], run_dir: Path, log_dir: Path) -> None:
        how, word = self.config.hosts, ""
        # The first host writes what the others must find.
        for numbers in ([0], list(range(1, len(self.open)))):
            for number in numbers:
                self.open[number].send(
                    "check",
                    silence_timeout_s=how.silence_timeout_s + how.connect_timeout_s,
                    first=number == 0,
                    word=word,
                    probe_wait_s=how.connect_timeout_s / 4,
                    directory=os.getcwd(),
                    run_dir=str(run_dir.absolute()),
                    log_dir=str(log_dir.absolute()),
                    environment=handed_over(
                        [*HANDED_OVER, *how.environment], dict(os.environ) if how.over is Over.ssh else {}
                    ),
                    command=list(command),
                    processes=slots[number],
                    gpus=self.config.gpus.name,
                    port=self.config.port,
                )
            answers = self._answers("checked", numbers, how.connect_timeout_s)
            faults = [
                f"host {self.open[number].host.name}: {fault}"
                for number, answer in zip(numbers, answers, strict=True)
                for fault in answer["faults"]
            ]
            if faults:
                raise ConfigError(faults)
            word = answers[0]["word"] if numbers == [0] else word

    def start(self, command: Sequence[str], slots: tuple[int, ...], log_dir: Path, restart: int) -> None:
        address = self.config.hosts.address or meeting_address(self.hosts[0], self.config)
        for line in self.open:
            line.heard_s = time.monotonic()
            line.send(
                "start",
                silence_timeout_s=self.config.hosts.silence_timeout_s,
                command=list(command),
                starter=self.config.starter.name,
                log_dir=str(log_dir.absolute()),
                keep_attempts=self.config.keep_attempts,
                slots=list(slots),
                node=line.number,
                address=address,
                port=self.config.port or self.hellos[0]["port"],
                restart=restart,
                stop_timeout_s=self.config.stop_timeout_s,
                peer_grace_s=ranks.PEER_GRACE_S,
            )

    def watch(self, world_size: int, received: deque[signal.Signals]) -> Outcome:
        """Until all ranks of all hosts have ended, or those of a host that is gone cannot be waited for."""
        silence_s = self.config.hosts.silence_timeout_s
        began_s = time.monotonic()
        ended: dict[int, Ended] = {}
        lost: list[str] = []
        starters: list[str] = []
        any_started = failed = False
        told: signal.Signals | None = None
        give_up_s = float("inf")
        next_beat_s = 0.0
        shown = logs.Shown()
        while not all(line.done or line.gone for line in self.open):
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                next_beat_s = now_s + silence_s / BEATS_PER_SILENCE
                self._order("alive")
            try:
                number, message = self.arrived.get(timeout=LOOK_S)
            except queue.Empty:
                message, number = {"is": "nothing"}, -1
            now_s = time.monotonic()
            if number >= 0:
                line = self.open[number]
                line.heard_s = now_s
                where = line.host.name
            match message and message["is"]:
                case None:
                    line.gone = True
                    if not line.done:
                        lost.append(": ".join([f"host {where} is gone: its connection ended", *line.said()[-2:]]))
                case "ended":
                    ended[message["rank"]] = Ended(
                        code=message["code"],
                        after_s=now_s - began_s - message["age_s"],
                        killed=message["killed"],
                        log=message["log"],
                        host=where,
                        lines=message["lines"],
                    )
                case "output":
                    shown.write(message["text"].encode("utf-8", "surrogateescape"))
                case "say":
                    logs.say(f"{where}: {message['line']}")
                case "told" if told is None:
                    got = signal.Signals(message["number"])
                    told = ranks.HANDED_ON[got]
                    logs.say(f"{where} got {got.name}: the ranks of all hosts are told to save and stop")
                    self._order("signal", number=int(got))
                case "broken":
                    starters += [f"{where}: {message['line']}"]
                    line.done = True
                    failed = self._fail()
                case "done":
                    line.done = True
                    any_started = any_started or message["any_started"]
                    starters += [f"{where}: {text}" for text in message["starter"]]
            for line in self.open:
                if not line.done and not line.gone and now_s - line.heard_s > silence_s:
                    line.gone = True
                    lost.append(f"host {line.host.name} is gone: nothing was heard of it for {silence_s:g} s")
            while received:
                asked = received.popleft()
                if told is None:
                    told = ranks.HANDED_ON[asked]
                    self._order("signal", number=int(asked))
                elif self.config.hosts.over is Over.ssh:  # Slurm sends several
                    self._order("kill")
            if not failed and (lost or blame(ended, told) or cut_short(ended, told)):
                failed = self._fail()
            if failed and give_up_s == float("inf"):
                # A node kills its ranks after that time by itself; one that cannot even do that is not waited for.
                give_up_s = now_s + ranks.PEER_GRACE_S + silence_s
            if now_s > give_up_s:
                for line in self.open:
                    if not line.done and not line.gone:
                        line.gone = True
                        lost.append(f"host {line.host.name} did not end its ranks")
        return conclude(
            ended,
            world_size=world_size,
            told=told,
            any_started=any_started,
            starter=("the hosts' starter logs", starters[-logs.LAST_LINES :]),
            lost=lost,
        )

    def _fail(self) -> bool:
        self._order("peer_failed")
        return True

    def _order(self, order: str, **content: Any) -> None:
        for line in self.open:
            if not line.done and not line.gone:
                line.send(order, **content)


def meeting_address(host: Host, config: LaunchConfig) -> str:
    """The name at which the other hosts find the first one; of an alias in ssh's own settings the name behind it."""
    if config.hosts.over is Over.srun:
        shown = subprocess.run(
            ["scontrol", "show", "node", host.name, "--oneliner"], capture_output=True, text=True, timeout=60
        )
        found = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
        return found[1] if found else host.name
    try:
        answer = subprocess.run(
            ["ssh", *config.hosts.ssh, "-G", "--", host.name], capture_output=True, text=True, timeout=30, check=True
        )
        names = [line.split()[1] for line in answer.stdout.splitlines() if line.startswith("hostname ")]
        if names:
            return names[0].strip("[]")
    except (OSError, subprocess.SubprocessError, IndexError):
        pass  # an ssh older than -G (OpenSSH 6.8): the name itself
    return host.name.rpartition("@")[2].strip("[]")
