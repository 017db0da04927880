"""Owning a run folder: what it holds, whether these settings may go on with it, and that nobody else does.

Flows in: the settings and the identity of the run that they describe. Flows out: a lock that ends with the process, and
run.json, which keeps the run's id, its identity and the last checkpoint published. A run's identity is what fixes its
weights' shapes and the order of its data; with another one the same curve cannot go on, and the folder is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2train.config import CheckpointError, ConfigError, RunExistsError, TrainConfig
from gpt2train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    METRICS,
    REPORT,
    VERSIONS,
    checkpoint_folders,
    read_json,
    replace_file,
)

RUN, LOCK, LOGS, WANDB = "run.json", ".lock", "logs", "wandb"
FORMAT = "gpt2train run"
_DISCARDED = ".discarded"
_OURS = {CONFIG, METRICS, VERSIONS, CHECKPOINTS, EVALUATION, REPORT, RUN, LOCK, LOGS, WANDB, _DISCARDED}
_SHAPE = ("layers", "channels", "heads", "context", "vocabulary", "pad_vocabulary_to")


def identity(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """What may not change while a run goes on, by the name of its setting."""
    model = asdict(config.model)
    return {
        **{f"model.{name}": model[name] for name in _SHAPE},
        "data": data_fingerprint,
        "batch.sequences": config.batch.sequences,
        "seed": config.seed,
    }


@dataclass
class Claim:
    """A run folder that this process owns until it ends."""

    run_dir: Path
    run_id: str
    identity: dict[str, Any]
    published: int
    """Step of the newest checkpoint ever published; -1: none."""

    def record(self) -> None:
        """Writes run.json whole."""
        content = {
            "format": FORMAT,
            "id": self.run_id,
            "identity": self.identity,
            "published": self.published,
        }
        replace_file(self.run_dir / RUN, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Owns `run_dir` until the block, or the process, ends; the kernel frees the lock of a process that died.

    Raises RunExistsError when another process owns it and ConfigError when the folder cannot be made or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError([f"run_dir={run_dir}: cannot be written ({error.strerror}); give another folder"]) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RunExistsError(f"run_dir={run_dir}: in use by {owner}; wait for it, or give another folder") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    try:
        yield
    finally:
        os.close(descriptor)


def refuse_other_folder(run_dir: Path) -> None:
    """Raises RunExistsError for a folder with files that no run writes; nothing of theirs is ever touched."""
    names = {path.name for path in run_dir.iterdir()}
    foreign = sorted(name for name in names - _OURS if not name.startswith("."))
    if foreign and not _is_run(run_dir):
        raise RunExistsError(
            f"run_dir={run_dir}: holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''} and no run; "
            f"give a new folder"
        )


def _is_run(run_dir: Path) -> bool:
    return read_json(run_dir / RUN).get("format") == FORMAT or bool(checkpoint_folders(run_dir))


def discard(run_dir: Path) -> None:
    """Removes a run's record and checkpoints. Cut short, it leaves no checkpoint that a next start would go on from."""
    if (run_dir / CHECKPOINTS).exists():
        shutil.rmtree(run_dir / _DISCARDED, ignore_errors=True)
        os.rename(run_dir / CHECKPOINTS, run_dir / _DISCARDED)
    for name in (METRICS, RUN, CONFIG, VERSIONS, EVALUATION, REPORT):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / _DISCARDED, ignore_errors=True)


def restarted() -> bool:
    """Whether a launcher started this same command again: then overwrite=true was already obeyed."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def claim(run_dir: Path, wanted: dict[str, Any]) -> Claim:
    """The run that stands in `run_dir`, or a new one. Raises RunExistsError when it is another run than `wanted`."""
    found = read_json(run_dir / RUN)
    if found.get("format") != FORMAT:
        return Claim(run_dir, run_id=secrets.token_hex(8), identity=wanted, published=-1)
    refuse_changes(run_dir, wanted, found.get("identity", {}))
    return Claim(run_dir, run_id=str(found["id"]), identity=wanted, published=int(found["published"]))


def refuse_changes(run_dir: Path, wanted: dict[str, Any], stands: dict[str, Any]) -> None:
    """Raises RunExistsError when a field that both name differs: one line each with then and now."""
    changed = [name for name in wanted if name in stands and wanted[name] != stands[name]]
    if changed:
        lines = [f"{name}={_short(wanted[name])}: the run in {run_dir} has {_short(stands[name])}" for name in changed]
        raise RunExistsError(
            "\n".join(lines) + "\ngive the run's own value, another run_dir, or overwrite=true to start from nothing"
        )


def refuse_lost_checkpoints(claimed: Claim, newest: int) -> None:
    """Raises CheckpointError when checkpoints were published (`published`) and none is there (`newest` is -1)."""
    if newest < 0 <= claimed.published:
        raise CheckpointError(
            f"{claimed.run_dir / CHECKPOINTS}: the checkpoint of step {claimed.published} was published and is gone; "
            f"restore it, or start from nothing with overwrite=true"
        )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
