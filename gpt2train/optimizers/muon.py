"""Muon: for the matrices of the blocks, momentum whose singular values are all made nearly one; for all else AdamW.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (the momentum, Nesterov's form, the five
Newton-Schulz steps); Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2 (weight decay, and the scale by
which an update has the size of AdamW's, so that one learning rate serves both).

Flows in: parameters with gradients, as DeepSpeed hands them over: whole, or as flat parts of many matrices laid end to
end. Flows out: updated parameters. The momentum is kept and updated part by part; for the Newton-Schulz steps the parts
of a matrix come together on one rank and the result goes back (sharing.py), so no rank makes another's work and the
update does not depend on how many ranks there are. Costs 4 bytes of state a parameter where AdamW takes 8, about
30·min(rows, columns) operations a parameter and step, and two exchanges of the gradient's size among the ranks.

DeepSpeed 0.19.8 has a Muon of its own. It orthogonalizes before the gradient norm is known: clipping then scales the
update, where it should scale the gradient, and an update that is refused (faults.py) has moved the momentum all the
same. So it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gpt2train.optimizers.sharing import Part, Sharing, matrices_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a·s + b·s³ + c·s⁵ that moves singular values to [0.7, 1.2] in five steps (Jordan et al.)."""
STEPS = 5
EPS = 1e-7
RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates in practice (Liu et al. 2025, section 2.2); ours is scaled to it."""
BATCH_NUMBERS = 1 << 25
"""Matrices of one shape are orthogonalized together while they hold at most this many numbers."""


def orthogonalize(matrices_MRC: Tensor) -> Tensor:
    """[M, rows, columns] → the same shape: each matrix's singular values moved near 1, its singular vectors kept."""
    x = matrices_MRC
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT  # the products below are of the smaller side squared
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # no singular value above 1
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_all(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalize` of matrices of any shapes, equal shapes in batches."""
    done: list[Tensor | None] = [None] * len(matrices)
    places: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(place)
    for shape, found in places.items():
        size = max(1, BATCH_NUMBERS // shape.numel())
        for start in range(0, len(found), size):
            batch = found[start : start + size]
            result = orthogonalize(torch.stack([matrices[place] for place in batch]))
            for place, matrix in zip(batch, result.unbind(0), strict=True):
                done[place] = matrix
    return [matrix for matrix in done if matrix is not None]


class Muon(torch.optim.Optimizer):
    """An optimizer over groups of parameters; those with `muon: True` hold matrices and get Muon, the others AdamW.

        groups = [{"params": matrices, "muon": True, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = Muon(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, dtype=torch.bfloat16)

    Every tensor of a `muon` group needs an entry in `sharing`, which says what lies where in it (`share_whole`, or
    engine.py for what DeepSpeed split). `dtype` is that of the Newton-Schulz steps: they bear bf16, but what is
    compared to 1e-5 needs fp32. State: `exp_avg` for Muon; `exp_avg`, `exp_avg_sq` and `step` for AdamW, as torch's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        dtype: torch.dtype,
        fused: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": fused, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"muon": False})
        self.dtype = dtype
        self.sharing: dict[Tensor, Sharing] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates every parameter that has a gradient; all ranks make the same calls."""
        assert closure is None, "gradients are made before"
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for parameter in with_gradient:
                    self._muon(parameter, group)
            elif with_gradient:
                self._adamw(with_gradient, group)

    def _muon(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        gradient, momentum = flat.grad, group["momentum"]
        assert gradient is not None
        average = state["exp_avg"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(average, momentum)  # Nesterov's
        sharing = self.sharing[flat]
        ahead = ahead.flatten().to(self.dtype)
        updates = orthogonalize_all(sharing.gather(ahead))
        updates = [update * (RMS_OF_ADAMW * math.sqrt(max(update.shape))) for update in updates]
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        flat.sub_(sharing.scatter(updates, like=ahead).view_as(flat), alpha=group["lr"])

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                device = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        states = [self.state[parameter] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def share_whole(optimizer: Muon, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Fills `sharing` for parameters by name that every rank holds whole, and orthogonalizes itself."""
    members = {parameter for group in optimizer.param_groups if group["muon"] for parameter in group["params"]}
    for name, parameter in parameters:
        if parameter in members:
            rows, columns = parameter.shape
            part = Part(parameter=0, start=0, numbers=parameter.numel(), offset=0)
            optimizer.sharing[parameter] = Sharing(matrices_of([name], [(rows, columns)]), [[part]], rank=0)
