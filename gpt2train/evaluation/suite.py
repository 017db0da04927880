"""All tasks that a command asks for, one after another → evaluation.json, which never loses what it has.

In: settings, a model, token shards to look for the test sets in. Out: the records of the tasks, in the file after each
of them. A task whose record stands with the same key (weights, data, settings) is not measured again; one that was
killed goes on from the batches that are in `evaluation/TASK/`, a folder that goes when its record is written.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import Tokenizer
from gpt2train.config import Precision
from gpt2train.distributed import World, all_sum
from gpt2train.evaluation import contamination, harness, likelihood, measure, sources, tasks
from gpt2train.evaluation.config import EvaluateCommandConfig
from gpt2train.evaluation.items import texts_of
from gpt2train.evaluation.measure import Prepared, Subject
from gpt2train.model import GPT
from gpt2train.run_folder import EVALUATION, EVALUATION_WORK, read_json, replace_file

TOLD_EVERY_S = 10.0


class Book:
    """evaluation.json of a folder, on rank 0; elsewhere, and with no folder, nothing is written.

    What it says of other weights is not kept: the file is of one model.
    """

    def __init__(self, folder: Path | None, head: dict[str, Any]) -> None:
        self._folder, self._head = folder, head
        before = read_json(folder / EVALUATION) if folder else {}
        if before.get("weights_sha256") != head["weights_sha256"]:
            before = {}
        self._before = {name: before[name] for name in ("results", "stride", "data_fingerprint") if name in before}
        self.tasks: dict[str, dict[str, Any]] = {record["name"]: record for record in before.get("tasks", [])}
        self.harness: dict[str, dict[str, Any]] = before.get("harness", {})

    def write(self) -> None:
        if self._folder is None:
            return
        content = self._before | self._head
        if self.tasks:
            order = {name: place for place, name in enumerate(tasks.TASKS)}
            content["tasks"] = sorted(self.tasks.values(), key=lambda record: order.get(record["name"], len(order)))
        if self.harness:
            content["harness"] = self.harness
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        replace_file(self._folder / EVALUATION, text.encode())


def subject(model: GPT, precision: Precision) -> Subject:
    """The model to ask, with the hash of its weights."""
    device = model.wte.weight.device
    autocast = torch.bfloat16 if precision is Precision.bf16 else None
    return Subject(
        forward=likelihood.plain_forward(model, autocast=autocast, device=device),
        config=model.config,
        device=device,
        weights_sha256=measure.weights_sha256(model),
        precision=precision.value,
        model=model,
    )


def run_tasks(
    config: EvaluateCommandConfig,
    subject: Subject,
    tokenizer: Tokenizer,
    book: Book,
    *,
    world: World,
    shards: TokenShards | None,
    folder: Path | None,
) -> list[dict[str, Any]]:
    """The records of the tasks asked for, in the order of the table; the same on every rank.

    A group's task whose data no folder holds is left out, with a line that says so.
    """
    tell = _teller(world)
    ready = prepare(config.tasks, config.task_data, tokenizer, subject, config=config, tell=tell)
    stands = [measure.measure_key(p, subject) == book.tasks.get(p.task.name, {}).get("key") for p in ready]
    stands = [total > 0 for total in all_sum(world, [float(s and not config.again) for s in stands])]
    for prepared, standing in zip(ready, stands, strict=True):
        name = prepared.task.name
        if standing:
            tell(f"{name}: measured before, with the same weights, data and settings; again=true measures anew")
            continue
        work = folder / EVALUATION_WORK / name if folder else None
        if work and config.again and world.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        begin = time.perf_counter()
        scores = measure.measure(prepared, subject, tokenizer, world=world, folder=work, told=_progress(name, tell))
        took_s = time.perf_counter() - begin
        book.tasks[name] = measure.record(prepared, subject, scores)
        book.write()
        if work and world.rank == 0:
            _remove(work)
        tell(f"{name}: {len(prepared.items):,} items, {prepared.tokens:,} tokens in {took_s:.1f} s")
    if config.contamination and shards is not None:
        _count_contamination(ready, shards, tokenizer, book, world=world, tell=tell)
    return [book.tasks[p.task.name] for p in ready if p.task.name in book.tasks]


def prepare(
    names: list[str],
    places: list[str],
    tokenizer: Tokenizer,
    subject: Subject,
    *,
    config: EvaluateCommandConfig,
    tell: Callable[[str], None],
) -> list[Prepared]:
    """The tasks whose data are there, as token sequences. Raises TaskDataError for data that no task reads."""
    ready = []
    for name in tasks.select(names):
        task = tasks.TASKS[name]
        found = sources.find(task, places)
        if found is None:
            tell(f"{name}: left out, no folder of task_data holds {' or '.join(task.files)}")
            continue
        ready.append(
            measure.prepare(
                task,
                sources.read(task, found),
                tokenizer,
                subject.config,
                stride=config.stride,
                budget=config.batch * subject.config.context,
                limit=config.limit,
            )
        )
    return ready


def _count_contamination(
    ready: list[Prepared],
    shards: TokenShards,
    tokenizer: Tokenizer,
    book: Book,
    *,
    world: World,
    tell: Callable[[str], None],
) -> None:
    """Adds to each record what share of its 8-grams the training shards hold, where it does not say so yet."""
    if shards.tokenizer_sha256 != tokenizer.sha256:
        tell("contamination: not counted, the token shards were made with another vocabulary")
        return
    known = [
        book.tasks[p.task.name].get("contamination", {}).get("data_fingerprint") == shards.fingerprint
        if p.task.name in book.tasks
        else False
        for p in ready
    ]
    known = [total > 0 for total in all_sum(world, [float(k) for k in known])]
    sets = {
        p.task.name: [text for item in p.items for text in texts_of(item)]
        for p, is_known in zip(ready, known, strict=True)
        if not is_known
    }
    if not sets:
        return
    found = contamination.overlaps(sets, shards, tokenizer, world=world, told=_progress("contamination", tell))
    for name, overlap in found.items():
        if name in book.tasks:
            book.tasks[name]["contamination"] = overlap
    book.write()


def run_harness(
    config: EvaluateCommandConfig,
    subject: Subject,
    tokenizer: Tokenizer,
    book: Book,
    *,
    world: World,
    folder: Path | None,
) -> dict[str, dict[str, Any]]:
    """lm-evaluation-harness's results of `config.harness`, also in the file."""
    work = folder / EVALUATION_WORK / "harness" if folder else None
    scoring = harness.Scoring(
        subject, tokenizer, budget=config.batch * subject.config.context, world=world, folder=work
    )
    found = harness.evaluate(config.harness, scoring, include_path=config.harness_path, limit=config.limit)
    book.harness |= found
    book.write()
    if work and world.rank == 0:
        _remove(work)
    return found


def _remove(work: Path) -> None:
    """What made a task resumable, once its record is written; and the folder of them all with the last one."""
    shutil.rmtree(work, ignore_errors=True)
    if work.parent.is_dir() and not any(work.parent.iterdir()):
        work.parent.rmdir()


def _teller(world: World) -> Callable[[str], None]:
    """Lines for people on standard error, from rank 0."""
    return lambda line: print(line, file=sys.stderr, flush=True) if world.rank == 0 else None


def _progress(name: str, tell: Callable[[str], None]) -> Callable[[int, int], None]:
    """A line now and then: how much of `name` is done."""
    last = [time.perf_counter()]

    def told(done: int, of: int) -> None:
        if time.perf_counter() - last[0] >= TOLD_EVERY_S:
            last[0] = time.perf_counter()
            tell(f"{name}: {done:,} of {of:,} batches")

    return told
