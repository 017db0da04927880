"""Rows on their way to their shards, on disk, so that memory holds one shard at a time.

JSON values flow in, each with the number of its shard; afterwards those of one shard flow out, in the order they came.
Costs one write and one read of the rows; one file is open at a time, whatever the number of shards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPILL_BYTES = 32 << 20
"""Rows wait for their shard's file in this much memory."""


class Spill:
    """Use it as a context: `folder` is emptied first and gone in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[int, list[str]] = {}
        self._waiting_bytes = 0

    def __enter__(self) -> Spill:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, shard: int, row: list[Any]) -> None:
        line = json.dumps(row, ensure_ascii=True)
        self._waiting.setdefault(shard, []).append(line)
        self._waiting_bytes += len(line)
        if self._waiting_bytes > SPILL_BYTES:
            self._flush()

    def _flush(self) -> None:
        for shard, lines in self._waiting.items():
            with open(self._path(shard), "a", encoding="ascii") as f:
                f.write("\n".join(lines) + "\n")
        self._waiting.clear()
        self._waiting_bytes = 0

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.jsonl"

    def read(self, shard: int) -> Iterator[list[Any]]:
        """To be called once all rows are added."""
        self._flush()
        if self._path(shard).exists():
            with open(self._path(shard), encoding="ascii") as f:
                for line in f:
                    yield json.loads(line)
