"""Learning rates against torch's schedulers; which parameters decay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpt2train.config import LRSchedule, ModelConfig, OptimizerConfig
from gpt2train.model import GPT
from gpt2train.optim import adamw, learning_rate, parameter_groups, set_learning_rate, warmup_steps

TINY = ModelConfig(layers=2, channels=16, heads=2, context=8, vocabulary=100)


def torch_rates(config: OptimizerConfig, steps: int) -> list[float]:
    """The same schedule out of torch's parts: LinearLR up, then CosineAnnealingLR or LinearLR down."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    warmup = config.warmup_steps
    if config.schedule is LRSchedule.wsd:
        fall = round(steps * config.cooldown)
        stable = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, total_iters=1)
        last = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, config.min_lr_ratio, total_iters=fall)
        down: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer, [stable, last], milestones=[steps - warmup - fall]
        )
    elif config.schedule is LRSchedule.cosine:
        down = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=steps - warmup, eta_min=config.lr * config.min_lr_ratio
        )
    else:
        end = 1.0 if config.schedule is LRSchedule.constant else config.min_lr_ratio
        down = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=steps - warmup)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    rates = []
    for step in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (up if step < warmup else down).step()
    return rates


@pytest.mark.parametrize("schedule", LRSchedule)
def test_rates_equal_torch(schedule: LRSchedule) -> None:
    config = OptimizerConfig(lr=6e-4, warmup_steps=20, schedule=schedule, min_lr_ratio=0.1)
    steps = 120
    ours = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    theirs = torch_rates(config, steps)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours[19] == pytest.approx(6e-4)
    assert ours[-1] == pytest.approx(6e-4 if schedule is LRSchedule.constant else 6e-5)


def test_rates_at_the_edges() -> None:
    none = OptimizerConfig(warmup_steps=0)
    assert learning_rate(none, 1, 1) == pytest.approx(none.lr * none.min_lr_ratio)
    assert learning_rate(none, 1, 10**6) == pytest.approx(none.lr)
    long = OptimizerConfig(warmup_steps=100)
    assert [learning_rate(long, step, 50) for step in (1, 50)] == pytest.approx([long.lr / 100, long.lr / 2])
    assert learning_rate(none, 70, 50) == pytest.approx(none.lr * none.min_lr_ratio)


def test_warmup_that_is_left_to_us() -> None:
    automatic = OptimizerConfig()
    assert [warmup_steps(automatic, steps) for steps in (5, 50, 7000, 100_000)] == [0, 5, 700, 700]
    assert warmup_steps(OptimizerConfig(warmup_steps=3), 5) == 3


def test_matrices_decay_and_vectors_do_not() -> None:
    model = GPT(TINY)
    matrices, vectors = parameter_groups(model.named_parameters(), OptimizerConfig(weight_decay=0.1))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(matrices["params"]) == 2 + 4 * TINY.layers
    assert all(p.ndim == 2 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_embeddings_and_head_may_have_rates_of_their_own() -> None:
    model = GPT(dataclasses.replace(TINY, tied_head=False))
    config = OptimizerConfig(lr=1e-3, embedding_lr_ratio=5.0, head_lr_ratio=0.5)
    groups = parameter_groups(model.named_parameters(), config)
    by_rate = {(g["lr_ratio"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in groups}
    assert by_rate[5.0, 0.1] == [(128, 16), (8, 16)]
    assert by_rate[0.5, 0.1] == [(128, 16)]
    assert len(by_rate[1.0, 0.1]) == 4 * TINY.layers
    assert set(by_rate) == {(5.0, 0.1), (0.5, 0.1), (1.0, 0.1), (1.0, 0.0)}
    optimizer = adamw(model, config, torch.device("cpu"))
    set_learning_rate(optimizer.param_groups, 2e-4)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-4, 2e-4, 2e-4, 1e-3])


def test_adamw_has_the_settings() -> None:
    config = OptimizerConfig(lr=1e-3, beta1=0.8, beta2=0.7, eps=1e-7, weight_decay=0.3)
    optimizer = adamw(GPT(TINY), config, torch.device("cpu"))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.8, 0.7) and g["eps"] == 1e-7 and g["fused"] for g in optimizer.param_groups)
    set_learning_rate(optimizer.param_groups, 5e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-4]
