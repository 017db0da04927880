"""Runs shard tasks on this machine's cores: `function(*arguments) → dict`, each in a worker process.

Chosen: pebble's pool. A worker that is killed or runs out of memory costs one task, which is tried again in a new
worker; `concurrent.futures` breaks as a whole there. Results do not depend on the number of workers: a task reads and
writes only its own files. Workers watch their parent and die with it, so that `kill -9` leaves no orphan.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from pebble import ProcessExpired, ProcessPool

from data_pipeline.records import PipelineError

TRIES = 3
"""A task whose worker dies is tried this often in all."""

_END = b"end"
_ticks: Connection | None = None


@dataclass(frozen=True)
class Task:
    """`function` must be importable by name; `arguments` and the returned dict must be picklable."""

    label: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = field(default=())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tick(rows: int) -> None:
    """Tell the parent, from within a task, that `rows` more rows are done."""
    if _ticks is not None:
        _ticks.send_bytes(b"%d" % rows)  # one write of less than PIPE_BUF bytes: atomic, and no lock to die with


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    *,
    on_done: Callable[[Task, dict[str, Any]], None],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> None:
    """Run all tasks; `on_done` and `on_rows` are called in this process. An exception of a task is raised here."""
    if not tasks:
        return
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    drain = threading.Thread(target=_drain, args=(receiver, on_rows), daemon=True)
    drain.start()
    pool = ProcessPool(
        max_workers=min(workers, len(tasks)), context=context, initializer=_start_worker, initargs=(sender,)
    )
    try:
        running: dict[Future[dict[str, Any]], tuple[Task, int]] = {
            pool.schedule(t.function, args=list(t.arguments)): (t, 1) for t in tasks
        }
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task, tries = running.pop(future)
                try:
                    result = future.result()
                except ProcessExpired as e:
                    if tries == TRIES:
                        raise PipelineError(
                            f"{task.label}: its worker died {TRIES} times ({e}); give fewer workers if memory is short"
                        ) from e
                    running[pool.schedule(task.function, args=list(task.arguments))] = (task, tries + 1)
                else:
                    on_done(task, result)
        pool.close()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()
        sender.send_bytes(_END)
        drain.join()
        sender.close()
        receiver.close()


def _drain(receiver: Connection, on_rows: Callable[[int], None]) -> None:
    while (message := receiver.recv_bytes()) != _END:
        on_rows(int(message))


def _start_worker(sender: Connection) -> None:
    global _ticks
    _ticks = sender
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG would wait for the fork server, which lives as long as its children do."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
