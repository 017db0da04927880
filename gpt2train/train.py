"""Training: token shards → checkpoints and metrics.jsonl; the same command again goes on where it was.

    run folder → data → engine → newest whole checkpoint
    each step:   batch, forward, backward, agree, update, log   then, when due: evaluate, save, stop

Everything that a step depends on is a function of the seed and the step: its windows, its learning rate, its dropout.
So a checkpoint holds the weights, the moments and a number, and a run that was killed repeats the undisturbed one: bit
for bit with the same number of ranks and the same ZeRO stage, within rounding with others.

All ranks run this same code. Rank 0 speaks, keeps the records and decides; what it decides goes to all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import OmegaConf

from data_pipeline.token_shards import TokenShards
from gpt2train import checkpoint, claim, distributed, engine
from gpt2train.config import (
    REQUEUE_EXIT_CODE,
    ConfigError,
    GPT2TrainError,
    NonFiniteError,
    TrainConfig,
    check,
    flops_per_token,
    micro_batch,
    parameter_count,
)
from gpt2train.data import BatchOrder, TokenWindows, derive_seed, micro_batches
from gpt2train.distributed import World, all_sum, on_rank_zero
from gpt2train.evaluate import validation_loss
from gpt2train.metrics import Reporter
from gpt2train.optim import learning_rate, set_learning_rate, warmup_steps
from gpt2train.run_folder import CHECKPOINTS, CONFIG, VERSIONS, read_run_config, replace_file

PACKAGES = ("gpt2train", "torch", "deepspeed", "numpy", "safetensors", "hydra-core", "wandb", "tiktoken")
NAMED_DOCUMENTS = 20
"""Documents of a batch that an error names; `gpt2train trace` names them all."""


def train(config: TrainConfig) -> int:
    """Trains to `config.steps`; gives 0 when the run is complete and REQUEUE_EXIT_CODE when it was told to stop.

    Raises GPT2TrainError (see config.py for the tree) or, for the data, TokenShardError.
    """
    faults = check(config, world_size=distributed.world_size())
    if faults:
        raise ConfigError(faults)
    with _StopSignal() as stop, contextlib.ExitStack() as held:
        world = distributed.start(config.device, config.distributed.timeout_s)
        doing = ["start"]
        try:
            return _train(config, world, stop, doing, held)
        except torch.cuda.OutOfMemoryError as error:
            micro = micro_batch(config, world.size)
            raise GPT2TrainError(
                f"rank {world.rank}: {doing[0]}: the GPU's memory is full with batch.micro={micro}; "
                f"give batch.micro={max(micro // 2, 1)}, activation_checkpointing=full or a higher zero.stage"
            ) from error
        except RuntimeError as error:
            peer = distributed.peer_error(error, world, doing[0])
            if peer is None:
                raise
            distributed.abandon()
            raise peer from error


def _train(config: TrainConfig, world: World, stop: _StopSignal, doing: list[str], held: contextlib.ExitStack) -> int:
    # What stands in the run folder, and whether there is anything to do
    run = _open_run(config, world, held)
    if run.start_step >= config.steps:
        run.tell(f"{run.folder}: complete at step {run.start_step}; nothing to do for steps={config.steps}")
        return 0

    # Data, model, checkpoint
    windows = TokenWindows(run.shards.split("train"), config.model.context)
    order = BatchOrder(config.seed, len(windows), config.batch.sequences)
    micro = micro_batch(config, world.size)
    _set_determinism(config, world)
    model = engine.build(config, world)
    if run.start_from is not None:
        with checkpoint.Reader(run.start_from) as read:
            engine.load_state_tensors(model, read, run.start_step)
    for line in batch_arithmetic(config, world.size, len(windows)):
        run.tell(line)
    reporter = Reporter(
        config,
        active=world.rank == 0,
        run_id=run.claim.run_id if run.claim else "",
        after_step=run.start_step,
        ranks=world.size,
        device_name=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    )

    watchdog = distributed.Watchdog(world, config.distributed.timeout_s)
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def read_step(step: int) -> list[tuple[int, torch.Tensor]]:
        """This rank's forward passes of `step` (counted from 1): place in the global batch, tokens [micro, T + 1]."""
        shares = micro_batches(order.indices(step - 1), micro=micro, rank=world.rank, world_size=world.size)
        return [(place, torch.from_numpy(windows.read(indices))) for place, indices in shares]

    try:
        ahead = reader.submit(read_step, run.start_step + 1)
        reporter.start_clock()
        for step in range(run.start_step + 1, config.steps + 1):
            doing[0] = f"step {step}"
            if not (config.compile and step == run.start_step + 1):  # compiling takes as long as it takes
                watchdog.watch(doing[0])
            batch = ahead.result()
            if step < config.steps:
                ahead = reader.submit(read_step, step + 1)

            # Forward and backward over this rank's share
            loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
            for number, (place, rows) in enumerate(batch, start=1):
                if config.model.dropout:
                    torch.manual_seed(_dropout_seed(config.seed, step, place))
                tokens = rows.to(world.device, non_blocking=True)
                loss = model(tokens[:, :-1], tokens[:, 1:])
                loss_sum += loss.detach()
                model.backward(loss)
                if number < len(batch):
                    model.step()  # within the accumulation: counts, updates nothing

            # Agree on the loss and on whether to stop; look before the update
            plain_norm = engine.gradient_norm(model)
            total, stopping = all_sum(world, [loss_sum.item(), float(stop.received)])  # host-device sync
            mean_loss = total / (len(batch) * world.size)
            if not math.isfinite(mean_loss) or (plain_norm is not None and not math.isfinite(plain_norm)):
                raise _non_finite(step, mean_loss, plain_norm, windows, order, run)

            # Update
            lr = learning_rate(config.optimizer, step, config.steps)
            set_learning_rate(model.optimizer.param_groups, lr)
            model.step()
            norm = plain_norm if plain_norm is not None else float(model.get_global_grad_norm())
            if not model.was_step_applied() or not math.isfinite(norm):
                raise _non_finite(step, mean_loss, norm, windows, order, run)
            tokens_seen = step * config.batch.sequences * config.model.context
            reporter.step(step=step, loss=mean_loss, lr=lr, grad_norm=norm, tokens=tokens_seen)
            watchdog.rest()

            # Evaluate, save, stop
            last = step == config.steps or stopping > 0
            if run.evaluates and (_due(step, config.evaluate.every_steps) or step == config.steps):
                doing[0] = f"evaluation after step {step}"
                reporter.evaluation(step=step, validation_loss=_evaluate(config, world, model, run.shards))
            if last or _due(step, config.checkpoint.every_steps):
                doing[0] = f"checkpoint of step {step}"
                reporter.sync()
                _save(config, world, run, model, step)
            if stopping and step < config.steps:
                reporter.tell(f"stopped by a signal after step {step}, saved; the same command goes on from there")
                return REQUEUE_EXIT_CODE
            reporter.start_clock()
        reporter.sync()
        reporter.tell(f"{run.folder}: complete at step {config.steps}")
        return 0
    finally:
        watchdog.close()
        reader.shutdown(wait=False, cancel_futures=True)
        reporter.close()


# -------------------------------------------------------------------------------------------------- the run's folder


@dataclass
class _Run:
    folder: Path
    shards: TokenShards
    start_step: int
    start_from: Path | None
    """The checkpoint to go on from."""
    claim: claim.Claim | None
    """On rank 0 alone."""
    evaluates: bool

    def tell(self, line: str) -> None:
        """One line for people, from rank 0."""
        if self.claim is not None:
            print(line, file=sys.stderr, flush=True)


def _open_run(config: TrainConfig, world: World, held: contextlib.ExitStack) -> _Run:
    """Locks the run folder, verifies the data, finds the checkpoint; on rank 0, and all ranks follow."""
    folder = Path(config.run_dir)
    found: list[tuple[claim.Claim, TokenShards]] = []

    def decide() -> int:
        held.enter_context(claim.lock(folder))
        claim.refuse_other_folder(folder)
        shards = TokenShards.open(config.data.path, verify=config.data.verify)
        _check_data(config, shards)
        wanted = claim.identity(config, shards.fingerprint)
        if config.overwrite and not claim.restarted():
            claim.discard(folder)
        claimed = claim.claim(folder, wanted)
        newest = checkpoint.newest_whole(folder)
        step = -1
        if newest is not None:
            state = checkpoint.read_state(newest)
            step = int(state["step"])
            stands = {f"model.{name}": value for name, value in state["model"].items()}
            claim.refuse_changes(folder, wanted, stands | state.get("identity", {}))
        claim.refuse_lost_checkpoints(claimed, step)
        found.append((claimed, shards))
        return step

    step = on_rank_zero(world, decide)
    claimed, shards = found[0] if found else (None, TokenShards.open(config.data.path, verify=False))
    validation_windows = len(TokenWindows(shards.split("validation"), config.model.context))
    run = _Run(
        folder,
        shards,
        start_step=max(step, 0),
        start_from=folder / CHECKPOINTS / checkpoint.folder_name(step) if step >= 0 else None,
        claim=claimed,
        evaluates=config.evaluate.every_steps > 0 and validation_windows > 0,
    )
    if run.start_step < config.steps and claimed is not None:
        if run.start_from is not None:
            run.tell(f"goes on from {run.start_from}")
        for line in _changes(config, folder):
            run.tell(line)
        if config.evaluate.every_steps > 0 and not run.evaluates:
            run.tell(f"no validation loss: the validation split has no {config.model.context} tokens and a target")
        claimed.record()
        _write_records(config, folder, shards, world)
    return run


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
    silent = ("run_dir", "overwrite", "data.path", "logging.", "checkpoint.", "data.verify")
    for name in sorted(now):
        if before.get(name) != now[name] and not name.startswith(silent):
            yield f"changed since the last start: {name} {before.get(name)} → {now[name]}"
    if before.get("steps") != now["steps"]:
        yield (
            f"the learning rate from here on follows the {config.optimizer.schedule.name} schedule of "
            f"{config.steps} steps; the part behind was of {before.get('steps')}"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _write_records(config: TrainConfig, folder: Path, shards: TokenShards, world: World) -> None:
    """config.yaml and versions.json: what this start runs with."""
    replace_file(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    versions: dict[str, Any] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    content = {
        "versions": versions,
        "git_commit": _git_commit(),
        "data": {"path": str(Path(config.data.path).resolve()), "fingerprint": shards.fingerprint},
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


# ------------------------------------------------------------------------------------------------------ parts of a step


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _dropout_seed(seed: int, step: int, place: int) -> int:
    """A seed for one forward pass: the same whatever rank makes it and however often the run was restarted."""
    return derive_seed(seed, step, place) >> 1


def _evaluate(config: TrainConfig, world: World, model: Any, shards: TokenShards) -> float:
    return validation_loss(
        model,
        shards.split("validation"),
        context=config.model.context,
        sequences=config.evaluate.sequences,
        micro=micro_batch(config, world.size),
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )


def _save(config: TrainConfig, world: World, run: _Run, model: Any, step: int) -> None:
    state = {
        "step": step,
        "tokens": step * config.batch.sequences * config.model.context,
        "model": asdict(config.model),
        "identity": claim.identity(config, run.shards.fingerprint),
        "schedule": {
            "kind": config.optimizer.schedule.value,
            "steps": config.steps,
            "warmup_steps": warmup_steps(config.optimizer, config.steps),
            "lr": config.optimizer.lr,
            "min_lr_ratio": config.optimizer.min_lr_ratio,
        },
        # Every random number is a function of these, so no generator's state has to be kept.
        "random": {"seed": config.seed, "next_step": step + 1},
        "data": {
            "fingerprint": run.shards.fingerprint,
            "tokenizer_sha256": run.shards.tokenizer_sha256,
            "next_sequence": step * config.batch.sequences,
        },
        "layout": {"processes": world.size, "zero_stage": config.zero.stage, "precision": config.precision.value},
    }
    checkpoint.save(
        run.folder, step, engine.state_tensors(model), state, world=world, keep_last=config.checkpoint.keep_last
    )
    if run.claim is not None:
        run.claim.published = step
        run.claim.record()


def _non_finite(
    step: int, loss: float, norm: float | None, windows: TokenWindows, order: BatchOrder, run: _Run
) -> NonFiniteError:
    """The error that names a step's documents; its update was not made."""
    if run.claim is None:
        return NonFiniteError(f"step {step}: not finite; rank 0 names the documents")
    urls: dict[str, None] = {}
    for index in order.indices(step - 1):
        for document in windows.split.documents(*windows.span(int(index))):
            urls[document.url] = None
    named = ", ".join(list(urls)[:NAMED_DOCUMENTS])
    rest = f" and {len(urls) - NAMED_DOCUMENTS} more" if len(urls) > NAMED_DOCUMENTS else ""
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
    return NonFiniteError(
        f"step {step}: {what}; the update was not made. Its {len(urls)} documents: {named}{rest} "
        f"(gpt2train trace run={run.folder} step={step}). Lower optimizer.lr, or look at these texts; "
        f"the newest checkpoint is intact"
    )


def _set_determinism(config: TrainConfig, world: World) -> None:
    if world.device.type == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def batch_arithmetic(config: TrainConfig, ranks: int, windows: int) -> list[str]:
    """What the run will do, in numbers, before it does it."""
    micro = micro_batch(config, ranks)
    accumulation = config.batch.sequences // (micro * ranks)
    tokens_per_step = config.batch.sequences * config.model.context
    parameters = parameter_count(config.model)
    tokens = config.steps * tokens_per_step
    return [
        f"model {config.model.name}: {parameters:,} parameters, {config.model.layers} layers, {config.model.channels} "
        f"channels, {config.model.heads} heads, context {config.model.context}",
        f"batch: {config.batch.sequences} sequences × {config.model.context} tokens = {tokens_per_step:,} tokens a "
        f"step; {ranks} processes × micro batch {micro} × {accumulation} accumulated, ZeRO {config.zero.stage}, "
        f"{config.precision.value}",
        f"run: {config.steps:,} steps × {tokens_per_step:,} = {tokens:,} tokens = "
        f"{config.steps * config.batch.sequences / windows:.2f} epochs of {windows:,} windows; "
        f"{flops_per_token(config.model) * tokens:.2e} FLOPs",
    ]


class _StopSignal:
    """SIGTERM and SIGUSR1 set `received` while the context lasts; the handlers from before come back after it."""

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignal:
        self._before = {number: signal.signal(number, self._receive) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
