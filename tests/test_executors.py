"""Shard tasks in worker processes: results, crashes, errors, orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.executors import TRIES, LocalExecutor, Task, tick
from data_pipeline.records import ConfigError, InputError, PipelineError


def square(n: int) -> dict[str, Any]:
    tick(n)
    return {"n": n, "square": n * n, "pid": os.getpid()}


def die_once(flag: str) -> dict[str, Any]:
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"survived": True}


def always_die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuse() -> dict[str, Any]:
    raise InputError("urls=x: there is no such file")


def refuse_all() -> dict[str, Any]:
    raise ConfigError(["a=1: wrong", "b=2: wrong too"])


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_once_and_every_row_counted(workers: int) -> None:
    results: list[dict[str, Any]] = []
    rows: list[int] = []
    tasks = [Task(f"t{n}", square, (n,)) for n in range(10)]
    with LocalExecutor(workers) as executor:
        executor.run(tasks, on_done=lambda task, result: results.append(result), on_rows=rows.append)
    assert sorted(r["square"] for r in results) == [n * n for n in range(10)]
    assert sum(rows) == sum(range(10))
    assert os.getpid() not in {r["pid"] for r in results}


def test_a_killed_worker_costs_one_task_one_try(tmp_path: Path) -> None:
    results: dict[str, dict[str, Any]] = {}
    tasks = [Task("dies", die_once, (str(tmp_path / "died"),)), *(Task(f"t{n}", square, (n,)) for n in range(4))]
    with LocalExecutor(2) as executor:
        executor.run(tasks, on_done=lambda task, result: results.__setitem__(task.label, result))
    assert results["dies"] == {"survived": True}
    assert len(results) == 5


def test_a_task_that_always_dies_is_named() -> None:
    with pytest.raises(PipelineError, match=f"bad: its worker died {TRIES} times"), LocalExecutor(1) as executor:
        executor.run([Task("bad", always_die)], on_done=lambda task, result: None)


def test_an_error_of_a_task_reaches_the_caller_as_it_is() -> None:
    with pytest.raises(InputError, match="there is no such file"), LocalExecutor(1) as executor:
        executor.run([Task("bad", refuse)], on_done=lambda task, result: None)


def test_faults_come_through_as_a_list() -> None:
    with pytest.raises(ConfigError) as error, LocalExecutor(1) as executor:
        executor.run([Task("bad", refuse_all)], on_done=lambda task, result: None)
    assert error.value.faults == ["a=1: wrong", "b=2: wrong too"]
    assert str(error.value) == "a=1: wrong\nb=2: wrong too"


def linger(folder: str, n: int) -> dict[str, Any]:
    (Path(folder) / f"{n}.pid").write_text(str(os.getpid()))
    time.sleep(600)
    return {}


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_fork_server_ends_the_run_with_its_name(tmp_path: Path, kind: signal.Signals) -> None:
    """In the middle of a stage, with more tasks than a pipe holds waiting behind those at work."""
    pids: list[int] = []

    def kill() -> None:
        while len(pids) < 2:
            pids[:] = [int(text) for p in tmp_path.glob("*.pid") if (text := p.read_text())]
            time.sleep(0.02)
        os.kill(int(Path(f"/proc/{pids[0]}/stat").read_text().rsplit(")", 1)[1].split()[1]), kind)

    killer = threading.Thread(target=kill)
    killer.start()
    tasks = [Task(str(n), linger, (str(tmp_path), n)) for n in range(2_000)]
    began = time.monotonic()
    with pytest.raises(PipelineError, match=r"workers were lost .*run the same command again"), LocalExecutor(2) as e:
        e.run(tasks, on_done=lambda task, result: None)
    killer.join()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() - began < 120, "a worker outlived its fork server"
        time.sleep(0.05)
    assert time.monotonic() - began < 120
    with LocalExecutor(1) as executor:  # and the next run has a server of its own
        executor.run([Task("next", square, (3,))], on_done=lambda task, result: None)


PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from data_pipeline.executors import LocalExecutor, Task
from test_executors import write_pid_and_sleep
with LocalExecutor(2) as executor:
    executor.run([Task(str(n), write_pid_and_sleep, (sys.argv[1], n)) for n in range(2)], on_done=lambda t, r: None)
"""


def write_pid_and_sleep(folder: str, n: int) -> dict[str, Any]:
    (Path(folder) / f"{n}.pid").write_text(str(os.getpid()))
    time.sleep(120)
    return {}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_kill_9_of_the_parent_leaves_no_worker(tmp_path: Path) -> None:
    script = PARENT.format(tests=str(Path(__file__).parent))
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 200
    while len(pids := [p.read_text() for p in tmp_path.glob("*.pid")]) < 2 or not all(pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(alive(int(pid)) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
