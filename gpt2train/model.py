"""GPT-2 in plain PyTorch: token ids → logits, or the mean cross-entropy.

The network of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, and of the code
released with it (openai/gpt-2, src/model.py): layer norm before each sub-block and after the last block, learned
positions, GELU in its tanh form, one matrix for the input and the output embedding. Parameters carry GPT-2's own names
(`wte`, `wpe`, `h.0.attn.c_attn`, ...); matrices lie as `torch.nn.Linear` has them, [out, in].

What has been learned since 2019 stands behind switches of `ModelConfig`, all off by default; `recipe=modern` sets them.
Where a switch takes a parameter away its name is missing, and one of a head of its own is `lm_head.weight`.

The embedding has `padded_vocabulary` rows for speed; the rows beyond `vocabulary` are zero, get no gradient, and never
enter a softmax.

Shape letters: B sequences, T tokens of a sequence, N = B·T positions, C channels, V vocabulary, P padded vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpt2train.config import (
    Activation,
    ActivationCheckpointing,
    AttentionKernel,
    LossKernel,
    ModelConfig,
    Norm,
    Positions,
)
from gpt2train.mup import logit_ratio, matrix_std_ratio
from gpt2train.network.attention import (
    Attention,
    KeyValueCache,
    rms_norm,
    rotation,
)
from gpt2train.network.documents import document_mask, document_positions
from gpt2train.network.layers import Embedding, Linear
from gpt2train.network.loss import cross_entropy, softcapped

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

INIT_STD = 0.02
"""Standard deviation of initial matrices (openai/gpt-2 src/model.py: `conv1d` and `wte`)."""
POSITION_INIT_STD = 0.01
"""Standard deviation of initial positions (openai/gpt-2 src/model.py: `wpe`)."""
LAYER_NORM_EPS = 1e-5
"""openai/gpt-2 src/model.py: `norm`."""
_EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective checkpointing keeps: nearly all of a block's operations. The norms, GELU and dropout are made again
(Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", keep by the same measure)."""


class RMSNorm(nn.Module):
    """x over its root mean square along the channels; nothing is learned."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return rms_norm(x_BTC)


def norm(config: ModelConfig) -> nn.Module:
    """The norm that `config` names, over the channels."""
    if config.norm is Norm.rms:
        return RMSNorm()
    return nn.LayerNorm(config.channels, eps=LAYER_NORM_EPS, bias=config.biases)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.activation = config.dropout, config.activation
        self.c_fc = Linear(config.channels, 4 * config.channels, bias=config.biases)
        self.c_proj = Linear(4 * config.channels, config.channels, bias=config.biases)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.c_fc(x_BTC)
        h_BTC = F.gelu(h_BTC, approximate="tanh") if self.activation is Activation.gelu else F.relu(h_BTC).square()
        y_BTC = self.c_proj(h_BTC)
        return F.dropout(y_BTC, self.dropout) if self.training else y_BTC


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        mask: Tensor | BlockMask | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), cache, layer, mask, rotation)
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class GPT(nn.Module):
    """GPT-2 of the given sizes, on the CPU in fp32, initialized from `seed` alone (see `initialize`).

    `seed=None`: its parameters hold anything, for weights that are loaded next.

    `activation_checkpointing`: what the backward pass computes again instead of keeping. `document_mask`: attention
    stays within a document, `reset_positions`: so do positions (see `DataConfig`); with a cache, which holds one
    document, neither counts. The kernels are those of `KernelsConfig`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
        document_mask: bool = False,
        reset_positions: bool = False,
        attention_kernel: AttentionKernel = AttentionKernel.auto,
        loss_kernel: LossKernel = LossKernel.torch,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.document_mask, self.reset_positions = document_mask, reset_positions
        self.wte = Embedding(config.padded_vocabulary, config.channels)
        if config.positions is Positions.learned:
            self.wpe = Embedding(config.context, config.channels)
        if config.embedding_norm:
            self.ln_e = norm(config)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = norm(config)
        if not config.tied_head:
            self.lm_head = Linear(config.channels, config.padded_vocabulary, bias=False)
        for block in self.h:
            block.attn.kernel = attention_kernel
        self.attention_kernel = attention_kernel
        self.loss_kernel = loss_kernel
        self.logit_ratio = logit_ratio(config)
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        """Of the last positions with the vocabulary's matrix; `generation/products` has another."""
        if seed is not None:
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """The released code's initial values, drawn in the order of the parameters by a generator of its own.

        The same seed gives the same weights on every rank, whatever else drew random numbers. The paper scales the
        weights of residual layers by 1/√N, N the number of residual layers: two in each block. With `zero_projections`
        those are zero, and so is a head of its own. µP makes the matrices of wide blocks smaller (mup.py).
        """
        generator = torch.Generator().manual_seed(seed)
        matrix_std = INIT_STD * matrix_std_ratio(self.config)
        residual_std = matrix_std / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            zero = self.config.zero_projections and name.endswith(("c_proj.weight", "lm_head.weight"))
            if name.endswith("bias") or zero:
                parameter.zero_()
            elif name in ("wte.weight", "lm_head.weight"):
                parameter.zero_()
                parameter[: self.config.vocabulary].normal_(0.0, INIT_STD, generator=generator)
            elif name == "wpe.weight":
                parameter.normal_(0.0, POSITION_INIT_STD, generator=generator)
            elif parameter.ndim == 1:  # the gains of layer norms
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith("c_proj.weight") else matrix_std
                parameter.normal_(0.0, std, generator=generator)

    @contextlib.contextmanager
    def attention_of_any_device(self) -> Iterator[None]:
        """Within it FlexAttention, which makes all scores where it is not compiled, gives way to torch's own choice."""
        kernel = self.attention_kernel
        if kernel is AttentionKernel.flex:
            self.attention_kernel = AttentionKernel.auto
        try:
            yield
        finally:
            self.attention_kernel = kernel

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
        at_M: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats (fp32 scalar) when there are targets; else logits_BTV over the true vocabulary.

        tokens_BT and targets_BT are int64; `targets_BT[b, t]` is the token that follows `tokens_BT[b, t]`. With a cache
        the tokens stand behind those it holds. `at_M`: logits_MV of these M positions b·T + t alone, since the product
        with the vocabulary costs as much as several blocks. Raises ValueError when a sequence would pass the model's
        context.
        """
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.context:
            raise ValueError(
                f"{start} cached + {T} new tokens: the model's context is {self.config.context}; give it fewer tokens"
            )
        positions = torch.arange(start, start + T, device=tokens_BT.device)
        mask: Tensor | BlockMask | None = None
        if cache is None:
            if self.attention_kernel is AttentionKernel.flex:
                from gpt2train.network.flexible import block_mask

                mask = block_mask(tokens_BT, self.document_mask)
            elif self.document_mask:
                mask = document_mask(tokens_BT)
            if self.document_mask and self.reset_positions:
                positions = document_positions(tokens_BT)
        x_BTC = self.wte(tokens_BT)
        turns = None
        if self.config.positions is Positions.learned:
            x_BTC = x_BTC + self.wpe(positions)
        else:
            turns = rotation(positions, self.config.channels // self.config.heads, x_BTC.dtype)
        if self.config.embedding_norm:
            x_BTC = self.ln_e(x_BTC)
        if self.training:
            x_BTC = F.dropout(x_BTC, self.config.dropout)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing is not ActivationCheckpointing.none and torch.is_grad_enabled():
                x_BTC = self._checkpointed(block, x_BTC, mask, turns)
            else:
                x_BTC = block(x_BTC, cache, layer, mask, turns)
        if cache is not None:
            cache.length += T
        x_BTC = self.ln_f(x_BTC)
        if at_M is not None:
            x_BTC = x_BTC.flatten(0, 1)[at_M]
        if self.logit_ratio != 1.0:
            x_BTC = x_BTC * self.logit_ratio
        head_PC = self.wte.weight if self.config.tied_head else self.lm_head.weight
        if targets_BT is None:
            logits_BTV = self.product(x_BTC, head_PC)[..., : self.config.vocabulary]
            return softcapped(logits_BTV, self.config.logit_softcap)
        return cross_entropy(
            x_BTC.flatten(0, 1),
            head_PC,
            targets_BT.flatten(),
            self.config.vocabulary,
            self.config.logit_softcap,
            triton=self.loss_kernel is LossKernel.triton,
        )

    def _checkpointed(
        self,
        block: nn.Module,
        x_BTC: Tensor,
        mask: Tensor | BlockMask | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        options: dict[str, Any] = {}
        if self.activation_checkpointing is ActivationCheckpointing.selective:
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _EXPENSIVE)
        y_BTC = checkpoint(block, x_BTC, None, 0, mask, rotation, use_reentrant=False, **options)
        assert isinstance(y_BTC, Tensor)
        return y_BTC
