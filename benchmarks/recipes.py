"""What each change of `recipe=modern` is worth: validation loss after equally many tokens, and tokens to equal loss.

For both recipes a small grid of learning rates is run and the best taken; then gpt2 with each change alone, modern
without each, and modern at parts of the budget, each with a whole schedule of its own, since a loss in the middle of a
schedule says little. A trial is a plain PyTorch loop over the network, the optimizer and the order of data that
`train` uses (tests hold `train` to the same losses), on one thread; a fixed set of held-out passages is the validation.

The tokens are those of a folder of books, cut into passages, every tenth held out, or of any token shards. On a CPU
nine tenths of a small model's work is its 50,257 logits, so by default tokens are named anew by how common they are
and the rarest share one name: the losses are then of that simpler language, alike for all trials, and no others'.

    python -m benchmarks.recipes --books ../shared/data/books [--steps 400] [--out trials.jsonl] [--only main]
    python -m benchmarks.recipes --tokens corpus/tokens --vocabulary 0 --device cuda …

Trials done are kept in `--out`, a line each: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.compose import CONFIG_FOLDER, compose
from gpt2train.config import TrainConfig
from gpt2train.data import BatchOrder
from gpt2train.model import GPT
from gpt2train.optim import learning_rate, make_optimizer, set_learning_rate
from gpt2train.optimizers.muon import Muon, share_whole

PASSAGE_CHARACTERS = 8_000
HELD_OUT_EVERY = 10
CHANGES: dict[str, dict[str, tuple[str, str]]] = {
    "Muon": {"optimizer.name": ("adamw", "muon")},
    "rotary positions": {"model.positions": ("learned", "rotary")},
    "ReLU²": {"model.activation": ("gelu", "relu2")},
    "RMS norm": {"model.norm": ("layer", "rms")},
    "no biases": {"model.biases": ("true", "false")},
    "QK-norm": {"model.qk_norm": ("false", "true")},
    "embedding norm": {"model.embedding_norm": ("false", "true")},
    "untied head": {"model.tied_head": ("true", "false"), "optimizer.head_lr_ratio": ("1.0", "")},
    "zero projections": {"model.zero_projections": ("false", "true")},
    "soft-capped logits": {"model.logit_softcap": ("0.0", "15.0")},
    "wsd schedule": {"optimizer.schedule": ("cosine", "wsd"), "optimizer.min_lr_ratio": ("0.1", "0.0")},
    "embeddings' own rate": {"optimizer.embedding_lr_ratio": ("1.0", "")},
}
"""Name → settings as in 2019 and today; an empty value is that of the recipe."""
BUDGETS = (0.3, 0.4, 0.5, 0.6)


def books(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of training and validation: passages of all books in turn, each ended by `<|endoftext|>`."""
    tokenizer = load_tokenizer()
    splits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    number = 0
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        for start in range(0, len(text), PASSAGE_CHARACTERS):
            ids = tokenizer.encode(text[start : start + PASSAGE_CHARACTERS])
            splits[number % HELD_OUT_EVERY == 0].append(np.append(ids, END_OF_TEXT).astype(np.int64))
            number += 1
    return np.concatenate(splits[0]), np.concatenate(splits[1])


def shards(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of training and validation of token shards, whole, in memory."""
    opened = TokenShards.open(str(folder))
    train, validation = (
        opened.split(name).read(0, opened.split(name).tokens).astype(np.int64) for name in ("train", "validation")
    )
    return train, validation


def renamed(train: np.ndarray, validation: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Both with the commonest `vocabulary` - 1 tokens of `train` named 0, 1, …, and all others the last number."""
    counts = np.bincount(train, minlength=END_OF_TEXT + 1)
    names = np.full(len(counts), vocabulary - 1, dtype=np.int64)
    common = np.argsort(-counts, kind="stable")[: vocabulary - 1]
    names[common] = np.arange(len(common))
    return names[train], names[validation]


def windows(tokens: np.ndarray, indices: np.ndarray, context: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[i * context : i * context + context + 1] for i in indices]))


def trial(
    settings: Sequence[str], data: tuple[np.ndarray, np.ndarray], options: argparse.Namespace, steps: int, seed: int
) -> dict[str, Any]:
    """Trains once; the validation losses by tokens seen."""
    config = compose(
        TrainConfig,
        [
            f"model={options.model}",
            *settings,
            f"model.context={options.context}",
            *([f"model.vocabulary={options.vocabulary}"] if options.vocabulary else []),
            f"steps={steps}",
            f"batch.sequences={options.sequences}",
            f"seed={seed}",
        ],
        groups=CONFIG_FOLDER / "train",
    )
    device = torch.device(options.device)
    train, validation = data
    context, vocabulary = config.model.context, config.model.vocabulary
    model = GPT(config.model, seed=seed).to(device)
    low = torch.bfloat16 if options.precision == "bf16" else torch.float32
    optimizer = make_optimizer(model, config.optimizer, device, low)
    if isinstance(optimizer, Muon):
        share_whole(optimizer, model.named_parameters())
    order = BatchOrder(seed, (len(train) - 1) // context, options.sequences)
    held_out = np.linspace(0, (len(validation) - 1) // context - 1, options.validation, dtype=np.int64)
    tokens_per_step = options.sequences * context
    curve, begin = {}, time.process_time()
    for step in range(1, steps + 1):
        rows = windows(train, order.indices(step - 1), context).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        if config.optimizer.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        set_learning_rate(optimizer.param_groups, learning_rate(config.optimizer, step, steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % options.evaluate_every == 0 or step == steps:
            losses = []
            with torch.no_grad():
                for place in range(0, len(held_out), options.sequences):
                    rows = windows(validation, held_out[place : place + options.sequences], context).to(device)
                    losses += [model(rows[:, :-1], rows[:, 1:]).item()] * len(rows)
            curve[step * tokens_per_step] = statistics.fmean(losses)
            if not math.isfinite(curve[step * tokens_per_step]):
                break
    assert vocabulary > int(train.max())
    return {"loss": curve[max(curve)], "curve": curve, "cpu_s": round(time.process_time() - begin, 1)}


class Trials:
    """Trials by their settings, steps and seed; each is run once and kept in a file."""

    def __init__(self, options: argparse.Namespace, data: tuple[np.ndarray, np.ndarray]) -> None:
        self._options, self._data, self._done = options, data, dict[str, dict[str, Any]]()
        if options.out.exists():
            for line in options.out.read_text().splitlines():
                entry = json.loads(line)
                self._done[entry.pop("key")] = entry

    def run(self, settings: Mapping[str, str], steps: int, seed: int) -> dict[str, Any]:
        o = self._options
        common = [o.model, o.context, o.vocabulary, o.sequences, o.precision, o.validation, o.books or o.tokens]
        chosen = [f"{name}={value}" for name, value in settings.items() if value]
        key = json.dumps([*map(str, common), *chosen, steps, seed])
        if key not in self._done:
            self._done[key] = trial(chosen, self._data, o, steps, seed)
            with open(o.out, "a") as f:
                f.write(json.dumps({"key": key, **self._done[key]}) + "\n")
            print(f"{self._done[key]['loss']:.4f} {' '.join(chosen)} steps={steps} seed={seed}", file=sys.stderr)
        return self._done[key]


def trials(options: argparse.Namespace, run: Trials) -> Iterator[tuple[str, str, list[float]]]:
    """(group, name, final losses by seed), as they come."""
    steps, best = options.steps, {}
    for recipe in ("gpt2", "modern"):
        losses = {}
        for rate in options.rates:
            losses[rate] = run.run({"recipe": recipe, "optimizer.lr": rate}, steps, 0)["loss"]
            yield "learning rates", f"{recipe}, {rate}", [losses[rate]]
        best[recipe] = min(losses, key=lambda rate: losses[rate])

    def losses_of(recipe: str, changes: Mapping[str, str], part: float = 1.0) -> list[float]:
        settings = {"recipe": recipe, "optimizer.lr": best[recipe], **changes}
        return [run.run(settings, round(steps * part), seed)["loss"] for seed in range(options.seeds)]

    for recipe in ("gpt2", "modern"):
        yield "whole budget", recipe, losses_of(recipe, {})
    for part in BUDGETS:
        yield "part of the budget", f"modern, {part:.0%}", losses_of("modern", {}, part)
    if options.only == "main":
        return
    for name, change in CHANGES.items():
        yield "modern without", name, losses_of("modern", {key: value[0] for key, value in change.items()})
    for name, change in CHANGES.items():
        yield "gpt2 with", name, losses_of("gpt2", {key: value[1] for key, value in change.items()})


def tokens_to_reach(target: float, parts: Mapping[float, float]) -> float | None:
    """The part of the budget at which a straight line between two budgets' losses, over log tokens, meets `target`."""
    known = sorted(parts.items())
    for (lower, high), (upper, low) in itertools.pairwise(known):
        if low <= target <= high:
            share = (high - target) / (high - low) if high > low else 0.0
            return math.exp(math.log(lower) + share * (math.log(upper) - math.log(lower)))
    return known[0][0] if known and known[0][1] <= target else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--books", type=Path, help="folder of .txt files")
    source.add_argument("--tokens", type=Path, help="folder of token shards")
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rates", nargs="+", default=["0.002", "0.004", "0.008"], help="learning rates to try")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--only", choices=("main",), help="leave the single changes out")
    sizes = {"context": 128, "vocabulary": 4096, "sequences": 16, "steps": 400, "seeds": 1, "validation": 256}
    for name, value in (sizes | {"evaluate_every": 50, "threads": 1}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = books(options.books) if options.books else shards(options.tokens)
    if options.vocabulary:
        data = renamed(*data, options.vocabulary)
    found: dict[str, dict[str, list[float]]] = {}
    for group, name, losses in trials(options, Trials(options, data)):
        found.setdefault(group, {})[name] = losses
    whole = {name: statistics.fmean(losses) for name, losses in found["whole budget"].items()}
    tokens = options.steps * options.sequences * options.context
    print(f"{len(data[0]):,} training tokens, {tokens:,} seen; {options.validation} validation windows")
    for group, rows in found.items():
        print(f"\n{group}")
        for name, losses in rows.items():
            mean, base = statistics.fmean(losses), whole["modern" if group == "modern without" else "gpt2"]
            spread = f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(losses) > 1 else ""
            print(f"  {name:24} {mean:.4f}{spread}  {mean - base:+.4f}")
    parts = {part: statistics.fmean(found["part of the budget"][f"modern, {part:.0%}"]) for part in BUDGETS}
    reached = tokens_to_reach(whole["gpt2"], parts | {1.0: whole["modern"]})
    answer = f"with {reached:.0%} of its tokens" if reached else "not at all"
    print(f"\nmodern reaches gpt2's loss {answer}")


if __name__ == "__main__":
    main()
