"""An executor that runs tasks in the test's own process: no worker has to start and import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from data_pipeline import pipeline
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


def work_inline(patch: pytest.MonkeyPatch) -> None:
    """From now on `build_corpus` works in this process."""
    patch.setattr(pipeline, "_executor", lambda config, out: Inline())


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    work_inline(monkeypatch)


@pytest.fixture(scope="module")
def inline_module() -> Iterator[None]:
    """Also while fixtures of the module are made."""
    with pytest.MonkeyPatch.context() as patch:
        work_inline(patch)
        yield
