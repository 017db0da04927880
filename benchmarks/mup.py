"""Does the best learning rate of a narrow model stay the best at four times its width? With µP, and without.

    python -m benchmarks.mup [BOOKS] [OUT]

BOOKS: a folder of .txt files (by default ../shared/data/books). OUT: where tokens and trials go and stay, so that a
bench that was killed goes on (by default a folder under the system's temporary one). Both widths are trained with every
rate of the grid, in both parametrizations, which are one and the same at the base's width (a test holds them equal).
Each trial is `benchmarks.recipes`' plain loop on one thread, with a whole schedule of its own, long enough to come past
the plateau of the tokens' frequencies, where the seed decides more than the rate. Prints validation losses, means of
the seeds, and how many grid steps the best rate of the wider lies from that of the base; exit code 1 when with µP it is
more than one. About forty CPU minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.books import VOCABULARY, write_books
from benchmarks.recipes import Trials, shards

BASE, WIDTHS, LAYERS, HEAD_CHANNELS = 32, (32, 128), 3, 16
RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
STEPS, SEEDS = 512, (0, 1)
OPTIONS = {
    "model": "nano",
    "context": 128,
    "vocabulary": VOCABULARY,
    "sequences": 8,
    "validation": 256,
    "evaluate_every": STEPS,
    "precision": "fp32",
    "device": "cpu",
    "tokens": "",
}
NAMES = {BASE: "µP", 0: "standard"}
ALLOWED_STEPS = 1
"""Grid steps between the best rate of the base and that of the widest that still count as carried over."""


def main() -> int:
    books = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data/books")
    out = Path(sys.argv[2] if len(sys.argv) > 2 else Path(tempfile.gettempdir()) / "gpt2train-bench-mup")
    if not list(books.glob("*.txt")):
        print(f"benchmarks.mup: no .txt files in {books}; give the folder of some novels", file=sys.stderr)
        return 0
    tokens = out / "books" / "tokens"
    if not (tokens / "manifest.json").exists():
        print(write_books(books, tokens))
    torch.set_num_threads(1)
    options = argparse.Namespace(**OPTIONS, books=books.name, out=out / "trials.jsonl")
    run = Trials(options, shards(tokens))
    found = {
        (base, width): [loss(run, width, base if width != BASE else 0, rate) for rate in RATES]
        for width in WIDTHS
        for base in NAMES
    }
    print("\n".join(table(found)))
    moved = {name: abs(place(found[base, WIDTHS[-1]]) - place(found[base, BASE])) for base, name in NAMES.items()}
    for name, steps in moved.items():
        print(f"{name}: the best rate of {WIDTHS[-1]} channels lies {steps} grid steps from that of {BASE}")
    return 0 if moved["µP"] <= ALLOWED_STEPS else 1


def loss(run: Trials, width: int, base: int, rate: float) -> float:
    """Validation loss at the end, nats a token, mean of the seeds."""
    settings = {
        "model.layers": str(LAYERS),
        "model.channels": str(width),
        "model.heads": str(width // HEAD_CHANNELS),
        "model.mup_base": str(base),
        "optimizer.lr": str(rate),
    }
    return float(np.mean([run.run(settings, STEPS, seed)["loss"] for seed in SEEDS]))


def place(losses: Sequence[float]) -> int:
    """Of the lowest; a loss that is not a number counts as the highest."""
    return min(range(len(losses)), key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))


def table(found: Mapping[tuple[int, int], Sequence[float]]) -> list[str]:
    """Lines of a Markdown table, the best of each row in bold."""
    lines = [f"| | channels | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|" + "---|" * (2 + len(RATES))]
    for base, name in NAMES.items():
        for width in WIDTHS:
            losses = found[base, width]
            cells = [f"**{x:.4f}**" if i == place(losses) else f"{x:.4f}" for i, x in enumerate(losses)]
            lines.append(f"| {name} | {width} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
