"""Tokens per second of evaluation beside the training forward pass, and of generation beside transformers.

The training forward pass is the one of the training loop, loss included, over full sequences and without gradients.
Tasks are measured as `gpt2train evaluate` does it, from requests to scores; a token counts when it goes through the
network, padding does not. All take turns, several times over, so that a machine that slows down does so for all. What
is compared are CPU seconds where there is no GPU, since other programs do not count in those.

    python -m benchmarks.inference [--model small] [--batch 4] [--items 64] [--rounds 2] [--data FOLDER] [--json FILE]

`--data`: a folder with the tasks' files (docs/evaluation.md); without it, texts of random words of the same lengths.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import generation
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.compose import CONFIG_FOLDER, compose
from gpt2train.config import ModelConfig, TrainConfig
from gpt2train.evaluation import likelihood, measure, sources
from gpt2train.evaluation.items import Completions, Item, LastWord, Stretch
from gpt2train.evaluation.measure import Prepared, Subject
from gpt2train.evaluation.tasks import TASKS
from gpt2train.model import GPT

TASK_NAMES = ("lambada", "hellaswag", "wikitext2")
GOAL = 0.9
"""Of the training forward pass's tokens per second, what evaluation is to reach."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=4, help="sequences of full context at once")
    parser.add_argument("--items", type=int, default=64, help="items, or windows, of each task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a text, in generation")
    parser.add_argument("--data", default="", help="folder with the tasks' files")
    parser.add_argument("--json", default="", help="file for the numbers")
    options = parser.parse_args()

    config = _model_config(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(config, seed=0).to(device).eval()
    print(f"{options.model}, context {config.context}, batch {options.batch}, {device}, {platform.machine()}")
    jobs = {"training forward": _training_forward(model, options.batch)}
    for name in TASK_NAMES:
        prepared = _prepare(name, config, options)
        jobs[name] = _task(model, prepared, device)

    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(options.rounds + 1):
        for name, job in jobs.items():
            begin = _clock(device)
            tokens = job()
            took_s = _clock(device) - begin
            if round_number:  # the first round warms up
                rates[name].append(tokens / took_s)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    reference = medians["training forward"]
    unit = "tokens/s" if device.type == "cuda" else "tokens per CPU second"
    print(f"{'':<20}{unit:>24}{'of the training forward':>26}")
    for name, rate in medians.items():
        print(f"{name:<20}{rate:>24,.0f}{rate / reference:>26.2f}")
    least = min(rate for name, rate in medians.items() if name in TASK_NAMES) / reference
    print(f"the slowest task reaches {least:.2f} of the training forward pass; the goal is {GOAL}")
    generated = generation.compare(options.model, tokens=options.tokens, rounds=options.rounds)
    if options.json:
        content = {
            "generation": generated,
            "model": options.model,
            "device": str(device),
            "unit": unit,
            "rates": rates,
            "least_ratio": least,
        }
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _model_config(name: str) -> ModelConfig:
    found = compose(TrainConfig, [f"model={name}"], groups=CONFIG_FOLDER / "train")
    assert isinstance(found, TrainConfig)
    return found.model


def _training_forward(model: GPT, batch: int) -> Callable[[], int]:
    context = model.config.context
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocabulary, (batch, context + 1), generator=generator)

    def forward() -> int:
        rows = tokens_BT.to(model.wte.weight.device)
        with torch.no_grad():
            model(rows[:, :-1], rows[:, 1:]).item()
        return batch * context

    return forward


def _task(model: GPT, prepared: Prepared, device: torch.device) -> Callable[[], int]:
    subject = Subject(likelihood.plain_forward(model), model.config, device, model=model)
    tokenizer = load_tokenizer()

    def run() -> int:
        measure.measure(prepared, subject, tokenizer)
        return prepared.tokens

    return run


def _prepare(name: str, config: ModelConfig, options: Any) -> Prepared:
    task = TASKS[name]
    found = sources.find(task, [options.data]) if options.data else None
    test_set = sources.read(task, found) if found else sources.TestSet(_made_up(name, options.items, config), "", "")
    return measure.prepare(
        task,
        test_set,
        load_tokenizer(),
        config,
        stride=config.context // 2,
        budget=options.batch * config.context,
        limit=options.items,
    )


def _made_up(name: str, items: int, config: ModelConfig) -> list[Item]:
    """Texts of random words, about as long as the task's own: LAMBADA's passages, HellaSwag's stories and endings."""
    generator = np.random.default_rng(0)
    words = ["time", "people", "water", "house", "world", "under", "small", "never", "light", "paper", "green", "river"]

    def text(least: int, most: int) -> str:
        return " ".join(generator.choice(words, size=int(generator.integers(least, most + 1))))

    if name == "lambada":
        return [LastWord(text(50, 120), " river") for _ in range(items)]
    if name == "hellaswag":
        made: list[Item] = []
        for _ in range(items):
            context = text(15, 75)
            made.append(Completions(tuple((context, f" {text(5, 35)}") for _ in range(4)), 0))
        return made
    long = text(items * config.context // 2 + config.context, items * config.context // 2 + config.context)
    return [Stretch(long, len(long.split()))]


if __name__ == "__main__":
    main()
