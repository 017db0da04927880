"""GPT-2 in plain PyTorch: token ids → logits, or the mean cross-entropy.

The network of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, and of the code
released with it (openai/gpt-2, src/model.py): layer norm before each sub-block and after the last block, learned
positions, GELU in its tanh form, one matrix for the input and the output embedding. Parameters carry GPT-2's own names
(`wte`, `wpe`, `h.0.attn.c_attn`, ...); matrices lie as `torch.nn.Linear` has them, [out, in].

The embedding has `padded_vocabulary` rows for speed; the rows beyond `vocabulary` are zero, get no gradient, and never
enter a softmax. Logits over 50,257 tokens in fp32 would be the largest tensor of a training step by far (1.6 GB for 8
sequences of 1,024), so the loss takes a few thousand positions at a time and keeps only gradients.

Shape letters: B sequences, T tokens of a sequence, N = B·T positions, C channels, H heads, D channels of a head (C/H),
V vocabulary, P padded vocabulary, S past and present tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data_pipeline.tokenizer import END_OF_TEXT
from gpt2train.config import ActivationCheckpointing, ModelConfig

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
LOSS_CHUNK_POSITIONS = 2048
"""Positions whose logits exist at once; 2,048 × 50,304 in fp32 are 412 MB."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, for decoding one token at a time.

        cache = KeyValueCache(model.config, batch=2)
        logits_BTV = model(prompt_BT, cache=cache)
        logits_B1V = model(next_B1, cache=cache)

    Room for `context` tokens is taken at once; `length` tokens of it are in use. A forward that would pass `context`
    raises ValueError: `clear()` and feed the last tokens again.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, batch, config.heads, config.context, config.channels // config.heads)
        self.keys_LBHSD = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBHSD = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows of the batch go on, in this order."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.keys_LBHSD.device)
        self.keys_LBHSD = self.keys_LBHSD.index_select(1, chosen)
        self.values_LBHSD = self.values_LBHSD.index_select(1, chosen)

    def append(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens of one layer behind the old ones; returns all of them, [B, H, S, D] each.

        `length` moves on when the model's forward is through all layers.
        """
        start, stop = self.length, self.length + keys_BHTD.shape[2]
        self.keys_LBHSD[layer, :, :, start:stop] = keys_BHTD
        self.values_LBHSD[layer, :, :, start:stop] = values_BHTD
        return self.keys_LBHSD[layer, :, :, :stop], self.values_LBHSD[layer, :, :, :stop]


class Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.c_attn = nn.Linear(config.channels, 3 * config.channels)
        self.c_proj = nn.Linear(config.channels, config.channels)

    def forward(
        self, x_BTC: Tensor, cache: KeyValueCache | None = None, layer: int = 0, mask_B1TT: Tensor | None = None
    ) -> Tensor:
        B, T, C = x_BTC.shape
        qkv_3BHTD = self.c_attn(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHSD, v_BHSD = qkv_3BHTD.unbind(0)
        mask = mask_B1TT
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(layer, k_BHSD, v_BHSD)
            if 1 < T < k_BHSD.shape[2]:
                # Several new tokens behind old ones: `is_causal` would align the triangle with the first key.
                S = k_BHSD.shape[2]
                mask = torch.ones(T, S, dtype=torch.bool, device=x_BTC.device).tril(diagonal=S - T)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHSD,
            v_BHSD,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y_BTC = self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y_BTC, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.channels, 4 * config.channels)
        self.c_proj = nn.Linear(4 * config.channels, config.channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x_BTC), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.channels, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.channels, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(
        self, x_BTC: Tensor, cache: KeyValueCache | None = None, layer: int = 0, mask_B1TT: Tensor | None = None
    ) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), cache, layer, mask_B1TT)
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class GPT(nn.Module):
    """GPT-2 of the given sizes, on the CPU in fp32, initialized from `seed` alone (see `initialize`).

    `activation_checkpointing`: what the backward pass computes again instead of keeping. `document_mask`: attention
    stays within a document, `reset_positions`: so do positions (see `DataConfig`); with a cache, which holds one
    document, neither counts.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
        document_mask: bool = False,
        reset_positions: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.document_mask, self.reset_positions = document_mask, reset_positions
        with torch.device("meta"):  # torch's own initial values would be drawn and thrown away
            self.wte = nn.Embedding(config.padded_vocabulary, config.channels)
            self.wpe = nn.Embedding(config.context, config.channels)
            self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.ln_f = nn.LayerNorm(config.channels, eps=LAYER_NORM_EPS)
        self.to_empty(device="cpu")
        self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """The released code's initial values, drawn in the order of the parameters by a generator of its own.

        The same seed gives the same weights on every rank, whatever else drew random numbers. The paper scales the
        weights of residual layers by 1/√N, N the number of residual layers: two in each block.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if name == "wte.weight":
                parameter.zero_()
                parameter[: self.config.vocabulary].normal_(0.0, INIT_STD, generator=generator)
            elif name == "wpe.weight":
                parameter.normal_(0.0, POSITION_INIT_STD, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # the gains of layer norms
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                parameter.normal_(0.0, std, generator=generator)

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
        mask_B1TT = None
        if self.document_mask and cache is None:
            mask_B1TT = document_mask(tokens_BT)
            if self.reset_positions:
                positions = document_positions(tokens_BT)
        x_BTC = F.dropout(self.wte(tokens_BT) + self.wpe(positions), self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing is not ActivationCheckpointing.none and torch.is_grad_enabled():
                x_BTC = self._checkpointed(block, x_BTC, mask_B1TT)
            else:
                x_BTC = block(x_BTC, cache, layer, mask_B1TT)
        if cache is not None:
            cache.length += T
        x_BTC = self.ln_f(x_BTC)
        if at_M is not None:
            x_BTC = x_BTC.flatten(0, 1)[at_M]
        if targets_BT is None:
            return F.linear(x_BTC, self.wte.weight)[..., : self.config.vocabulary]
        loss = _ChunkedCrossEntropy.apply(
            x_BTC.flatten(0, 1), self.wte.weight, targets_BT.flatten(), self.config.vocabulary
        )
        assert isinstance(loss, Tensor)
        return loss

    def _checkpointed(self, block: nn.Module, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        options: dict[str, Any] = {}
        if self.activation_checkpointing is ActivationCheckpointing.selective:
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _EXPENSIVE)
        y_BTC = checkpoint(block, x_BTC, None, 0, mask_B1TT, use_reentrant=False, **options)
        assert isinstance(y_BTC, Tensor)
        return y_BTC


def document_mask(tokens_BT: Tensor) -> Tensor:
    """Which keys a query may see, bool [B, 1, T, T]: those before it, and itself, of its own document.

    `<|endoftext|>` belongs to the document that it opens, as in a sample that starts from it.
    """
    document_BT = (tokens_BT == END_OF_TEXT).cumsum(1)
    T = tokens_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril()
    return ((document_BT[:, :, None] == document_BT[:, None, :]) & causal_TT)[:, None]


def document_positions(tokens_BT: Tensor) -> Tensor:
    """int64 [B, T]: how far each token lies behind its document's start, or the sequence's."""
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    starts_BT = torch.where(tokens_BT == END_OF_TEXT, positions_T, 0).cummax(1).values
    return positions_T - starts_BT


class _ChunkedCrossEntropy(torch.autograd.Function):
    """x_NC, weight_PC, targets_N, vocabulary → mean cross-entropy (fp32 scalar), exact.

    The gradient of a softmax needs nothing but the softmax, so both gradients are made in the forward pass, chunk by
    chunk, and no logits outlive their chunk: the work of the plain form, without its memory. Sums are fp32.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_PC: Tensor, targets_N: Tensor, vocabulary: int) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad)
        if torch.is_autocast_enabled(x_NC.device.type):
            dtype = torch.get_autocast_dtype(x_NC.device.type)
        else:
            dtype = torch.promote_types(x_NC.dtype, weight_PC.dtype)
        weight = weight_PC.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        if needs_gradient:
            x_gradient_NC = torch.empty_like(x_NC)
            weight_gradient_PC = torch.zeros_like(weight_PC, dtype=torch.float32)
        for start in range(0, x_NC.shape[0], LOSS_CHUNK_POSITIONS):
            chunk = slice(start, start + LOSS_CHUNK_POSITIONS)
            x, targets = x_NC[chunk].to(dtype), targets_N[chunk, None]
            logits = F.linear(x, weight).float()
            logits[:, vocabulary:] = float("-inf")  # exp gives exactly 0: the padding has no part in the softmax
            log_sums = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sums - logits.gather(1, targets)).sum()
            if needs_gradient:
                gradient = logits.sub_(log_sums).exp_()
                gradient[torch.arange(len(targets), device=targets.device), targets[:, 0]] -= 1.0
                gradient = gradient.div_(x_NC.shape[0]).to(dtype)
                x_gradient_NC[chunk] = gradient @ weight
                weight_gradient_PC += gradient.T @ x
        if needs_gradient:
            ctx.save_for_backward(x_gradient_NC, weight_gradient_PC.to(weight_PC.dtype))
        return total / x_NC.shape[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_gradient_NC, weight_gradient_PC = ctx.saved_tensors
        return x_gradient_NC * loss_gradient, weight_gradient_PC * loss_gradient, None, None
