"""Runs shard tasks on a Ray cluster: the same functions on the same files, so the same bytes as on one machine.

What flows in are tasks: a function of `tasks`, paths and settings. What flows out are their counts; rows go through the
corpus folder, which all nodes see at the same path, and never through Ray's object store. The command runs on one node
of the cluster and keeps the lock, the markers and the order; a node only ever makes the files of one step.

    worker or node dies     its tasks run again elsewhere, `ray.retries` times: a task writes whole files or none
    command dies            Ray ends its workers; the same command again goes on
    no node has room        the run ends after `ray.node_timeout_s` and says what was asked for
    a node that differs     other code, other versions or another folder: refused by name before it writes a byte

Ray itself moves pickles between its processes; whoever reaches its ports runs code. docs/ray.md says how to close them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at import; nothing is reported to anybody

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.config import RayConfig
from data_pipeline.executors import Task, hear_ticks
from data_pipeline.records import InputError, PipelineError

POLL_S = 0.5
"""How often rows are counted and room is looked for, in seconds."""
CONNECT_TIMEOUT_S = 10.0
LAST_ROWS_S = 20.0
"""How long the end of a stage waits for its last rows to be counted."""
DEPTH = 2
"""Tasks handed to Ray for each place in the cluster, so that none waits for this process."""
DECIDING = ("lxml", "numpy", "py3langid", "pyarrow", "resiliparse", "scipy", "tiktoken", "trafilatura", "uvloop")
"""Packages whose version may decide bytes of the corpus."""


@dataclass(frozen=True)
class _Home:
    """What a node has to share with the process that hands out the tasks."""

    folder: Path
    token: str
    """Name of a file in `folder` that is this run's alone."""
    working_directory: str
    environment: Mapping[str, str]


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what decides the result, and a hash of this package's own source."""
    source = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {"data_pipeline": source.hexdigest()[:12], **{name: version(name) for name in DECIDING}}


class RayExecutor:
    """Joins a running cluster for a whole run; `folder` is the corpus folder, on storage that all nodes share.

    with RayExecutor(config.ray, workers=0, folder=out) as executor:
        executor.run(tasks, on_done=…)

    Raises InputError when no cluster answers at `config.address`, or none of its nodes could ever hold a task.
    """

    def __init__(self, config: RayConfig, workers: int, folder: Path) -> None:
        self.config = config
        self._most = workers
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".ray-*"):  # of runs that were killed
            left.unlink(missing_ok=True)
        # A name that was never asked for before cannot be answered from a network file system's cache.
        self._home = _Home(folder.resolve(), f".ray-{uuid.uuid4().hex}", os.getcwd(), environment())
        self._connect()
        if not self._places():
            nodes = ", ".join(f"{n['NodeManagerHostname']}: {n['Resources'].get('CPU', 0):g} CPUs" for n in _alive())
            ray.shutdown()
            raise InputError(f"{self._asked()}: no node of the cluster has as much ({nodes}); ask for less")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._rows = ray.remote(_Rows).options(num_cpus=0, scheduling_strategy=here).remote()
        self._question: Any = None
        """What `_rows` was asked and has not answered yet."""
        self._run_task = ray.remote(_run_task).options(
            num_cpus=config.cpus,
            memory=config.memory_mb << 20 or None,
            max_retries=config.retries,
            scheduling_strategy="SPREAD",
        )

    def _connect(self) -> None:
        address = self.config.address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or address
        try:
            if address != "auto":  # where nobody listens, Ray itself would try for two minutes and then exit
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
            ray.init(address=address, logging_level="warning")
        except (OSError, RuntimeError, ValueError) as e:
            raise InputError(
                f"ray.address={address}: no Ray cluster that this machine belongs to ({_first_line(e)}); "
                "run `ray start --head` on one machine, `ray start --address=…` on the others, and this command on one"
            ) from e

    def __enter__(self) -> RayExecutor:
        (self._home.folder / self._home.token).touch()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            (self._home.folder / self._home.token).unlink()
        ray.shutdown()  # ends this run's workers, also those in mid-task

    @property
    def workers(self) -> int:
        """Tasks that run at once: `workers`, or what the cluster has room for at this moment (at least 1)."""
        return self._most or max(1, self._places())

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, dict[str, Any]], None],
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Run all tasks; `on_done` and `on_rows` are called in this process. A task's exception is raised here."""
        waiting = deque(tasks)
        running: dict[Any, Task] = {}
        room = self._depth()
        looked = had_room = time.monotonic()
        while waiting or running:
            while waiting and len(running) < room:
                task = waiting.popleft()
                running[self._run_task.remote(task, self._home, self._rows)] = task
            done, _ = ray.wait(list(running), timeout=POLL_S)
            for reference in done:
                task = running.pop(reference)
                on_done(task, self._result(task, reference))
            now = time.monotonic()
            if now - looked >= POLL_S or not (waiting or running):
                looked = now
                self._hear_rows(on_rows, 0.0)
                if self._places():
                    had_room = now
                elif now - had_room > self.config.node_timeout_s:
                    raise PipelineError(
                        f"{self._asked()}: for {self.config.node_timeout_s:g} s no living node of the cluster had as "
                        "much; what is finished stands, run the same command again once there are nodes"
                    )
                room = self._depth()
        for _ in range(2):  # a question that was under way may have come before the last rows
            self._hear_rows(on_rows, LAST_ROWS_S)

    def _hear_rows(self, on_rows: Callable[[int], None], wait_s: float) -> None:
        """Count the rows done since the last answer. An actor that cannot answer holds up a number, never the run."""
        if self._question is None:
            self._question = self._rows.take.remote()
        answered, _ = ray.wait([self._question], timeout=wait_s)
        if answered:
            self._question = None
            with contextlib.suppress(ray.exceptions.RayError):
                on_rows(ray.get(answered[0]))

    def _depth(self) -> int:
        return self._most or DEPTH * self.workers

    def _result(self, task: Task, reference: Any) -> dict[str, Any]:
        try:
            result: dict[str, Any] = ray.get(reference)
        except ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, PipelineError | OSError):
                raise e.cause from None  # as the task raised it; its message is for the user
            raise
        except ray.exceptions.RayError as e:
            raise PipelineError(
                f"{task.label}: its worker died {self.config.retries + 1} times ({_first_line(e)}); "
                "give ray.memory_mb if memory is short, or raise ray.retries"
            ) from e
        return result

    def _places(self) -> int:
        """Tasks that all living nodes could hold at once, if this run had them to itself."""
        c, places = self.config, 0
        for node in _alive():
            has = node["Resources"]
            by_memory = has.get("memory", 0.0) // (c.memory_mb << 20) if c.memory_mb else float("inf")
            places += int(min(has.get("CPU", 0.0) / c.cpus + 1e-6, by_memory))
        return places

    def _asked(self) -> str:
        return f"ray.cpus={self.config.cpus:g}" + (
            f", ray.memory_mb={self.config.memory_mb}" if self.config.memory_mb else ""
        )


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


class _Rows:
    """Rows done since it was last asked; an actor on the command's own node, so that no other node's death ends it."""

    def __init__(self) -> None:
        self._rows = 0

    def add(self, rows: int) -> None:
        self._rows += rows

    def take(self) -> int:
        rows, self._rows = self._rows, 0
        return rows


# ── on a node ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _run_task(task: Task, home: _Home, rows: Any) -> dict[str, Any]:
    """`task`'s counts. Raises InputError where this node is not like the one that handed the task out."""
    node = socket.gethostname()
    if not (home.folder / home.token).exists():
        raise InputError(
            f"out={home.folder}: node {node} sees another folder there, or none; "
            "executor=ray needs storage that all nodes mount at the same path"
        )
    other = [f"{k} {here} instead of {home.environment[k]}" for k, here in environment().items()
             if here != home.environment[k]]  # fmt: skip
    if other:
        raise InputError(f"node {node} has {', '.join(other)}; install the same on all nodes, or the bytes may differ")
    with contextlib.suppress(OSError):  # then only absolute paths will be found here
        os.chdir(home.working_directory)
    ticks = _Ticks(rows)
    hear_ticks(ticks.add)
    try:
        return task.function(*task.arguments)
    except FileNotFoundError as e:
        raise InputError(
            f"{task.label}: node {node} has no {e.filename or e}; with executor=ray all inputs have to lie on storage "
            "that all nodes mount at the same path"
        ) from e
    finally:
        hear_ticks(None)
        ticks.close()


class _Ticks:
    """Gathers a task's rows, so that a fast task does not send a message for each."""

    def __init__(self, rows: Any) -> None:
        self._actor = rows
        self._gathered = 0
        self._sent = time.monotonic()
        self._last: Any = None

    def add(self, rows: int) -> None:
        self._gathered += rows
        if time.monotonic() - self._sent >= POLL_S:
            self.send()

    def send(self) -> None:
        if self._gathered:
            self._last = self._actor.add.remote(self._gathered)
        self._gathered, self._sent = 0, time.monotonic()

    def close(self) -> None:
        """Send what is left and wait until it is counted: the run may be over, and asking, once this task has ended."""
        if self._last is None and not self._gathered:
            return
        self.send()
        with contextlib.suppress(ray.exceptions.RayError):  # a number for the progress bar fails no task
            ray.get(self._last, timeout=CONNECT_TIMEOUT_S)


def _first_line(e: BaseException) -> str:
    return str(e).strip().split("\n")[0][:200]
