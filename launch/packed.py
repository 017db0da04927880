"""Several launches at once on this machine, each with cores and GPUs of its own.

Flows in: commands, each a launch by itself, and how many run at a time. Flows out: exit codes and seconds, in the order
of the commands. Costs a look at the processes twenty times a second. A command begins when another's share is free; its
output is shown line by line behind its name.

Nothing is left behind: every command ends when this process does (PR_SET_PDEATHSIG), and a launch's ranks end with it
(launch.rank). Whatever was killed goes on when it is given again, since that is what a launch does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from launch.config import REQUEUE_EXIT_CODE, LaunchConfig, Launcher
from launch.machine import count_cores
from launch.rank import PR_SET_PDEATHSIG
from launch.ranks import HANDED_ON

POLL_S = 0.05
VISIBLE = "CUDA_VISIBLE_DEVICES"
KILLED = 128
"""Exit codes above it are of what a signal killed."""


@dataclass(frozen=True)
class Share:
    """What one of the commands that run at a time has of this machine."""

    cores: frozenset[int]
    gpus: tuple[str, ...] | None
    """As CUDA_VISIBLE_DEVICES names them; None: it is left as it is."""

    def environment(self) -> dict[str, str]:
        return {VISIBLE: ",".join(self.gpus)} if self.gpus is not None else {}


def share_faults(config: LaunchConfig, parallel: int, gpus: int) -> list[str]:
    """What keeps `parallel` launches of `config` from running at once, one line each. gpus: of this machine; 0: none,
    or none that matter."""
    if parallel < 1:
        return [f"parallel={parallel}: must be at least 1; leave it out"]
    if parallel == 1:
        return []
    faults = []
    if config.launcher is not Launcher.local:
        more = "slurm.array_limit" if config.launcher is Launcher.slurm else "one after another"
        faults.append(f"parallel={parallel}: packs trials on this machine, launcher=local; give {more}")
    if (cores := count_cores()) < parallel:
        faults.append(f"parallel={parallel}: each trial needs a core and {cores} may be used; give parallel={cores}")
    if gpus and gpus // parallel < max(config.processes, 1):
        each = max(config.processes, 1)
        faults.append(
            f"parallel={parallel}: {each} GPUs each are more than the {gpus} here; give parallel={max(gpus // each, 1)}"
        )
    if config.port:
        faults.append(f"port={config.port}: trials at once each need their own; leave it out")
    if config.log_dir:
        faults.append(f"log_dir={config.log_dir}: trials at once each need their own; leave it out")
    return faults


def shares(parallel: int, gpus: int, environment: Mapping[str, str] = os.environ) -> list[Share]:
    """This machine's cores in `parallel` parts that lie together, as equal as can be; its GPUs in equal ones."""
    cores = sorted(os.sched_getaffinity(0))
    names = [e.strip() for e in environment.get(VISIBLE, ",".join(map(str, range(gpus)))).split(",")][:gpus]
    each = gpus // parallel
    return [
        Share(
            frozenset(cores[i * len(cores) // parallel : (i + 1) * len(cores) // parallel]),
            tuple(names[i * each : (i + 1) * each]) if gpus else None,
        )
        for i in range(parallel)
    ]


def run_packed(
    commands: Sequence[tuple[str, Sequence[str]]],
    parts: Sequence[Share],
    received: deque[signal.Signals],
    *,
    say: Callable[[str], None],
) -> list[tuple[int, float]]:
    """(exit code, seconds) of each (name, arguments), as many at a time as there are `parts`.

    received: fills when a signal asks to stop; it goes on to all that run, and no other is begun. What was not begun,
    or was told to stop, has REQUEUE_EXIT_CODE; so nothing more is begun either when a command ends with it by itself.
    128 + N for one that signal N killed.
    """
    results: list[tuple[int, float]] = [(REQUEUE_EXIT_CODE, 0.0)] * len(commands)
    waiting, free = deque(range(len(commands))), list(parts)
    running: dict[int, tuple[subprocess.Popen[bytes], Share, float, list[threading.Thread]]] = {}
    told = False
    try:
        while waiting or running:
            while received:
                number = received.popleft()
                told = True
                for process, *_ in running.values():
                    process.send_signal(HANDED_ON[number])
            if told:
                waiting.clear()
            while waiting and free:
                place, share = waiting.popleft(), free.pop(0)
                name, arguments = commands[place]
                say(f"{place + 1} of {len(commands)}: {name}")
                process = _start(arguments, share)
                running[place] = (process, share, time.monotonic(), _show(process, name))
            for place, (process, share, began_s, readers) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                for reader in readers:
                    reader.join()
                del running[place]
                free.append(share)
                code = 128 - code if code < 0 else code
                code = REQUEUE_EXIT_CODE if told and code > KILLED else code
                results[place] = code, time.monotonic() - began_s
                told = told or code == REQUEUE_EXIT_CODE
            time.sleep(POLL_S if running else 0)
    finally:
        for process, *_ in running.values():
            process.kill()
            process.wait()
    return results


def _start(arguments: Sequence[str], share: Share) -> subprocess.Popen[bytes]:
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_the_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.sched_setaffinity(0, share.cores)

    return subprocess.Popen(
        arguments,
        env=os.environ | share.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C reaches this process alone, which hands it on
        preexec_fn=in_the_child,
    )


def _show(process: subprocess.Popen[bytes], name: str) -> list[threading.Thread]:
    """Threads that show the lines of a process behind its name, until it closes them."""

    def copy(source: IO[bytes], target: IO[bytes]) -> None:
        shown = True
        with source:
            for line in source:
                try:
                    if shown:
                        target.write(f"{name}: ".encode() + line)
                        target.flush()
                except BrokenPipeError:
                    shown = False  # nobody reads any more; the process must not wait for it

    assert process.stdout is not None
    assert process.stderr is not None
    pairs = ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
    threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    return threads
