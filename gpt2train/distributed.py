"""The processes of a run: who they are, how they agree, and how a run ends when one of them does not answer.

Flows in: the environment that torchrun or the deepspeed launcher made (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT), or none of it: then this process is the whole world. Flows out: a `World`, and a few small collectives.
Two things keep a dead or stopped peer from hanging the rest: the time limit of every collective, and the `Watchdog`.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gpt2train.config import Device
from gpt2train.errors import ConfigError, GPT2TrainError, PeerError
from gpt2train.planning.choose import PROCESS_BYTES, host_bytes


@dataclass(frozen=True)
class World:
    """One process of a run. `size` processes hold ranks 0 to `size` - 1; rank 0 speaks and keeps the records."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The processes' group for its collectives; None: torch's default one."""


def world_size() -> int:
    """Processes of this run, from the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: Device, timeout_s: float) -> World:
    """Joins the run's other processes, or makes a world of one; a second call gives the same world.

    Every collective of every group ends after `timeout_s`. Raises ConfigError for an environment or a GPU that is not
    there and PeerError when the others do not come in time.
    """
    world = _world(device)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if dist.is_initialized():
        return world
    # DeepSpeed looks for these even where it does not start torch.distributed; without them it asks for mpi4py.
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if world.size == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # no port, no name look-up
    try:
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", **options)
    except (dist.DistError, RuntimeError) as error:
        raise PeerError(
            f"rank {world.rank}: not all {world.size} processes met at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within distributed.timeout_s={timeout_s:g} ({_first_line(error)})"
        ) from error
    atexit.register(dist.destroy_process_group)
    _limit_new_groups(timedelta(seconds=timeout_s))
    return world


def device_memory(device: Device) -> tuple[bool, float]:
    """Whether this rank trains on a GPU, and the bytes that are its own there, or its share of the machine's; the same
    on all ranks of like machines. Needs no start."""
    gpus = torch.cuda.device_count() if device is not Device.cpu else 0
    if gpus:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return True, float(torch.cuda.get_device_properties(min(local_rank, gpus - 1)).total_memory)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())
    return False, max(host_bytes() / max(ranks_here, 1) - PROCESS_BYTES, 0.0)


def peak_memory_bytes(device: torch.device) -> float:
    """The most that this process held at once: of the GPU by torch's allocator, of the machine by the kernel."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # kilobytes on Linux


def _world(device: Device) -> World:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    size = world_size()
    missing = [name for name in names if name not in os.environ]
    if size > 1 and missing:
        raise ConfigError(
            [f"WORLD_SIZE={size}: {', '.join(missing)} must be set too; start with torchrun or `gpt2train launch`"]
        )
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if device is not Device.cpu and torch.cuda.is_available() else 0
    if device is Device.cuda and gpus == 0:
        raise ConfigError(["device=cuda: torch sees no GPU here; give device=cpu, or install torch for your driver"])
    if gpus and local_rank >= gpus:
        raise ConfigError(
            [f"local rank {local_rank}: this machine has {gpus} GPUs; start at most {gpus} processes on it"]
        )
    return World(rank, size, local_rank, torch.device("cuda", local_rank) if gpus else torch.device("cpu"))


def _limit_new_groups(timeout: timedelta) -> None:
    """Groups that DeepSpeed makes later get the run's time limit; by themselves they get torch's 30 minutes."""
    if isinstance(dist.new_group, functools.partial):
        return
    dist.new_group = functools.partial(dist.new_group, timeout=timeout)


def beside(world: World) -> World:
    """The same processes with a group of their own on the CPU, so that a thread may agree while another one trains.

    All ranks come here together; the group has the time limit of all others.
    """
    group = dist.new_group(backend="gloo") if world.size > 1 else None
    return replace(world, device=torch.device("cpu"), group=group)


def all_sum(world: World, values: Sequence[float]) -> list[float]:
    """Element-wise sum over all ranks in float64. Waits for the device."""
    numbers = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(numbers, group=world.group)
    return [float(value) for value in numbers.tolist()]


def all_rows(world: World, row: bytes) -> list[bytes]:
    """Every rank's bytes, in the order of ranks; equally many on each."""
    mine = torch.tensor(list(row), dtype=torch.uint8, device=world.device)
    if world.size == 1:
        return [row]
    rows = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(rows, mine, group=world.group)
    return [bytes(other.tolist()) for other in rows]


_AT_WORK = -1
"""Said by rank 0 in place of an exit code while its work goes on."""


def on_rank_zero(
    world: World, work: Callable[[], int], *, beat_s: float | None = None, alive: Callable[[], None] = lambda: None
) -> int:
    """Runs `work` on rank 0 and gives its whole number to all ranks.

    Where it raises, rank 0 raises that error and the others a GPT2TrainError with its exit code, so that all leave.
    With `beat_s`, the work may take longer than the time limit of a collective: a thread does it, and rank 0 says every
    so many seconds that it is there; each rank calls `alive` then.
    """
    outcome, error = [0, 0], None

    def tell(outcome: list[int]) -> list[int]:
        alive()
        if world.size == 1:
            return outcome
        numbers = torch.tensor(outcome, dtype=torch.int64, device=world.device)
        dist.broadcast(numbers, src=0, group=world.group)
        return [int(number) for number in numbers.tolist()]

    if world.rank == 0:
        try:
            outcome = [0, _with_beats(work, beat_s, lambda: tell([_AT_WORK, 0])) if beat_s else work()]
        except Exception as raised:
            error = raised
            outcome = [getattr(raised, "exit_code", 1), 0]
        tell(outcome)
    else:
        while (outcome := tell(outcome))[0] == _AT_WORK:
            pass
    if error is not None:
        raise error
    if outcome[0]:
        follower = GPT2TrainError(f"rank {world.rank}: rank 0 ended the run; its line says why")
        follower.exit_code = outcome[0]
        raise follower
    return outcome[1]


def on_all_ranks(world: World, work: Callable[[], None], *, beat_s: float, alive: Callable[[], None]) -> None:
    """Runs `work` on every rank, in a thread; it may take longer than the time limit of a collective.

    Every `beat_s` seconds each rank says that it is there, and calls `alive`; all return when the last one is done.
    Where it raises, those ranks raise that error and the others a GPT2TrainError with the first one's exit code.
    """
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    while True:
        thread.join(beat_s)
        alive()
        working = thread.is_alive()  # looked at first: what ends behind this look is told in the next round, to all
        code = getattr(errors[0], "exit_code", 1) if errors and not working else 0
        rows = all_rows(world, bytes([working, code]))
        failed = [(rank, row[1]) for rank, row in enumerate(rows) if row[1]]
        if code:
            raise errors[0]
        if failed:
            rank, code = failed[0]
            follower = GPT2TrainError(f"rank {world.rank}: rank {rank} ended the run; its line says why")
            follower.exit_code = code
            raise follower
        if not any(row[0] for row in rows):
            return


def _with_beats(work: Callable[[], int], beat_s: float, beat: Callable[[], object]) -> int:
    with ThreadPoolExecutor(1, thread_name_prefix="rank-zero") as pool:
        doing = pool.submit(work)
        while not doing.done():
            if not wait([doing], beat_s).done:
                beat()
        return doing.result()


# What torch's backends say when a peer is gone or silent: Gloo raises plain RuntimeError, NCCL DistBackendError.
_PEER_SIGNS = ("gloo", "Timed out", "timed out", "Connection closed", "Connection reset", "NCCL", "Broken pipe")


def peer_error(error: Exception, world: World, doing: str) -> PeerError | None:
    """A PeerError with the cause in one line, when `error` is a collective's; else None."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(sign in text for sign in _PEER_SIGNS):
        return None
    return PeerError(
        f"rank {world.rank}: {doing}: another rank died, stopped or cannot be reached ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def abandon() -> None:
    """Leaves the other processes to themselves at exit: the orderly way would wait for one that does not answer."""
    atexit.unregister(dist.destroy_process_group)


class Watchdog:
    """Ends this process with exit code 7 when what it watches takes longer than `limit_s`.

        watchdog.watch("step 57")   # the clock starts anew
        watchdog.rest()             # nothing is watched

    A thread, because the main one may wait for ever in a collective. It prints one line that names what was waited for,
    then every thread's stack, and leaves without clean-up, which would wait too. Time during which this process itself
    was stopped does not count against its peers.
    """

    def __init__(self, world: World, limit_s: float) -> None:
        self._rank, self._limit_s = world.rank, limit_s
        self._tick_s = min(limit_s / 20, 0.5)
        self._what: str | None = None
        self._spent_s = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def watch(self, what: str) -> None:
        self._what, self._spent_s = what, 0.0

    def rest(self) -> None:
        self._what = None

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self._tick_s):
            now = time.monotonic()
            self._spent_s += min(now - before, 2 * self._tick_s)
            before = now
            if self._what is not None and self._spent_s > self._limit_s:
                self._bark()

    def _bark(self) -> None:
        line = (
            f"gpt2train: rank {self._rank}: {self._what} did not end within distributed.timeout_s={self._limit_s:g}: "
            f"another rank died or stopped, or the step is slower than the limit; the stacks follow\n"
        )
        sys.stderr.write(line)
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        os._exit(PeerError.exit_code)
