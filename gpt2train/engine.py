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

import torch
from torch import Tensor

from gpt2train.config import Compile, Offload, Precision, TrainConfig, micro_batch, parameter_count
from gpt2train.distributed import World
from gpt2train.model import GPT, Block
from gpt2train.optim import adamw

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
    model = GPT(
        config.model,
        seed=config.seed,
        activation_checkpointing=config.activation_checkpointing,
        document_mask=config.data.document_mask,
        reset_positions=config.data.reset_positions,
    ).to(world.device)
    deepspeed.init_distributed(verbose=False)  # takes over the process group that stands
    if config.compile is Compile.blocks:
        for block in model.h:
            block.forward = torch.compile(block.forward)
        if config.zero.stage == 3:
            # Gathered as a whole, before the compiled forward begins.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
    _import_muon()
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory figures whatever the log level
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, config.optimizer, world.device),
            config=deepspeed_config(config, world.size, on_gpu=world.device.type == "cuda"),
            dist_init_required=False,
        )
    if config.compile is Compile.model:
        engine.compile()
    engine.train()
    return engine


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


def state_tensors(engine: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, fp32 weight, exp_avg, exp_avg_sq) of every parameter, whole; all ranks must run through it together.

    Each tensor may be DeepSpeed's own or a buffer that is used again: copy what is to be kept.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _make_optimizer_state(engine, step=None)
    for name, parameter in engine.module.named_parameters():
        if _is_plain(engine):
            state = engine.optimizer.state[parameter]
            yield name, parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
        else:
            yield (
                name,
                safe_get_full_fp32_param(parameter),
                safe_get_full_optimizer_state(parameter, "exp_avg"),
                safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
            )


@torch.no_grad()
def load_state_tensors(engine: Any, read: Callable[[str], tuple[Tensor, Tensor, Tensor]], step: int) -> None:
    """Writes what `state_tensors` gave, at any ZeRO stage and world size, after `step` updates; on all ranks together.

    `read(name)` gives fp32 weight, exp_avg and exp_avg_sq on any device. The low-precision weights are written too, as
    an update would: the next loss is that of the loaded model.
    """
    _make_optimizer_state(engine, step=step)
    for name, parameter in engine.module.named_parameters():
        weight, exp_avg, exp_avg_sq = (tensor.to(engine.device) for tensor in read(name))
        if _is_plain(engine):
            state = engine.optimizer.state[parameter]
            state["exp_avg"].copy_(exp_avg)
            state["exp_avg_sq"].copy_(exp_avg_sq)
            parameter.copy_(weight)
        elif hasattr(parameter, "ds_id"):
            _load_partitioned(parameter, weight, exp_avg, exp_avg_sq)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            safe_set_full_fp32_param(parameter, weight)
            safe_set_full_optimizer_state(parameter, exp_avg, "exp_avg")
            safe_set_full_optimizer_state(parameter, exp_avg_sq, "exp_avg_sq")
            parameter.copy_(weight)


def _load_partitioned(parameter: Any, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
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
    safe_set_local_optimizer_state(parameter, mine(exp_avg), "exp_avg")
    safe_set_local_optimizer_state(parameter, mine(exp_avg_sq), "exp_avg_sq")
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
        self._optimizer = engine.optimizer if _is_plain(engine) else engine.optimizer.optimizer
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


def _make_optimizer_state(engine: Any, step: int | None) -> None:
    """Adam's entries where they are not yet, as its first update would make them; `step` updates where it is given.

    DeepSpeed splits and flattens parameters, so the entries belong to its own tensors. ZeRO 1 and 2 tie parameters to
    entries after the first update, but only those of the first group: they are tied again here.
    """
    optimizer = engine.optimizer
    inner = optimizer if _is_plain(engine) else optimizer.optimizer
    owned = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    if owned is None:
        owned = [tensor for group in inner.param_groups for tensor in group["params"]]
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for tensor in owned:
        state = inner.state[tensor]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format).detach()
            state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format).detach()
        if step is not None:
            state["step"].fill_(float(step))
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
