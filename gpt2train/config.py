"""The settings of training, of `trace` and of `report`: defaults, units and the sentence that explains each field.

Neither torch nor deepspeed is imported here, so that `--help`, `plan`, tab completion and the report of wrong settings
answer at once; what keeps them from working stands in bounds.py. Files in `configs/train/` hold only what a model size
or a recipe changes. The settings of what follows training stand in the config.py of the wing they are for:
`evaluation/`, `generation/`, `release/`, and `planning/`, whose first two are part of a run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from gpt2train.planning.config import ClusterConfig, PlanConfig

VOCABULARY = 50_257
"""Tokens of the GPT-2 BPE, `<|endoftext|>` (50,256) included."""


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WandbMode(Enum):
    off = "off"
    offline = "offline"
    online = "online"


class LRSchedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"


class Positions(Enum):
    learned = "learned"
    rotary = "rotary"


class Activation(Enum):
    gelu = "gelu"
    relu2 = "relu2"


class Norm(Enum):
    layer = "layer"
    rms = "rms"


class ActivationCheckpointing(Enum):
    none = "none"
    selective = "selective"
    full = "full"


class Compile(Enum):
    none = "none"
    model = "model"
    blocks = "blocks"


class CompileMode(Enum):
    """As torch.compile calls them."""

    default = "default"
    reduce_overhead = "reduce-overhead"
    max_autotune = "max-autotune-no-cudagraphs"


class Offload(Enum):
    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"


class AttentionKernel(Enum):
    auto = "auto"
    flash = "flash"
    cudnn = "cudnn"
    efficient = "efficient"
    math = "math"
    flex = "flex"


class LossKernel(Enum):
    torch = "torch"
    triton = "triton"


class FaultAction(Enum):
    stop = "stop"
    skip = "skip"
    rewind = "rewind"


@dataclass
class ModelConfig:
    name: str = "small"
    layers: int = 12
    channels: int = 768
    heads: int = 12
    context: int = 1024
    """Longest sequence, in tokens."""
    vocabulary: int = VOCABULARY
    """Tokens that can be predicted and sampled."""
    pad_vocabulary_to: int = 128
    """The embedding's rows are rounded up to a multiple of this for speed; the padding is never target nor sample."""
    dropout: float = 0.0
    """Probability of zeroing, for embeddings, attention and residuals."""
    positions: Positions = Positions.learned
    """learned: a vector for each place, added to the token's; rotary: queries and keys are turned by an angle that
    grows with their place (Su et al. 2021, "RoFormer")."""
    activation: Activation = Activation.gelu
    """Of the MLP. gelu: in its tanh form; relu2: the square of what is above 0 (So et al. 2021, "Primer")."""
    norm: Norm = Norm.layer
    """layer: layer norm with gains; rms: division by the root mean square, with nothing to learn."""
    biases: bool = True
    """Linear layers and layer norms add a learned vector."""
    qk_norm: bool = False
    """Queries and keys are divided by their root mean square (Henry et al. 2020, "Query-Key Normalization")."""
    embedding_norm: bool = False
    """The norm also stands between the embedding and the first block."""
    tied_head: bool = True
    """The embedding is the output matrix too; false: that is a matrix of its own, `lm_head`."""
    zero_projections: bool = False
    """What writes into the residual stream, and a head of its own, start at zero: at first a block changes nothing."""
    logit_softcap: float = 0.0
    """Logits z become s·tanh(z/s) for this s (Gemma Team 2024, "Gemma 2"); 0: they stay."""
    mup_base: int = 0
    """Channels of the narrow model that `optimizer.lr` was found with: initial values, learning rates and logits then
    follow the width by µP (Yang et al. 2022, "Tensor Programs V"), and its best rate is this model's. 0: no µP."""
    mup_base_head: int = 0
    """Channels of a head of that model, where this one's are larger; 0: as many as here."""

    @property
    def padded_vocabulary(self) -> int:
        return -(-self.vocabulary // self.pad_vocabulary_to) * self.pad_vocabulary_to

    def to_json(self) -> dict[str, Any]:
        """Plain words and numbers, as state.json keeps them."""
        return {name: value.value if isinstance(value, Enum) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ModelConfig:
        """What `to_json` gave; a setting that was not there yet is as in 2019, its default."""
        choices: dict[str, type[Enum]] = {"positions": Positions, "activation": Activation, "norm": Norm}
        values: dict[str, Any] = {n: choices[n](value) if n in choices else value for n, value in found.items()}
        return cls(**values)


def parameter_count(config: ModelConfig, *, padded: bool = False) -> int:
    """Trainable numbers of a model, a shared embedding counted once; `padded`: with the embedding's padding rows.

    A block holds 12·C² weights (3·C² + C² of attention, 4·C² + 4·C² of the MLP), 9·C biases of its linear layers, and
    2·C gains and 2·C biases of layer norms; the last norm has C of each.
    """
    c, layers = config.channels, config.layers
    vocabulary = config.padded_vocabulary if padded else config.vocabulary
    outside = vocabulary * c * (1 if config.tied_head else 2)
    outside += config.context * c if config.positions is Positions.learned else 0
    norms = 2 * layers + 1 if config.norm is Norm.layer else 0
    if config.embedding_norm and config.norm is Norm.layer:
        norms += 1
    biases = layers * 9 * c + norms * c if config.biases else 0
    return outside + layers * 12 * c * c + norms * c + biases


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of training on one token, forward and backward, at full context.

    6 for each parameter, and 12·layers·channels·context for attention scores and their use; the causal half is not
    taken off (Chowdhery et al. 2022, "PaLM", appendix B). An embedding beside a head of its own multiplies nothing.
    """
    parameters = parameter_count(config) - (0 if config.tied_head else config.vocabulary * config.channels)
    return 6 * parameters + 12 * config.layers * config.channels * config.context


@dataclass
class DataConfig:
    path: str = ""
    """Folder of token shards (`corpus/tokens`), or their place in a bucket (s3://bucket/corpus/tokens), from where each
    machine brings them; `data=FOLDER` is short for it."""
    cache: str = ""
    """Folder for shards that are brought from a bucket; empty: gpt2train/tokens in the user's cache folder."""
    verify: bool = True
    """Check every shard's size and sha256 against the manifest before the first step."""
    document_mask: bool = False
    """Attention stays within a document: `<|endoftext|>` opens what follows it and sees nothing before it."""
    reset_positions: bool = False
    """With document_mask: positions count from each document's `<|endoftext|>`, not from the sequence's start."""


@dataclass
class BatchConfig:
    sequences: int = 512
    """Sequences of one optimizer step over all GPUs (the paper's: 512)."""
    micro: int = 0
    """Sequences of one forward pass on one GPU; 0: as many as divide, at most 8."""


@dataclass
class OptimizerConfig:
    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Last learning rate over `lr`."""
    warmup_steps: int = -1
    """Steps of linear warm-up; -1: 700, and in a run of under 7,000 steps a tenth of them."""
    schedule: LRSchedule = LRSchedule.cosine
    """From the warm-up's end to the last step: cosine, linear, constant, or wsd: constant, then a straight line down
    over the last `cooldown` of the run (Hu et al. 2024, "MiniCPM", section 4)."""
    cooldown: float = 0.4
    """Part of the run that schedule=wsd takes to come down."""
    name: OptimizerName = OptimizerName.adamw
    """muon: the matrices of the blocks get the orthogonalized momentum of Jordan et al. 2024, "Muon", scaled so that
    `lr` and `weight_decay` mean what they mean for AdamW (Liu et al. 2025, "Muon is Scalable for LLM Training"); all
    else gets AdamW."""
    muon_momentum: float = 0.95
    embedding_lr_ratio: float = 1.0
    """Learning rate of the embeddings over `lr`."""
    head_lr_ratio: float = 1.0
    """Learning rate of a head of its own over `lr`."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices alone; biases, gains and nothing one-dimensional decay."""
    clip_grad_norm: float = 1.0
    """Largest gradient norm; 0: no clipping."""


@dataclass
class ZeroConfig:
    stage: int = 1
    """ZeRO stage: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights are split over GPUs."""
    accumulate: Precision = Precision.fp32
    """What the gradients of micro batches are added up in under precision=bf16; bf16 takes 2 bytes less a parameter and
    loses digits with every micro batch."""
    offload: Offload = Offload.none
    """What is kept, and updated, in the machine's memory instead of the GPU's: optimizer (the fp32 weights and moments,
    ZeRO 2 and 3), or parameters too (ZeRO 3). torch's fused AdamW updates it; nothing is compiled."""


@dataclass
class DeepspeedConfig:
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged untouched over the DeepSpeed dictionary that engine.py makes."""


@dataclass
class CheckpointConfig:
    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_last: int = 3
    """Newest checkpoints that stay; 0: all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are multiples of this stay for ever; 0: none."""
    keep_best: bool = False
    """The checkpoint with the lowest validation loss stays too; evaluations must fall on the steps that are saved."""
    background: bool = True
    """Training waits only for the copy into the machine's memory; a thread writes, verifies and publishes. Takes room
    for this rank's share of 12 bytes a parameter."""
    remote: str = ""
    """A place in other storage that each published checkpoint is copied to, with the run's records: s3://bucket/NAME,
    gs://bucket/NAME (`pip install 'gpt2train[s3]'` or `[gs]`) or file:///path. A start takes the newest whole
    checkpoint of both, so a run goes on on an empty machine; the rules above hold there too. A copy that fails is told
    and tried again, and training goes on. Empty: none."""
    remote_transfers: int = 4
    """Files on their way at once."""
    remote_retry_s: float = 60.0
    """A request that fails is tried again for this long, in seconds, before it is told."""
    remote_wait_s: float = 600.0
    """What is still being copied when a run ends is waited for this long, in seconds; then a run that is complete ends
    with code 4, and the same command copies what is missing."""


@dataclass
class EvaluateConfig:
    every_steps: int = 250
    """Steps between validation losses; also after the last step. 0: never."""
    sequences: int = 256
    """Validation sequences, always the same ones."""
    sample_prompt: str = ""
    """After each evaluation the model goes on from this text, always with the same seed; empty: no sample."""
    sample_tokens: int = 64
    """Tokens of that sample."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks, or groups of them, to measure while training (docs/evaluation.md); none that write text."""
    task_data: list[str] = field(default_factory=list)
    """Folders that hold the tasks' files under their usual names."""
    tasks_every_steps: int = 0
    """Steps between measurements of the tasks; also after the last step. 0: with every validation loss."""
    task_limit: int = 0
    """First items of each task alone; 0: all."""


@dataclass
class LoggingConfig:
    every_steps: int = 10
    """Steps between lines on the terminal; metrics.jsonl has every step."""
    wandb: WandbMode = WandbMode.off
    wandb_project: str = "gpt2train"
    wandb_group: str = ""
    """Group that the run is shown in; a sweep puts all its runs in one, named as its folder. Empty: none."""
    tensorboard: bool = False
    """Also write `run_dir/tensorboard`; needs `pip install gpt2train[tensorboard]`."""
    layers_every_steps: int = 0
    """Steps between the norms of each layer's gradients and weights in metrics.jsonl; costs a gather of both. 0:
    never."""


@dataclass
class FaultsConfig:
    """What becomes of a step whose loss or gradient norm is not finite, or leaves its usual range. Its update is not
    made in any case, and its documents are named."""

    nonfinite: FaultAction = FaultAction.stop
    """stop: end with exit code 6; skip: go on with the next step; rewind: back to the newest checkpoint of a multiple
    of checkpoint.every_steps, and on from there with the batches after the faulty one."""
    spike_sigma: float = 0.0
    """A loss or a gradient norm this many standard deviations above the mean of the window is a spike; 0: none is."""
    spike_window: int = 128
    """Steps, the last ones whose update was made, that the mean and the deviation are of."""
    spike_action: FaultAction = FaultAction.skip
    """What becomes of a spike: stop, skip or rewind, as above."""
    limit: int = 20
    """Skips and rewinds of a whole run; one more stops it."""


@dataclass
class ProfileConfig:
    steps: list[int] = field(default_factory=list)
    """[first, last]: rank 0's torch profiler records these steps of this start into `run_dir/profile`, for
    chrome://tracing or Perfetto; empty: none."""


@dataclass
class DistributedConfig:
    timeout_s: float = 600.0
    """A collective, or a step, that takes longer ends the run on every rank with a named cause, in seconds."""


@dataclass
class KernelsConfig:
    """Which code does the heavy work; all of it computes the same, up to rounding (`python -m benchmarks.gpu`)."""

    attention: AttentionKernel = AttentionKernel.auto
    """Of torch's `scaled_dot_product_attention`: auto, torch's own choice, or this one alone. Or flex: FlexAttention,
    which leaves out what data.document_mask hides instead of computing it; on CUDA GPUs, without dropout."""
    loss: LossKernel = LossKernel.torch
    """Softmax and gradient of the loss: torch's operations, or triton, one kernel of ours, for CUDA."""
    fp8: bool = False
    """Products of the blocks' matrices in fp8 (torchao, `pip install gpt2train[fp8]`); H100, H200 and newer, with
    compile=model or blocks."""


@dataclass
class TrainConfig:
    """`gpt2train train`: token shards → a model; run again with the same run_dir to go on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: str = "gpt2"
    """Name of the recipe in force; choose with recipe=NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    run_dir: str = ""
    """Folder of the run: config, metrics, checkpoints. The same command again resumes from its newest checkpoint."""
    overwrite: bool = False
    """Start from nothing over an existing run."""
    steps: int = 0
    """Optimizer steps of the whole run."""
    seed: int = 1337
    """Seed of the initial weights, of the data order and of dropout."""
    device: Device = Device.auto
    """auto: cuda where there is one."""
    precision: Precision = Precision.bf16
    """fp32, or bf16 with fp32 master weights."""
    compile: Compile = Compile.none
    """torch.compile the whole model (the fastest steps), or each block by itself (one block is compiled, and serves for
    all; the only form at ZeRO 3)."""
    compile_mode: CompileMode = CompileMode.default
    """How: reduce_overhead replays CUDA graphs, for models so small that a GPU waits for Python; max_autotune tries
    more kernels for each product, which takes minutes at the start."""
    deterministic: bool = True
    """On GPUs, kernels that give the same bits each time, so that a resumed run repeats the undisturbed one exactly;
    false: faster, and equal within rounding. CPUs always give the same bits."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """What the backward pass computes again instead of keeping: nothing; what is cheap (selective: all but products of
    matrices and attention); or whole blocks (full)."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class TraceConfig:
    """`gpt2train trace`: a step → the documents and URLs that it saw; or a URL → the steps that saw it."""

    run: str = ""
    """Run folder."""
    step: int = 0
    """Step, counted from 1 as in metrics.jsonl."""
    url: str = ""
    """Instead of a step: this URL, exactly as the corpus's documents.parquet has it."""


@dataclass
class ReportConfig:
    """`gpt2train report FOLDER`."""

    path: str = ""
    """Folder of a corpus or of a run."""


def micro_batch(config: TrainConfig, world_size: int) -> int:
    """Sequences of one forward pass on one GPU: `batch.micro`, or the largest divisor of a rank's share up to 8."""
    if config.batch.micro:
        return config.batch.micro
    share = config.batch.sequences // world_size
    return max(d for d in range(1, min(8, share) + 1) if share % d == 0)
