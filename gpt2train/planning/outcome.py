"""The forecast of a run, told and written before it starts, and beside what it measured at its end.

Flows in: the settings, the number of ranks, the memory of the device. Flows out: settings with the plan applied,
`run_dir/forecast.json`, lines for people. Costs nothing on the way: measured are the numbers in metrics.jsonl and the
allocator's own peak.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2train.config import TrainConfig
from gpt2train.errors import ConfigError
from gpt2train.planning.choose import PROCESS_BYTES, applied, misfit
from gpt2train.planning.forecast import forecast
from gpt2train.planning.memory import GIB, memory
from gpt2train.planning.table import duration
from gpt2train.run_folder import FORECAST, read_json, read_metrics, replace_file

WARM_UP_STEPS = 1
"""Steps at the start that do not count as the run's speed."""


def prepared(config: TrainConfig, ranks: int, *, on_gpu: bool, room_bytes: float) -> TrainConfig:
    """The settings that the run goes by: with the plan applied where that was asked.

    room_bytes: memory of one rank's device, the same on all ranks; 0: unknown. Raises ConfigError for what cannot fit
    in it, or on the cluster, before anything starts.
    """
    if config.cluster.on_gpu != on_gpu:
        config = replace(config, cluster=replace(config.cluster, on_gpu=on_gpu))
    if room_bytes and not config.cluster.memory_bytes:
        nodes = config.cluster.nodes if on_gpu else ranks  # what one rank has is known, so no sharing is left to count
        bytes_of_one = room_bytes if on_gpu else room_bytes + PROCESS_BYTES
        config = replace(config, cluster=replace(config.cluster, memory_bytes=bytes_of_one, nodes=nodes))
    if config.plan.apply:
        config = applied(config, ranks)
    faults = misfit(config, ranks, room_bytes)
    if faults:
        raise ConfigError(faults)
    return config


class Outcome:
    """What a run was expected to take, and took.

    outcome = Outcome(config, ranks)
    for line in outcome.begin(): ...
    for line in outcome.end(first_step=0, peak_bytes=torch.cuda.max_memory_allocated()): ...
    """

    def __init__(self, config: TrainConfig, ranks: int) -> None:
        self._config = config
        self._folder = Path(config.run_dir)
        expected = memory(config, ranks, on_gpu=config.cluster.on_gpu)
        rates = forecast(config, ranks)
        own = 0.0 if config.cluster.on_gpu else PROCESS_BYTES
        self._forecast: dict[str, Any] = {
            # Without what no allocator counts: this is compared with an allocator's peak, on a CPU with the process's.
            "peak_bytes": expected.total - expected.overhead + own,
            "tokens_per_s": rates.tokens_per_s if rates else None,
            "mfu": rates.mfu if rates else None,
            "mfu_source": rates.mfu_source if rates else None,
        }

    def begin(self) -> list[str]:
        """One line; the file is written, and what an earlier start measured is kept in it."""
        before = read_json(self._folder / FORECAST)
        self._write({"forecast": self._forecast, "measured": before.get("measured")})
        rate = self._forecast["tokens_per_s"]
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        left_s = self._config.steps * self._config.batch.sequences * self._config.model.context / rate if rate else 0.0
        whole = f", {duration(left_s)} for all steps" if rate else ""
        return [f"forecast: {self._forecast['peak_bytes'] / GIB:.2f} GiB a rank at its peak{speed}{whole}"]

    def end(self, *, first_step: int, peak_bytes: float, whole_peak_bytes: float | None = None) -> list[str]:
        """Forecast beside measured, of the steps after `first_step` that this start made; empty where it made none.

        peak_bytes: of what the forecast counts, the steps. whole_peak_bytes: with the saves, told where it is more.
        """
        rates = [
            e["tokens_per_s"]
            for e in read_metrics(self._folder)
            if e.get("tokens_per_s") and e["step"] > first_step + WARM_UP_STEPS
        ]
        if not rates:
            return []
        measured = {"peak_bytes": peak_bytes, "tokens_per_s": statistics.median(rates), "steps": len(rates)}
        if whole_peak_bytes is not None and whole_peak_bytes > peak_bytes:
            measured["whole_peak_bytes"] = whole_peak_bytes
        self._write({"forecast": self._forecast, "measured": measured})
        return [f"{name}: forecast {told}, measured {found}{off}" for name, told, found, off in rows(self._folder)]

    def _write(self, content: dict[str, Any]) -> None:
        replace_file(self._folder / FORECAST, (json.dumps(content, indent=1) + "\n").encode())


def rows(run_dir: Path) -> list[Sequence[str]]:
    """(what, forecast, measured, difference) of a run, for its end and its report; empty where nothing was measured."""
    content = read_json(run_dir / FORECAST)
    told, found = content.get("forecast"), content.get("measured")
    if not told or not found:
        return []
    made = [
        ("tokens/s", told.get("tokens_per_s"), found.get("tokens_per_s"), "{:,.0f}", 1.0),
        ("peak memory of a rank", told.get("peak_bytes"), found.get("peak_bytes"), "{:,.2f} GiB", GIB),
        ("peak memory of a rank, its saves' copies included", None, found.get("whole_peak_bytes"), "{:,.2f} GiB", GIB),
    ]
    return [
        (
            name,
            form.format(forecasted / unit) if forecasted else "unknown",
            form.format(measured / unit),
            f" ({measured / forecasted - 1:+.1%})" if forecasted else "",
        )
        for name, forecasted, measured, form, unit in made
        if measured
    ]
