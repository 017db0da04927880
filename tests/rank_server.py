"""A process that has torch, DeepSpeed and the trainer in memory and forks one rank of a test run for each request.

    python rank_server.py FOLDER        {"number": 3, "environment": {…}, "output": …, "jobs": …, "answers": …} a line

A rank that starts anew spends most of its time on imports; a forked one has its own process, memory and signals all the
same, and may be killed like any other. Its number and pid come back as a line on standard output; its exit code, as
subprocess gives it, in `FOLDER/exit.NUMBER`. The end of standard input ends the server and all ranks still alive.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any


def serve(folder: Path) -> dict[str, Any]:
    """Forks until standard input ends; returns in each forked rank, with its request, and never in the server."""
    wake, on_child = os.pipe()
    os.set_blocking(on_child, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(on_child)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    alive: dict[int, int] = {}
    unread = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            reap(folder, alive)
        if 0 not in ready:
            continue
        block = os.read(0, 1 << 16)
        if not block:
            break
        *lines, unread = (unread + block).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wake)
                os.close(on_child)
                become(request)
                return request
            alive[pid] = request["number"]
            os.write(1, f"{request['number']} {pid}\n".encode())
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # at once: there is nothing to put in order


def reap(folder: Path, alive: dict[int, int]) -> None:
    for pid in list(alive):
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            place = folder / f"exit.{alive.pop(pid)}"
            place.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
            place.with_suffix(".new").rename(place)


def become(request: dict[str, Any]) -> None:
    """The process that Popen would have made: its environment, its output, nothing to read."""
    os.environ.clear()
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


if __name__ == "__main__":
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    import train_worker

    import gpt2train.train
    from gpt2train import engine

    assert gpt2train.train
    engine._import_muon()  # and with it DeepSpeed

    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    threads = [task.joinpath("comm").read_text().strip() for task in tasks]
    others = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # jemalloc starts its own anew after a fork
    assert not others, f"a fork would leave these threads behind: {others}"
    # DeepSpeed collects garbage six times in a start with bf16: 0.2 s each over the modules that are here for good.
    gc.collect()
    gc.freeze()
    asked = serve(Path(sys.argv[1]))
    sys.exit(train_worker.main(asked["jobs"], asked["answers"]))
