"""A Ray cluster of two nodes on this machine, for test_ray_executor.py, which runs this file in a network of its own.

    python ray_cluster.py engine FOLDER       the executor by itself
    python ray_cluster.py lost_nodes FOLDER   no node is left that could hold the task
    python ray_cluster.py corpus FOLDER       whole corpora, with nodes and commands killed
    python ray_cluster.py kills FOLDER        a corpus whose command is killed 25 times, with one and with two workers

Each prints a line of JSON: what happened. The cluster listens on loopback alone, because the network namespace has
nothing else.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from killing import copy_archive, finished_steps, kill_again_and_again
from ray.cluster_utils import Cluster
from test_pipeline import RESULT, Handler, settings, tree, url_list

from data_pipeline.config import RayConfig
from data_pipeline.executors import Task, tick
from data_pipeline.ray_executor import RayExecutor
from data_pipeline.records import ConfigError, PipelineError

STORE_BYTES = 100_000_000


@contextmanager
def cluster() -> Iterator[Cluster]:
    # A dead node is noticed within two seconds instead of half a minute.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    quick["worker_register_timeout_seconds"] = 600  # a busy machine may take minutes to start a worker
    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": quick}
    both = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield both
    finally:
        ray.shutdown()
        both.shutdown()


PATIENCE_S = 200.0
"""A busy machine may take minutes for what takes it seconds; only what never happens is an error."""


def wait_for(happened: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def square(n: int) -> dict[str, Any]:
    time.sleep(0.1)
    tick(n)
    return {"square": n * n, "node": ray.get_runtime_context().get_node_id()}


def refuse_all() -> dict[str, Any]:
    raise ConfigError(["a=1: wrong", "b=2: wrong too"])


def stumble() -> dict[str, Any]:
    raise KeyError("a bug")


def read_missing(path: Path) -> dict[str, Any]:
    return {"text": path.read_text()}


def always_die(folder: Path) -> dict[str, Any]:
    (folder / f"try_{os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hold(folder: Path, n: int) -> dict[str, Any]:
    """Ends once the test says so; leaves a trace of every try: the node, and the process to kill with it."""
    node = ray.get_runtime_context().get_node_id()
    (folder / f"{n}.{node}").write_text(f"{os.getpid()}\n")
    wait_for((folder / "go").exists)
    return {"node": node}


def kill_node(both: Cluster, node: Any, folder: Path, tasks: int) -> None:
    """Kill `node` with its workers, as a power cut would, once `tasks` calls of `hold` are under way on it."""

    def processes() -> list[int]:
        lines = [p.read_text() for p in folder.glob(f"*.{node.node_id}")]
        return [int(line) for line in lines if line.endswith("\n")]

    wait_for(lambda: len(processes()) == tasks)
    both.remove_node(node, allow_graceful=False)
    for process in processes():
        os.kill(process, signal.SIGKILL)


# ── the executor by itself ──────────────────────────────────────────────────────────────────────────────────────────


def engine(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}

    def run(executor: RayExecutor, tasks: list[Task]) -> tuple[dict[str, dict[str, Any]], int]:
        results: dict[str, dict[str, Any]] = {}
        rows: list[int] = []
        executor.run(tasks, on_done=lambda task, result: results.update({task.label: result}), on_rows=rows.append)
        return results, sum(rows)

    def error(act: Callable[[], Any]) -> dict[str, Any]:
        try:
            act()
        except Exception as e:
            return {"type": [c.__name__ for c in type(e).__mro__], "says": str(e), "faults": getattr(e, "faults", None)}
        return {}

    with cluster() as both:
        address = both.address
        second = both.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        with RayExecutor(RayConfig(address=address, retries=2), 0, folder) as executor:
            said["workers"] = executor.workers
            results, rows = run(executor, [Task(f"t{n}", square, (n,)) for n in range(12)])
            said["squares"] = sorted(r["square"] for r in results.values())
            said["rows"], said["nodes"] = rows, len({r["node"] for r in results.values()})
            said["config_error"] = error(lambda: run(executor, [Task("bad", refuse_all)]))
            said["bug"] = error(lambda: run(executor, [Task("bad", stumble)]))
            said["missing"] = error(lambda: run(executor, [Task("bad", read_missing, (folder / "nothing",))]))
            said["dies"] = error(lambda: run(executor, [Task("bad", always_die, (folder,))]))
            said["tries"] = len(list(folder.glob("try_*")))

            def kill_the_second() -> None:
                kill_node(both, second, folder, 2)
                (folder / "go").touch()

            thread = threading.Thread(target=kill_the_second)
            thread.start()
            results, _ = run(executor, [Task(f"h{n}", hold, (folder, n)) for n in range(4)])
            thread.join()
            said["held"] = sorted(results)
            said["on_the_dead_node"] = sum(r["node"] == second.node_id for r in results.values())
            said["begun_on_the_dead_node"] = len(list(folder.glob(f"*.{second.node_id}")))

        too_much = RayConfig(address=address, cpus=3)
        said["too_much"] = error(lambda: RayExecutor(too_much, 0, folder))
    said["no_cluster"] = error(lambda: RayExecutor(RayConfig(address=address), 0, folder))
    said["left"] = [p.name for p in folder.glob(".*")]
    return said


def lost_nodes(folder: Path) -> dict[str, Any]:
    """The only node that could hold the task dies and no other comes."""
    with cluster() as both:
        second = both.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        config = RayConfig(address=both.address, cpus=2, node_timeout_s=1.5)
        thread = threading.Thread(target=kill_node, args=(both, second, folder, 1))
        thread.start()
        try:
            with RayExecutor(config, 0, folder) as executor:
                executor.run([Task("h", hold, (folder, 9))], on_done=lambda task, result: None)
        except PipelineError as e:
            return {"says": str(e)}
        finally:
            thread.join()
    return {}


# ── whole corpora ───────────────────────────────────────────────────────────────────────────────────────────────────


def start(overrides: list[str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2train", "corpus", *overrides, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(command: subprocess.Popen[str]) -> dict[str, Any]:
    errors = command.communicate(timeout=240)[1]
    return {"code": command.returncode, "says": errors[-3000:]}


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def corpus(folder: Path) -> dict[str, Any]:
    """Fetch on two nodes, one of which loses touch; then the same archive locally, with a node killed, with the command
    killed again and again."""
    asked: Counter[str] = Counter()

    class Counting(Handler):
        def do_GET(self) -> None:
            asked[f"{self.headers['Host']}{self.path}"] += 1
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    url_list(folder, address)
    said: dict[str, Any] = {}

    def overrides(out: Path) -> list[str]:
        return [*settings(folder, address, out), "shards=8"]

    with cluster() as both:
        on_ray = ["executor=ray", f"ray.address={both.address}", "workers=0"]

        second = both.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        fetched = folder / "fetched"
        slowly = ("stages=[urls,fetch]", "fetch.processes=2", "fetch.delay_s=0.4")
        command = start(overrides(fetched), *on_ray, *slowly)
        journals = fetched / "fetch"
        wait_for(lambda: sum(p.read_text().count("\n") for p in journals.glob("*.journal.jsonl")) >= 8)
        both.remove_node(second, allow_graceful=False)  # its workers write on until they notice
        said["fetching_when_the_node_went"] = command.poll() is None
        said["fetch"] = finish(command)
        said["most_often_asked"] = max(n for name, n in asked.items() if not name.endswith("/robots.txt"))
        said["pages_asked_twice"] = sum(n > 1 for name, n in asked.items() if not name.endswith("/robots.txt"))

        local = copy_archive(fetched, folder / "local")
        said["local"] = finish(start(overrides(local)))

        third = both.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        out = copy_archive(fetched, folder / "node_killed")
        command = start(overrides(out), *on_ray)
        wait_for(lambda: len(list((out / "extract").glob("*.done.json"))) >= 2)
        raylet = third.all_processes["raylet"][0].process.pid
        workers = children(raylet)
        both.remove_node(third, allow_graceful=False)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        said["working_when_the_node_died"] = command.poll() is None
        said["node_killed"] = finish(command)

        both.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        out = copy_archive(fetched, folder / "command_killed")
        rng = random.Random(11)
        said["finished_steps_at_kills"] = []
        for steps in (9, 14, 20, 27, 35, 44, 54, 64):
            command = start(overrides(out), *on_ray)
            wait_for(lambda: len(list(out.rglob("*.done.json"))) >= steps or command.poll() is not None)  # noqa: B023
            time.sleep(rng.uniform(0, 0.2))
            command.kill()
            command.communicate()
            said["finished_steps_at_kills"].append(len(list(out.rglob("*.done.json"))))
        said["command_killed"] = finish(start(overrides(out), *on_ray))
    server.shutdown()
    said["trees"] = {name: tree(folder / name, *RESULT) for name in ("local", "node_killed", "command_killed")}
    said["left"] = [p.name for p in folder.rglob(".*.tmp")]
    return said


def kills(folder: Path) -> dict[str, Any]:
    """The command is killed 25 times in the course of one run, with one worker and with two."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    url_list(folder, address)
    one_go = folder / "one_go"
    overrides = [*settings(folder, address, one_go), "shards=8"]
    said: dict[str, Any] = {"one_go": finish(start(overrides)), "moments": {}, "trees": {}, "summaries": {}}
    with cluster() as both:
        both.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        for workers in (1, 2):
            out = copy_archive(one_go, folder / f"killed{workers}")
            on_ray = [f"out={out}", "executor=ray", f"ray.address={both.address}", f"workers={workers}"]

            def begin(more: list[str] = on_ray) -> subprocess.Popen[str]:
                return start(overrides, *more)

            said["moments"][workers] = kill_again_and_again(
                begin, out, kills=25, steps=finished_steps(one_go), seed=workers
            )
            said[f"killed{workers}"] = finish(begin())
    server.shutdown()
    for name in ("one_go", "killed1", "killed2"):
        said["trees"][name] = tree(folder / name, *RESULT)
        said["summaries"][name] = json.loads((folder / name / "summary.json").read_text())
    said["left"] = [p.name for p in folder.rglob(".*.tmp")]
    return said


def main() -> None:
    scenes: dict[str, Callable[..., dict[str, Any]]] = {
        "engine": engine,
        "lost_nodes": lost_nodes,
        "corpus": corpus,
        "kills": kills,
    }
    said = scenes[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    print("SAID " + json.dumps(said))


if __name__ == "__main__":
    main()
