"""An executor that runs tasks in the test's own process: no worker has to start and import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.executors import Task


class Inline:
    workers = 1

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, dict[str, Any]], None],
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        for task in tasks:
            on_done(task, task.function(*task.arguments))
