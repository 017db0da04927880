"""What all tests share: where the optional real data lies, and a quiet, offline environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GPT2TRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pages, WARC files, books, evaluation sets; they are no part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of real data at {SHARED}")
    return SHARED
