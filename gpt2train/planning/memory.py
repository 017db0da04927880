"""Bytes on one GPU at the worst moment of a training step, by what they are for.

Flows in: the settings and the number of ranks. Flows out: a `Memory`. Arithmetic alone, no torch: microseconds.

What holds memory is counted where it is made: weights, gradients and moments as DeepSpeed 0.19.8 lays them out at each
ZeRO stage (read in its code, measured on one and two ranks), activations tensor by tensor as model.py keeps them for
the backward pass. Three moments can be the worst: the end of the forward pass, when the loss has its logits; the
backward pass through the last block; its end, when all gradients stand. The update needs less than either, but for
Muon's, which makes whole matrices anew: a fourth.

tests/test_plan.py holds this against the bytes that torch really allocates. What it cannot see on a CPU are the
insides of GPU kernels and libraries; OVERHEAD_BYTES and FRAGMENTATION stand for those.

Letters: N parameters (the embedding's padding included), W ranks, u = positions × channels × bytes a number: the
residual stream of one micro batch, which all activations are multiples of.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2train.config import (
    Activation,
    ActivationCheckpointing,
    ModelConfig,
    Norm,
    Offload,
    OptimizerName,
    Positions,
    Precision,
    TrainConfig,
    micro_batch,
    parameter_count,
)

GIB = 1 << 30
LOSS_CHUNK_POSITIONS = 2048
"""network.loss.CHUNK_POSITIONS, which cannot be imported without torch; a test holds them equal."""
OVERHEAD_BYTES = 1.5 * GIB
"""CUDA's context, cuBLAS's workspace and NCCL's buffers, which no allocator of torch's counts; an allowance, to be
replaced by a measurement."""
FRAGMENTATION = 0.04
"""Part of what is allocated that lies unused between blocks; an allowance for the caching allocator."""
BUCKETS, MIN_BUCKET, MAX_BUCKET = 8, 1 << 20, 500_000_000
"""engine.py's, which cannot be imported without torch; a test holds them equal."""
MUON_BATCH = 1 << 25
"""optimizers.muon.BATCH_NUMBERS, which cannot be imported without torch; a test holds them equal."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance: up to this many gathered numbers stay."""

# What a block keeps for its backward pass, in u. None: the inputs of both norms (2), of c_attn and c_fc (2), queries,
# keys and values (3), attention's output (1), c_fc's output (4) and GELU's (4). Selective keeps all outputs of products
# (3 + 1 + 4 + 1), attention's (1) and the block's input (1). Full keeps the block's input.
_KEPT = {
    ActivationCheckpointing.none: 16.0,
    ActivationCheckpointing.selective: 11.0,
    ActivationCheckpointing.full: 1.0,
}
# What is made again at once for one block's backward pass, in u.
_MADE_AGAIN = {
    ActivationCheckpointing.none: 0.0,
    ActivationCheckpointing.selective: 6.0,
    ActivationCheckpointing.full: 15.0,
}
_BACKWARD = 3.5
"""Gradients of activations within a block, in u: the stream's, and MLP's hidden ones less what they replace."""
_BACKWARD_OF_A_SQUARE = 8.0
"""What relu2 takes there beyond GELU, in u: autograd makes x¹ and 2·x¹ of the 4u that were squared."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at the moment of the step when they are most."""

    weights: float
    """As the forward pass uses them; at ZeRO 3 this rank's part, and what of the others' is gathered."""
    gradients: float
    master: float
    """fp32 weights that the optimizer updates, where they are not the model's own."""
    moments: float
    activations: float
    """Kept for the backward pass, with what is made again of a checkpointed block."""
    logits: float
    """The loss's chunk of logits and what becomes of it."""
    buffers: float
    """DeepSpeed's reduce buckets."""
    overhead: float
    """What no allocator counts, and fragmentation; 0 on a CPU."""

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def states(self) -> float:
        """What does not depend on the micro batch and stands between steps."""
        return self.weights + self.gradients + self.master + self.moments

    def parts(self) -> dict[str, float]:
        """By component, in the order of a table."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "master weights": self.master,
            "moments": self.moments,
            "activations": self.activations,
            "logits": self.logits,
            "buffers": self.buffers,
            "overhead": self.overhead,
        }


def memory(config: TrainConfig, ranks: int, *, on_gpu: bool = True) -> Memory:
    """Memory of one rank of `ranks` with `config`, at its micro batch."""
    model, stage = config.model, config.zero.stage
    bf16 = config.precision is Precision.bf16
    number = 2 if bf16 else 4
    micro = micro_batch(config, ranks)
    accumulates = config.batch.sequences > micro * ranks
    N, W = parameter_count(model, padded=True), ranks
    split = W if stage >= 1 else 1
    bucket = reduce_bucket(config)

    # States, as they stand while the backward pass ends
    weights = N * number if stage < 3 else N * number / W + _gathered(model, W) * number
    orthogonalized = muon_count(config)
    moments = (8.0 * N - 4.0 * orthogonalized) / split  # Muon keeps one
    master = 4.0 * N / split if bf16 or stage >= 1 else 0.0
    if on_gpu and config.zero.offload is not Offload.none:
        # In the machine's memory; what travels through the GPU is small and reasoned, not measured.
        moments = master = 0.0
        weights -= N * number / W if config.zero.offload is Offload.parameters else 0.0
    made = float(N * number)
    """Gradients as autograd makes them."""
    if bf16 and stage == 1:
        # BF16_Optimizer adds up whole fp32 gradients, and empties the model's own without freeing them.
        whole = 4.0 * N if config.zero.accumulate is Precision.fp32 else 0.0
        gradients = whole + (made if accumulates else 0.0)
        last_gradients = whole + made
    elif stage >= 2:
        # Reduced and split block by block; only a bucket of them is whole at a time.
        gradients = (4.0 if not bf16 or config.zero.accumulate is Precision.fp32 else 2.0) * N / W
        last_gradients = gradients
    else:
        gradients = made if accumulates else 0.0
        last_gradients = made
    bucket_bytes = 0.0
    if stage >= 1 and not (bf16 and stage == 1):
        bucket_bytes = bucket * number * (2 if on_gpu else 1)  # overlapping takes a second one
    if stage >= 2:
        bucket_bytes += _embedding(model) * number  # its gradient is larger than any bucket and is reduced whole

    # Activations
    policy = config.activation_checkpointing
    positions = micro * model.context
    u = positions * model.channels * number
    small = positions * (4 * model.heads + 16)  # attention's log-sums and the norms' statistics
    beyond = _beyond_2019(model, bf16)
    kept = _KEPT[policy] * u + (0 if policy is ActivationCheckpointing.full else small)
    if policy is ActivationCheckpointing.none:
        kept += beyond.kept * u
    if model.dropout:
        kept += 2 * positions * model.channels  # two masks of a byte
    mask = micro * model.context**2 * (1 + number) if config.data.document_mask else 0
    embedding = _embedding(model) * number
    outside = (2 + beyond.outside) * u + mask
    forward_end = model.layers * kept + outside  # and the last norm's input and output
    after_loss = model.layers * kept + outside + embedding  # that norm's input, and the loss's two gradients
    again = _MADE_AGAIN[policy] * u + (small if policy is ActivationCheckpointing.full else 0)
    if policy is not ActivationCheckpointing.none:
        again += (beyond.kept + (beyond.again if policy is ActivationCheckpointing.selective else 0.0)) * u
    backward = (_BACKWARD + beyond.backward) * u

    # The three moments, each with the states that stand then
    logits = (
        _loss_positions(positions, bf16, capped=model.logit_softcap > 0) * model.padded_vocabulary
        + u
        + _embedding(model) * 4
    )
    # Where micro batches are added up, the gradients of the first are there already.
    block_gradients = 12 * model.channels**2 * number if stage < 2 and not accumulates else 0
    blocks = model.layers - 1
    moments_of_step = [
        (gradients, forward_end, logits, bucket_bytes),
        (gradients, after_loss, u + embedding, bucket_bytes),
        (gradients, after_loss + again + backward, 0.0, bucket_bytes),
        (
            gradients + blocks * block_gradients,
            after_loss - blocks * kept + again + backward,
            0.0,
            bucket_bytes,
        ),
        (last_gradients, mask, 0.0, _reducing(config, N, W)),
    ]
    if orthogonalized and stage >= 1:  # at ZeRO 0 one parameter after the other, which is little
        updating = _orthogonalizing(orthogonalized / W, bf16=bf16, on_gpu=on_gpu)
        moments_of_step.append((last_gradients, 0.0, 0.0, updating + (4.0 * N / W if stage == 3 else 0.0)))
    worst = max(moments_of_step, key=sum)
    allocated = weights + master + moments + sum(worst)
    overhead = OVERHEAD_BYTES + FRAGMENTATION * allocated if on_gpu else 0.0
    return Memory(weights, worst[0], master, moments, worst[1], worst[2], worst[3], overhead)


def muon_count(config: TrainConfig) -> int:
    """Parameters that Muon updates: the matrices of the blocks."""
    return 12 * config.model.layers * config.model.channels**2 if config.optimizer.name is OptimizerName.muon else 0


def _orthogonalizing(numbers: float, *, bf16: bool, on_gpu: bool) -> float:
    """Bytes while this rank's `numbers` of Muon's matrices are orthogonalized and written; measured as the rest is.

    First the momentum ahead, the matrices that came together, those that are done, and of the batch that is under way
    three copies; then the momentum ahead, the updates and those laid flat, on a CPU with an fp32 copy of what is bf16.
    """
    number = 2 if bf16 else 4
    made = number * (3 * numbers + 2 * min(numbers / 3, MUON_BATCH))
    written = number * 3 * numbers + (4 * numbers if bf16 and not on_gpu else 0)
    return max(made, written)


def reduce_bucket(config: TrainConfig) -> int:
    """Numbers in one of DeepSpeed's reduce buckets, as engine.py sets them: an eighth of the model."""
    return min(max(parameter_count(config.model, padded=True) // BUCKETS, MIN_BUCKET), MAX_BUCKET)


@dataclass(frozen=True)
class _Beyond:
    """What a network takes beyond that of 2019, in u."""

    kept: float
    """Of one block, for its backward pass, where nothing is made again."""
    again: float
    """Made again under selective checkpointing, beyond that."""
    backward: float
    """Beyond _BACKWARD."""
    outside: float
    """Of the norms outside of blocks."""


def _beyond_2019(model: ModelConfig, bf16: bool) -> _Beyond:
    kept = again = backward = outside = 0.0
    # torch's rms_norm on a CPU keeps an fp32 copy, 2u, in place of its bf16 input, u; a fused kernel would not.
    rms_in_fp32 = bf16 and model.norm is Norm.rms
    if model.positions is Positions.rotary or model.qk_norm:
        kept += 3  # new queries and keys beside c_attn's whole output, and attention's in the order of channels
    if model.qk_norm:
        kept += 4 if bf16 else 2 if model.positions is Positions.rotary else 0  # what is normed
    if rms_in_fp32:
        kept += 2
        again += 2
        outside += 1
    if model.embedding_norm:
        outside += 2 if rms_in_fp32 else 1
    if model.activation is Activation.relu2:
        backward += _BACKWARD_OF_A_SQUARE
    return _Beyond(kept, again, backward, outside)


def _loss_positions(positions: int, bf16: bool, *, capped: bool) -> float:
    """Bytes for one token of the vocabulary while the loss is made: fp32 logits beside a copy that is summed up, and
    from the second chunk on the gradient of the one before, in the model's own precision. A soft cap's slope is fp32,
    too."""
    chunk = min(LOSS_CHUNK_POSITIONS, positions)
    following = min(chunk, positions - chunk)
    each = 12 if capped else 8
    left = (2 if bf16 else 4) * chunk + each * following
    return max(each * chunk, left if following else 0)


def _embedding(model: ModelConfig) -> int:
    return model.padded_vocabulary * model.channels


def _gathered(model: ModelConfig, ranks: int) -> float:
    """Numbers of whole weights that are at hand at ZeRO 3, beside this rank's part; measured: of two passes."""
    return 2 * min(parameter_count(model, padded=True), LIVE_PARAMETERS) if ranks > 1 else 0


def _reducing(config: TrainConfig, N: int, W: int) -> float:
    """Bytes that the exchange of all gradients and the update take beyond the gradients themselves."""
    stage, bf16 = config.zero.stage, config.precision is Precision.bf16
    if stage == 0:
        return 0.0
    if bf16 and stage == 1:
        # One flat copy of the fp32 gradients, and that copy in bf16 to send.
        return 6.0 * min(N, MAX_BUCKET) if config.zero.accumulate is Precision.fp32 else 2.0 * min(N, MAX_BUCKET)
    return 4.0 * N / W + reduce_bucket(config) * (2 if bf16 else 4)
