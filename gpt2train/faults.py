"""Steps whose loss or gradients are not to be trusted: found before the update, and what becomes of them.

Flows in: each step's loss and gradient norm, the same numbers on every rank, so all ranks decide alike. Flows out: a
reason not to make the update, and where the run goes on.

    skip      the step counts, its batch is spent, the weights and moments stay as they are
    rewind    back to a checkpoint of step c; step c + 1 gets the batch after the faulty one's, and so on: the batches
              in between are not seen again. The way out of loss spikes of Chowdhery et al. 2022 ("PaLM", section 5.1):
              the same weights with other batches did not spike again.
    stop      the run ends

A spike is measured against the steps just before, as OLMo's trainers do (OLMo-core, `SkipStepOptimizer`): more than σ
deviations above their mean. All that the rule remembers is in state.json, so a run that was killed decides again what
it decided before, and the data order stays a function of seed, step and what is written there.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from gpt2train.config import FaultAction, FaultsConfig


class FaultRule:
    """What the run's faults have been, and the judgement of the next step."""

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self.skipped: list[int] = []
        """Steps whose update was not made."""
        self.rewinds: list[dict[str, int]] = []
        """`from` the faulty step `to` the checkpoint's."""
        self.offset = 0
        """Batches that rewinds have passed over: step s trains on the batch of step s + offset."""
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)

    def judge_loss(self, loss: float) -> str | None:
        """Why the update must not be made, or None."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if loss > self._highest(self._losses):
            return f"loss {loss:.4f}, a spike: {self._beyond(loss, self._losses)}"
        return None

    def judge_norm(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return f"gradient norm {norm}"
        if norm > self.highest_norm:
            return f"gradient norm {norm:.4g}, a spike: {self._beyond(norm, self._norms)}"
        return None

    @property
    def highest_norm(self) -> float:
        """The largest gradient norm that an update is made with."""
        return self._highest(self._norms)

    def _highest(self, window: deque[float]) -> float:
        if not self._config.spike_sigma or len(window) < self._config.spike_window:
            return math.inf
        return statistics.fmean(window) + self._config.spike_sigma * statistics.pstdev(window)

    def _beyond(self, value: float, window: deque[float]) -> str:
        mean, deviation = statistics.fmean(window), statistics.pstdev(window)
        sigmas = (value - mean) / deviation if deviation else math.inf
        return (
            f"{sigmas:.1f}σ above {mean:.4g}, the mean of {len(window)} steps; faults.spike_sigma is "
            f"{self._config.spike_sigma:g}"
        )

    def accept(self, loss: float, norm: float) -> None:
        """The update was made."""
        self._losses.append(loss)
        self._norms.append(norm)

    def action(self, loss: float, norm: float) -> FaultAction:
        """What becomes of a faulty step; `stop` once the run has had `faults.limit` of them."""
        if len(self.skipped) + len(self.rewinds) >= self._config.limit:
            return FaultAction.stop
        finite = math.isfinite(loss) and math.isfinite(norm)
        return self._config.spike_action if finite else self._config.nonfinite

    def skip(self, step: int) -> None:
        self.skipped.append(step)

    def rewind(self, step: int, to: int, state: Mapping[str, Any]) -> None:
        """Takes the checkpoint's memory (`state` is its state.json) back in; the batches up to `step`'s stay spent."""
        offset, rewinds = self.offset + step - to, self.rewinds
        self.restore(state)
        self.offset, self.rewinds = offset, [*rewinds, {"from": step, "to": to}]

    def updates(self, step: int) -> int:
        """Updates made up to `step`: what Adam's bias correction counts."""
        return step - len(self.skipped)

    def to_state(self) -> dict[str, Any]:
        """For state.json; floats come back from JSON as the same numbers."""
        return {
            "skipped": list(self.skipped),
            "rewinds": list(self.rewinds),
            "batch_offset": self.offset,
            "window": {"losses": list(self._losses), "norms": list(self._norms)} if self._config.spike_sigma else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a state.json, also one that was written without."""
        held = state.get("faults", {})
        self.skipped, self.rewinds = list(held.get("skipped", [])), list(held.get("rewinds", []))
        self.offset = int(held.get("batch_offset", 0))
        for window, name in ((self._losses, "losses"), (self._norms, "norms")):
            window.clear()
            window.extend(held.get("window", {}).get(name, []))
