"""Causal self-attention over all heads, and what it needs: rotary positions and a cache.

Flows in: the residual stream of a block, normed. Flows out: what attention adds to it. Costs 4·C² weights and, beyond
them, 4·C·T operations a token forward; the scores are never all in memory, as torch's `scaled_dot_product_attention`
works in tiles where no mask is given, and FlexAttention (flexible.py) also where one is.

Shape letters: B sequences, T tokens of a sequence, C channels, H heads, D channels of a head (C/H), L layers, S past
and present tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2train.config import AttentionKernel, ModelConfig
from gpt2train.mup import attention_scale
from gpt2train.network.layers import Linear

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ROTARY_BASE = 10_000.0
"""Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.2."""
RMS_NORM_EPS = 1e-6
"""Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", leave it open; this is transformers' for NanoChat,
an architecture that a modern model can be exported to (release/nanochat.py)."""


_BACKENDS = {
    AttentionKernel.flash: SDPBackend.FLASH_ATTENTION,
    AttentionKernel.cudnn: SDPBackend.CUDNN_ATTENTION,
    AttentionKernel.efficient: SDPBackend.EFFICIENT_ATTENTION,
    AttentionKernel.math: SDPBackend.MATH,
}


class KeyValueCache:
    """Keys and values of the tokens seen so far, for decoding one token at a time.

        cache = KeyValueCache(model.config, batch=2)
        logits_BTV = model(prompt_BT, cache=cache)
        logits_B1V = model(next_B1, cache=cache)

    Room for `context` tokens is taken at once; `length` tokens of it are in use. A forward that would pass `context`
    raises ValueError: `clear()` and feed the last tokens again. Keys are kept as attention uses them: turned to their
    place, where positions are rotary.
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
        T = keys_BHTD.shape[2]
        keys_BHSD, values_BHSD = self.keys_LBHSD[layer], self.values_LBHSD[layer]
        keys_BHSD.narrow(2, self.length, T).copy_(keys_BHTD)
        values_BHSD.narrow(2, self.length, T).copy_(values_BHTD)
        return keys_BHSD.narrow(2, 0, self.length + T), values_BHSD.narrow(2, 0, self.length + T)


class Attention(nn.Module):
    """x_BTC → what attention adds, [B, T, C].

    `rotation` holds the cosines and sines of rotary positions (see `rotation`), or None; `mask` says which keys a query
    may see: bool [B, 1, T, T], or a BlockMask for FlexAttention; None: those before it and itself. `kernel` may be set
    to one of torch's kernels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.qk_norm = config.heads, config.dropout, config.qk_norm
        self.kernel = AttentionKernel.auto
        self.scale = attention_scale(config)
        self.c_attn = Linear(config.channels, 3 * config.channels, bias=config.biases)
        self.c_proj = Linear(config.channels, config.channels, bias=config.biases)

    def forward(
        self,
        x_BTC: Tensor,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        mask: Tensor | BlockMask | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        B, T, C = x_BTC.shape
        qkv_3BHTD = self.c_attn(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHSD, v_BHSD = qkv_3BHTD.unbind(0)
        if rotation is not None:
            q_BHTD, k_BHSD = rotate(q_BHTD, *rotation), rotate(k_BHSD, *rotation)
        if self.qk_norm:  # a rotation keeps the length, so it does not matter which of the two comes first
            q_BHTD, k_BHSD = rms_norm(q_BHTD), rms_norm(k_BHSD)
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(layer, k_BHSD, v_BHSD)
            if 1 < T < k_BHSD.shape[2]:
                # Several new tokens behind old ones: `is_causal` would align the triangle with the first key.
                S = k_BHSD.shape[2]
                mask = torch.ones(T, S, dtype=torch.bool, device=x_BTC.device).tril(diagonal=S - T)
        if mask is not None and not isinstance(mask, Tensor):
            from gpt2train.network import flexible

            y_BHTD = flexible.attend(q_BHTD, k_BHSD, v_BHSD, mask, self.scale)
        else:
            with one_kernel(self.kernel):
                y_BHTD = F.scaled_dot_product_attention(
                    q_BHTD,
                    k_BHSD,
                    v_BHSD,
                    attn_mask=mask,
                    is_causal=mask is None and T > 1,
                    dropout_p=self.dropout if self.training else 0.0,
                    scale=self.scale,
                )
        y_BTC = self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y_BTC, self.dropout) if self.training else y_BTC


def one_kernel(kernel: AttentionKernel) -> contextlib.AbstractContextManager[None]:
    """Within it `scaled_dot_product_attention` has this kernel alone, and raises RuntimeError where it cannot serve."""
    if kernel in (AttentionKernel.auto, AttentionKernel.flex):  # the latter has a function of its own
        return contextlib.nullcontext()
    return sdpa_kernel(_BACKENDS[kernel])


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis, in x's own dtype; sums of low precision are made in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=RMS_NORM_EPS)


def rotation(positions: Tensor, head_channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`: [T, D/2] for positions [T], [B, 1, T, D/2] for positions [B, T].

    Pair i of a head turns by position · base^(-2i/D). The angles are fp32 whatever the model's dtype: at position 1,000
    bf16 would be off by several radians. They are made anew in each forward pass, T·D/2 numbers, and so are no buffers
    that a change of the model's dtype would round.
    """
    pairs = torch.arange(0, head_channels, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * ROTARY_BASE ** (-pairs / head_channels)
    if angles.ndim == 3:
        angles = angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTD: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x with channels i and i + D/2 turned as a pair, clockwise, as transformers' NanoChat has it."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cosines + second * sines, second * cosines - first * sines), dim=-1)
