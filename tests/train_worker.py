"""One rank of a test run, started by training.py as its own process: runs jobs one after another in one start.

    python train_worker.py jobs.json answers.json

A job is {"train": {dotted setting: value}}, or {"cut": [from, to, step]}: copy a run folder without its checkpoints
after `step`. Rank r writes the exit codes and messages of its jobs to `answers.json.r`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


def main() -> int:
    rank = int(os.environ.get("RANK", "0"))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers, code = [], 0
    for job in jobs:
        if "cut" in job:
            code, message = cut(*job["cut"], rank), ""
        else:
            code, message = run(job["train"])
        answers.append({"code": code, "message": message})
        Path(f"{sys.argv[2]}.{rank}").write_text(json.dumps(answers))
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
    sys.exit(main())
