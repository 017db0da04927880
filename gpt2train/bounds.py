"""What keeps settings from working: every fault at once, each in one line `field=value: bound; remedy`.

Flows in: a dataclass of config.py. Flows out: its faults, none when it can run. Nothing here imports torch or
deepspeed, so wrong settings are told at once.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gpt2train.config import (
    VOCABULARY,
    ActivationCheckpointing,
    AttentionKernel,
    Compile,
    CompileMode,
    FaultAction,
    LossKernel,
    Offload,
    OptimizerName,
    Positions,
    Precision,
    TrainConfig,
)
from gpt2train.evaluation.asked import task_faults


def run_faults(run: str) -> list[str]:
    """What keeps `run` from being a folder of a run, of a checkpoint or in Hugging Face format; a look, no reading."""
    path = Path(run)
    if not run:
        return ["run='': must name a run, checkpoint or Hugging Face folder; give run=runs/NAME"]
    if not path.is_dir():
        return [f"run={run}: there is no such folder; give the folder that `train` got as run_dir"]
    whole = any((path / name).exists() for name in ("checkpoints", "manifest.json", "config.json"))
    if not whole and path.parent.name != "checkpoints":
        return [f"run={run}: holds no checkpoint; give the folder that `train` got as run_dir"]
    return []


def check(config: TrainConfig, *, world_size: int = 1) -> list[str]:
    """All faults of `config` on `world_size` ranks, a line each: field=value: bound; remedy. Empty when it can run."""
    faults: list[str] = []

    def require(holds: bool, name: str, value: object, bound: str, remedy: str) -> None:
        if not holds:
            faults.append(f"{name}={value}: {bound}; {remedy}")

    c, m, o, b = config, config.model, config.optimizer, config.batch
    require(bool(c.data.path), "data", "''", "must name a folder of token shards", "give data=corpus/tokens")
    require(bool(c.run_dir), "run_dir", "''", "must name the run's folder", "give run_dir=runs/NAME")
    require(c.steps > 0, "steps", c.steps, "must be above 0", "give steps=1000")
    require(-(2**63) <= c.seed < 2**63, "seed", c.seed, "must lie in [-2⁶³, 2⁶³)", "give seed=1337")
    for name in ("layers", "channels", "heads", "context", "vocabulary", "pad_vocabulary_to"):
        require(getattr(m, name) > 0, f"model.{name}", getattr(m, name), "must be above 0", "choose model=small")
    if m.heads > 0:
        require(
            m.channels % m.heads == 0,
            "model.channels",
            m.channels,
            f"must be a multiple of model.heads={m.heads}",
            f"give {-(-m.channels // m.heads) * m.heads}",
        )
    require(m.vocabulary < 65_536, "model.vocabulary", m.vocabulary, "must fit uint16 token shards", "give 50257")
    require(0 <= m.dropout < 1, "model.dropout", m.dropout, "must lie in [0, 1)", "give 0.0 or 0.1")
    require(b.sequences > 0, "batch.sequences", b.sequences, "must be above 0", "give 512")
    require(b.micro >= 0, "batch.micro", b.micro, "must be 0 (automatic) or more", "leave it out")
    if b.sequences > 0 and b.micro >= 0:
        require(
            b.sequences % world_size == 0,
            "batch.sequences",
            b.sequences,
            f"must be a multiple of the {world_size} processes",
            f"give {-(-b.sequences // world_size) * world_size}",
        )
        per_pass = b.micro * world_size
        if b.micro > 0 and b.sequences % world_size == 0:
            require(
                b.sequences % per_pass == 0,
                "batch.micro",
                b.micro,
                f"batch.sequences={b.sequences} must be a multiple of batch.micro × {world_size} processes, {per_pass}",
                f"give batch.sequences={-(-b.sequences // per_pass) * per_pass} or another batch.micro",
            )
    require(o.lr > 0, "optimizer.lr", o.lr, "must be above 0", "give 6e-4")
    require(0 <= o.min_lr_ratio <= 1, "optimizer.min_lr_ratio", o.min_lr_ratio, "must lie in [0, 1]", "give 0.1")
    require(o.warmup_steps >= -1, "optimizer.warmup_steps", o.warmup_steps, "must be -1 or more", "leave it out")
    for name in ("beta1", "beta2", "muon_momentum"):
        require(0 <= getattr(o, name) < 1, f"optimizer.{name}", getattr(o, name), "must lie in [0, 1)", "leave it out")
    for name in ("eps", "weight_decay", "clip_grad_norm"):
        require(getattr(o, name) >= 0, f"optimizer.{name}", getattr(o, name), "must be 0 or more", "leave it out")
    require(c.zero.stage in (0, 1, 2, 3), "zero.stage", c.zero.stage, "must be 0, 1, 2 or 3", "give 1")
    require(
        not (c.zero.stage == 0 and c.precision is Precision.bf16),
        "zero.stage",
        0,
        "adds up bf16 gradients in bf16 (DeepSpeed#1800)",
        "give zero.stage=1, also on one GPU, or precision=fp32",
    )
    require(
        not (c.compile is Compile.model and c.zero.stage == 3),
        "compile",
        "model",
        "does not go with zero.stage=3, whose weights torch.compile sees as empty",
        "give compile=blocks or zero.stage=2",
    )
    require(
        c.compile is not Compile.none or c.compile_mode is CompileMode.default,
        "compile_mode",
        c.compile_mode.name,
        "changes nothing without compile=model or blocks",
        "give one of them, or leave it out",
    )
    require(
        c.precision is Precision.bf16 or c.compile_mode is not CompileMode.reduce_overhead,
        "compile_mode",
        c.compile_mode.name,
        "needs precision=bf16: in fp32 gradients add up where the next pass's graph would write over them",
        "give precision=bf16, or leave it out",
    )
    least_stage = {Offload.none: 0, Offload.optimizer: 2, Offload.parameters: 3}[c.zero.offload]
    require(
        c.zero.stage >= least_stage,
        "zero.offload",
        c.zero.offload.value,
        f"needs zero.stage={least_stage}{' or 3' if least_stage == 2 else ''}, it is {c.zero.stage}",
        f"give zero.stage={least_stage}",
    )
    for owner, name in (
        (c.checkpoint, "checkpoint.every_steps"),
        (c.checkpoint, "checkpoint.keep_last"),
        (c.checkpoint, "checkpoint.keep_every_steps"),
        (c.evaluate, "evaluate.every_steps"),
        (c.evaluate, "evaluate.tasks_every_steps"),
        (c.evaluate, "evaluate.task_limit"),
        (c.logging, "logging.layers_every_steps"),
        (c.faults, "faults.spike_sigma"),
        (c.faults, "faults.limit"),
    ):
        value = getattr(owner, name.split(".")[1])
        require(value >= 0, name, value, "must be 0 or more", "leave it out")
    require(c.evaluate.sequences > 0, "evaluate.sequences", c.evaluate.sequences, "must be above 0", "leave it out")
    require(c.logging.every_steps > 0, "logging.every_steps", c.logging.every_steps, "must be above 0", "leave it out")
    faults += _faults_of_recipe(c) + _faults_of_kernels(c) + _faults_of_extras(c) + _faults_of_remote(c)
    require(
        c.distributed.timeout_s >= 1,
        "distributed.timeout_s",
        c.distributed.timeout_s,
        "must be at least 1 s",
        "give 600",
    )
    return faults


_REMOTES = {"s3": "s3fs", "gs": "gcsfs", "file": "fsspec"}
"""What checkpoint.remote may start with, and the package that speaks it."""


def _faults_of_remote(c: TrainConfig) -> list[str]:
    """Faults of where checkpoints are copied to; a look at installed packages, no connection."""
    faults = []
    scheme, found, place = c.checkpoint.remote.partition("://")
    if c.checkpoint.remote and (not found or scheme not in _REMOTES or not place.strip("/")):
        faults.append(
            f"checkpoint.remote={c.checkpoint.remote}: must be s3://bucket/NAME, gs://bucket/NAME or file:///path; "
            f"for a folder give file://{Path(c.checkpoint.remote).absolute() if not found else '/mnt/NAME'}"
        )
    elif c.checkpoint.remote and importlib.util.find_spec(_REMOTES[scheme]) is None:
        faults.append(
            f"checkpoint.remote={c.checkpoint.remote}: {_REMOTES[scheme]} is not installed; pip install "
            f"'gpt2train[{scheme}]'"
        )
    for name, least in (("remote_transfers", 1), ("remote_retry_s", 0), ("remote_wait_s", 0)):
        value = getattr(c.checkpoint, name)
        if value < least:
            faults.append(f"checkpoint.{name}={value}: must be at least {least}; leave it out")
    return faults


def _faults_of_recipe(c: TrainConfig) -> list[str]:
    """Faults of what may differ from 2019."""
    m, o, faults = c.model, c.optimizer, []
    for name in ("embedding_lr_ratio", "head_lr_ratio"):
        if not 0 < getattr(o, name) < float("inf"):
            faults.append(f"optimizer.{name}={getattr(o, name)}: must be above 0; leave it out")
    if o.name is OptimizerName.muon and c.zero.offload is not Offload.none:
        faults.append(
            f"optimizer.name=muon: its matrices come together on the GPUs, zero.offload={c.zero.offload.value} keeps "
            f"them off; give zero.offload=none or optimizer.name=adamw"
        )
    if o.head_lr_ratio != 1 and m.tied_head:
        faults.append(
            f"optimizer.head_lr_ratio={o.head_lr_ratio}: the head is the embedding; give model.tied_head=false or "
            f"optimizer.embedding_lr_ratio"
        )
    if not 0 < o.cooldown <= 1:
        faults.append(f"optimizer.cooldown={o.cooldown}: must lie in (0, 1]; give 0.4")
    if not 0 <= m.logit_softcap < float("inf"):
        faults.append(f"model.logit_softcap={m.logit_softcap}: must be 0 (none) or more; give 15")
    for name in ("mup_base", "mup_base_head"):
        if getattr(m, name) < 0:
            faults.append(f"model.{name}={getattr(m, name)}: must be 0 (none) or more; leave it out")
    if m.mup_base_head and not m.mup_base:
        faults.append(f"model.mup_base_head={m.mup_base_head}: needs model.mup_base; give both, or leave it out")
    elif m.mup_base > 0 and m.mup_base_head > m.mup_base:
        faults.append(
            f"model.mup_base_head={m.mup_base_head}: a head of model.mup_base={m.mup_base} channels has at most as "
            f"many; give model.mup_base_head=64"
        )
    if m.positions is Positions.rotary and m.heads > 0 and m.channels % (2 * m.heads):
        faults.append(
            f"model.positions=rotary: turns pairs of a head's channels, so model.channels={m.channels} must be a "
            f"multiple of 2 × model.heads={m.heads}; give another or model.positions=learned"
        )
    return faults


def _faults_of_kernels(c: TrainConfig) -> list[str]:
    k, faults = c.kernels, []
    if k.attention is AttentionKernel.flash and c.data.document_mask:
        faults.append(
            "kernels.attention=flash: takes no mask, and data.document_mask=true needs one; give kernels.attention=auto"
        )
    if k.attention is AttentionKernel.flex:
        if c.model.dropout:
            faults.append(
                f"kernels.attention=flex: has no dropout, and model.dropout={c.model.dropout:g}; "
                "give model.dropout=0 or kernels.attention=auto"
            )
        if c.activation_checkpointing is ActivationCheckpointing.selective:
            faults.append(
                "kernels.attention=flex: activation_checkpointing=selective cannot keep its results; give "
                "activation_checkpointing=full or none, or kernels.attention=auto"
            )
    if k.loss is LossKernel.triton and importlib.util.find_spec("triton") is None:
        faults.append(
            "kernels.loss=triton: triton is not installed, it comes with torch's CUDA build; give kernels.loss=torch"
        )
    if not k.fp8:
        return faults
    if importlib.util.find_spec("torchao") is None:
        faults.append("kernels.fp8=true: torchao is not installed; pip install 'gpt2train[fp8]', or leave it out")
    if c.precision is not Precision.bf16 or c.compile is Compile.none:
        faults.append(
            f"kernels.fp8=true: needs precision=bf16 and compile=model or blocks, not {c.precision.value} and "
            f"{c.compile.value}; give both"
        )
    if c.zero.stage == 3:
        faults.append("kernels.fp8=true: ZeRO 3 replaces the layers that it would; give zero.stage=2")
    if c.model.channels % 16:
        faults.append(
            f"kernels.fp8=true: model.channels={c.model.channels} must be a multiple of 16; give model.channels="
            f"{-(-c.model.channels // 16) * 16}"
        )
    return faults


def _faults_of_extras(c: TrainConfig) -> list[str]:
    """Faults of settings that only make sense beside others."""
    faults = []
    every, best = c.evaluate.every_steps, c.checkpoint.keep_best
    if best and (every <= 0 or c.checkpoint.every_steps <= 0 or c.checkpoint.every_steps % every):
        faults.append(
            f"checkpoint.keep_best=true: each saved step must be evaluated, checkpoint.every_steps="
            f"{c.checkpoint.every_steps} be a multiple of evaluate.every_steps={every}; give evaluate.every_steps="
            f"{max(c.checkpoint.every_steps, 1)}"
        )
    if c.evaluate.sample_prompt and every <= 0:
        faults.append("evaluate.sample_prompt: samples come after evaluations; give evaluate.every_steps=250")
    if c.evaluate.sample_tokens < 1:
        faults.append(f"evaluate.sample_tokens={c.evaluate.sample_tokens}: must be at least 1; leave it out")
    if c.evaluate.tasks and every <= 0 and c.evaluate.tasks_every_steps <= 0:
        faults.append("evaluate.tasks: are measured every so many steps; give evaluate.tasks_every_steps=1000")
    if c.evaluate.tasks and c.model.vocabulary < VOCABULARY:
        faults.append(
            f"evaluate.tasks: model.vocabulary={c.model.vocabulary} is below GPT-2's {VOCABULARY}; leave them out"
        )
    faults += task_faults(c.evaluate.tasks, c.evaluate.task_data, "evaluate.tasks", "evaluate.task_data", writing=False)
    if c.data.reset_positions and not c.data.document_mask:
        faults.append("data.reset_positions=true: needs data.document_mask=true; give both")
    if c.data.document_mask and c.model.vocabulary < VOCABULARY:
        faults.append(
            f"data.document_mask=true: model.vocabulary={c.model.vocabulary} has no <|endoftext|>, {VOCABULARY - 1}; "
            f"give model.vocabulary={VOCABULARY}"
        )
    if c.faults.spike_window < 2:
        faults.append(f"faults.spike_window={c.faults.spike_window}: must be at least 2; give 128")
    rewinds = c.faults.nonfinite is FaultAction.rewind or (
        c.faults.spike_sigma > 0 and c.faults.spike_action is FaultAction.rewind
    )
    if rewinds and c.checkpoint.every_steps <= 0:
        faults.append("checkpoint.every_steps=0: rewinding needs a checkpoint to go back to; give 1000")
    if c.activation_checkpointing is ActivationCheckpointing.selective and c.zero.stage == 3:
        faults.append(
            "activation_checkpointing=selective: DeepSpeed's linear layers at zero.stage=3 change what it keeps; give "
            "activation_checkpointing=full or zero.stage=2"
        )
    if c.activation_checkpointing is ActivationCheckpointing.selective and c.compile is Compile.blocks:
        faults.append(
            "activation_checkpointing=selective: cannot look into compiled blocks; give activation_checkpointing=full "
            "or compile=none"
        )
    zero = c.deepspeed.extra.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("compute_grad_norm") is False:
        faults.append(
            "deepspeed.extra.zero_optimization.compute_grad_norm=false: updates are made when their gradient norm is "
            "known to be finite; leave it out"
        )
    faults += _faults_of_plan(c)
    window = c.profile.steps
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        faults.append(f"profile.steps={window}: must be [first, last], counted from 1; give profile.steps=[10,12]")
    return faults


def _faults_of_plan(c: TrainConfig) -> list[str]:
    """Faults of what a run is planned for and how."""
    cluster, plan = c.cluster, c.plan
    faults = [
        f"cluster.{name}={getattr(cluster, name)}: must be above 0; give cluster.{name}=1"
        for name in ("nodes", "gpus")
        if getattr(cluster, name) < 1
    ]
    at_least_0 = ("memory_bytes", "peak_bf16_flops", "peak_fp32_flops", "link_bytes_per_s", "watts", "gpu_hour_price")
    for name in at_least_0:
        value = getattr(cluster, name)
        if not 0 <= value < float("inf"):
            faults.append(f"cluster.{name}={value}: must be 0 (unknown) or more; choose cluster=8xh100")
    for name, value in (("plan.mfu", plan.mfu), ("cluster.mfu", cluster.mfu)):
        if not 0 <= value < 1:
            faults.append(f"{name}={value}: must lie in [0, 1), 0 for unknown; give {name}=0.45")
    if plan.tokens < 0:
        faults.append(f"plan.tokens={plan.tokens}: must be 0 (20 a parameter) or more; leave it out")
    planned = ("batch.micro", "zero.stage", "activation_checkpointing")
    for name in plan.keep:
        if name not in planned:
            faults.append(f"plan.keep=[{name}]: must name some of {', '.join(planned)}; leave it out")
    if plan.apply and not cluster.memory_bytes:
        faults.append("plan.apply=true: needs to know the memory that there is; give cluster=8xh100, say")
    return faults
