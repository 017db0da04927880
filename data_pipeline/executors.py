"""Runs shard tasks on this machine's cores: `function(*arguments) → dict`, each in a worker process.

`Executor` is what the pipeline needs of any engine; beyond one machine see `ray_executor`.

Chosen: pebble's pool. A worker that is killed or runs out of memory costs one task, which is tried again in a new
worker; `concurrent.futures` breaks as a whole there. Results do not depend on the number of workers: a task reads and
writes only its own files. Workers watch their parent and die with it, so that `kill -9` leaves no orphan. They are
started by a fork server; when that dies, nobody hears of their ends any more, so the run ends, too, and says why.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from data_pipeline.records import PipelineError, StoppedError

TRIES = 3
"""A task whose worker dies is tried this often in all."""

POLL_S = 0.5
"""How often it is looked whether those live on whom workers, or this process, depend."""
STOP_S = 20.0
"""How long a run that ends with an error waits for its workers' ends."""

_END = b"end"
_hear: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Task:
    """`function` must be importable by name; `arguments` and the returned dict must be picklable."""

    label: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = field(default=())


class Executor(Protocol):
    """Lives for a whole run as a context manager."""

    @property
    def workers(self) -> int:
        """Tasks that run at once."""

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, dict[str, Any]], None],
        on_rows: Callable[[int], None] = ...,
    ) -> None:
        """Run all tasks; `on_done` and `on_rows` are called in this process. A task's exception is raised here."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, kind: type[BaseException] | None, value: Any, traceback: Any, /) -> None: ...


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tick(rows: int) -> None:
    """Tell the parent, from within a task, that `rows` more rows are done."""
    if _hear is not None:
        _hear(rows)


def hear_ticks(hear: Callable[[int], None] | None) -> None:
    """Where this process's ticks go from now on; an executor says so in its workers."""
    global _hear
    _hear = hear


class _Stop(BaseException):
    """SIGTERM came; no `except Exception` on the way takes it for something else."""


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block with StoppedError: workers are ended, files half written removed. A second one kills."""
    if threading.current_thread() is not threading.main_thread():  # no place for signal handlers
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stop:
        raise StoppedError("stopped; run the same command again to go on") from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class LocalExecutor:
    """A pool of `workers` processes that lives for a whole run, so that libraries are imported once a worker.

    with LocalExecutor(workers=2) as executor:
        executor.run(tasks, on_done=…)
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._server: int | None = None
        """The fork server's process, once there is one."""
        self._on_rows: Callable[[int], None] = lambda rows: None
        context = multiprocessing.get_context("forkserver")
        self._receiver, self._sender = context.Pipe(duplex=False)
        self._drain = threading.Thread(target=self._hear_ticks, daemon=True)
        self._drain.start()
        self._pool = ProcessPool(
            max_workers=workers, context=context, initializer=_start_worker, initargs=(self._sender,)
        )
        # In a thread: a signal's exception in the middle of it would leave a worker that the pool does not know of.
        self._start = threading.Thread(target=lambda: self._pool.active, daemon=True)

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._start.ident is not None:
            self._start.join(STOP_S)
        if kind is None:
            self._pool.close()
        else:
            self._pool.stop()
        closing = threading.Thread(target=self._pool.join, daemon=True)
        closing.start()
        closing.join(None if kind is None else STOP_S)  # a broken pool may wait for workers that are no more
        self._sender.send_bytes(_END)
        self._drain.join()
        self._sender.close()
        self._receiver.close()

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, dict[str, Any]], None],
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Run all tasks; `on_done` and `on_rows` are called in this process. A task's exception is raised here."""
        self._on_rows = on_rows
        if self._start.ident is None:
            self._start.start()
        self._start.join()
        running: dict[Future[dict[str, Any]], tuple[Task, int]] = {self._schedule(t): (t, 1) for t in tasks}
        while running:
            done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                task, tries = running.pop(future)
                try:
                    result = future.result()
                except ProcessExpired as e:
                    if tries == TRIES:
                        raise PipelineError(
                            f"{task.label}: its worker died {TRIES} times ({e}); give fewer workers if memory is short"
                        ) from e
                    running[self._schedule(task)] = (task, tries + 1)
                except BrokenProcessPool as e:
                    raise self._broken(e) from e
                else:
                    on_done(task, result)
            if running:
                self._require_server()

    def _schedule(self, task: Task) -> Future[dict[str, Any]]:
        try:
            future: Future[dict[str, Any]] = self._pool.schedule(task.function, args=list(task.arguments))
        except (RuntimeError, OSError, EOFError) as e:  # the pool's own words, or a server that does not answer
            raise self._broken(e) from e
        if self._server is None:
            self._server = getattr(forkserver._forkserver, "_forkserver_pid", None)
        return future

    def _require_server(self) -> None:
        """Raise PipelineError unless the fork server that workers came from lives, and the pool works."""
        if self._server is not None:
            try:  # without reaping it, which is multiprocessing's to do
                ended = os.waitid(os.P_PID, self._server, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:  # reaped already
                ended = True
            if ended:
                raise self._broken(f"process {self._server}, which starts them, was killed")
        if not self._pool.active:
            raise self._broken("their pool broke")

    def _broken(self, why: object) -> PipelineError:
        why = str(why) or f"{type(why).__name__}: the process that starts them ended"
        return PipelineError(f"workers were lost ({why}); what is finished stands, run the same command again to go on")

    def _hear_ticks(self) -> None:
        while (message := self._receiver.recv_bytes()) != _END:
            self._on_rows(int(message))


def _start_worker(sender: Connection) -> None:
    # One write of less than PIPE_BUF bytes: atomic, and no lock to die with.
    hear_ticks(lambda rows: sender.send_bytes(b"%d" % rows))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _die_with_parent() -> None:
    """Or with the fork server. PR_SET_PDEATHSIG would hear of that alone, and it lives as long as its children do."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    server = os.getppid()
    while not multiprocessing.connection.wait([parent.sentinel], timeout=POLL_S):
        if os.getppid() != server:  # nobody waits for what this process does any more
            break
    os.kill(os.getpid(), signal.SIGKILL)
