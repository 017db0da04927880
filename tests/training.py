"""What the tests of training share: a folder of tokens, tiny settings, ranks as real processes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.token_writer import TokenShardWriter

WORKER = Path(__file__).parent / "train_worker.py"

VOCABULARY = 211
"""Enough for the tokens of `write_tokens`; with GPT-2's, two thirds of a tiny run's time would go into its head."""

TINY: dict[str, Any] = {
    "model.name": "tiny",
    "model.vocabulary": VOCABULARY,
    "model.layers": 2,
    "model.channels": 16,
    "model.heads": 2,
    "model.context": 16,
    "device": "cpu",
    "precision": "fp32",
    "batch.sequences": 8,
    "batch.micro": 2,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 5,
    "evaluate.every_steps": 25,
    "evaluate.sequences": 6,
    "checkpoint.every_steps": 20,
    "checkpoint.keep_last": 0,
    "logging.every_steps": 10,
    "distributed.timeout_s": 60.0,
}


def write_tokens(folder: Path, *, documents: int = 300, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """Token shards of random documents over 200 tokens of unequal likelihood; the last tenth validates."""
    end_of_text = vocabulary - 1
    generator = np.random.default_rng(seed)
    likelihood = 1.0 / np.arange(1, 201)
    likelihood /= likelihood.sum()
    folder.mkdir(parents=True)
    with TokenShardWriter(
        folder, shard_tokens=4096, tokenizer_sha256="0" * 64, vocabulary=vocabulary, end_of_text=end_of_text
    ) as writer:
        for index in range(documents):
            tokens = generator.choice(200, size=int(generator.integers(20, 60)), p=likelihood).astype(np.uint16)
            tokens[-1] = end_of_text
            split = "train" if index < documents * 9 // 10 else "validation"
            writer.append(split, tokens, index=index, url=f"https://example.com/{index}", digest=f"{index:064x}")
        writer.finish(made_from="a test", settings={})
    return folder


class RankServer:
    """rank_server.py as a process of this one; forks a rank in some hundredths of a second instead of seconds."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks."))
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(self.folder / "stderr", "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER.with_name("rank_server.py")), str(self.folder)],
                env=os.environ | one_thread | {"DS_ACCELERATOR": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=WORKER.parent.parent,
            )
        self._number = 0

    def fork(self, request: Mapping[str, Any]) -> ForkedRank:
        self._number += 1
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "number": self._number}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        assert answer[:1] == [str(self._number).encode()], (self.folder / "stderr").read_text()
        return ForkedRank(int(answer[1]), self.folder / f"exit.{self._number}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def rank_server() -> RankServer:
    """One for all tests of this process."""
    server = RankServer()
    atexit.register(server.close)
    return server


class ForkedRank:
    """What subprocess.Popen offers, for a child of the server."""

    def __init__(self, pid: int, exit_file: Path) -> None:
        self.pid, self._exit_file = pid, exit_file

    def poll(self) -> int | None:
        return int(self._exit_file.read_text()) if self._exit_file.exists() else None

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Ranks:
    """Processes of one start of a run, ranks 0 to n - 1, on this machine; `fresh`: each imports all it needs itself."""

    def __init__(self, folder: Path, jobs: Sequence[Mapping[str, Any]], ranks: int, *, fresh: bool = False) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps(list(jobs)))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes: list[subprocess.Popen[bytes] | ForkedRank] = []
        for rank in range(ranks):
            environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            files = str(folder / "jobs.json"), str(folder / "answers.json")
            output = folder / f"stderr.{rank}"
            if not fresh:
                request = {"jobs": files[0], "answers": files[1], "output": str(output), "environment": environment}
                self.processes.append(rank_server().fork(request))
                continue
            with open(output, "w") as stream:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER), *files],
                        env=environment,
                        stdout=stream,
                        stderr=stream,
                        cwd=WORKER.parent.parent,
                    )
                )

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes by rank; processes that are not done by then are killed and the test fails."""
        end = time.monotonic() + timeout_s
        try:
            return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done in {timeout_s:g} s:\n{self.stderr(0)[-3000:]}") from None

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def answers(self, rank: int = 0) -> list[dict[str, Any]]:
        return json.loads((self._folder / f"answers.json.{rank}").read_text())

    def stderr(self, rank: int = 0) -> str:
        path = self._folder / f"stderr.{rank}"
        return path.read_text() if path.exists() else ""


def read_metrics(run_dir: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Losses and validation losses by step. Fails on a step that is there twice or a line that is no JSON."""
    losses: dict[int, float] = {}
    validation: dict[int, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        series, value = (losses, entry["loss"]) if "loss" in entry else (validation, entry["validation_loss"])
        assert entry["step"] not in series, f"step {entry['step']} is there twice"
        series[entry["step"]] = value
    return losses, validation


def written_steps(run_dir: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


STEPS = 50
"""Of a run that is compared with others."""


def settings(tokens: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return {**TINY, "data.path": str(tokens), "run_dir": str(run_dir), "steps": STEPS, **dotted}


def losses_of(run: Path) -> list[float]:
    losses, _ = read_metrics(run)
    assert list(losses) == list(range(1, len(losses) + 1))
    return list(losses.values())


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def entries_of(run: Path) -> list[dict[str, Any]]:
    """Lines of steps, without what the clock says."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in entries if "loss" in entry]


def play(
    folder: Path, starts: Sequence[tuple[int, Sequence[dict[str, Any]]]], *, timeout_s: float = 800
) -> dict[str, dict[str, Any]]:
    """Each start's jobs one after another, on its number of ranks; what became of each job by its name."""
    answers: dict[str, dict[str, Any]] = {}
    for number, (ranks, jobs) in enumerate(starts):
        started = Ranks(folder / f"start{number}", jobs, ranks)
        started.wait(timeout_s)
        for index, done in enumerate(jobs):
            by_rank = [started.answers(rank)[index] for rank in range(ranks)]
            answers[done["name"] + ("" if number < 2 else " later")] = {
                "codes": [answer["code"] for answer in by_rank],
                "messages": [answer["message"] for answer in by_rank],
                "stderr": started.stderr(0),
            }
    return answers


def cut(folder: Path, source: str, target: str, step: int) -> dict[str, Any]:
    """The job that copies a run without its checkpoints after `step`."""
    return {"name": f"cut {target}", "cut": [str(folder / source), str(folder / target), step]}
