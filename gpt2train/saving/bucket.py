"""A place in other storage, as checkpoints need it: list, read, put, get, remove.

    bucket = Bucket("s3://runs/small", retry_s=60)
    bucket.put("checkpoints/step_00000010/manifest.json", content)

The requests, their repetition and what is told of an error are data_pipeline's, which stores a corpus in the same way;
here every failure is a RemoteError, since a copy that fails does not end the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.records import PipelineError
from data_pipeline.storage import bucket
from data_pipeline.storage.bucket import Stored
from gpt2train.errors import RemoteError


class Bucket:
    """Raises RemoteError where the storage cannot be used or does not answer within `retry_s` seconds."""

    def __init__(self, address: str, *, retry_s: float) -> None:
        self.address = address.rstrip("/")
        with self._remote_errors("open"):
            self._bucket = bucket.Bucket(address, retry_s=retry_s, remedy="the checkpoints of this machine are intact")

    def list(self, below: str) -> dict[str, Stored]:
        """Name → size of every file below a folder of the place; none where there is no such folder."""
        with self._remote_errors(f"list {below}"):
            try:
                return self._bucket.list(below)
            except FileNotFoundError:
                return {}

    def read(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""
        with self._remote_errors(f"read {name}"):
            return self._bucket.read(name)

    def put(self, name: str, content: bytes | Path) -> None:
        """Stores bytes, or a file of this machine."""
        with self._remote_errors(f"put {name}"):
            self._bucket.put(name, content)

    def get(self, name: str, to: Path, expected: Stored) -> None:
        """Brings a file that `list` named here. Raises FileNotFoundError where it is gone."""
        gone = False
        with self._remote_errors(f"get {name}"):
            try:
                self._bucket.get(name, to, expected)
            except FileNotFoundError:
                gone = True
        if gone:
            raise FileNotFoundError(f"{self.address}/{name}: is gone")

    def remove(self, *names: str) -> None:
        """Removes files, in this order, where they are there."""
        with self._remote_errors("remove"):
            self._bucket.remove(names)

    @contextmanager
    def _remote_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except PipelineError as error:
            raise RemoteError(str(error)) from None
        except OSError as error:  # what is in the way of a name, or a file of this machine that went meanwhile
            raise RemoteError(f"{self.address}: {what}: {bucket.reason(error)}") from None
