"""Doing what is due: the steps of a stage that do not stand, in workers, and a line for each that is done again.

A step (`store.Step`) stands while its marker fits its settings, its inputs and its outputs. The rest is given to the
executor; each is marked when its files are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.config import STAGES
from data_pipeline.executors import Executor, Task
from data_pipeline.layout import Corpus
from data_pipeline.progress import Reporter
from data_pipeline.records import InputError
from data_pipeline.store import (
    Hashes,
    Step,
    changed_while_read,
    input_hashes,
    mark_done,
    prune,
    renew,
    standing_outputs,
    why_not_done,
)


class Steps:
    """The steps of one run over one corpus folder. `shards` is known once `cut_into` was called."""

    def __init__(
        self,
        corpus: Corpus,
        executor: Executor,
        reporter: Reporter,
        asked: Sequence[str],
        on_marked: Callable[[Step, Sequence[Path]], None] = lambda step, beside: None,
    ) -> None:
        """`on_marked` gets each step that stands, with files that belong to it beside its outputs."""
        self.corpus = corpus
        self.out = corpus.out
        self.executor = executor
        self.reporter = reporter
        self.asked = list(asked)
        """The stages that the user named; empty: all."""
        self.on_marked = on_marked
        self.hashes = Hashes()
        self._first_seen: dict[Path, str | None] = {}
        self.shards = 0

    def cut_into(self, shards: int) -> None:
        """From now on there are so many shards; what an earlier run left of higher ones goes, WARC files excepted."""
        self.shards = shards
        for stage in (*STAGES, "rescue", "documents", "ledger"):
            prune(self.corpus.folder(stage), shards)

    def require(self, stage: str, files: Sequence[Path], before: str) -> None:
        missing = [p for p in files if not p.exists()]
        if missing:
            raise InputError(
                f"stages={self.asked}: {stage} needs {missing[0].relative_to(self.out)}, which {before} makes; "
                f"add {before}"
            )

    def standing_outputs(self) -> set[str]:
        """Names of the stages' outputs that were made of what is in the corpus now."""
        return standing_outputs([self.corpus.folder(stage) for stage in (*STAGES, "documents")], self.hashes)

    def look_at(self, files: Sequence[Path]) -> None:
        """Take the hashes of the user's `files` before they are read.

        What a run was shown first is what it is made of: raises InputError when a file is another one since then.
        """
        for path in files:
            digest = self.hashes.of(path)
            if self._first_seen.setdefault(path, digest) != digest:
                raise changed_while_read(path)

    def look(self, step: Step) -> dict[str, str | None]:
        """The inputs' hashes before the work, for `mark`. In the corpus they were taken when the inputs were made."""
        self.look_at([path for path in step.inputs if not path.is_relative_to(self.out)])
        return input_hashes(step, self.hashes)

    def mark(
        self,
        step: Step,
        counts: Mapping[str, Any],
        outputs: Sequence[Path] = (),
        beside: Sequence[Path] = (),
        *,
        before: Mapping[str, str | None],
    ) -> None:
        """The step is done: write its marker, and tell whoever stores it elsewhere."""
        mark_done(step, counts, self.hashes, outputs, before)
        self.on_marked(step, beside)

    def by_shard(
        self,
        stage: str,
        settings: Mapping[str, Any],
        *,
        inputs: Callable[[int], tuple[Path, ...]],
        outputs: Callable[[int], tuple[Path, ...]],
        task: Callable[[int], tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]],
        rows: Callable[[int], int],
        part: str = "",
        of_shard: Callable[[int], Mapping[str, Any]] = lambda k: {},
    ) -> None:
        name = f"{stage} {part}".strip()
        folder = self.corpus.folder(stage)
        steps = [
            Step(
                stage,
                f"{k:05d}{f'.{part}' if part else ''}",
                folder,
                {**settings, **of_shard(k)},
                inputs(k),
                outputs(k),
            )
            for k in range(self.shards)
        ]
        number = {step.name: k for k, step in enumerate(steps)}

        def make(step: Step) -> Task:
            function, arguments = task(number[step.name])
            return Task(f"{name} {step.name}", function, arguments)

        self.run(name, steps, make, rows=lambda step: rows(number[step.name]))

    def run(
        self,
        name: str,
        steps: Sequence[Step],
        make: Callable[[Step], Task],
        *,
        rows: Callable[[Step], int] = lambda step: 0,
        quiet: bool = False,
        beside: Callable[[Step], Sequence[Path]] = lambda step: (),
    ) -> None:
        """Do the steps that do not stand, and say which are done again and why.

        `beside`: files that belong to a step but are not its outputs, such as a fetch's journal.
        """
        reasons = {step.name: why_not_done(step, self.hashes) for step in steps}
        due = [step for step in steps if reasons[step.name] is not None]
        for step in steps:
            if reasons[step.name] is None:  # maybe a killed run came no further than its marker
                renew(step)
                self.on_marked(step, beside(step))
        again: dict[str, list[str]] = {}
        for step in due:
            if why := reasons[step.name]:
                number = step.name.split(".")[0]  # one line for all shards, though each names its own files
                again.setdefault(why.replace(f"/{number}.", "/*."), []).append(why)
        for pattern, reasons_of in again.items():
            shards = f"{len(reasons_of)} of {len(steps)} shards" if len(steps) > 1 else "done"
            self.reporter.say(f"{name}: {shards} again: {pattern if len(reasons_of) > 1 else reasons_of[0]}")
        if not due:
            if not quiet:
                self.reporter.say(f"{name}: finished before, nothing to do")
            return
        work = {step.name: make(step) for step in due}
        by_label = {work[step.name].label: step for step in due}
        assert len(by_label) == len(due), f"{name}: labels that are not unique"  # each task marks the step of its label
        for step in due:
            step.folder.mkdir(parents=True, exist_ok=True)
        before = {step.name: self.look(step) for step in due}
        with self.reporter.stage(name, sum(rows(step) for step in due)) as counter:

            def on_done(task: Task, counts: dict[str, Any]) -> None:
                step = by_label[task.label]
                self.mark(step, counts, beside=beside(step), before=before[step.name])

            self.executor.run(list(work.values()), on_done=on_done, on_rows=counter.advance)
            if counter.done and not quiet:
                self.reporter.say(f"{name}: {counter.done:,} rows, {counter.rate:,.0f}/s")


def plain(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config dataclass as JSON values."""
    values = asdict(config)
    return {f"{prefix}{k}": v.value if isinstance(v, Enum) else v for k, v in values.items()}


def rows_of(path: Path) -> int:
    """Rows of a Parquet file, from its footer alone."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError):  # damaged or absent: the step that makes it will say so
        return 0
