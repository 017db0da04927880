"""Attention by torch's FlexAttention: the mask is a function, and tiles of 128 × 128 that it empties are not computed.

Flows in: tokens, from which the mask is made once a forward pass; then queries, keys and values of each block. Flows
out: what `scaled_dot_product_attention` gives with the same mask, up to rounding (Dong et al. 2024, "Flex Attention",
arXiv:2412.05496). What it is for: attention that stays within a document (`data.document_mask`), which torch's
FlashAttention cannot do, since it takes no mask. Chosen against FlashAttention's form for sequences of any length,
whose shapes change with each batch's documents, which torch.compile and CUDA graphs do not like.

Needs a CUDA GPU: on a CPU torch has its forward pass alone. There is no dropout in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gpt2train.errors import ConfigError
from gpt2train.network.documents import document_numbers


def require_gpu(device: torch.device) -> None:
    """Raises ConfigError on a device that cannot train by it."""
    if device.type != "cuda":
        raise ConfigError(
            [f"kernels.attention=flex: trains on a CUDA GPU alone, not on {device.type}; give kernels.attention=auto"]
        )


def block_mask(tokens_BT: Tensor, within_documents: bool) -> BlockMask:
    """Which keys a query may see: those before it and itself, and with `within_documents` of its own document."""
    B, T = tokens_BT.shape
    document_BT = document_numbers(tokens_BT)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def of_its_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_BT[b, q] == document_BT[b, k])

    if within_documents:
        return create_block_mask(of_its_document, B, None, T, T, device=tokens_BT.device)
    return create_block_mask(causal, None, None, T, T, device=tokens_BT.device)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Not compiled, it would make all scores."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """What the queries see, [B, H, T, D]."""
    # Within a model that is compiled it becomes part of that.
    alone = q_BHTD.device.type == "cuda" and not torch.compiler.is_compiling()
    how = _compiled() if alone else flex_attention
    y_BHTD = how(q_BHTD, k_BHTD, v_BHTD, block_mask=mask, scale=scale)
    assert isinstance(y_BHTD, Tensor)
    return y_BHTD
