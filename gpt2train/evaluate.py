"""Validation loss, the perplexity of texts, and the command that measures them and the tasks of `evaluation/`.

Flows in: a model and the validation split of token shards, or text files. Flows out: mean nats a token and what follows
from it (perplexity, bits a byte). The validation loss costs one forward pass over every sequence; a text costs
context / stride passes over itself.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from data_pipeline.token_shards import TokenShards, TokenSplit
from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY, Tokenizer
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train import checkpoint, distributed
from gpt2train.data import TokenWindows
from gpt2train.errors import ConfigError
from gpt2train.evaluation import likelihood, suite, table
from gpt2train.evaluation.config import EvaluateCommandConfig, check_evaluate
from gpt2train.evaluation.metrics import exp
from gpt2train.model import GPT
from gpt2train.release.hf import choose_device, is_hf_folder, load_model
from gpt2train.run_folder import data_folder, run_dir_of

TIMEOUT_S = 600.0
"""Ranks that share an evaluation wait this long for each other."""


def validation_loss(
    model: nn.Module,
    split: TokenSplit,
    *,
    context: int,
    sequences: int,
    micro: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Mean nats per token over the first `sequences` windows of `split` (0: all), the same on every rank.

    `model(tokens_BT, targets_BT)` gives the mean cross-entropy; it is put into eval mode and back. Ranks take micro
    batches in turn, whose composition does not depend on `world_size`, and the sum is made in float64 in the order of
    the data: any number of ranks gives the same number. Every rank makes equally many forward passes, as ZeRO 3 gathers
    weights within them; one that has no micro batch left runs the first one and throws the result away.

    Raises ConfigError when the split is too short for one window.
    """
    windows = TokenWindows(split, context)
    count = len(windows) if sequences == 0 else min(sequences, len(windows))
    if count <= 0:
        raise ConfigError(
            [
                f"validation split: its {split.tokens} tokens are fewer than one sequence of model.context={context} "
                f"and its target; raise tokenize.validation_fraction or give evaluate.every_steps=0"
            ]
        )
    device = torch.device(device)
    starts = range(0, count, micro)
    nats = torch.zeros(len(starts), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for turn in range(-(-len(starts) // world_size)):
            mine = turn * world_size + rank
            start = starts[mine] if mine < len(starts) else 0
            stop = min(start + micro, count)
            batch_BT = torch.from_numpy(windows.read(np.arange(start, stop))).to(device)
            with torch.no_grad(), _autocast(device, autocast_dtype):
                loss = model(batch_BT[:, :-1], batch_BT[:, 1:])
            if mine < len(starts):
                nats[mine] = loss.double().item() * (stop - start)  # host-device sync, once a micro batch
    finally:
        model.train(was_training)
    if world_size > 1:
        nats = nats.to(device)
        torch.distributed.all_reduce(nats)  # every entry is zero on all ranks but one, so the sum is exact
        nats = nats.cpu()
    return nats.sum().item() / count


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class Measure:
    """How well a model predicts a stretch of text."""

    name: str
    nats: float
    """Sum of -ln p over the predicted tokens."""
    tokens: int
    """Tokens predicted."""
    text_bytes: int = 0
    """UTF-8 bytes of the text that they spell, `<|endoftext|>` not counted; 0: not known."""
    words: int = 0
    """Words of the original text, split at white space; 0: not counted."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """The same probability of the text, spread over its words: comparable between vocabularies."""
        return exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


def text_measure(
    model: GPT,
    text: str,
    tokenizer: Tokenizer,
    *,
    stride: int,
    batch: int,
    name: str = "",
    forward: likelihood.Forward | None = None,
) -> Measure:
    """The text's probability by a sliding window; every token of it is predicted once, the first from `<|endoftext|>`.

    `batch` windows of full context run at once; see `likelihood.windows`. Raises ConfigError for an empty text.
    """
    tokens = np.concatenate([[END_OF_TEXT], tokenizer.encode(text)]).astype(np.uint16)
    if len(tokens) == 1:
        raise ConfigError([f"texts={name}: is empty; give a file with text"])
    context = model.config.context
    requests = likelihood.windows(tokens, context=context, stride=stride)
    rows = likelihood.batches(requests, budget=batch * context)
    device = model.wte.weight.device
    found = [likelihood.score(forward or likelihood.plain_forward(model), r, requests, device=device) for r in rows]
    nats = -float(likelihood.scattered(rows, found, len(requests))[:, likelihood.LOG_LIKELIHOOD].sum())
    spelled = len(tokenizer.decode_bytes(tokens[1:]))
    return Measure(name, nats, len(tokens) - 1, text_bytes=spelled, words=len(text.split()))


def split_bytes(split: TokenSplit, tokens: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of positions 1 to `tokens` of a split, the targets of its first windows; `<|endoftext|>` counts 0."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(VOCABULARY)], dtype=np.int64)
    lengths[END_OF_TEXT] = 0
    block = 1 << 24
    return sum(
        int(lengths[split.read(start, min(start + block, tokens + 1))].sum()) for start in range(1, tokens + 1, block)
    )


def evaluate(config: EvaluateCommandConfig) -> int:
    """Prints the validation loss, the texts' perplexities and the tasks' scores; a run keeps them in evaluation.json.

    Under torchrun all ranks share the work; rank 0 speaks and writes. Started again after a kill, the tasks go on.
    """
    faults = check_evaluate(config)
    if faults:
        raise ConfigError(faults)
    hugging_face = is_hf_folder(config.run)
    source = Path(config.run) if hugging_face else checkpoint.resolve(config.run)
    world = _world(config)
    model = load_model(source, world.device)
    if (config.tasks or config.harness) and model.config.vocabulary < VOCABULARY:
        raise ConfigError(
            [f"run={config.run}: its {model.config.vocabulary} tokens are fewer than GPT-2's {VOCABULARY}; train anew"]
        )
    tokenizer = load_tokenizer()
    results: dict[str, Any] = {"model": model.config.to_json(), "source": source.name}
    if not hugging_face:
        state = checkpoint.read_state(source)
        results |= {"step": state["step"], "tokens_trained": state["tokens"]}
    run_dir = None if hugging_face else run_dir_of(source)
    folder = Path(config.out) if config.out else run_dir
    data = Path(config.data) if config.data else data_folder(run_dir) if run_dir else None
    if not (data or config.texts or config.tasks or config.harness):
        raise ConfigError([f"data='': {config.run} names no data; give data=corpus/tokens, texts=[FILE] or tasks=[…]"])
    reads_shards = config.validation or (config.contamination and bool(config.tasks))
    shards = TokenShards.open(data) if data and reads_shards else None
    subject = suite.subject(model, config.precision)
    results["weights_sha256"] = subject.weights_sha256
    book = suite.Book(folder if world.rank == 0 else None, results)

    measures = []
    if shards and config.validation:
        results["data_fingerprint"] = shards.fingerprint
        measures.append(_validation_measure(model, shards, tokenizer, config, world))
    for path in config.texts:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        measures.append(
            text_measure(
                model,
                text,
                tokenizer,
                stride=config.stride,
                batch=config.batch,
                name=Path(path).name,
                forward=subject.forward,
            )
        )
    if measures:
        results["stride"] = min(config.stride, model.config.context)
        results["results"] = [as_json(m) for m in measures]
        book.write()
        if world.rank == 0:
            _print(measures, f"{source}: context {model.config.context}, stride {results['stride']} on texts")
    records = suite.run_tasks(config, subject, tokenizer, book, world=world, shards=shards, folder=folder)
    if records and world.rank == 0:
        table.show(records, f"{source}: weights {subject.weights_sha256[:12]}, GPT-2's own scores on the right")
    if config.harness:
        found = suite.run_harness(config, subject, tokenizer, book, world=world, folder=folder)
        if world.rank == 0:
            table.show_harness(found)
    return 0


def _world(config: EvaluateCommandConfig) -> distributed.World:
    """The ranks that torchrun started, or this process alone."""
    if distributed.world_size() > 1:
        return distributed.start(config.device, TIMEOUT_S)
    return distributed.World(rank=0, size=1, local_rank=0, device=choose_device(config.device))


def _validation_measure(
    model: GPT, shards: TokenShards, tokenizer: Tokenizer, config: EvaluateCommandConfig, world: distributed.World
) -> Measure:
    split = shards.split("validation")
    context = model.config.context
    loss = validation_loss(
        model,
        split,
        context=context,
        sequences=config.sequences,
        micro=config.batch,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    windows = len(TokenWindows(split, context))
    tokens = context * (min(config.sequences, windows) or windows)
    # Another vocabulary's tokens have other bytes, so then there is no honest number.
    ours = shards.tokenizer_sha256 == tokenizer.sha256
    return Measure("validation", loss * tokens, tokens, text_bytes=split_bytes(split, tokens, tokenizer) if ours else 0)


def as_json(measure: Measure) -> dict[str, Any]:
    """A measure with what follows from it; what is not known or not finite is null."""
    found: dict[str, Any] = asdict(measure)
    for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
        value = getattr(measure, name)
        found[name] = value if value is not None and math.isfinite(value) else None
    return found


def _number(value: float | None) -> str:
    """For the table: 4 decimals, or of a million and more 4 digits and the exponent; – for what is not known."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _print(measures: Sequence[Measure], title: str) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("text", overflow="fold")
    for name in ("tokens", "loss", "perplexity", "per word", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in measures:
        values = (m.loss, m.perplexity, m.word_perplexity, m.bits_per_byte)
        table.add_row(Text(m.name), f"{m.tokens:,}", *(_number(value) for value in values))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(Text(title))
    console.print(table)
