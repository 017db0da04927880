"""Checkpoints beside the training: the step waits for a copy in memory; writing and publishing are a thread's work.

    saver = Saver(world, background=True)
    saver.start(lambda world: checkpoint.write(...))    # after checkpoint.capture(...)
    ... the next steps ...                              # saver.failed: has it come to nothing?
    saver.wait()                                        # until it is published; raises what it raised

Flows in: a save that needs neither model nor device. Flows out: a published checkpoint, or its error in the training's
own thread. At most one save is under way: the next one waits for it, so a disk that is too slow slows the run and does
not fill the memory. The thread agrees with the other ranks' over a group of its own, on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from gpt2train import distributed
from gpt2train.distributed import World
from gpt2train.errors import GPT2TrainError


class Saver:
    """One rank's saves, in order. Every rank makes one, at the same point, and starts the same saves."""

    def __init__(self, world: World, *, background: bool) -> None:
        self._world = distributed.beside(world) if background else world
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save has ended with an error, which the next call of `start` or `wait` raises."""
        return self._error is not None

    def start(self, work: Callable[[World], object]) -> None:
        """Waits for the save before, then runs `work`, beside the training or, without `background`, at once."""
        self.wait()
        if not self._background:
            work(self._world)
            return
        # A daemon: a save that waits for a dead rank must not keep a process that has given its reason from leaving.
        self._thread = threading.Thread(target=self._run, args=(work,), name="saver", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[World], object]) -> None:
        try:
            work(self._world)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until nothing is under way; raises what the save raised."""
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def fail(self) -> None:
        """Ends the run after a rank has said that its save failed: with this rank's own error where there is one."""
        self.wait()
        raise GPT2TrainError("another rank could not save its part of the checkpoint; its line says why")

    def close(self) -> None:
        """Until nothing is under way; raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
