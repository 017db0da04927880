"""A line to launch.node on another machine: through ssh, or through srun within a Slurm allocation.

In: a host, and how to reach it. Out: its messages, in the order of their arrival, and a way to send it orders. What
ssh, srun or the host's shell print beside goes to a log. The environment and all else travel through the connection:
command lines, which every user of a machine can see, hold paths and host names alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from launch.config import HostsConfig, Over
from launch.logs import last_lines
from launch.node import MARK

# Isolated, so that no file of the working folder can pass for one of ours; site-packages only where the launch's own
# folder is at another path on that host.
BOOT = (
    "import os, sys; sys.path.append(sys.argv[1]); "
    'os.path.isdir(sys.argv[1] + "/launch") or __import__("site").main(); '
    "from launch.node import main; main()"
)
CLOSE_S = 15.0  # for a host's processes to be cleared away at the end, and its ssh or srun to leave


@dataclass(frozen=True)
class Host:
    """One machine of a launch."""

    name: str
    """As ssh or srun takes it."""
    slots: int = 0
    """Processes on it; 0: not said."""

    @property
    def file_name(self) -> str:
        """For its log."""
        return "host_" + "".join(c if c.isalnum() or c in ".-_" else "_" for c in self.name) + ".log"


def arguments(host: Host, config: HostsConfig, python: str, package_folder: str) -> list[str]:
    """The command line that starts launch.node on `host`; no shell of this machine sees it."""
    node = shlex.join([python, "-I", "-S", "-c", BOOT, package_folder])
    match config.over:
        case Over.ssh:
            # In the host's own login shell; `exec`, so that nothing stands between ssh and the node.
            remote = "\n".join([*config.setup, f"exec {node}"])
            options = ["-T", "-a", "-x", "-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes"]
            # ssh gives up first, and says why.
            options += ["-o", f"ConnectTimeout={math.ceil(0.8 * config.connect_timeout_s)}"]
            # Of two values ssh takes the first: the user's own.
            return ["ssh", *config.ssh, *options, "--", host.name, remote]
        case Over.srun:
            # One step a node, with all that the job has of it; --overlap, or it waits for the batch script's share.
            step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--cpu-bind=none"]
            step += ["--unbuffered", "--job-name=node"]
            script = "\n".join([*config.setup, f"exec {node}"])
            return [*step, *(["bash", "-c", script] if config.setup else shlex.split(node))]


def handed_over(patterns: Sequence[str], environment: dict[str, str]) -> dict[str, str]:
    """The part of `environment` that `hosts.environment` names, and what it sets."""
    found: dict[str, str] = {}
    for entry in patterns:
        name, equals, value = entry.partition("=")
        if equals:
            found[name] = value
        else:
            found |= {key: text for key, text in environment.items() if fnmatchcase(key, name)}
    return found


class Connection:
    """One host while a launch lasts."""

    def __init__(
        self, number: int, host: Host, command: Sequence[str], log: Path, arrived: queue.Queue[tuple[int, Any]]
    ) -> None:
        """arrived: gets (number, message) for each message, and (number, None) when the line is gone."""
        self.number, self.host, self.log = number, host, log
        self.heard_s = time.monotonic()
        self.gone = False
        """Nothing more will come."""
        self.done = False
        """It said that all its ranks have ended."""
        self._noise = open(log, "ab", buffering=0)  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            start_new_session=True,  # so that Ctrl-C reaches the launcher alone
        )
        assert self._process.stdin is not None
        # A host that does not read must not stop the launcher, which watches the others.
        os.set_blocking(self._process.stdin.fileno(), False)
        self._reader = threading.Thread(target=self._read, args=(arrived,), daemon=True)
        self._reader.start()

    def _read(self, arrived: queue.Queue[tuple[int, Any]]) -> None:
        assert self._process.stdout is not None
        mark = MARK.encode()
        for line in self._process.stdout:
            if line.startswith(mark):
                arrived.put((self.number, json.loads(line[len(mark) :])))
            else:  # a login shell's own
                self._noise.write(line)
        arrived.put((self.number, None))

    def send(self, order: str, **content: Any) -> None:
        """An order; to a host that is gone, or takes nothing any more, none."""
        assert self._process.stdin is not None
        data = json.dumps({"do": order, **content}).encode() + b"\n"
        end_s = time.monotonic() + 5.0
        with contextlib.suppress(BrokenPipeError):
            while data and time.monotonic() < end_s:
                try:
                    data = data[os.write(self._process.stdin.fileno(), data) :]
                except BlockingIOError:
                    time.sleep(0.01)

    def said(self) -> list[str]:
        """What ssh, srun or the host's shell printed beside."""
        return last_lines(self.log)

    def close(self) -> None:
        """End the line: the host clears away what still runs there. Waits until ssh or srun has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(0.1 if self.gone and not self.done else CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(CLOSE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._noise.close()
