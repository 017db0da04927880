"""Models too small to learn anything, whose numbers differ from token to token all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpt2train.config import ModelConfig
from gpt2train.model import GPT

TINY = ModelConfig("tiny", layers=2, channels=32, heads=2, context=64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(config: ModelConfig = TINY, *, seed: int = 0, spread: float = 0.4) -> GPT:
    """An untrained model, for evaluation, with matrices so large that its greedy text does not settle on one token."""
    model, generator = GPT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, spread, generator=generator)
        model.wte.weight[config.vocabulary :] = 0
    return model
