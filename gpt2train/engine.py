"""DeepSpeed: the one place that makes its dictionary, starts it, and reads and writes its state by parameter name.

Flows in: the settings, the world, a model. Flows out: a `deepspeed.DeepSpeedEngine` to call, `backward` and `step`, and
for checkpoints every parameter's fp32 weight and Adam moments, whole, at any ZeRO stage and world size.

Measured on DeepSpeed 0.19.8. Internal names that are used here stand in this room alone and are guarded.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2train.config import (
    AttentionKernel,
    Compile,
    Offload,
    OptimizerName,
    Precision,
    TrainConfig,
    micro_batch,
    parameter_count,
)
from gpt2train.distributed import World, all_rows
from gpt2train.model import GPT, Block
from gpt2train.network.float8 import to_float8
from gpt2train.optim import is_hidden_matrix, make_optimizer
from gpt2train.optimizers.muon import Muon, share_whole
from gpt2train.optimizers.sharing import Part, Sharing, matrices_of

BUCKETS = 8
"""Parts that the gradients are reduced in, so that all but the last overlap with the backward pass. DeepSpeed's default
bucket of 5e8 numbers is larger than a 355M model, which then has nothing to overlap."""
MIN_BUCKET = 1 << 20
MAX_BUCKET = 500_000_000
"""DeepSpeed's default."""


def deepspeed_config(config: TrainConfig, world_size: int, *, on_gpu: bool = True) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; `deepspeed.extra` is merged over it, key by key, untouched.

    bf16 runs add up the gradients of micro batches in `zero.accumulate`. With fp32 (the default) ZeRO 1 goes by
    DeepSpeed's BF16_Optimizer: whole fp32 gradients on every rank, 4 bytes a parameter, reduced once a step. ZeRO 2 and
    3 split them and reduce at every micro batch. Ranks exchange gradients in bf16; fp32 is
    `deepspeed.extra.communication_data_type=fp32`.
    """
    micro = micro_batch(config, world_size)
    bf16 = config.precision is Precision.bf16
    bucket = min(max(parameter_count(config.model, padded=True) // BUCKETS, MIN_BUCKET), MAX_BUCKET)
    made: dict[str, Any] = {
        "train_batch_size": config.batch.sequences,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch.sequences // (micro * world_size),
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": on_gpu and config.zero.stage > 0,
            "contiguous_gradients": True,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.zero.offload is not Offload.none:
        there = {"device": "cpu", "pin_memory": on_gpu}
        made["zero_optimization"]["offload_optimizer"] = there
        if config.zero.offload is Offload.parameters:
            made["zero_optimization"]["offload_param"] = there
        made["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW; DeepSpeed's would be compiled for minutes
    if config.optimizer.name is OptimizerName.muon:
        made["zero_allow_untested_optimizer"] = True  # DeepSpeed knows its own Muon, not ours
    if bf16:
        made["data_types"] = {"grad_accum_dtype": config.zero.accumulate.value}
    return _merge(made, config.deepspeed.extra)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in place, dictionaries entry by entry, all else as a whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def build(config: TrainConfig, world: World) -> Any:
    """A DeepSpeed engine over a fresh model, the same on every rank; the world must have been started.

    The weights are drawn on the CPU from `seed` before DeepSpeed splits them, so neither the number of ranks nor the
    ZeRO stage changes them.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 has begun to rename; nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+. is deprecated")
    if world.device.type == "cpu":
        _skip_shared_memory_op()
    if config.kernels.attention is AttentionKernel.flex:
        from gpt2train.network.flexible import require_gpu

        require_gpu(world.device)
    model = GPT(
        config.model,
        seed=config.seed,
        activation_checkpointing=config.activation_checkpointing,
        document_mask=config.data.document_mask,
        reset_positions=config.data.reset_positions,
        attention_kernel=config.kernels.attention,
        loss_kernel=config.kernels.loss,
    ).to(world.device)
    if config.kernels.fp8:
        to_float8(model, world.device)
    shapes = {name: (p.shape[0], p.shape[1]) for name, p in model.named_parameters() if is_hidden_matrix(name, p.ndim)}
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    deepspeed.init_distributed(verbose=False)  # takes over the process group that stands
    if config.compile is Compile.blocks:
        for block in model.h:
            block.forward = torch.compile(block.forward, mode=config.compile_mode.value)
        if config.zero.stage == 3:
            # Gathered as a whole, before the compiled forward begins.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
    _import_muon()
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory figures whatever the log level
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, config.optimizer, world.device, dtype),
            config=deepspeed_config(config, world.size, on_gpu=world.device.type == "cuda"),
            dist_init_required=False,
        )
    inner = _inner(engine)
    if isinstance(inner, Muon):
        _share_matrices(engine, inner, shapes, world)
    if config.compile is Compile.model:
        engine.compile(compile_kwargs={"mode": config.compile_mode.value})
    engine.train()
    return engine


def _share_matrices(engine: Any, muon: Muon, shapes: dict[str, tuple[int, int]], world: World) -> None:
    """Tells Muon what lies where in the flat tensors that DeepSpeed made of its parameters; all ranks together.

    `shapes` are those before DeepSpeed split the parameters, by name.
    """
    if _is_plain(engine):
        share_whole(muon, engine.module.named_parameters())
        return
    parameters = {name: p for name, p in engine.module.named_parameters() if name in shapes}
    held: list[tuple[Tensor, list[str], list[Part]]] = []
    split = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if split is None:  # ZeRO 1 and 2: one flat tensor for the group
        (flat,) = (tensor for group in muon.param_groups if group["muon"] for tensor in group["params"])
        parts = []
        for place, parameter in enumerate(parameters.values()):
            if (found := parameter._hp_mapping) is not None:
                of_parameter, of_flat = found.lp_fragment_address, found.hp_fragment_address
                parts.append(Part(place, of_parameter.start, of_parameter.numel, of_flat.start))
        held.append((flat, list(parameters), parts))
    else:  # ZeRO 3: one for each of DeepSpeed's sub-groups, and of each parameter an equal piece on every rank
        for flat, group in zip(split, engine.optimizer.fp16_groups, strict=True):
            ids = {id(parameter) for parameter in group}
            names = [name for name, parameter in parameters.items() if id(parameter) in ids]
            parts = []
            for place, name in enumerate(names):
                parameter = parameters[name]
                piece = parameter.ds_tensor.numel()  # the last ones are padded
                numbers = min(max(parameter.ds_numel - world.rank * piece, 0), piece)
                _, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
                parts.append(Part(place, world.rank * piece, numbers, offset))
            if names:
                held.append((flat, names, parts))
    for flat, names, parts in held:
        row = np.array([[p.parameter, p.start, p.numbers, p.offset] for p in parts], dtype=np.int64).reshape(-1, 4)
        # Rows of one length for all ranks: a rank that holds no part of a parameter has one of no numbers.
        table = np.zeros((len(names), 4), dtype=np.int64)
        table[row[:, 0]] = row
        answers = [np.frombuffer(answer, dtype=np.int64).reshape(-1, 4) for answer in all_rows(world, table.tobytes())]
        of_all = [[Part(place, *map(int, entry[1:])) for place, entry in enumerate(answer)] for answer in answers]
        matrices = matrices_of(names, [shapes[name] for name in names])
        muon.sharing[flat] = Sharing(matrices, of_all, world.rank)


def _skip_shared_memory_op() -> None:
    """Keeps `init_distributed` from compiling a CPU all-reduce (50 s, needs a compiler) that training never calls."""
    import deepspeed.ops

    operations = vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    if isinstance(operations, dict):
        operations["deepspeed_shm_comm"] = False


def _import_muon() -> None:
    """Imports DeepSpeed's Muon, whose types `initialize` and every reduction compare with, without compiling it.

    It would compile three functions as it is imported, which takes all of torch's compiler in: about 2 CPU seconds of
    every rank's start. Here they are compiled when they are first called, which is never unless it is the optimizer.
    """
    from deepspeed.runtime import compiler

    at_once = compiler.compile

    def later(*args: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            compiled: list[Callable[..., Any]] = []

            @functools.wraps(function)
            def call(*inputs: Any, **more: Any) -> Any:
                if not compiled:
                    compiled.append(at_once(*args, **options)(function))
                return compiled[0](*inputs, **more)

            return call

        return decorate

    compiler.compile = later
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = at_once


def state_tensors(engine: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, fp32 weight, exp_avg, exp_avg_sq) of every parameter, whole; all ranks must run through it together.

    Muon keeps one moment of its parameters, exp_avg; the other is None.

    Each tensor may be DeepSpeed's own or a buffer that is used again: copy what is to be kept.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _make_optimizer_state(engine, step=None)
    for name, parameter in engine.module.named_parameters():
        if _is_plain(engine):
            state = engine.optimizer.state[parameter]
            yield name, parameter.detach(), state["exp_avg"], state.get("exp_avg_sq")
        else:
            yield (
                name,
                safe_get_full_fp32_param(parameter),
                safe_get_full_optimizer_state(parameter, "exp_avg"),
                None if _is_muon(engine, name, parameter) else safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
            )


@torch.no_grad()
def load_state_tensors(engine: Any, read: Callable[[str], tuple[Tensor, Tensor, Tensor | None]], step: int) -> None:
    """Writes what `state_tensors` gave, at any ZeRO stage and world size, after `step` updates; on all ranks together.

    `read(name)` gives fp32 weight, exp_avg and exp_avg_sq (None, or not looked at, for Muon's) on any device. The
    low-precision weights are written too, as an update would: the next loss is that of the loaded model.
    """
    _make_optimizer_state(engine, step=step)
    for name, parameter in engine.module.named_parameters():
        weight, *found = (tensor.to(engine.device) for tensor in read(name) if tensor is not None)
        names = ("exp_avg",) if _is_muon(engine, name, parameter) else ("exp_avg", "exp_avg_sq")
        moments = dict(zip(names, found, strict=False))
        assert len(moments) == len(names), f"{name}: the run's optimizer is part of its identity (claim.py)"
        if _is_plain(engine):
            for kind, moment in moments.items():
                engine.optimizer.state[parameter][kind].copy_(moment)
            parameter.copy_(weight)
        elif hasattr(parameter, "ds_id"):
            _load_partitioned(parameter, weight, moments)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            safe_set_full_fp32_param(parameter, weight)
            for kind, moment in moments.items():
                safe_set_full_optimizer_state(parameter, moment, kind)
            parameter.copy_(weight)


def _load_partitioned(parameter: Any, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """ZeRO 3: this rank's part of the fp32 state, then the low-precision weight on all ranks."""
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    rank, part = deepspeed.comm.get_rank(), parameter.ds_tensor.numel()

    def mine(whole: Tensor) -> Tensor:
        # The last parts are padded, so that all ranks hold equally many numbers.
        flat = torch.zeros(part * deepspeed.comm.get_world_size(), dtype=whole.dtype, device=whole.device)
        flat[: whole.numel()] = whole.flatten()
        return flat[rank * part : (rank + 1) * part]

    safe_set_local_fp32_param(parameter, mine(weight))
    for kind, moment in moments.items():
        safe_set_local_optimizer_state(parameter, mine(moment), kind)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(weight)


class Guard:
    """Stands between DeepSpeed and torch's optimizer, so that an update can be refused once its gradients are known.

        guard = Guard(engine)
        norm, made = guard.update(largest_norm=12.0)

    DeepSpeed finds the gradient norm within `engine.step`, and what it does with one that is not finite differs by
    stage and precision. The optimizer's own step is the one place that every way leads through: where it is left out,
    DeepSpeed copies unchanged weights and clears the gradients as after any update.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = _inner(engine)
        self._update = self._optimizer.step
        self._optimizer.step = self._step
        self._norm = self._largest = math.inf
        self._refused = False

    def update(self, largest_norm: float) -> tuple[float, bool]:
        """Ends the step: the gradient norm before clipping, and whether the update was made.

        It is not when the norm is above `largest_norm` or not finite. Waits for the device. All ranks know the same
        norm and decide alike.
        """
        self._norm, self._largest, self._refused = math.inf, largest_norm, False
        if _is_plain(self._engine):
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients).item())  # host-device sync
        self._engine.step()
        made = self._engine.was_step_applied() and not self._refused
        return self._norm, made

    def _step(self, closure: Any = None) -> None:
        if not _is_plain(self._engine):
            norm = float(self._engine.optimizer._global_grad_norm)  # host-device sync
            self._norm = norm if norm >= 0 else math.nan  # DeepSpeed writes -1 for what is not finite
        if math.isfinite(self._norm) and self._norm <= self._largest:
            self._update()
        else:
            self._refused = True


def gradients(engine: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight, gradient) of every parameter, whole, after the last backward pass of a step and before its update;
    all ranks must run through it together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    for name, parameter in engine.module.named_parameters():
        if _is_plain(engine):
            yield name, parameter.detach(), parameter.grad
        else:
            yield name, safe_get_full_fp32_param(parameter), safe_get_full_grad(parameter)


def _is_plain(engine: Any) -> bool:
    """Whether DeepSpeed left torch's optimizer as it is: ZeRO 0 in fp32."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _inner(engine: Any) -> Any:
    """torch's optimizer, or ours, within DeepSpeed's."""
    return engine.optimizer if _is_plain(engine) else engine.optimizer.optimizer


def _is_muon(engine: Any, name: str, parameter: Any) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves a flat rest
    return isinstance(_inner(engine), Muon) and is_hidden_matrix(name, len(shape))


def _make_optimizer_state(engine: Any, step: int | None) -> None:
    """The optimizer's entries where they are not yet, as the first update would make them; `step` updates where given.

    DeepSpeed splits and flattens parameters, so the entries belong to its own tensors. ZeRO 1 and 2 tie parameters to
    entries after the first update, but only those of the first group: they are tied again here.
    """
    optimizer = engine.optimizer
    inner = _inner(engine)
    owned = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    if owned is None:
        owned = [tensor for group in inner.param_groups for tensor in group["params"]]
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for tensor in owned:
        state = inner.state[tensor]
        if "exp_avg" not in state:
            if not (isinstance(inner, Muon) and tensor in inner.sharing):
                state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else "cpu")
                state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format).detach()
            state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format).detach()
        if step is not None and "step" in state:
            state["step"].fill_(float(step))
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
