"""What all tests share: where the optional real data lies, and a quiet, offline environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from places import SHARED

if TYPE_CHECKING:
    from web import Site

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores SIGINT and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_train_kills",
    "test_train",
    "test_hosts",
    "test_train_faults",
    "test_remote",
    "test_pipeline",
    "test_storage",
    "test_slurm",
    "test_plan",
    "test_real_pages",
    "test_launch",
    "test_evaluation",
    "test_ray_executor",
    "test_muon",
    "test_detect",
    "test_fetch",
    "test_crawl",
    "test_politeness",
    "test_extract",
)
"""Files that take longest, begun first, so that all processes of a run end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))  # stable: within a file nothing moves


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pages, WARC files, books, evaluation sets; they are no part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of real data at {SHARED}")
    return SHARED


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server on loopback that does what it is told."""
    from web import Site

    with Site() as server:
        yield server
