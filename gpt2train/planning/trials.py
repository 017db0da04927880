"""Values of settings → the trials of a sweep: every combination, each with a name and its overrides.

Flows in: one axis for each override, `[(label, [override, …]), …]`. Flows out: `Spec`s. With a grid of learning rates
(`rates`), first the smallest sizes at the fewest steps run with each of them; the rule through their best ones
(planning.law.rate_rule) then gives every trial its rate.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

Axis = Sequence[tuple[str, Sequence[str]]]
HEAD_CHANNELS = 64
"""Channels of a head in all of the paper's sizes."""


@dataclass(frozen=True)
class Spec:
    """A trial: its name, and what it sets."""

    name: str
    overrides: list[str]


def size_axis(sizes: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """`LAYERSxCHANNELS` or `LAYERSxCHANNELSxHEADS` → an axis, and what is wrong with them, one line each."""
    axis, faults = [], []
    for size in sizes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", str(size))
        if match is None:
            faults.append(f"sizes=[{size}]: must be LAYERSxCHANNELS or LAYERSxCHANNELSxHEADS; give sizes=[4x128,6x192]")
            continue
        layers, channels = int(match[1]), int(match[2])
        heads = int(match[3]) if match[3] else max(channels // HEAD_CHANNELS, 1)
        given = {"name": size, "layers": layers, "channels": channels, "heads": heads}
        axis.append((str(size), [f"model.{key}={value}" for key, value in given.items()]))
    return axis, faults


def specs(axes: Sequence[Axis]) -> list[Spec]:
    """All combinations, the last axis the fastest; named by what varies."""
    found = []
    for combination in itertools.product(*axes):
        swept = [label for (label, _), axis in zip(combination, axes, strict=True) if len(axis) > 1]
        name = "_".join(swept).replace("/", "-") or "single"
        found.append(Spec(name, [o for _, overrides in combination for o in overrides]))
    return found


def rate_axis(rates: Sequence[float]) -> list[tuple[str, list[str]]]:
    return [(f"optimizer.lr={rate:g}", [f"optimizer.lr={rate:g}"]) for rate in rates]


def grid(axes: Sequence[Axis], rates: Sequence[float], smallest: Sequence[str]) -> list[Spec]:
    """The trials that the rule is made of: sizes whose label is in `smallest`, the fewest steps, each rate."""
    narrowed: list[Axis] = []
    for axis in axes:
        kept = [option for option in axis if option[0] in smallest] or list(axis)
        if kept[0][0].startswith("steps="):
            kept = [min(kept, key=lambda option: int(option[0].removeprefix("steps=")))]
        narrowed.append(kept)
    found = []
    for combination in itertools.product(*narrowed, rate_axis(rates)):
        # Named as the trials of the sweep itself, so that a rate that the rule gives again is not trained twice.
        varying = [len(axis) > 1 for axis in axes] + [True]
        name = "_".join(label for (label, _), varies in zip(combination, varying, strict=True) if varies)
        found.append(Spec(name.replace("/", "-"), [o for _, overrides in combination for o in overrides]))
    return found


def at_rates(axes: Sequence[Axis], rates: Sequence[float]) -> list[Spec]:
    """All combinations, the i-th with the i-th rate."""
    found = []
    for combination, rate in zip(itertools.product(*axes), rates, strict=True):
        label = f"optimizer.lr={rate:g}"
        swept = [each for (each, _), axis in zip(combination, axes, strict=True) if len(axis) > 1]
        name = "_".join([*swept, label]).replace("/", "-")
        found.append(Spec(name, [*(o for _, overrides in combination for o in overrides), label]))
    return found
