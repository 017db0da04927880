"""Shards on a Ray cluster of two nodes: results, errors, dead workers and nodes; the bytes of a local run.

The cluster runs in a network namespace that has loopback alone: Ray listens on the machine's own address otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.bounds import check
from data_pipeline.config import CorpusConfig, Executor, RayConfig

pytest.importorskip("ray", reason="Ray is not installed: pip install 'gpt2train[ray]'")

# A network that is loopback alone, and processes that all end with the first of them.
NAMESPACES = ("unshare", "--net", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
WITH_OWN_NETWORK = (*NAMESPACES, "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@cache
def own_network_fails() -> str:
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "unshare and ip are needed for a network of its own"
    tried = subprocess.run([*WITH_OWN_NETWORK, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip()


def play(scene: str, folder: Path, timeout_s: float) -> dict[str, Any]:
    """What ray_cluster.py says of a scene."""
    if why := own_network_fails():
        pytest.skip(f"no network namespace here: {why}")
    log = folder / "log"
    work = folder / "work"
    work.mkdir()
    script = Path(__file__).with_name("ray_cluster.py")
    with tempfile.TemporaryDirectory(prefix="ray") as sockets, open(log, "w", encoding="utf-8") as f:
        # Not below `folder`: a socket's path may have 107 bytes. A home of its own: Ray would write tokens there.
        environment = {**os.environ, "HOME": str(folder), "RAY_TMPDIR": sockets, "RAY_AUTH_MODE": "disabled"}
        process = subprocess.run(
            [*WITH_OWN_NETWORK, sys.executable, str(script), scene, str(work)],
            stdout=f, stderr=subprocess.STDOUT, env=environment, timeout=timeout_s, check=False,
        )  # fmt: skip
    lines = log.read_text(encoding="utf-8").split("\n")
    answers = [line for line in lines if line.startswith("SAID ")]
    assert process.returncode == 0, "\n".join(lines[-60:])
    assert len(answers) == 1, "\n".join(lines[-60:])
    return json.loads(answers[0][5:])


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_tasks_survive_their_workers_and_nodes_and_errors_come_as_they_are(tmp_path: Path) -> None:
    said = play("engine", tmp_path, 400)
    assert said["workers"] == 3  # of one core each, on two nodes
    assert said["squares"] == [n * n for n in range(12)]
    assert said["rows"] == sum(range(12))
    assert said["nodes"] == 2
    assert said["config_error"]["type"][0] == "ConfigError"
    assert said["config_error"]["faults"] == ["a=1: wrong", "b=2: wrong too"]
    assert "KeyError" in said["bug"]["type"]
    assert "in stumble" in said["bug"]["says"]  # with the traceback of the node
    assert said["missing"]["type"][0] == "InputError"
    assert "nothing; with executor=ray all inputs have to lie on storage" in said["missing"]["says"]
    assert "bad: its worker died 3 times" in said["dies"]["says"]
    assert said["tries"] == 3
    assert said["held"] == ["h0", "h1", "h2", "h3"]
    assert said["begun_on_the_dead_node"] == 2
    assert said["on_the_dead_node"] == 0
    assert said["too_much"]["type"][0] == "InputError"
    assert "ray.cpus=3: no node of the cluster has as much" in said["too_much"]["says"]
    assert said["no_cluster"]["type"][0] == "InputError"
    assert "run `ray start --head` on one machine" in said["no_cluster"]["says"]
    assert said["left"] == []


@pytest.mark.slow
@pytest.mark.soak
def test_a_cluster_that_lost_its_nodes_ends_the_run_within_the_time_limit(tmp_path: Path) -> None:
    said = play("lost_nodes", tmp_path, 280)
    assert "ray.cpus=2: for 1.5 s no living node of the cluster had as much" in said["says"]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_same_bytes_as_locally_after_nodes_and_commands_were_killed(tmp_path: Path) -> None:
    said = play("corpus", tmp_path, 800)
    assert said["fetching_when_the_node_went"]
    assert said["fetch"]["code"] == 0, said["fetch"]["says"]
    assert said["most_often_asked"] <= 2  # what was under way when the node went, and nothing else
    assert said["pages_asked_twice"] <= 4
    assert said["working_when_the_node_died"]
    assert said["finished_steps_at_kills"] == sorted(said["finished_steps_at_kills"])
    assert len(set(said["finished_steps_at_kills"])) >= 6  # of 8 kills, while the run went forward in between
    for name in ("local", "node_killed", "command_killed"):
        assert said[name]["code"] == 0, said[name]["says"]
        assert said["trees"][name] == said["trees"]["local"], name
    assert len(said["trees"]["local"]) > 20
    assert said["left"] == []


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_25_kills_of_the_command_change_no_byte_and_lose_no_row(tmp_path: Path) -> None:
    said = play("kills", tmp_path, 2300)
    for workers, moments in said["moments"].items():
        print(f"\nRay, {workers} workers: {dict(Counter(moments))}")
        assert sum(not m.startswith("ended") for m in moments) == 25
        assert Counter(moments)["half written"] >= 8
    for name in ("one_go", "killed1", "killed2"):
        assert said[name]["code"] == 0, said[name]["says"]
        assert said["trees"][name] == said["trees"]["one_go"], name
        assert said["summaries"][name] == said["summaries"]["one_go"], name
    assert len(said["trees"]["one_go"]) > 20
    assert said["left"] == []


# ── a node that is not like the others ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_node_with_another_folder_or_other_versions_is_refused_by_name(tmp_path: Path) -> None:
    from data_pipeline import ray_executor
    from data_pipeline.executors import Task
    from data_pipeline.records import InputError

    def touch() -> dict[str, Any]:
        (tmp_path / "touched").touch()
        return {}

    here = str(tmp_path)
    task, environment = Task("t", touch), ray_executor.environment()
    home = ray_executor._Home(tmp_path, ".ray-token", here, environment)
    with pytest.raises(InputError, match="sees another folder there, or none"):
        ray_executor._run_task(task, home, None)
    (tmp_path / ".ray-token").touch()
    other = ray_executor._Home(tmp_path, ".ray-token", here, {**environment, "pyarrow": "1.0"})
    with pytest.raises(InputError, match=rf"has pyarrow {environment['pyarrow']} instead of 1\.0"):
        ray_executor._run_task(task, other, None)
    assert not (tmp_path / "touched").exists()
    before = os.getcwd()
    try:
        assert ray_executor._run_task(task, home, None) == {}
    finally:
        os.chdir(before)
    assert (tmp_path / "touched").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_rows_that_cannot_be_counted_hold_up_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from data_pipeline import ray_executor

    answers: dict[str, int] = {}
    asked = iter(["a", "b", "c", "d"])
    waited: list[float] = []

    def wait(questions: list[str], timeout: float) -> tuple[list[str], list[str]]:
        waited.append(timeout)
        return [q for q in questions if q in answers], [q for q in questions if q not in answers]

    monkeypatch.setattr(ray_executor.ray, "wait", wait)
    monkeypatch.setattr(ray_executor.ray, "get", answers.__getitem__)
    executor = object.__new__(ray_executor.RayExecutor)
    executor._question = None
    executor._rows = SimpleNamespace(take=SimpleNamespace(remote=lambda: next(asked)))
    rows: list[int] = []
    for _ in range(3):  # no answer, and no second question before there is one
        executor._hear_rows(rows.append, 0.0)
    assert (rows, executor._question, waited) == ([], "a", [0.0] * 3)
    answers.update(a=3, b=4)
    executor._hear_rows(rows.append, 0.0)
    executor._hear_rows(rows.append, 5.0)
    assert (rows, executor._question) == ([3, 4], None)


def test_a_step_whose_file_is_not_seen_here_is_not_marked_as_done(tmp_path: Path) -> None:
    from data_pipeline.records import StorageError
    from data_pipeline.store import Hashes, Step, mark_done

    (tmp_path / "s" / "00000.parquet").parent.mkdir()
    (tmp_path / "s" / "00000.parquet").touch()
    outputs = (tmp_path / "s" / "00000.parquet", tmp_path / "s" / "00000.verdicts.parquet")
    step = Step("s", "00000", tmp_path / "s", {}, (), outputs)
    with pytest.raises(StorageError, match=r"00000\.verdicts\.parquet: written, but not to be seen"):
        mark_done(step, {}, Hashes())
    assert not step.marker.exists()
    outputs[1].touch()
    mark_done(step, {}, Hashes())
    assert step.marker.exists()


HOLD = """
import sys, time
from pathlib import Path
from data_pipeline.store import lock
with lock(Path(sys.argv[1]), ".00000.lock"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_shard_that_another_process_fetches_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.crawl import fetch_journal
    from data_pipeline.records import LockedError

    monkeypatch.setattr(fetch_journal, "LOCK_WAIT_S", 0.3)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"in use by process {other.pid} on "):
            fetch_journal.ShardLog(tmp_path, 0, tmp_path, 1 << 20)
        assert not list(tmp_path.glob("*.journal.jsonl"))  # nothing was opened, let alone cut
        fetch_journal.ShardLog(tmp_path, 1, tmp_path, 1 << 20).close()
        threading.Timer(0.5, other.kill).start()
        monkeypatch.setattr(fetch_journal, "LOCK_WAIT_S", 30.0)
        fetch_journal.ShardLog(tmp_path, 0, tmp_path, 1 << 20).close()


def test_settings_out_of_bounds_are_named() -> None:
    def faults(**settings: Any) -> list[str]:
        return check(CorpusConfig(urls="x", executor=Executor.ray, ray=RayConfig(**settings)))

    assert faults() == []
    assert faults(address="10.0.0.7:6379") == []
    for name, value in {
        "address": "ray://head:10001", "cpus": 0, "memory_mb": -1, "retries": -1, "node_timeout_s": 0
    }.items():  # fmt: skip
        assert [f.split("=")[0] for f in faults(**{name: value})] == [f"ray.{name}"]
