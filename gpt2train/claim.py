"""Owning a run folder: what it holds, whether these settings may go on with it, and that nobody else does.

Flows in: the settings and the identity of the run that they describe. Flows out: a `Run`, the same on all ranks, with
verified data and the newest whole checkpoint; a lock that ends with the process; config.yaml and versions.json, what it
runs with; and run.json, which keeps the run's id, its identity and the last checkpoint published. A run's identity is
what fixes its weights' shapes and the order of its data; with another one the same curve cannot go on, and the folder
is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from data_pipeline.token_shards import TokenShards, TokenSplit, fetch_token_shards, token_cache
from gpt2train import checkpoint
from gpt2train.config import ModelConfig, TrainConfig
from gpt2train.data import TokenWindows
from gpt2train.distributed import World, all_rows, on_all_ranks, on_rank_zero
from gpt2train.errors import (
    STORAGE_ERRNOS,
    CheckpointError,
    ConfigError,
    RunExistsError,
    RunInUseError,
    write_error,
)
from gpt2train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    FORECAST,
    METRICS,
    PROFILE,
    REPORT,
    RUN,
    TENSORBOARD,
    VERSIONS,
    checkpoint_folders,
    config_text,
    read_json,
    read_run_config,
    replace_file,
)
from gpt2train.saving.remote import Remote

PACKAGES = ("gpt2train", "torch", "deepspeed", "numpy", "safetensors", "hydra-core", "wandb", "tiktoken")
LOCK, LOGS, WANDB = ".lock", "logs", "wandb"
FORMAT = "gpt2train run"
_DISCARDED = ".discarded"
_OURS = {
    CONFIG,
    METRICS,
    VERSIONS,
    CHECKPOINTS,
    EVALUATION,
    FORECAST,
    REPORT,
    RUN,
    LOCK,
    LOGS,
    WANDB,
    TENSORBOARD,
    PROFILE,
    _DISCARDED,
}
FEW_DOCUMENTS = 30
"""Documents of a validation split below which single ones decide what its loss is."""
_FREE = ("name", "dropout")
"""What may change of the model while a run goes on: its name, and what is random in it."""


def identity(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """What may not change while a run goes on, by the name of its setting."""
    model = config.model.to_json()
    return {
        **{f"model.{name}": value for name, value in model.items() if name not in _FREE},
        "optimizer.name": config.optimizer.name.value,
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

    Raises RunInUseError when another process owns it ConfigError when the folder cannot be made or
    written, and StorageError when there is no room.
    """
    made = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in STORAGE_ERRNOS:
            raise write_error(f"run_dir={run_dir}", error) from error
        raise ConfigError([f"run_dir={run_dir}: cannot be written ({error.strerror}); give another folder"]) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RunInUseError(f"run_dir={run_dir}: in use by {owner}; wait for it, or give another folder") from None
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise write_error(f"run_dir={run_dir}", error) from error
        yield
    finally:
        if made and [path.name for path in run_dir.iterdir()] == [LOCK]:  # refused: nothing was begun
            shutil.rmtree(run_dir, ignore_errors=True)
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
    for name in (METRICS, RUN, CONFIG, VERSIONS, EVALUATION, FORECAST, REPORT):
        (run_dir / name).unlink(missing_ok=True)
    for name in (_DISCARDED, TENSORBOARD, PROFILE):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def restarted() -> bool:
    """Whether a launcher started this same command again: then overwrite=true was already obeyed."""
    counts = ("GPT2TRAIN_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)


def claim(run_dir: Path, wanted: dict[str, Any], data: str | Path = "") -> Claim:
    """The run that stands in `run_dir`, or a new one. Raises RunExistsError when it is another run than `wanted`."""
    found = read_json(run_dir / RUN)
    if found.get("format") != FORMAT:
        return Claim(run_dir, run_id=secrets.token_hex(8), identity=wanted, published=-1)
    refuse_changes(run_dir, wanted, found.get("identity", {}), data)
    return Claim(run_dir, run_id=str(found["id"]), identity=wanted, published=int(found["published"]))


def refuse_changes(run_dir: Path, wanted: dict[str, Any], stands: dict[str, Any], data: str | Path = "") -> None:
    """Raises RunExistsError when a field that both name differs: one line each with then and now.

    data: where the token shards of `wanted` lie; those of the run are told by what its versions.json has.
    """
    changed = [name for name in wanted if name in stands and wanted[name] != stands[name]]
    if changed:
        before = str(read_json(run_dir / VERSIONS).get("data", {}).get("path", ""))
        places = {"data": (f" ({Path(data).resolve()})" if str(data) else "", f" ({before})" if before else "")}
        lines = []
        for name in changed:
            now, then = places.get(name, ("", ""))
            lines.append(f"{name}={_short(wanted[name])}{now}: the run in {run_dir} has {_short(stands[name])}{then}")
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


# ------------------------------------------------------------------------------------------------------- opening a run


@dataclass
class Run:
    folder: Path
    world: World
    shards: TokenShards
    start_step: int
    start_from: Path | None
    """The checkpoint to go on from."""
    claim: Claim | None
    """On rank 0 alone."""
    evaluates: bool
    remote: Remote | None = None
    """Where checkpoints are copied to, on rank 0 alone."""

    def tell(self, line: str) -> None:
        """One line for people, from rank 0."""
        if self.claim is not None:
            print(line, file=sys.stderr, flush=True)


def open_run(
    config: TrainConfig, world: World, held: contextlib.ExitStack, *, alive: Callable[[], None] = lambda: None
) -> Run:
    """Locks the run folder, verifies the data, finds the checkpoint; on rank 0, and all ranks follow.

    `alive` is called at the start and whenever rank 0 has said that it is still at it.
    """
    alive()
    folder = Path(config.run_dir)
    data = _data_here(config, world, alive)
    found: list[tuple[Claim, TokenShards, Remote | None]] = []

    def decide() -> int:
        remote = Remote(config.checkpoint) if config.checkpoint.remote else None
        shards = TokenShards.open(data, verify=config.data.verify)
        _check_data(config, shards)
        wanted = identity(config, shards.fingerprint)
        held.enter_context(lock(folder))
        refuse_other_folder(folder)
        if config.overwrite and not restarted():
            if remote is not None:
                remote.discard()
            discard(folder)
        newest = _newest(folder, remote)
        claimed = claim(folder, wanted, data)
        step = -1
        if newest is not None:
            state = checkpoint.read_state(newest)
            step = int(state["step"])
            # What was no setting yet when it was saved was as in 2019.
            stands = {f"model.{name}": value for name, value in ModelConfig.from_json(state["model"]).to_json().items()}
            refuse_changes(folder, wanted, stands | state.get("identity", {}), data)
        refuse_lost_checkpoints(claimed, step)
        found.append((claimed, shards, remote))
        return step

    # Hashes of many gigabytes, or fetching them, may take longer than the others would wait in silence.
    step = on_rank_zero(world, decide, beat_s=config.distributed.timeout_s / 4, alive=alive)
    claimed, shards, remote = found[0] if found else (None, TokenShards.open(data, verify=False), None)
    validation_windows = len(TokenWindows(shards.split("validation"), config.model.context))
    run = Run(
        folder,
        world,
        shards,
        start_step=max(step, 0),
        start_from=folder / CHECKPOINTS / checkpoint.folder_name(step) if step >= 0 else None,
        claim=claimed,
        evaluates=config.evaluate.every_steps > 0 and validation_windows > 0,
        remote=remote,
    )

    def begin() -> int:
        assert claimed is not None, "rank 0 has claimed the folder"
        if run.start_from is not None:
            run.tell(f"goes on from {run.start_from}")
        for line in _changes(config, folder):
            run.tell(line)
        if config.evaluate.every_steps > 0 and not run.evaluates:
            run.tell(f"no validation loss: the validation split has no {config.model.context} tokens and a target")
        elif run.evaluates:
            for line in _few_to_validate(config, shards.split("validation"), validation_windows):
                run.tell(line)
        claimed.record()
        _write_records(config, folder, shards, world)
        return 0

    if run.start_step < config.steps:
        on_rank_zero(world, begin)
    return run


def _data_here(config: TrainConfig, world: World, alive: Callable[[], None]) -> Path:
    """The folder of the token shards here; out of a bucket the first rank of each machine brings them, and all wait."""
    path = config.data.path.removeprefix("file://")
    if "://" not in path:
        return Path(path)
    if world.rank == 0:  # the address is not said before it is known to hold no secret
        print("the token shards lie in a bucket; what is not here yet is brought", file=sys.stderr, flush=True)
    brought: list[Path] = []

    def bring() -> None:
        if world.local_rank == 0:
            brought.append(fetch_token_shards(path, config.data.cache))

    on_all_ranks(world, bring, beat_s=config.distributed.timeout_s / 4, alive=alive)
    # Folders are named by the shards' fingerprint, so all machines have the same name; 0 where a rank has brought none.
    names = {row.decode() for row in all_rows(world, (brought[0].name if brought else "0" * 16).encode())} - {"0" * 16}
    if len(names) > 1:
        raise ConfigError([f"data={path}: other shards were put there while they were brought; start again"])
    return token_cache(config.data.cache) / names.pop()


def _newest(folder: Path, remote: Remote | None) -> Path | None:
    """The newest whole checkpoint here and, where one of a later step is there, in other storage: that comes here."""
    if remote is None:
        return checkpoint.newest_whole(folder)
    torn: CheckpointError | None = None
    newest = None
    try:
        newest = checkpoint.newest_whole(folder)
    except CheckpointError as error:
        torn = error
    here = int(newest.name[5:]) if newest is not None else -1
    step = remote.fetch(folder, newer_than=here)
    if step is not None:
        print(f"fetched the checkpoint of step {step} from {remote.address}", file=sys.stderr, flush=True)
        return folder / CHECKPOINTS / checkpoint.folder_name(step)
    if torn is not None:
        raise torn
    return newest


def _check_data(config: TrainConfig, shards: TokenShards) -> None:
    """Raises ConfigError when the model cannot be trained on these tokens."""
    split = shards.split("train")
    faults = []
    if shards.vocabulary > config.model.vocabulary:
        faults.append(
            f"model.vocabulary={config.model.vocabulary}: the tokens in {config.data.path} go up to "
            f"{shards.vocabulary - 1}; give model.vocabulary={shards.vocabulary}"
        )
    if len(TokenWindows(split, config.model.context)) < 1:
        faults.append(
            f"model.context={config.model.context}: the {split.tokens} training tokens in {config.data.path} are fewer "
            f"than one sequence and its target; give more text, or a model with a shorter context"
        )
    if faults:
        raise ConfigError(faults)


def _changes(config: TrainConfig, folder: Path) -> Iterator[str]:
    """What the settings of this start change of the last one's, for a person to notice."""
    if not (folder / CONFIG).exists():
        return
    try:
        before = _flat(asdict(read_run_config(folder)))
    except ConfigError as error:
        yield f"the settings of the last start cannot be compared: {error}"
        return
    now = _flat(asdict(config))
    silent = ("run_dir", "overwrite", "data.path", "logging.", "checkpoint.", "data.verify", "cluster.", "plan.")
    for name in sorted(now):
        if before.get(name) != now[name] and not name.startswith(silent):
            yield f"changed since the last start: {name} {before.get(name)} → {now[name]}"
    if before.get("steps") != now["steps"]:
        yield (
            f"the learning rate from here on follows the {config.optimizer.schedule.name} schedule of "
            f"{config.steps} steps; the part behind was of {before.get('steps')}"
        )


def _few_to_validate(config: TrainConfig, split: TokenSplit, windows: int) -> list[str]:
    """A line where the validation split is too small for its loss to say much."""
    if windows >= config.evaluate.sequences and split.document_count >= FEW_DOCUMENTS:
        return []
    return [
        f"validation split: {split.document_count:,} documents, {split.tokens:,} tokens, {windows:,} of "
        f"evaluate.sequences={config.evaluate.sequences} sequences: the validation loss of so few is a rough one; "
        f"`corpus` keeps more aside with a larger tokenize.validation_fraction"
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _write_records(config: TrainConfig, folder: Path, shards: TokenShards, world: World) -> None:
    """config.yaml and versions.json: what this start runs with."""
    replace_file(folder / CONFIG, config_text(config).encode())
    versions: dict[str, Any] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    content = {
        "versions": versions,
        "git_commit": _git_commit(),
        "data": {"path": str(shards.folder.resolve()), "fingerprint": shards.fingerprint},
        "tokenizer_sha256": shards.tokenizer_sha256,
        "processes": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }
    replace_file(folder / VERSIONS, (json.dumps(content, indent=1) + "\n").encode())


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` when files differ; None outside of one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout.strip() or None
    return None
