"""What a person watches: on a terminal a bar with a rate and a time to go, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

LINE_EVERY_S = 10.0


class Rate(ProgressColumn):
    """Rows per second."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="progress.data.speed")


class Reporter:
    """Lines and bars on standard error; silent about bars when `bars` is off."""

    def __init__(self, *, bars: bool) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars = bars

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Counter]:
        """Count up to `total` rows. `total` 0: unknown."""
        counter = Counter(self, name, total)
        if self.bars and sys.stderr.isatty():
            with Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(),
                MofNCompleteColumn(),
                Rate(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            ) as progress:
                counter.show(progress)
                yield counter
        else:
            yield counter


class Counter:
    """Rows done of one stage; safe to advance from one other thread."""

    def __init__(self, reporter: Reporter, name: str, total: int) -> None:
        self.reporter, self.name, self.total = reporter, name, total
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self._progress: Progress | None = None

    def show(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task(self.name, total=self.total or None)

    def advance(self, rows: int) -> None:
        self.done += rows
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done)
        elif self.reporter.bars and time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            rate = self.rate
            left = f", {(self.total - self.done) / rate:,.0f} s to go" if self.total and rate else ""
            self.reporter.say(f"{self.name}: {self.done:,} of {self.total or '?':,} rows, {rate:,.0f}/s{left}")

    @property
    def rate(self) -> float:
        """Rows per second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)
