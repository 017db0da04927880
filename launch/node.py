"""The far end of a launch over several hosts: the ranks of one of them, at the other end of an ssh or srun connection.

In, on standard input, one JSON object a line: `check` (where to work, what to expect), `start` (the ranks), then
orders. Out, on standard output, one line a message with MARK before it, since a login shell may print lines of its own.
Needs the standard library alone. Costs one Python process a host.

The connection is the leash. When it ends, or nothing comes over it for `silence_timeout_s`, this process ends at once,
and launch.rank kills what it had started: no rank runs on that its launcher does not know of.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import select
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launch import logs
from launch.config import Gpus, LaunchConfig, LaunchError, Starter
from launch.machine import count_cores, count_gpus, free_port, machine_faults
from launch.outcome import blame
from launch.place import Place, plan
from launch.rank import file_of
from launch.ranks import Orders, Ranks, clear_away, start_all, stop_signals, watch

MARK = "gpt2train-node "
PROBE = ".launch_probe"
BEATS_PER_SILENCE = 10  # signs of life within the time that counts as silence
GONE = 70  # exit code when the launcher is gone: EX_SOFTWARE of sysexits.h, which nothing else here uses


def main() -> None:
    """Serve one launch, then end."""
    messages = _Messages()
    messages.send("hello", host=socket.gethostname(), cores=count_cores(), gpus=count_gpus(), port=free_port(""))
    while (order := messages.next())["do"] != "start":
        if order["do"] == "check":
            messages.send("checked", **_check(order))
    try:
        _run(order, messages)
    except (OSError, LaunchError) as error:
        messages.send("broken", line=str(error))
    # The reader's thread waits on standard input, which may stay open: nothing is left to clean up.
    sys.stdout.flush()
    os._exit(0)


class _Messages:
    """Standard input and output as messages. A thread reads, and ends the process when nobody is there any more."""

    def __init__(self) -> None:
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self.silence_timeout_s = 600.0  # until the launcher names its own
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any]:
        return self._orders.get()

    def arrived(self) -> list[dict[str, Any]]:
        found = []
        while not self._orders.empty():
            found.append(self._orders.get())
        return found

    def send(self, kind: str, **content: Any) -> None:
        sys.stdout.write(f"{MARK}{json.dumps({'is': kind, **content})}\n")
        sys.stdout.flush()

    def _read(self) -> None:
        rest = b""
        while True:
            readable, _, _ = select.select([0], [], [], self.silence_timeout_s)
            block = os.read(0, 1 << 16) if readable else b""
            if not block:
                os._exit(GONE)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                order = json.loads(line)
                self.silence_timeout_s = float(order.get("silence_timeout_s", self.silence_timeout_s))
                if order["do"] != "alive":
                    self._orders.put(order)


def _check(order: dict[str, Any]) -> dict[str, Any]:
    """What this host cannot give, one line each; of the first host also the word that the others must find."""
    faults: list[str] = []
    directory, run_dir, log_dir = Path(order["directory"]), Path(order["run_dir"]), Path(order["log_dir"])
    os.environ.update(order["environment"])
    try:
        os.chdir(directory)
    except OSError as error:
        return {"faults": [f"working folder {directory}: {error.strerror}; it must be the same on all hosts"]}
    word = ""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if order["first"]:
            word = secrets.token_hex(8)
            (run_dir / PROBE).write_text(word, encoding="utf-8")
        elif not _finds(run_dir / PROBE, order["word"], float(order["probe_wait_s"])):
            faults.append(
                f"run_dir={run_dir}: is not the first host's folder; all hosts write their part of a checkpoint into "
                f"it, so give one that they share"
            )
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}; give a folder that can be written to")
    if shutil.which(order["command"][0]) is None:
        faults.append(
            f"{order['command'][0]}: is not there; give hosts.python (or python) for a path that all hosts have"
        )
    port = int(order["port"]) if order["first"] else 0
    expected = LaunchConfig(processes=int(order["processes"]), gpus=Gpus[order["gpus"]], port=port)
    gpus = 0 if expected.gpus is Gpus.none else count_gpus()
    faults += machine_faults(expected, gpus, address="")
    return {"faults": faults, "word": word}


def _finds(probe: Path, word: str, within_s: float) -> bool:
    """Does the first host's word stand in `probe`? A network file system may show it some seconds late."""
    end_s = time.monotonic() + within_s
    while True:
        os.listdir(probe.parent)  # has a network file system look again
        with contextlib.suppress(FileNotFoundError):
            if probe.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > end_s:
            return False
        time.sleep(0.2)


def _run(order: dict[str, Any], messages: _Messages) -> None:
    """The ranks of this host, from their start to their end."""
    log_dir = Path(order["log_dir"])
    place = Place(
        slots=tuple(order["slots"]),
        node=int(order["node"]),
        address=order["address"],
        port=int(order["port"]),
        restart=int(order["restart"]),
    )
    ranks = Ranks(log_dir, place.ranks)
    logs.rotate(log_dir, keep=int(order["keep_attempts"]), ranks=place.ranks)
    starts = plan(Starter[order["starter"]], order["command"], place=place, log_dir=log_dir)
    starter_log = logs.starter_log(log_dir, place.node)
    tail = logs.Tail(file_of(log_dir, 0, "log"))
    reported: set[int] = set()
    beat_s = messages.silence_timeout_s / BEATS_PER_SILENCE
    next_beat_s = time.monotonic()

    with stop_signals() as own:
        orders = Orders(patient=True)

        def report() -> None:
            nonlocal next_beat_s
            for message in messages.arrived():
                match message["do"]:
                    case "signal":
                        orders.signals.append(signal.Signals(message["number"]))
                    case "peer_failed":
                        orders.peer_failed = True
                    case "kill":
                        orders.kill = True
            while own:  # from a batch system, to this host alone: the others have to know
                number = own.popleft()
                orders.signals.append(number)
                messages.send("told", number=int(number))
            if 0 in ranks.numbers:
                for block in tail.read():
                    messages.send("output", text=block.decode("utf-8", "surrogateescape"))
            ends = ranks.ends()
            failing = blame(ends, None)
            for rank in sorted(set(ends) - reported):
                reported.add(rank)
                end = ends[rank]
                messages.send(
                    "ended",
                    rank=rank,
                    code=end.code,
                    age_s=time.monotonic() - end.after_s,
                    killed=end.killed,
                    log=end.log,
                    lines=logs.last_lines(Path(end.log)) if rank in failing else [],
                )
            if time.monotonic() >= next_beat_s:
                next_beat_s = time.monotonic() + beat_s
                messages.send("alive")

        starters = start_all(starts, ranks, starter_log)
        try:
            watch(
                ranks,
                starts,
                starters,
                orders,
                stop_timeout_s=float(order["stop_timeout_s"]),
                peer_grace_s=float(order["peer_grace_s"]),
                say=lambda line: messages.send("say", line=line),
                each_look=report,
            )
        finally:
            clear_away(ranks, starters)
            report()
    messages.send("done", any_started=bool(ranks.started), starter=logs.last_lines(starter_log))


if __name__ == "__main__":
    main()
