"""Validation loss, and the perplexity of texts.

Flows in: a model and the validation split of token shards, or text files. Flows out: mean nats a token and what follows
from it (perplexity, bits a byte). The validation loss costs one forward pass over every sequence; a text costs
context / stride passes over itself.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
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
from gpt2train import checkpoint
from gpt2train.bounds import run_faults
from gpt2train.config import ConfigError, EvaluateCommandConfig
from gpt2train.data import TokenWindows
from gpt2train.model import GPT
from gpt2train.release.hf import choose_device, is_hf_folder, load_model
from gpt2train.run_folder import EVALUATION, data_folder, replace_file, run_dir_of


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
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """The same probability of the text, spread over its words: comparable between vocabularies."""
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


def _exp(x: float) -> float:
    """e^x, infinite where a float cannot hold it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@torch.no_grad()
def text_measure(model: GPT, text: str, tokenizer: Tokenizer, *, stride: int, batch: int, name: str = "") -> Measure:
    """The text's probability by a sliding window; every token of it is predicted once, the first from `<|endoftext|>`.

    A window is as long as the model's context, or as the text where that is shorter. The first predicts all its tokens;
    each further one starts `stride` tokens later and predicts only those that no window before it did, so each token
    but the first window's sees at least context - stride tokens. `batch` windows run at once.
    """
    tokens = np.concatenate([[END_OF_TEXT], tokenizer.encode(text)]).astype(np.int64)
    targets = len(tokens) - 1
    if targets == 0:
        raise ConfigError([f"texts={name}: is empty; give a file with text"])
    length = min(model.config.context, targets)
    stride = min(stride, length)
    # Window k ends before target position ends[k]; its last fresh[k] predictions count.
    ends = [*range(length, targets, stride), targets]
    fresh = [length, *np.diff(ends).tolist()]
    device = model.wte.weight.device
    nats = 0.0
    # The first window alone predicts all its positions, so it goes alone; the others need few logits.
    for first, last in [(0, 1), *((k, min(k + batch, len(ends))) for k in range(1, len(ends), batch))]:
        windows_BT1 = torch.from_numpy(np.stack([tokens[e - length : e + 1] for e in ends[first:last]])).to(device)
        counted = max(fresh[first:last])
        logits_NV = _last_logits(model, windows_BT1[:, :-1], counted).float().flatten(0, 1)
        targets_N = windows_BT1[:, -counted:].flatten()
        losses_BF = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").view(-1, counted).cpu()
        for k in range(first, last):
            nats += losses_BF[k - first, counted - fresh[k] :].double().sum().item()
    return Measure(name, nats, targets, text_bytes=len(tokenizer.decode_bytes(tokens[1:])), words=len(text.split()))


def _last_logits(model: GPT, tokens_BT: torch.Tensor, positions: int) -> torch.Tensor:
    """Logits of the last `positions` alone: the product with the vocabulary would cost more than a small network."""
    hook = model.ln_f.register_forward_hook(lambda module, inputs, x_BTC: x_BTC[:, -positions:])
    try:
        return model(tokens_BT)
    finally:
        hook.remove()


def split_bytes(split: TokenSplit, tokens: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of positions 1 to `tokens` of a split, the targets of its first windows; `<|endoftext|>` counts 0."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(VOCABULARY)], dtype=np.int64)
    lengths[END_OF_TEXT] = 0
    block = 1 << 24
    return sum(
        int(lengths[split.read(start, min(start + block, tokens + 1))].sum()) for start in range(1, tokens + 1, block)
    )


def check(config: EvaluateCommandConfig) -> list[str]:
    """All faults of `config`, one line each; empty when it can run."""
    faults = run_faults(config.run)
    for name, least in (("sequences", 0), ("stride", 1), ("batch", 1)):
        if getattr(config, name) < least:
            faults.append(f"{name}={getattr(config, name)}: must be at least {least}; leave it out")
    for path in config.texts:
        if not Path(path).is_file():
            faults.append(f"texts={path}: there is no such file; name a text file in UTF-8")
    if config.run and not config.texts and not config.data and is_hf_folder(config.run):
        faults.append("data='': a Hugging Face folder has no data of its own; give data=corpus/tokens or texts=[FILE]")
    return faults


def evaluate(config: EvaluateCommandConfig) -> int:
    """Prints the validation loss and the texts' perplexities; a run keeps them in its evaluation.json."""
    faults = check(config)
    if faults:
        raise ConfigError(faults)
    hugging_face = is_hf_folder(config.run)
    source = Path(config.run) if hugging_face else checkpoint.resolve(config.run)
    device = choose_device(config.device)
    model = load_model(source, device)
    tokenizer = load_tokenizer()
    results: dict[str, Any] = {"model": asdict(model.config), "source": source.name}
    if not hugging_face:
        state = checkpoint.read_state(source)
        results |= {"step": state["step"], "tokens_trained": state["tokens"]}
    measures = []
    run_dir = None if hugging_face else run_dir_of(source)
    data = Path(config.data) if config.data else data_folder(run_dir) if run_dir else None
    if data:
        shards = TokenShards.open(data)
        measure = _validation_measure(model, shards, tokenizer, config, device)
        results["data_fingerprint"] = shards.fingerprint
        measures.append(measure)
    elif not config.texts:
        raise ConfigError([f"data='': {config.run} names no data; give data=corpus/tokens or texts=[FILE]"])
    for path in config.texts:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        measures.append(
            text_measure(model, text, tokenizer, stride=config.stride, batch=config.batch, name=Path(path).name)
        )
    results["stride"] = min(config.stride, model.config.context)
    results["results"] = [as_json(m) for m in measures]
    _print(measures, f"{source}: context {model.config.context}, stride {results['stride']} on texts")
    if run_dir:
        content = json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        replace_file(run_dir / EVALUATION, content.encode())
    return 0


def _validation_measure(
    model: GPT, shards: TokenShards, tokenizer: Tokenizer, config: EvaluateCommandConfig, device: torch.device
) -> Measure:
    split = shards.split("validation")
    context = model.config.context
    loss = validation_loss(model, split, context=context, sequences=config.sequences, micro=config.batch, device=device)
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


def _print(measures: Sequence[Measure], title: str) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("text", overflow="fold")
    for name in ("tokens", "loss", "perplexity", "per word", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in measures:
        optional = [f"{v:.4f}" if v is not None else "–" for v in (m.word_perplexity, m.bits_per_byte)]
        table.add_row(Text(m.name), f"{m.tokens:,}", f"{m.loss:.4f}", f"{m.perplexity:.4f}", *optional)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(Text(title))
    console.print(table)
