"""Settings of what a run is planned for, of the plan itself, and of a sweep. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ClusterConfig:
    """What a run is planned for; `cluster=8xh100` takes one of configs/cluster/."""

    name: str = ""
    """Name of the cluster in force; empty: none, so no plan but for what this machine shows."""
    nodes: int = 1
    gpus: int = 1
    """GPUs of one node; on a CPU, processes."""
    device: str = ""
    """What one of them is."""
    on_gpu: bool = True
    memory_bytes: float = 0.0
    """Of one GPU, or of a CPU's whole machine."""
    peak_bf16_flops: float = 0.0
    """Dense, with fp32 accumulation, FLOP/s of one GPU."""
    peak_fp32_flops: float = 0.0
    mfu: float = 0.0
    """Model FLOPs utilization that is assumed where none was measured or stated."""
    mfu_source: str = ""
    link_bytes_per_s: float = 0.0
    """From one GPU to the others, in one direction."""
    watts: float = 0.0
    """Rated power of one GPU."""
    gpu_hour_price: float = 0.0
    """What one GPU (on a CPU one process) costs an hour, in the currency of your choice; 0: unknown, no cost told."""


@dataclass
class PlanConfig:
    """How a run is planned: memory, speed, cost."""

    apply: bool = False
    """Take batch.micro, zero.stage and activation_checkpointing from the plan: the fastest that fit. What is given
    beside it stays as given."""
    keep: list[str] = field(default_factory=list)
    """Of these three, those that stay as they are; the command line's are added by themselves."""
    mfu: float = 0.0
    """Model FLOPs utilization to plan with; 0: the measured one, else the cluster's."""
    measured: str = ""
    """Run folder, or a JSON file of a benchmark, whose measured utilization is planned with."""
    tokens: int = 0
    """Tokens to plan for where `steps` is not given; 0: 20 for each parameter (Hoffmann et al. 2022, table 3)."""
    refuse: bool = True
    """Refuse to start what is not going to fit in memory."""


@dataclass
class SweepConfig:
    """`gpt2train sweep`: several values of any training setting → one run each, a table and a picture."""

    out: str = ""
    """Folder of the sweep; each trial's run folder lies in it."""
    sizes: list[str] = field(default_factory=list)
    """Models of a ladder, each LAYERSxCHANNELS or LAYERSxCHANNELSxHEADS; else give several with model=."""
    rates: list[float] = field(default_factory=list)
    """Peak learning rates that the smallest sizes are tried with, at the fewest steps; every trial then takes the rate
    that the rule through their best ones gives its size. Empty: optimizer.lr, as given or the model's own."""
    rate_sizes: int = 3
    """How many of the smallest sizes the grid of `rates` is run on."""
    parallel: int = 1
    """Trials that run at a time on this machine, each with its share of the cores and GPUs."""
    forecast: str = "full"
    """Model whose loss the law is asked for."""
    summary_only: bool = False
    """Run no trial; table and picture of what the trials have reached so far."""
