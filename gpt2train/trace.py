"""A training step → the documents and URLs that it saw; a URL → the steps that saw it.

Flows in: a run's config.yaml and the token shards it trained on. Flows out: a table. Nothing is looked up in a log: the
batch of a step is a function of seed and step, and every token of a shard belongs to a document with a URL. A step
costs the reading of its documents' rows; a URL costs one pass over the table of documents, and its windows' places in
the order are computed backwards, an epoch at a time. Where a rewind has parted batches from steps (faults.py), the
lines of metrics.jsonl say which batch a step had.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.token_shards import DocumentSpan, TokenShards, TokenSplit
from gpt2train.config import TraceConfig, TrainConfig
from gpt2train.data import BatchOrder, TokenWindows
from gpt2train.errors import ConfigError
from gpt2train.run_folder import VERSIONS, data_folder, read_json, read_metrics, read_run_config, series

SCAN_TOKENS = 16_000_000
"""Positions whose documents are in memory at once while a URL is looked for."""


NO_REWINDS: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Seen:
    """A part of a document in one sequence of a step."""

    step: int
    """Counted from 1."""
    sequence: int
    """Place in the global batch, counted from 0."""
    epoch: int
    """Counted from 0."""
    start: int
    stop: int
    """Positions [start, stop) of the train split that sequence and document share; the last target is one of them."""
    document: DocumentSpan


def documents_of_step(
    split: TokenSplit, config: TrainConfig, step: int, *, batches: Mapping[int, int] = NO_REWINDS
) -> list[Seen]:
    """What `step` (counted from 1) saw, in the order of its global batch.

    `batches` gives the batch of each step that had another than its own number's.
    """
    windows = TokenWindows(split, config.model.context)
    order = _order(windows, config)
    seen = []
    batch = batches.get(step, step)
    for sequence, window in enumerate(order.indices(batch - 1)):
        start, stop = windows.span(int(window))
        epoch = ((batch - 1) * order.sequences + sequence) // order.windows
        for document in split.documents(start, stop):
            shared = max(start, document.start), min(stop, document.stop)
            seen.append(Seen(step, sequence, epoch, *shared, document))
    return seen


def steps_of_url(
    split: TokenSplit, config: TrainConfig, url: str, *, last_step: int, batches: Mapping[int, int] = NO_REWINDS
) -> list[Seen]:
    """Where steps 1 to `last_step` saw the documents of `url`, by step. Empty: they did not, or there is none."""
    return steps_of_documents(split, config, documents_of_url(split, url), last_step=last_step, batches=batches)


def steps_of_documents(
    split: TokenSplit,
    config: TrainConfig,
    documents: Sequence[DocumentSpan],
    *,
    last_step: int,
    batches: Mapping[int, int] = NO_REWINDS,
) -> list[Seen]:
    """Where steps 1 to `last_step` saw any of `documents`, by step."""
    windows = TokenWindows(split, config.model.context)
    order = _order(windows, config)
    by_window: dict[int, list[DocumentSpan]] = {}
    for document in documents:
        # The window before may hold the document's first token as its last target.
        first = max((document.start - 1) // windows.context, 0)
        last = min((document.stop - 1) // windows.context, len(windows) - 1)
        for window in range(first, last + 1):
            start, stop = windows.span(window)
            if start < document.stop and document.start < stop:
                by_window.setdefault(window, []).append(document)
    wanted = np.array(sorted(by_window), dtype=np.int64)
    step_of = {batches.get(step, step): step for step in range(1, last_step + 1)} if batches else None
    last_batch = max(step_of, default=0) if step_of is not None else last_step
    seen = []
    for epoch in range(-(-last_batch * order.sequences // order.windows) if len(wanted) else 0):
        places = order.places(wanted, epoch)
        for at in np.argsort(places):
            batch, sequence = int(places[at]) // order.sequences + 1, int(places[at]) % order.sequences
            step = step_of.get(batch, 0) if step_of is not None else batch
            if not 1 <= step <= last_step:
                continue
            start, stop = windows.span(int(wanted[at]))
            for document in by_window[int(wanted[at])]:
                shared = max(start, document.start), min(stop, document.stop)
                seen.append(Seen(step, sequence, epoch, *shared, document))
    return seen


def documents_of_url(split: TokenSplit, url: str) -> list[DocumentSpan]:
    """The split's documents whose URL is exactly `url`, in the order of the split."""
    return documents_of_urls(split, {url})


def documents_of_urls(split: TokenSplit, urls: Collection[str]) -> list[DocumentSpan]:
    """The split's documents whose URL is among `urls`, in the order of the split."""
    return [document for document in _all_documents(split) if document.url in urls]


def steps_done(run_dir: str | Path) -> int:
    """The last step in the run's metrics; 0 before the first."""
    return max((entry["step"] for entry in read_metrics(run_dir) if "loss" in entry), default=0)


def other_batches(run_dir: str | Path) -> dict[int, int]:
    """The batch of each step done that had another than its own number's, since the run has rewound."""
    return {step: int(batch) for step, batch in series(read_metrics(run_dir), "batch")}


def _all_documents(split: TokenSplit) -> Iterator[DocumentSpan]:
    """Every document once, a bounded number in memory."""
    for start in range(0, split.tokens, SCAN_TOKENS):
        for document in split.documents(start, min(start + SCAN_TOKENS, split.tokens)):
            if document.start >= start:  # else the part before gave it
                yield document


def _order(windows: TokenWindows, config: TrainConfig) -> BatchOrder:
    if not len(windows):
        raise ConfigError(
            [
                f"data={config.data.path}: its {windows.split.tokens} training tokens hold no sequence of "
                f"model.context={config.model.context}; give the token shards that the run trained on"
            ]
        )
    return BatchOrder(config.seed, len(windows), config.batch.sequences)


def trace(config: TraceConfig) -> int:
    """Prints what `step` saw, or will see; or which of the steps done saw `url`."""
    if not config.run:
        raise ConfigError(["run='': must name a run's folder; give run=runs/NAME"])
    if bool(config.url) == bool(config.step):
        raise ConfigError([f"step={config.step}, url={config.url!r}: exactly one is needed; give step=1200 or url=URL"])
    run = read_run_config(config.run)
    if not 0 <= config.step <= run.steps:
        raise ConfigError([f"step={config.step}: must lie in 1..{run.steps}, the run's steps; give step=1"])
    shards = open_data(Path(config.run))
    split = shards.split("train")
    done = steps_done(config.run)
    batches = other_batches(config.run)
    if config.step > done:  # a rewind's shift stays for the steps to come
        batches[config.step] = config.step + batches.get(done, done) - done
    if config.url:
        seen = steps_of_url(split, run, config.url, last_step=done, batches=batches)
        title = f"{config.url}: seen {len(seen)} times in {done} steps"
        if not seen:
            _say_unseen(shards, done, config.url)
    else:
        seen = documents_of_step(split, run, config.step, batches=batches)
        title = f"step {config.step}: {run.batch.sequences} sequences, {len(seen)} parts of documents"
        if config.step > done:
            title += f"; not done yet, the run stands at step {done}"
    _print(seen, title)
    return 0


def open_data(run_dir: Path) -> TokenShards:
    """The run's token shards; raises ConfigError when others lie in their place now."""
    folder = data_folder(run_dir)
    if folder is None:
        raise ConfigError([f"run={run_dir}: has not trained on any data yet; train it first"])
    shards = TokenShards.open(folder, verify=False)
    trained_on = read_json(run_dir / VERSIONS).get("data", {}).get("fingerprint")
    if trained_on and trained_on != shards.fingerprint:
        raise ConfigError(
            [
                f"run={run_dir}: trained on token shards with the fingerprint {trained_on}, but {folder} now has "
                f"{shards.fingerprint}; restore the folder that it trained on"
            ]
        )
    return shards


def _say_unseen(shards: TokenShards, done: int, url: str) -> None:
    """Says on standard error why no step saw `url`."""
    if documents_of_url(shards.split("train"), url):
        reason = f"its windows are not among those of the {done} steps done"
    elif documents_of_url(shards.split("validation"), url):
        reason = "it is in the validation split, which no step trains on"
    else:
        reason = f"no document of {shards.folder} has exactly this URL; `gpt2train why` says what became of it"
    print(f"{url}: {reason}", file=sys.stderr)


def _print(seen: list[Seen], title: str) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("step", "sequence", "epoch", "tokens", "of document"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("URL", overflow="fold")
    for part in seen:
        document = part.document
        table.add_row(
            str(part.step),
            str(part.sequence),
            str(part.epoch),
            f"{part.start}..{part.stop}",
            f"{part.start - document.start}..{part.stop - document.start} of {document.stop - document.start}",
            Text(document.url),  # a URL's brackets are no markup
        )
    # A terminal folds long URLs; a file or pipe gets one line a row.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    console.print(Text(title))
    if seen:
        console.print(table)
