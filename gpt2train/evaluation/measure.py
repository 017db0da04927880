"""A task, its test set and a model → the task's scores, with all that they depend on.

In: what `sources` read and a model to ask. Out: a record for evaluation.json: scores, protocol, counts, hashes. Two
steps, so that training prepares once and measures often: `prepare` makes token sequences and batches of a test set,
`measure` runs them through a model, on all ranks, resuming what a killed start had done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from gpt2train.config import ModelConfig
from gpt2train.distributed import World
from gpt2train.errors import NonFiniteError
from gpt2train.evaluation import likelihood, metrics, writing
from gpt2train.evaluation.items import Completions, Item, LastWord, Question, Stretch
from gpt2train.evaluation.likelihood import COLUMNS, LOG_LIKELIHOOD, Forward, Request, Row
from gpt2train.evaluation.metrics import Score
from gpt2train.evaluation.sources import TestSet
from gpt2train.evaluation.stop_words import STOP_WORDS
from gpt2train.evaluation.tasks import Task
from gpt2train.evaluation.work import shared_out
from gpt2train.evaluation.writing import Writing
from gpt2train.model import GPT

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    forward: Forward
    config: ModelConfig
    device: torch.device
    weights_sha256: str = ""
    precision: str = "fp32"
    model: GPT | None = None
    """For tasks that write; None where only likelihoods can be asked."""


@dataclass
class Prepared:
    """A test set as token sequences, in batches, for models of one context."""

    task: Task
    test_set: TestSet
    items: Sequence[Item]
    """Those that are asked; all, or the first ones."""
    requests: list[Request] = field(default_factory=list)
    rows: list[list[Row]] = field(default_factory=list)
    prompts: list[np.ndarray] = field(default_factory=list)
    prompt_batches: list[list[int]] = field(default_factory=list)
    sampling: Writing | None = None
    of_items: int = 0
    """Items or windows of the whole test set."""
    truncated: int = 0
    """Requests or prompts that the context did not hold whole."""
    units_per_token: float = 1.0
    tokens: int = 0
    """Positions that go through the network, padding not counted."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the numbers depend on."""

    def digest(self) -> str:
        """sha256 over all that is asked, what is right, and how it is batched."""
        of_task = [self.task.name, self.task.protocol, self.test_set.sha256, self.settings]
        found = hashlib.sha256(json.dumps(of_task, sort_keys=True).encode())
        for request in self.requests:
            found.update(b"%d:%d:" % (len(request.tokens), request.predicted) + request.tokens.astype("<u2").tobytes())
        for ids in self.prompts:
            found.update(b"%d:" % len(ids) + ids.astype("<u2").tobytes())
        return found.hexdigest()


def prepare(
    task: Task,
    test_set: TestSet,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    stride: int,
    budget: int,
    limit: int = 0,
) -> Prepared:
    """`budget`: tokens of a batch, padding included; `limit`: the first items or windows alone, 0: all."""
    context = config.context
    items = test_set.items if task.unit or not limit else test_set.items[:limit]
    made = Prepared(
        task,
        test_set,
        items,
        of_items=len(test_set.items),
        settings={"budget": budget, "context": context, "limit": limit},
    )
    if task.generates:
        made.sampling = Writing(task.max_new_tokens, (task.stop,) if task.stop else (), task.top_k)
        room = writing.room_for_prompt(config, made.sampling)
        for item in items:
            assert isinstance(item, Question)
            ids, cut = writing.prompt_ids(tokenizer, item.prompt, item.cue, limit=room, cut_end=item.cut_end)
            made.prompts.append(ids)
            made.truncated += cut
        made.prompt_batches = writing.batches(made.prompts, made.sampling, config, budget=budget)
        made.settings |= {"max_new_tokens": task.max_new_tokens, "top_k": task.top_k, "stop": task.stop}
        made.tokens = sum(len(ids) for ids in made.prompts)
        return made
    for item in items:
        if isinstance(item, Stretch):
            tokens = np.concatenate([[END_OF_TEXT], tokenizer.encode(item.text)]).astype(np.uint16)
            made.requests += likelihood.windows(tokens, context=context, stride=stride)
            made.units_per_token = item.units / (len(tokens) - 1)
            made.settings["stride"] = min(stride, context)
        elif isinstance(item, Completions):
            made.requests += [likelihood.request(tokenizer, a, b, limit=context) for a, b in item.pairs]
        elif isinstance(item, LastWord):
            made.requests.append(likelihood.request(tokenizer, item.context, item.word, limit=context))
    if task.unit:
        made.of_items = len(made.requests)
        made.requests = made.requests[: limit or None]
    made.truncated = sum(request.truncated for request in made.requests)
    made.rows = likelihood.batches(made.requests, budget=budget)
    made.tokens = sum(len(row.tokens) for batch in made.rows for row in batch)
    return made


def measure(
    prepared: Prepared,
    subject: Subject,
    tokenizer: Tokenizer,
    *,
    world: World = ALONE,
    folder: Path | None = None,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Score]:
    """The task's scores, the same on every rank. `folder` keeps what is done until it is removed.

    Raises NonFiniteError when the model's outputs are not finite.
    """
    task, key = prepared.task, measure_key(prepared, subject)
    if prepared.sampling is not None:
        written = _written(prepared, prepared.sampling, subject, tokenizer, world, folder, key, told)
        questions = [item for item in prepared.items if isinstance(item, Question)]
        return metrics.written_scores(task.answers, written, [question.answers for question in questions])
    filtered = likelihood.first_tokens(tokenizer, STOP_WORDS) if isinstance(prepared.items[0], LastWord) else None

    def work(i: int) -> np.ndarray:
        return likelihood.score(
            subject.forward, prepared.rows[i], prepared.requests, device=subject.device, filtered=filtered
        )

    sizes = [sum(len(row.requests) for row in batch) for batch in prepared.rows]
    found = shared_out(work, sizes, len(COLUMNS), world=world, folder=folder, key=key, told=told)
    table = likelihood.scattered(prepared.rows, found, len(prepared.requests))
    if not np.isfinite(table[:, LOG_LIKELIHOOD]).all():
        raise NonFiniteError(f"{task.name}: the model's log-likelihoods are not finite; choose an earlier checkpoint")
    first = prepared.items[0]
    if isinstance(first, Stretch):
        return metrics.stretch_scores(prepared.requests, table, unit=task.unit, per_token=prepared.units_per_token)
    if isinstance(first, LastWord):
        return metrics.last_word_scores(table)
    completions = [item for item in prepared.items if isinstance(item, Completions)]
    return metrics.completion_scores(completions, prepared.requests, table)


def _written(
    prepared: Prepared,
    sampling: Writing,
    subject: Subject,
    tokenizer: Tokenizer,
    world: World,
    folder: Path | None,
    key: str,
    told: Callable[[int, int], None],
) -> list[str]:
    model = subject.model
    assert model is not None, "tasks that write need the model itself"

    def work(i: int) -> np.ndarray:
        return writing.write(model, [prepared.prompts[k] for k in prepared.prompt_batches[i]], sampling, tokenizer)

    sizes = [len(batch) for batch in prepared.prompt_batches]
    found = shared_out(work, sizes, sampling.max_new_tokens, world=world, folder=folder, key=key, told=told)
    written = [""] * len(prepared.prompts)
    for batch, rows in zip(prepared.prompt_batches, found, strict=True):
        for k, ids in zip(batch, rows, strict=True):
            written[k] = writing.until_stop(writing.text_of(ids, tokenizer), sampling)
    return written


def measure_key(prepared: Prepared, subject: Subject) -> str:
    """sha256 hex of all that the scores depend on: weights, precision, kind of device, and what is asked."""
    parts = [subject.weights_sha256, subject.precision, subject.device.type, prepared.digest()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def record(prepared: Prepared, subject: Subject, scores: dict[str, Score]) -> dict[str, Any]:
    """What evaluation.json says of a task. The same measurement gives the same record."""
    task, first = prepared.task, prepared.items[0]
    stretch = isinstance(first, Stretch)
    found: dict[str, Any] = {
        "name": task.name,
        "title": task.title,
        "group": task.group,
        "metric": task.metric,
        "scores": {name: score.as_json() for name, score in scores.items()},
        "protocol": task.protocol,
        "source": task.source,
        "published": [{"metric": p.metric, "values": list(p.values), "source": p.source} for p in task.published],
        "items": len(prepared.requests if stretch else prepared.items),
        "of_items": prepared.of_items,
        "truncated": prepared.truncated,
        "tokens": prepared.tokens,
        "data": {"file": prepared.test_set.file, "sha256": prepared.test_set.sha256},
        "settings": prepared.settings | {"precision": subject.precision, "device": subject.device.type},
        "weights_sha256": subject.weights_sha256,
        "key": measure_key(prepared, subject),
    }
    if stretch:
        assert isinstance(first, Stretch)
        found["units"] = first.units
        found["restored_lines"] = first.restored_lines
    return found


def weights_sha256(model: GPT) -> str:
    """sha256 over the weights by name, in fp32, without the embedding's padding: the same for a checkpoint and what was
    exported from it."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name == "wte.weight":
            weight = weight[: model.config.vocabulary]
        plain = weight.detach().to("cpu", torch.float32).contiguous()
        found.update(f"{name} {tuple(plain.shape)}\n".encode())
        found.update(memoryview(plain.numpy()).cast("B"))
    return found.hexdigest()
