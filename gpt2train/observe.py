"""A closer look at a run while it goes: norms by layer, a sample text, a profile of some steps.

Flows in: the engine and the settings. Flows out: numbers for metrics.jsonl, text, a trace file. All of it is off by
default, and none of it changes what the run computes: samples have a generator of their own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.config import EvaluateConfig, TrainConfig
from gpt2train.generation.sampling import Sampling, next_token
from gpt2train.run_folder import PROFILE

SAMPLE_TEMPERATURE, SAMPLE_TOP_K, SAMPLE_SEED = 0.8, 40, 0


def layer_norms(parameters: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """(name, weight, gradient), whole → by layer (`wte`, `wpe`, `h.0`, …, `ln_f`) the L2 norms of both.

    Gradients are those of the whole batch before clipping. Waits for the device once a layer.
    """
    squares: dict[str, list[Tensor]] = {}
    for name, weight, gradient in parameters:
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "h" else parts[0]
        now = [gradient.float().square().sum(), weight.float().square().sum()]
        squares[layer] = [a + b for a, b in zip(squares[layer], now, strict=True)] if layer in squares else now
    return {
        layer: {"grad_norm": gradient.sqrt().item(), "weight_norm": weight.sqrt().item()}
        for layer, (gradient, weight) in squares.items()
    }


@torch.no_grad()
def sample_text(forward: Callable[[Tensor], Tensor], config: EvaluateConfig, *, context: int, device: Any) -> str:
    """`evaluate.sample_prompt` and what the model goes on with, `sample_tokens` long at most.

    `forward(tokens_BT)` gives logits_BTV. Every rank makes equally many forward passes of equal length, whatever it
    draws, as ZeRO 3 gathers weights within them; so no keys and values are kept, and a token costs a whole forward.
    """
    tokenizer = load_tokenizer()
    tokens = tokenizer.encode(config.sample_prompt).tolist() or [END_OF_TEXT]
    start = len(tokens)
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    sampling = Sampling(temperature=SAMPLE_TEMPERATURE, top_k=SAMPLE_TOP_K)
    for _ in range(config.sample_tokens):
        logits_V = forward(torch.tensor([tokens[-context:]], device=device))[0, -1, :VOCABULARY].float().cpu()
        tokens.append(next_token(logits_V.nan_to_num(nan=0.0), sampling, tokens, generator))
    new = tokens[start:]
    return config.sample_prompt + tokenizer.decode(new[: new.index(END_OF_TEXT)] if END_OF_TEXT in new else new)


class Profile:
    """torch's profiler over `profile.steps`, on rank 0; elsewhere, and without the setting, every call does nothing."""

    def __init__(self, config: TrainConfig, *, active: bool) -> None:
        self._steps = tuple(config.profile.steps) if active else ()
        self._folder = Path(config.run_dir) / PROFILE
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Starts with the first step of the window, or within it after a resume."""
        if self._steps and self._profiler is None and self._steps[0] <= step <= self._steps[1]:
            self._profiler = torch.profiler.profile(profile_memory=True, record_shapes=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Writes the trace behind the last step. A disk without room costs the trace, not the run."""
        if self._profiler is None or step < self._steps[1]:
            return
        profiler, self._profiler, first_last = self._profiler, None, self._steps
        self._steps = ()
        profiler.stop()
        path = self._folder / f"steps_{first_last[0]:08d}-{first_last[1]:08d}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
            print(f"profile: {path}, for chrome://tracing or Perfetto", file=sys.stderr, flush=True)
        except (OSError, RuntimeError) as error:
            print(f"profile: {path} cannot be written ({error})", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._profiler is not None:
            with contextlib.suppress(RuntimeError):
                self._profiler.stop()
            self._profiler = None
