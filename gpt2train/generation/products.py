"""A new token's products on a CPU, as fast as memory gives the weights.

Flows in: a model, as it was loaded. Flows out: the same model, its matrices where and as a CPU reads them fastest for
one position, and its products of a single row made by numpy where that is faster. Costs a copy of the weights at the
start, block by block. The weights stay what they are; results differ by rounding, as between any two orders of a sum.

At batch 1 nine tenths of a token's time is reading each weight once. Three things decide how fast that goes (figures
in docs/performance.md): the order, [in, out]; pages of 2 MiB, which numpy asks the kernel for with arrays of 4 MiB and
more; and the library, since on one core numpy's OpenBLAS reads a matrix 1.5 times as fast as what torch's wheels have.
With more threads the products stay torch's: OpenBLAS's threads wait for each other by spinning, and a token has 49
such waits, which takes many times as long where other programs use the cores too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import threadpoolctl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2train.model import GPT


def lay_for_decoding(model: GPT) -> GPT:
    """The same model, made ready to make tokens one by one; on a GPU nothing is changed."""
    if model.wte.weight.device.type != "cpu":
        return model
    for block in model.h:
        _move([module for module in block.modules() if isinstance(module, nn.Linear)])
    _move([model.wte])
    if not model.config.tied_head:
        _move([model.lm_head])
    if model.wte.weight.dtype is torch.float32 and torch.get_num_threads() == 1 and numpy_has_openblas():
        # In the whole process, as torch's number is: what was told to torch alone is meant for both.
        threadpoolctl.ThreadpoolController().select(internal_api="openblas").limit(limits=1)
        for block in model.h:
            for part in (block.attn, block.mlp):
                part.c_proj = OneRowLinear(part.c_proj)
            block.attn.c_attn, block.mlp.c_fc = OneRowLinear(block.attn.c_attn), OneRowLinear(block.mlp.c_fc)
        model.product = one_row_linear
    return model


def _move(modules: Iterable[nn.Linear | nn.Embedding]) -> None:
    """Copies the modules' matrices into one piece of memory, transposed; as seen through torch they are as before."""
    weights = [module.weight for module in modules]
    if any(weight.dtype is not torch.float32 for weight in weights):
        for weight in weights:
            weight.data = weight.data.t().contiguous().t()
        return
    # One large array rather than several, some of them too small for large pages.
    memory = torch.from_numpy(np.empty(sum(weight.numel() for weight in weights), dtype=np.float32))
    for weight, place in zip(weights, memory.split([weight.numel() for weight in weights]), strict=True):
        transposed = place.view(weight.shape[1], weight.shape[0])
        transposed.copy_(weight.data.t())
        weight.data = transposed.t()


class OneRowLinear(nn.Module):
    """An `nn.Linear`, with its parameters, for a model that gets no gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return one_row_linear(x, self.weight, self.bias)


def one_row_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` on fp32 on the CPU, without a gradient: [..., I] → [..., O]; by numpy where x is a single row."""
    if x.numel() != x.shape[-1]:
        return F.linear(x, weight_OI, bias_O)
    y = torch.from_numpy(np.dot(weight_OI.detach().numpy(), x.detach().numpy().ravel())).view(*x.shape[:-1], -1)
    return y if bias_O is None else y.add_(bias_O.detach())


def numpy_has_openblas() -> bool:
    """Whether numpy's products are OpenBLAS's, as in its wheels; Apple's and Intel's builds have their own."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    return "openblas" in blas.lower()
