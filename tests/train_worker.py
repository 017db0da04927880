"""One rank of a test run, its own process (see training.py): runs jobs one after another in one start.

    python train_worker.py jobs.json answers.json

A job is {"train": {dotted setting: value}}, or {"cut": [from, to, step]}: copy a run folder without its checkpoints
after `step`, or {"loop": {…}} (see deepspeed_loop.py). With "poison": {"kind": …, "rows": [tokens of a sequence]} the
loss or the gradient of any forward pass over such a sequence is spoilt, as a broken text or a broken chip would. With
"strike": {"rank", "place", "count", "signal"} a rank hits itself at an exact place, with "again" twice. Rank r writes
the exit codes and messages of its jobs to `answers.json.r`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed_loop


def main(jobs_file: str, answers_file: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    jobs = json.loads(Path(jobs_file).read_text())
    answers, code = [], 0
    for job in jobs:
        if "cut" in job:
            code, message = cut(*job["cut"], rank), ""
        elif "loop" in job:
            code, message = deepspeed_loop.run(job["loop"]), ""
        else:
            with poisoned(job.get("poison")), struck(job.get("strike"), rank):
                code, message = run(job["train"])
        answers.append({"code": code, "message": message})
        Path(f"{answers_file}.{rank}").write_text(json.dumps(answers))
    return code


def run(settings: dict[str, object]) -> tuple[int, str]:
    from omegaconf import OmegaConf

    from gpt2train.config import TrainConfig
    from gpt2train.train import train

    merged = OmegaConf.structured(TrainConfig)
    for name, value in settings.items():
        OmegaConf.update(merged, name, value)
    try:
        return train(OmegaConf.to_object(merged)), ""
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(error, file=sys.stderr, flush=True)
        return code, str(error)


@contextlib.contextmanager
def poisoned(poison: dict[str, object] | None) -> Iterator[None]:
    if poison is None:
        yield
        return
    import torch

    from gpt2train import engine
    from gpt2train.model import GPT

    rows = torch.tensor(poison["rows"])

    class Poisoned(GPT):
        def forward(self, tokens, targets=None, cache=None):  # type: ignore[no-untyped-def]
            result = super().forward(tokens, targets, cache)
            if not self.training or not (tokens[:, None] == rows[None]).all(2).any():
                return result
            if poison["kind"] == "loss":
                return result * float("nan")
            if poison["kind"] == "gradient":
                return result + (result * 0).sqrt()  # adds 0, whose derivative is 0 · ∞
            return result * 50

    engine.GPT = Poisoned  # type: ignore[misc]
    try:
        yield
    finally:
        engine.GPT = GPT  # type: ignore[misc]


@contextlib.contextmanager
def struck(strike: dict[str, object] | None, rank: int) -> Iterator[None]:
    """This rank sends itself a signal when it comes to a place for the n-th time: no timing decides where it is hit."""
    if strike is None or strike["rank"] != rank:
        yield
        return
    from gpt2train import checkpoint, engine
    from gpt2train.model import GPT

    place, left = strike["place"], [int(str(strike["count"]))]
    owner, name, counts = {
        "accumulation": (GPT, "forward", lambda model, *_: model.training),
        "evaluation": (GPT, "forward", lambda model, *_: not model.training),
        "save": (checkpoint, "_write", lambda *_: True),
        "publishing": (checkpoint, "publish", lambda *_: True),
        "pruning": (checkpoint.shutil, "rmtree", lambda path, *_: str(path).endswith(".pruned")),
        "start": (engine, "load_state_tensors", lambda *_: True),
    }[str(place)]
    before = getattr(owner, name)

    def instead(*arguments, **options):  # type: ignore[no-untyped-def]
        if counts(*arguments):
            left[0] -= 1
            if left[0] == 0:
                print(f"struck at {place}", file=sys.stderr, flush=True)
                for _ in range(2 if strike.get("again") else 1):
                    os.kill(os.getpid(), getattr(signal, str(strike["signal"])))
        return before(*arguments, **options)

    setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cut(source: str, target: str, step: int, rank: int) -> int:
    import torch.distributed as dist

    if rank == 0:
        shutil.copytree(source, target)
        for folder in Path(target, "checkpoints").glob("step_*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
