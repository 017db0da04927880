"""A place in other storage, spoken to through fsspec: list, read, put, get, remove.

    bucket = Bucket("s3://runs/small", retry_s=60)
    bucket.put("checkpoints/step_00000010/manifest.json", content)

Names are relative to the place. An object shows up when all of it has come, as S3 and GCS do it; its size is compared
after each transfer either way. A request that fails is made again, after growing pauses, for `retry_s` seconds. Access
is what the store's own client finds in the environment, on disk or in the machine's role; it reaches no message.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gpt2train.errors import RemoteError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 15.0
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
"""Answers that do not change by asking again."""

Answer = TypeVar("Answer")


class Bucket:
    """Raises RemoteError where the storage cannot be used or does not answer in time."""

    def __init__(self, address: str, *, retry_s: float) -> None:
        import fsspec

        self.address = address.rstrip("/")
        self._retry_s = retry_s
        # Another machine may have written there a moment ago; a local folder's parents are made like a bucket's.
        options: dict[str, Any] = {"use_listings_cache": False}
        if address.startswith("file://"):
            options["auto_mkdir"] = True
        if address.startswith("s3://"):
            options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.address, **options)
        except Exception as error:  # whatever its client makes of the environment
            raise RemoteError(f"{self.address}: cannot be opened ({told(error)})") from None

    def list(self, below: str) -> dict[str, int]:
        """Name → bytes of every file below a folder of the place; none where there is no such folder."""

        def find() -> dict[str, int]:
            found = self._fs.find(self._path(below), detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {path[start:]: int(entry["size"] or 0) for path, entry in found.items() if entry["type"] == "file"}

        try:
            return self._asked(f"list {below}", find)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""
        try:
            return bytes(self._asked(f"read {name}", lambda: self._fs.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def put(self, name: str, content: bytes | Path) -> None:
        """Stores bytes, or a file of this machine."""

        def put() -> None:
            if isinstance(content, bytes):
                self._fs.pipe_file(self._path(name), content)
                size = len(content)
            else:
                self._fs.put_file(str(content), self._path(name))
                size = content.stat().st_size
            if (stored := int(self._fs.info(self._path(name))["size"])) != size:
                raise OSError(f"{stored:,} bytes of {size:,} arrived")

        self._asked(f"write {name}", put, final=(PermissionError, NotADirectoryError, IsADirectoryError))

    def get(self, name: str, to: Path) -> None:
        """Brings a file here. Raises FileNotFoundError where it is gone."""
        self._asked(f"read {name}", lambda: self._fs.get_file(self._path(name), str(to)))

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        try:
            self._asked(f"remove {name}", lambda: self._fs.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _asked(self, what: str, ask: Callable[[], Answer], *, final: tuple[type[Exception], ...] = _FINAL) -> Answer:
        end, pause_s = time.monotonic() + self._retry_s, FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except Exception as error:
                if isinstance(error, FileNotFoundError) and FileNotFoundError in final:
                    raise
                if isinstance(error, final) or time.monotonic() + pause_s > end:
                    raise RemoteError(f"{self.address}: cannot {what} ({told(error)})") from None
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # not all transfers at the same moment again
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def told(error: BaseException) -> str:
    """An error's first line, without the values of variables of the environment that are named like secrets."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    for name, value in os.environ.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("SECRET", "TOKEN", "PASSWORD", "KEY")):
            line = line.replace(value, "…")
    return line
