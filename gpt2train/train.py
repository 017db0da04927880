"""Training: token shards → checkpoints and metrics.jsonl; the same command again goes on where it was.

    run folder → data → engine → newest whole checkpoint
    each step:   batch, forward, backward, agree, judge, update, log   then, when due: evaluate, save, stop

Everything that a step depends on is a function of the seed and the step (and of the faults written in state.json): its
windows, its learning rate, its dropout. So a checkpoint holds the weights, the moments and a few numbers, and a run
that was killed repeats the undisturbed one: bit for bit with the same number of ranks and the same ZeRO stage, within
rounding with others.

All ranks run this same code. Rank 0 speaks, keeps the records and decides; what it decides goes to all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import FrameType
from typing import Any

import torch

from data_pipeline.token_shards import TokenShards
from gpt2train import checkpoint, claim, distributed, engine, mup
from gpt2train.bounds import check
from gpt2train.config import (
    Compile,
    CompileMode,
    FaultAction,
    TrainConfig,
    flops_per_token,
    micro_batch,
    parameter_count,
)
from gpt2train.data import BatchOrder, TokenWindows, derive_seed, micro_batches
from gpt2train.distributed import World, all_sum, on_rank_zero
from gpt2train.errors import REQUEUE_EXIT_CODE, ConfigError, GPT2TrainError, NonFiniteError, RemoteError
from gpt2train.evaluate import validation_loss
from gpt2train.evaluation.during import TasksDuringTraining
from gpt2train.faults import FaultRule
from gpt2train.metrics import Reporter
from gpt2train.observe import Profile, layer_norms, sample_text
from gpt2train.optim import learning_rate, set_learning_rate, warmup_steps
from gpt2train.planning.outcome import Outcome, prepared
from gpt2train.run_folder import CHECKPOINTS
from gpt2train.saving.remote import Uploader, unsent
from gpt2train.saving.saver import Saver

NAMED_DOCUMENTS = 20
"""Documents of a batch that an error names; `gpt2train trace` names them all."""


def train(config: TrainConfig) -> int:
    """Trains to `config.steps`; gives 0 when the run is complete and REQUEUE_EXIT_CODE when it was told to stop.

    Raises GPT2TrainError (see config.py for the tree) or, for the data, TokenShardError.
    """
    faults = check(config, world_size=distributed.world_size())
    if faults:
        raise ConfigError(faults)
    on_gpu, room_bytes = distributed.device_memory(config.device)
    config = prepared(config, distributed.world_size(), on_gpu=on_gpu, room_bytes=room_bytes)
    with _StopSignal() as stop, contextlib.ExitStack() as held:
        world = distributed.start(config.device, config.distributed.timeout_s)
        doing = ["start"]
        watchdog = distributed.Watchdog(world, config.distributed.timeout_s)
        held.callback(watchdog.close)
        try:
            return _train(config, world, stop, doing, held, watchdog)
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


def _train(
    config: TrainConfig,
    world: World,
    stop: _StopSignal,
    doing: list[str],
    held: contextlib.ExitStack,
    watchdog: distributed.Watchdog,
) -> int:
    # What stands in the run folder, and whether there is anything to do
    run = claim.open_run(config, world, held, alive=lambda: watchdog.watch("opening the run"))
    if run.start_step >= config.steps:
        run.tell(f"{run.folder}: complete at step {run.start_step}; nothing to do for steps={config.steps}")
        if run.remote is not None and (missing := unsent(run.remote, run.folder)) is not None:
            run.remote.send(run.folder, missing, _kept(config))
            run.tell(f"copied the checkpoint of step {missing} to {run.remote.address}")
        return 0

    # Data, model, checkpoint
    windows = TokenWindows(run.shards.split("train"), config.model.context)
    order = BatchOrder(config.seed, len(windows), config.batch.sequences)
    micro = micro_batch(config, world.size)
    _set_determinism(config, world)
    watchdog.watch("building the model")
    model = engine.build(config, world)
    guard = engine.Guard(model)
    rule = FaultRule(config.faults)
    if run.start_from is not None:
        rule.restore(checkpoint.read_state(run.start_from))
        with checkpoint.Reader(run.start_from) as read:

            def watched(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                watchdog.watch(f"loading {name}")
                return read(name)

            engine.load_state_tensors(model, watched, rule.updates(run.start_step))
    tasks = TasksDuringTraining(config, world) if config.evaluate.tasks else None
    outcome = Outcome(config, world.size) if run.claim is not None else None
    for line in [*batch_arithmetic(config, world.size, len(windows)), *(outcome.begin() if outcome else [])]:
        run.tell(line)
    reporter = Reporter(
        config,
        active=world.rank == 0,
        run_id=run.claim.run_id if run.claim else "",
        after_step=run.start_step,
        ranks=world.size,
        device_name=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    )
    profile = Profile(config, active=world.rank == 0)
    saver = Saver(world, background=config.checkpoint.background)
    uploader = Uploader(run.remote, run.folder, run.tell) if run.remote is not None else None
    if uploader is not None and run.start_from is not None:
        uploader.offer(run.start_step, _kept(config))  # what the start before could not copy; at once done if it did
    watchdog.rest()
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def read_ahead(step: int) -> Future[list[tuple[int, torch.Tensor]]]:
        """This rank's forward passes of `step` (counted from 1): place in the global batch, tokens [micro, T + 1]."""
        batch = step - 1 + rule.offset

        def read() -> list[tuple[int, torch.Tensor]]:
            shares = micro_batches(order.indices(batch), micro=micro, rank=world.rank, world_size=world.size)
            return [(place, torch.from_numpy(windows.read(indices))) for place, indices in shares]

        return reader.submit(read)

    peak_before_saves: float | None = None
    try:
        step = run.start_step
        ahead = read_ahead(step + 1)
        reporter.start_clock()
        while step < config.steps:
            step += 1
            doing[0] = f"step {step}"
            if not (
                config.compile is not Compile.none and step == run.start_step + 1
            ):  # compiling takes as long as it takes
                watchdog.watch(doing[0])
            profile.before(step)
            batch = ahead.result()
            if step < config.steps:
                ahead = read_ahead(step + 1)

            # Forward and backward over this rank's share
            loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
            for number, (place, rows) in enumerate(batch, start=1):
                if config.model.dropout:
                    torch.manual_seed(_dropout_seed(config.seed, step, place))
                tokens = rows.to(world.device, non_blocking=True)
                if config.compile_mode is CompileMode.reduce_overhead:
                    torch.compiler.cudagraph_mark_step_begin()  # its graphs may overwrite what the last pass gave
                loss = model(tokens[:, :-1], tokens[:, 1:])
                loss_sum += loss.detach()
                model.backward(loss)
                if number < len(batch):
                    model.step()  # within the accumulation: counts, updates nothing
            layers = layer_norms(engine.gradients(model)) if _due(step, config.logging.layers_every_steps) else None

            # Agree on the loss, on whether to stop, on whether a save or a record has failed
            total, stopping, failed, unwritten = all_sum(  # host-device sync
                world, [loss_sum.item(), float(stop.received), float(saver.failed), float(reporter.failed)]
            )
            if failed:
                saver.fail()
            if unwritten:
                reporter.fail()
            mean_loss = total / (len(batch) * world.size)

            # Judge, and update
            reason = rule.judge_loss(mean_loss)
            lr = learning_rate(config.optimizer, step, config.steps)
            set_learning_rate(model.optimizer.param_groups, lr)
            norm, made = guard.update(rule.highest_norm if reason is None else -1.0)
            if made:
                rule.accept(mean_loss, norm)
            else:
                reason = reason or rule.judge_norm(norm)
                assert reason is not None, "an update is refused for a reason"
                action = rule.action(mean_loss, norm)
                line = f"step {step}: {reason}; the update was not made. {_documents(step, rule, windows, order, run)}"
                if action is FaultAction.stop:
                    raise NonFiniteError(
                        f"{line} Lower optimizer.lr, look at these texts, or give faults.nonfinite=skip (or "
                        f"faults.spike_action); the newest checkpoint is intact"
                    )
                reporter.tell(line)
                if action is FaultAction.rewind:
                    saver.wait()
                    watchdog.rest()
                    step = _rewind(config, world, run, model, rule, step, line)
                    reporter.rewind(to=step, after=rule.rewinds[-1]["from"], reason=reason)
                    ahead = read_ahead(step + 1)
                    reporter.start_clock()
                    continue
                rule.skip(step)
            tokens_seen = step * config.batch.sequences * config.model.context
            reporter.step(
                step=step,
                loss=mean_loss,
                lr=lr,
                grad_norm=norm,
                tokens=tokens_seen,
                skipped=None if made else reason,
                batch=step + rule.offset if rule.offset else None,
                layers=layers,
            )
            watchdog.rest()
            profile.after(step)

            # Evaluate, save, stop
            last = step == config.steps or stopping > 0
            measured = None
            doing[0] = f"evaluation after step {step}"
            if run.evaluates and (_due(step, config.evaluate.every_steps) or step == config.steps):
                measured = _evaluate(config, world, model, run.shards)
                reporter.evaluation(step=step, validation_loss=measured, sample=_sample(config, world, model))
            task_steps = config.evaluate.tasks_every_steps or config.evaluate.every_steps
            if tasks and (_due(step, task_steps) or step == config.steps):
                reporter.tasks(step=step, scores=tasks.measure(model))
            if last or _due(step, config.checkpoint.every_steps):
                doing[0] = f"checkpoint of step {step}"
                if peak_before_saves is None:
                    peak_before_saves = distributed.peak_memory_bytes(world.device)
                _save(config, run, model, saver, uploader, reporter, rule, step, measured)
            if last:
                saver.wait()
            if last and outcome is not None:
                peak_bytes = distributed.peak_memory_bytes(world.device)
                # On a CPU the process's peak has the copies of a save in it, which on a GPU lie elsewhere.
                of_steps = peak_before_saves if world.device.type == "cpu" and peak_before_saves else peak_bytes
                for line in outcome.end(first_step=run.start_step, peak_bytes=of_steps, whole_peak_bytes=peak_bytes):
                    reporter.tell(line)
            if stopping and step < config.steps:
                reporter.tell(f"stopped by a signal after step {step}, saved; the same command goes on from there")
                _copied(config, uploader, step)
                return REQUEUE_EXIT_CODE
            reporter.start_clock()
        reporter.tell(f"{run.folder}: complete at step {config.steps}")
        if not _copied(config, uploader, step):
            raise RemoteError(
                f"checkpoint.remote={config.checkpoint.remote}: the checkpoint of step {step} is not there; it is "
                f"intact in {run.folder}, and the same command copies it"
            )
        return 0
    finally:
        # A collective's error means that a rank is gone: its part of a save would be waited for in vain.
        if not isinstance(sys.exc_info()[1], RuntimeError):
            saver.close()
        watchdog.rest()
        reader.shutdown(wait=False, cancel_futures=True)
        profile.close()
        reporter.close()


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


def _sample(config: TrainConfig, world: World, model: Any) -> str | None:
    if not config.evaluate.sample_prompt:
        return None
    model.eval()
    try:
        return sample_text(model, config.evaluate, context=config.model.context, device=world.device)
    finally:
        model.train()


def _save(
    config: TrainConfig,
    run: claim.Run,
    model: Any,
    saver: Saver,
    uploader: Uploader | None,
    reporter: Reporter,
    rule: FaultRule,
    step: int,
    validation_loss: float | None,
) -> None:
    """Copies the state of `step`; the rest is the saver's. Records of metrics.jsonl are on the disk before it is."""
    saver.wait()  # two captured states at once would be twice the memory
    captured = checkpoint.capture(engine.state_tensors(model), run.world)
    state = {
        "step": step,
        "tokens": step * config.batch.sequences * config.model.context,
        "updates": rule.updates(step),
        "validation_loss": validation_loss,
        "model": config.model.to_json(),
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
            "next_sequence": (step + rule.offset) * config.batch.sequences,
            "document_mask": config.data.document_mask,
            "reset_positions": config.data.reset_positions,
        },
        "faults": rule.to_state(),
        "layout": {
            "processes": run.world.size,
            "zero_stage": config.zero.stage,
            "precision": config.precision.value,
        },
    }

    def synced() -> int:
        reporter.sync()
        return 0

    def recorded() -> int:
        if run.claim is not None:
            run.claim.published = step
            run.claim.record()
        return 0

    def work(world: World) -> None:
        on_rank_zero(world, synced)  # as all that is written: where it fails, every rank leaves with the cause
        # Read where rank 0 prunes: what is on its way to other storage stays until it is there.
        keep = replace(_kept(config), spare=uploader.needed if uploader is not None else frozenset())
        checkpoint.write(run.folder, step, captured, state, world=world, keep=keep)
        on_rank_zero(world, recorded)
        if uploader is not None:
            uploader.offer(step, _kept(config))

    saver.start(work)


def _kept(config: TrainConfig) -> checkpoint.Keep:
    c = config.checkpoint
    return checkpoint.Keep(last=c.keep_last, every_steps=c.keep_every_steps, best=c.keep_best)


def _copied(config: TrainConfig, uploader: Uploader | None, step: int) -> bool:
    """Whether the checkpoint of `step`, the run's last, is in the other storage; waits for it."""
    return uploader is None or uploader.finish(step, config.checkpoint.remote_wait_s)


def _rewind(
    config: TrainConfig, world: World, run: claim.Run, model: Any, rule: FaultRule, step: int, line: str
) -> int:
    """Loads the newest checkpoint of a step that was due, and tells the rule; gives its step.

    One that a signal caused does not count: a run that was never told to stop would not have it.
    """

    def find() -> int:
        found = checkpoint.newest_whole(run.folder, multiples_of=config.checkpoint.every_steps)
        if found is None:
            raise NonFiniteError(f"{line} There is no checkpoint to rewind to yet; give faults.nonfinite=skip")
        return int(checkpoint.read_state(found)["step"])

    to = on_rank_zero(world, find)
    folder = run.folder / CHECKPOINTS / checkpoint.folder_name(to)
    rule.rewind(step, to, checkpoint.read_state(folder))
    with checkpoint.Reader(folder) as read:
        engine.load_state_tensors(model, read, rule.updates(to))
    return to


def _documents(step: int, rule: FaultRule, windows: TokenWindows, order: BatchOrder, run: claim.Run) -> str:
    """The documents of a step's batch by URL, for rank 0 to tell."""
    if run.claim is None:
        return "Rank 0 names the documents."
    urls: dict[str, None] = {}
    for index in order.indices(step - 1 + rule.offset):
        for document in windows.split.documents(*windows.span(int(index))):
            urls[document.url] = None
    named = ", ".join(list(urls)[:NAMED_DOCUMENTS])
    rest = f" and {len(urls) - NAMED_DOCUMENTS} more" if len(urls) > NAMED_DOCUMENTS else ""
    return f"Its {len(urls)} documents: {named}{rest} (gpt2train trace run={run.folder} step={step})."


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
        *mup.words(config.model, config.optimizer),
        f"batch: {config.batch.sequences} sequences × {config.model.context} tokens = {tokens_per_step:,} tokens a "
        f"step; {ranks} processes × micro batch {micro} × {accumulation} accumulated, ZeRO {config.zero.stage}, "
        f"{config.precision.value}",
        f"run: {config.steps:,} steps × {tokens_per_step:,} = {tokens:,} tokens = "
        f"{config.steps * config.batch.sequences / windows:.2f} epochs of {windows:,} windows; "
        f"{flops_per_token(config.model) * tokens:.2e} FLOPs",
    ]


class _StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C set `received` while the context lasts; the handlers from before come back after it.

    A second Ctrl-C is the system's own: it ends the process at once, wherever it is.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignal:
        self._before = {number: signal.getsignal(number) for number in self.signals}
        if self._before[signal.SIGINT] is signal.SIG_IGN:  # a script's background job: not its terminal's
            del self._before[signal.SIGINT]
        for number in self._before:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.environ.get("RANK", "0") == "0":
                # Not by print: the signal may have come within another one.
                with contextlib.suppress(OSError):
                    os.write(2, b"Ctrl-C: saves after this step and stops; Ctrl-C again ends at once, unsaved\n")
