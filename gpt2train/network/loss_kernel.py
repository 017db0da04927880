"""A Triton kernel for the cross-entropy: logits of a chunk → losses, and in place of the logits their gradient.

Flows in: logits as the matrix product left them, bf16 or fp32, and targets. Flows out: nats by position; the buffer of
the logits then holds the gradient. A row is read twice and written once, 6 bytes a logit in bf16; the plain form makes
fp32 copies and passes over them eight times, some 34 bytes a logit. Sums are fp32. The softmax is made in one pass
over a row (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

Needs a CUDA GPU and triton, which torch's CUDA build brings; `kernels.loss=triton` asks for it. With TRITON_INTERPRET=1
it runs on a CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of a row that a program holds at a time: 16 KiB in fp32, in registers of 8 warps."""
WARPS = 8


@triton.jit
def _capped(z, softcap):  # type: ignore[no-untyped-def]
    return softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)  # tanh(x) = 2·sigmoid(2x) - 1


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    logits,
    stride,
    targets,
    losses,
    scale,
    softcap,
    VOCABULARY: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    places = tl.arange(0, BLOCK)
    highest = -float("inf")
    total = 0.0
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + places < VOCABULARY
        z = tl.load(logits + start + places, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            z = _capped(z, softcap)
        z = tl.where(inside, z, -float("inf"))
        now = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - now) + tl.sum(tl.exp(z - now), 0)
        highest = now
    log_sum = highest + tl.log(total)
    z_target = tl.load(logits + target).to(tl.float32)
    if CAPPED:
        z_target = _capped(z_target, softcap)
    tl.store(losses + row, log_sum - z_target)
    if GRADIENT:
        for start in range(0, COLUMNS, BLOCK):
            within = start + places < COLUMNS
            z = tl.load(logits + start + places, mask=within, other=0.0).to(tl.float32)
            if CAPPED:
                z = _capped(z, softcap)
            gradient = tl.exp(z - log_sum) - tl.where(start + places == target, 1.0, 0.0)
            if CAPPED:
                gradient *= 1.0 - (z / softcap) * (z / softcap)
            gradient = tl.where(start + places < VOCABULARY, gradient * scale, 0.0)
            tl.store(logits + start + places, gradient.to(logits.dtype.element_ty), mask=within)


def losses_and_gradients(
    logits_NP: Tensor, targets_N: Tensor, vocabulary: int, softcap: float, scale: float, gradient: bool
) -> Tensor:
    """Nats by position, fp32 [N], under the softmax over the first `vocabulary` columns of the soft-capped logits.

    With `gradient`, logits_NP then holds `scale` times the gradient of their sum, zero in the padding's columns.
    """
    assert logits_NP.stride(1) == 1, "a row lies in one piece"
    losses_N = torch.empty(len(logits_NP), dtype=torch.float32, device=logits_NP.device)
    _row[(len(logits_NP),)](
        logits_NP,
        logits_NP.stride(0),
        targets_N,
        losses_N,
        scale,
        softcap or 1.0,
        VOCABULARY=vocabulary,
        COLUMNS=logits_NP.shape[1],
        CAPPED=bool(softcap),
        GRADIENT=gradient,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return losses_N
