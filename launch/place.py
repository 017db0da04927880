"""Which ranks are this machine's, where all meet, and what to start for them."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import rank as around_rank
from launch.config import Starter
from launch.machine import LOOPBACK, count_cores
from launch.ranks import Start

RESTART_COUNT = "GPT2TRAIN_RESTART_COUNT"
"""Tells a rank that the launch started it again, and how often: what was asked for once is not to be done twice."""


@dataclass(frozen=True)
class Place:
    """One machine's part of a launch."""

    slots: tuple[int, ...]
    """Processes of each machine, in the order of ranks."""
    node: int = 0
    """Which of the machines this is."""
    address: str = LOOPBACK
    """Where all ranks meet: a name or address of the first machine, and a TCP port that is free there."""
    port: int = 0
    restart: int = 0
    """How often this launch was started again."""

    @property
    def processes(self) -> int:
        return self.slots[self.node]

    @property
    def world_size(self) -> int:
        return sum(self.slots)

    @property
    def ranks(self) -> range:
        first = sum(self.slots[: self.node])
        return range(first, first + self.processes)


def plan(
    starter: Starter,
    command: Sequence[str],
    *,
    place: Place,
    log_dir: Path,
    environment: Mapping[str, str] = os.environ,
    python: str = sys.executable,
) -> list[Start]:
    """What this machine starts so that its ranks of `command` run. python: runs starter and launch.rank there.

    Threads: each rank gets its share of the cores, unless OMP_NUM_THREADS is set already.
    """
    shared = {
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(max(1, count_cores() // place.processes)),
        "PYTHONUNBUFFERED": "1",
    }
    if place.restart:
        shared[RESTART_COUNT] = str(place.restart)
    # By its path, isolated: it needs the standard library alone, and no file in the working folder can pass for it.
    rank = [python, "-I", "-S", around_rank.__file__, str(log_dir.absolute()), *command]
    match starter:
        case Starter.plain:
            common = {
                "WORLD_SIZE": str(place.world_size),
                "LOCAL_WORLD_SIZE": str(place.processes),
                "GROUP_RANK": str(place.node),
                "MASTER_ADDR": place.address,
                "MASTER_PORT": str(place.port),
                **shared,
            }
            return [
                Start(rank, {"RANK": str(number), "LOCAL_RANK": str(local), **common}, rank=number)
                for local, number in enumerate(place.ranks)
            ]
        case Starter.torchrun:
            options = [f"--nnodes={len(place.slots)}", f"--nproc-per-node={place.processes}"]
            options += [f"--node-rank={place.node}", f"--master-addr={place.address}", f"--master-port={place.port}"]
            # After `--` torchrun does not take the command's own options for abbreviations of its own.
            return [Start([python, "-m", "torch.distributed.run", *options, "--no-python", "--", *rank], shared)]
        case Starter.deepspeed:
            # --no_local_rank, or the command gets `--local_rank=N`.
            options = ["--no_local_rank", "--no_python"]
            options += [f"--master_addr={place.address}", f"--master_port={place.port}"]
            if len(place.slots) == 1:
                # No hostfile, or /job/hostfile would be obeyed.
                options = ["--hostfile=/dev/null", f"--num_gpus={place.processes}", *options]
                return [Start([python, "-m", "deepspeed.launcher.runner", *options, *rank], shared)]
            # The part of the deepspeed launcher that its own ssh would start on each machine.
            machines = {f"node{node}": list(range(slots)) for node, slots in enumerate(place.slots)}
            world = base64.urlsafe_b64encode(json.dumps(machines).encode()).decode()
            options += [f"--node_rank={place.node}", f"--world_info={world}"]
            return [Start([python, "-m", "deepspeed.launcher.launch", *options, *rank], shared)]
