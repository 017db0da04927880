"""Bytes that torch's CPU allocator really gave out, the insides of kernels included.

with Allocations() as made:
    loss = model(tokens, targets)
made.live, made.peak       # at the end, and at the worst moment, since the block began
"""

from __future__ import annotations

import gc
from typing import Any

import torch


class Allocations:
    live = 0
    peak = 0

    def __enter__(self) -> Allocations:
        gc.collect()  # what was there before and is freed within would count as less than nothing
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        results = self._profile.profiler.kineto_results
        events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
        for _, size in sorted(events, key=lambda event: event[0]):
            self.live += size
            self.peak = max(self.peak, self.live)
