"""What a launch would run, as lines for a POSIX shell: nothing is started, connected to or written."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config import HANDED_OVER, LaunchConfig, Over
from launch.connection import Host, arguments, handed_over
from launch.hosts import PACKAGE_FOLDER, meeting_address, slots_of
from launch.place import Place, plan
from launch.ranks import Start

EXAMPLE_PORT = 29500  # torchrun's default; a launch takes one that is free on the first host
END = "END_OF_HOST"
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def dry_run_lines(starts: Sequence[Start]) -> list[str]:
    """Lines that start the same processes: several run side by side, and the last line waits."""
    if len(starts) == 1:
        return [starts[0].line()]
    return [*(f"{start.line()} &" for start in starts), "wait"]


def host_lines(config: LaunchConfig, command: Sequence[str], machines: Sequence[Host], *, log_dir: Path) -> list[str]:
    """Lines that start the ranks of all hosts by hand, and what the launch itself connects with.

    A host that nobody has been asked about counts as one with one process.
    """
    how = config.hosts
    known = slots_of(config, machines)
    slots = known or tuple(host.slots or config.processes or 1 for host in machines)
    address = how.address or meeting_address(machines[0], config)
    environment = handed_over([*HANDED_OVER, *how.environment], dict(os.environ) if how.over is Over.ssh else {})
    hidden = sorted(name for name in environment if _SECRET.search(name))
    shown = {name: value for name, value in environment.items() if name not in hidden}
    python = how.python or sys.executable
    lines = [f"# {len(machines)} hosts, {sum(slots)} ranks, which meet at {address}"]
    if known is None:
        lines.append("# Processes by host: one per GPU, asked at the start; one each is shown here.")
    if not config.port:
        lines.append(
            f"# Port: a free one of the first host, another one at each restart; {EXAMPLE_PORT} is shown here."
        )
    if hidden:
        lines.append(f"# Not shown, handed over through the connection: {', '.join(hidden)}")
    lines.append("# The launch connects with these lines and hands the rest over through them:")
    lines += [f"#   {line}" for host in machines for line in _shown(arguments(host, how, python, PACKAGE_FOLDER))]
    lines.append("# The same by hand, without restarts and without a common end:")
    for node, host in enumerate(machines):
        place = Place(slots, node=node, address=address, port=config.port or EXAMPLE_PORT)
        starts = plan(config.starter, command, place=place, log_dir=log_dir, environment=environment, python=python)
        folder = shlex.join(["cd", os.getcwd()])
        there = [*how.setup, folder, *(shlex.join(["export", f"{k}={v}"]) for k, v in shown.items())]
        script = "\n".join([*there, shlex.join(["mkdir", "-p", str(log_dir.absolute())]), *dry_run_lines(starts)])
        reach = ["ssh", *how.ssh, "--", host.name] if how.over is Over.ssh else ["srun", "--overlap", "--nodes=1"]
        reach += [] if how.over is Over.ssh else ["--ntasks=1", f"--nodelist={host.name}"]
        # As a script on standard input, so that nothing needs to be quoted twice.
        lines += [f"{shlex.join(reach)} sh -s <<'{END}' &", script, END]
    return [*lines, "wait"]


def _shown(words: Sequence[str]) -> list[str]:
    return shlex.join(words).split("\n")
