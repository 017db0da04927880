"""The output matrix and the cross-entropy in one: positions → the mean loss and its gradients, without the logits.

Flows in: the last norm's output, the output matrix, the targets. Flows out: the mean cross-entropy, exact. Logits over
50,257 tokens in fp32 would be the largest tensor of a training step by far (1.6 GB for 8 sequences of 1,024), so a few
thousand positions are taken at a time and only gradients kept. The work is that of the plain form: one product forward
and two for the gradients, which are made in the forward pass.

Shape letters: N positions, C channels, P padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_POSITIONS = 2048
"""Positions whose logits exist at once; 2,048 × 50,304 in fp32 are 412 MB."""


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """s·tanh(logits/s), all below s (Gemma Team 2024, "Gemma 2", section 2); a softcap of 0 changes nothing."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cross_entropy(
    x_NC: Tensor, weight_PC: Tensor, targets_N: Tensor, vocabulary: int, softcap: float = 0.0, *, triton: bool = False
) -> Tensor:
    """Mean nats (fp32 scalar) of `targets_N` under the softmax over the first `vocabulary` rows of `weight_PC`.

    With `triton` the softmax and its gradient are one kernel of ours (loss_kernel.py); else torch's operations.
    """
    loss = _ChunkedCrossEntropy.apply(x_NC, weight_PC, targets_N, vocabulary, softcap, triton)
    assert isinstance(loss, Tensor)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """x_NC, weight_PC, targets_N, vocabulary, softcap → mean cross-entropy (fp32 scalar), exact.

    The gradient of a softmax needs nothing but the softmax, so both gradients are made in the forward pass, chunk by
    chunk, and no logits outlive their chunk. Sums are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, weight_PC: Tensor, targets_N: Tensor, vocabulary: int, softcap: float, triton: bool
    ) -> Tensor:
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
        for start in range(0, x_NC.shape[0], CHUNK_POSITIONS):
            chunk = slice(start, start + CHUNK_POSITIONS)
            x, targets = x_NC[chunk].to(dtype), targets_N[chunk]
            by = _by_kernel if triton else _by_torch
            nats, gradient = by(x, weight, targets, vocabulary, softcap, x_NC.shape[0], needs_gradient)
            total += nats
            if gradient is not None:
                x_gradient_NC[chunk] = gradient @ weight
                weight_gradient_PC += gradient.T @ x
        if needs_gradient:
            ctx.save_for_backward(x_gradient_NC, weight_gradient_PC.to(weight_PC.dtype))
        return total / x_NC.shape[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x_gradient_NC, weight_gradient_PC = ctx.saved_tensors
        return x_gradient_NC * loss_gradient, weight_gradient_PC * loss_gradient, None, None, None, None


def _by_torch(
    x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, softcap: float, count: int, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The chunk's nats, summed, and their gradient by the logits over `count`, in the dtype of `x`."""
    logits = F.linear(x, weight).float()  # without a name for what `float` copies, which would keep it
    slope = None
    if softcap:
        logits = logits.div_(softcap).tanh_()
        slope = 1.0 - logits.square() if needs_gradient else None  # of s·tanh(z/s)
        logits = logits.mul_(softcap)
    logits[:, vocabulary:] = float("-inf")  # exp gives exactly 0: the padding has no part in the softmax
    log_sums = logits.logsumexp(dim=-1, keepdim=True)
    nats = (log_sums - logits.gather(1, targets[:, None])).sum()
    if not needs_gradient:
        return nats, None
    gradient = logits.sub_(log_sums).exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    if slope is not None:
        gradient.mul_(slope)
    return nats, gradient.div_(count).to(x.dtype)


def _by_kernel(
    x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, softcap: float, count: int, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    from gpt2train.network.loss_kernel import losses_and_gradients  # imports triton, which CPU builds of torch lack

    logits = F.linear(x, weight)
    nats = losses_and_gradients(logits, targets, vocabulary, softcap, 1 / count, needs_gradient).sum()
    return nats, logits if needs_gradient else None
