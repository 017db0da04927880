"""Laws of loss and of the learning rate, fitted to trials.

Flows in: (parameters, tokens, loss) of finished runs; (parameters, learning rate, loss) of a grid. Flows out: a
`ScalingLaw` and a `RateRule`.

    L(N, D) = E + A / N^α + B / D^β

in nats a token (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", section 3.3), fitted as they
do: the Huber loss (δ = 10⁻³) of the logarithms, by L-BFGS from a grid of starts (appendix D.2). Where all runs saw
equally many tokens, L(N) = E + A / N^α (Kaplan et al. 2020, section 1.2, with that constant).

Intervals are of the bootstrap: the fit anew to as many runs, drawn with replacement, RESAMPLES times (Efron and
Tibshirani 1993). They say how far the fit hangs on single runs; they do not say how far the law itself holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HUBER_DELTA = 1e-3
"""Hoffmann et al. 2022, appendix D.2."""
RESAMPLES = 100
INTERVAL = (0.05, 0.95)
# Hoffmann et al. start from a grid of 4,500 points about what they expect at their sizes; ours spans the same exponents
# more coarsely, and amounts that follow from the data.
_EXPONENTS = (0.2, 0.5, 1.0)
_FLOORS = (0.0, 0.6)
"""E over the lowest loss."""
REFINED = 4
"""Of the fits by squares, how many are gone on from."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    name: str
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """Constants in nats a token; B is 0 and β 1 where the tokens did not vary."""

    E: float
    A: float
    alpha: float
    B: float = 0.0
    beta: float = 1.0
    resampled: list[tuple[float, float, float, float, float]] = field(default_factory=list, repr=False)
    """The same five of each bootstrap fit."""

    def loss(self, parameters: float, tokens: float) -> float:
        return _loss((self.E, self.A, self.alpha, self.B, self.beta), parameters, tokens)

    def interval(self, parameters: float, tokens: float) -> tuple[float, float] | None:
        """Within which 90 % of the bootstrap's forecasts lie; None where there are too few."""
        if len(self.resampled) < 20:
            return None
        losses = [_loss(law, parameters, tokens) for law in self.resampled]
        low, high = np.quantile(losses, INTERVAL)
        return float(low), float(high)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each constant."""
        if len(self.resampled) < 20:
            return {}
        bounds = np.quantile(np.array(self.resampled), INTERVAL, axis=0)
        names = ("E", "A", "alpha", "B", "beta") if self.B else ("E", "A", "alpha")
        return {name: (float(bounds[0, i]), float(bounds[1, i])) for i, name in enumerate(names)}


def _loss(law: tuple[float, float, float, float, float], parameters: float, tokens: float) -> float:
    E, A, alpha, B, beta = law
    return E + A / parameters**alpha + B / tokens**beta


def fit(points: Sequence[Point], *, resamples: int | None = None, seed: int = 0) -> ScalingLaw | None:
    """The law of the points; None where there are fewer sizes or runs than it takes, or their losses do not fall.

    L(N, D) takes three sizes, three amounts of tokens and six runs; L(N) three sizes.
    """
    points = [p for p in points if math.isfinite(p.loss) and p.loss > 0]
    sizes, amounts = {p.parameters for p in points}, {p.tokens for p in points}
    both = len(amounts) >= 3 and len(points) >= 6
    if len(sizes) < 3 or (len(amounts) > 1 and not both):
        return None
    found = _fit(points, both, None)
    if found is None:
        return None
    generator = np.random.default_rng(seed)
    again = []
    wanted = RESAMPLES if resamples is None else resamples
    for _ in range(wanted if len(points) > (5 if both else 3) else 0):
        drawn = [points[i] for i in generator.integers(0, len(points), len(points))]
        enough = len({p.parameters for p in drawn}) >= 3 and (not both or len({p.tokens for p in drawn}) >= 2)
        if enough and (refit := _fit(drawn, both, found)) is not None:
            again.append(refit)
    return ScalingLaw(*found, resampled=again)


Constants = tuple[float, float, float, float, float]


def _fit(points: Sequence[Point], both: bool, near: Constants | None) -> Constants | None:
    """The best of L-BFGS from all starts, or from `near` alone."""
    from scipy.optimize import minimize

    N = np.array([p.parameters for p in points], dtype=np.float64)
    D = np.array([p.tokens for p in points], dtype=np.float64)
    L = np.array([p.loss for p in points], dtype=np.float64)
    n, d = np.log(N / N.min()), np.log(D / D.min())
    target = np.log(L)

    def value(x: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
        # x: log E, log A', α, log B', β with A' = A/N_min^α: parts of the loss at the smallest run, all of one size.
        e, a, b = math.exp(x[0]), np.exp(x[1] - x[2] * n), np.exp(x[3] - x[4] * d) if both else 0.0 * d
        predicted = e + a + b
        error = np.log(predicted) - target
        near_zero = np.abs(error) <= delta
        huber = np.where(near_zero, 0.5 * error**2, delta * (np.abs(error) - 0.5 * delta))
        slope = np.where(near_zero, error, delta * np.sign(error)) / predicted
        gradient = [e * slope.sum(), slope @ a, slope @ (-n * a), slope @ b, slope @ (-d * b)]
        return float(huber.sum()) / delta, np.array(gradient) / delta  # in units of δ, for the optimizer's tolerances

    bounds: list[tuple[float, float]] = [
        (-12.0, math.log(L.min())),
        (-12.0, 6.0),
        (0.01, 4.0),
        (-12.0, 6.0),
        (0.01, 4.0),
    ]

    def descend(begin: Sequence[float], delta: float) -> tuple[float, np.ndarray]:
        clipped = [min(max(x, low), high) for x, (low, high) in zip(begin, bounds, strict=True)]
        limits = {"maxiter": 150, "maxfun": 400, "ftol": 1e-12, "gtol": 1e-9}
        result = minimize(value, clipped, (delta,), jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
        return float(result.fun), result.x

    if near is not None:
        E, A, alpha, B, beta = near
        part_b = math.log(max(B, 1e-9)) - beta * math.log(D.min())
        found = descend(
            [math.log(max(E, 1e-5)), math.log(A) - alpha * math.log(N.min()), alpha, part_b, beta], HUBER_DELTA
        )[1]
    else:
        # The kinks of so small a δ make a long way: first by squares from everywhere, then from the best few.
        spread = math.log(max(float(L.max() - L.min()), 1e-6))
        starts = [
            [math.log(max(floor * L.min(), 1e-5)), spread, alpha, spread, beta]
            for floor in _FLOORS
            for alpha in _EXPONENTS
            for beta in (_EXPONENTS if both else (1.0,))
        ]
        by_squares = sorted((descend(start, 1.0) for start in starts), key=lambda end: end[0])
        found = min((descend(list(x), HUBER_DELTA) for _, x in by_squares[:REFINED]), key=lambda end: end[0])[1]
    if not 0.0101 < found[2] < 3.99 or math.exp(found[1]) < 1e-4 * L.min():
        return None  # the loss does not fall with size, or falls at once: no power law
    e, a, alpha, b, beta = (float(x) for x in found)
    A, B = math.exp(a) * float(N.min()) ** alpha, math.exp(b) * float(D.min()) ** beta if both else 0.0
    return (math.exp(e) if e > -11.9 else 0.0), A, alpha, B, beta if both else 1.0


@dataclass(frozen=True)
class HeldOut:
    """A run that the law had not seen, and what the law said of it."""

    name: str
    measured: float
    forecast: float
    interval: tuple[float, float] | None

    @property
    def miss(self) -> float:
        """Part of the measured loss that the forecast is off by; above 0: forecast too high."""
        return self.forecast / self.measured - 1


def hold_out(points: Sequence[Point], *, resamples: int | None = None) -> tuple[ScalingLaw | None, list[HeldOut]]:
    """The law fitted without the largest size, and what it says of that size's runs."""
    largest = max((p.parameters for p in points), default=0)
    law = fit([p for p in points if p.parameters < largest], resamples=resamples)
    if law is None:
        return None, []
    kept = [p for p in points if p.parameters == largest]
    return law, [
        HeldOut(p.name, p.loss, law.loss(p.parameters, p.tokens), law.interval(p.parameters, p.tokens)) for p in kept
    ]


@dataclass(frozen=True)
class RateRule:
    """lr(N) = c · N^p, through the best learning rates of the sizes that had a grid."""

    c: float
    p: float
    best: dict[float, float]
    """Parameters → the best learning rate: the lowest point of a parabola over log lr through the best and its two
    neighbors, or the best itself at an edge."""
    at_edge: list[float]
    """Sizes whose best was the grid's first or last: the true one may lie outside."""

    def rate(self, parameters: float) -> float:
        """To three digits, so that it reads and names well."""
        return float(f"{self.c * parameters**self.p:.3g}")


def rate_rule(trials: Sequence[tuple[float, float, float]], *, constant: bool = False) -> RateRule | None:
    """From (parameters, learning rate, loss); None where no size had two learning rates.

    With one such size its best is everyone's (p = 0); so is the geometric mean of all bests where the rate is to be
    `constant`, as µP promises. Trials whose loss is not finite count as the worst.
    """
    by_size: dict[float, list[tuple[float, float]]] = {}
    for parameters, rate, loss in trials:
        by_size.setdefault(parameters, []).append((rate, loss if math.isfinite(loss) else math.inf))
    best: dict[float, float] = {}
    edges = []
    for parameters, tried in sorted(by_size.items()):
        if len({rate for rate, _ in tried}) < 2:
            continue
        tried.sort()
        place = min(range(len(tried)), key=lambda i: tried[i][1])
        best[parameters] = tried[place][0]
        if place in (0, len(tried) - 1):
            edges.append(parameters)
            continue
        x = [math.log(rate) for rate, _ in tried[place - 1 : place + 2]]
        y = [loss for _, loss in tried[place - 1 : place + 2]]
        if all(map(math.isfinite, y)):
            curve, slope, _ = np.polyfit(np.array(x) - x[1], y, 2)
            best[parameters] = math.exp(x[1] - slope / (2 * curve)) if curve > 0 else best[parameters]
    if not best:
        return None
    if constant or len(best) == 1:
        return RateRule(math.exp(float(np.mean(np.log(list(best.values()))))), 0.0, best, edges)
    p, log_c = np.polyfit(np.log(list(best)), np.log(list(best.values())), 1)
    return RateRule(math.exp(log_c), float(p), best, edges)


@dataclass(frozen=True)
class Findings:
    """What the finished runs of one kind (recipe and data) say together."""

    kind: str
    points: list[Point]
    law: ScalingLaw | None
    """Fitted to all points."""
    held_out: list[HeldOut]
    """What the law that was fitted without the largest size says of it."""
    naive_miss: float | None
    """The largest miss of who expects of the largest size the loss of the one below: what a law has to beat."""
    rule: RateRule | None
    forecasts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def largest_miss(self) -> float | None:
        return max((abs(h.miss) for h in self.held_out), default=None)
