"""One place in a bucket, through fsspec: list, put, get, create. Each request is tried again while it may help.

A corpus's files go through here, and copies of checkpoints. Names are relative to the place. What comes back of a file
is its size and an identity that changes whenever it is written anew: the store's ETag, or else the time of writing. A
file is there as a whole or not at all (S3 and GCS show an object once all of it has come, and compare its checksum on
the way); its size is looked at after each transfer.

Credentials come from the environment or the machine's role, as the store's own client finds them. No error says more
than the store's answer, and nothing of the environment's secrets.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.records import InputError, PipelineError, StorageError
from data_pipeline.store import write_atomic

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 20.0
PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}
# What the environment calls its secrets: AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, HF_TOKEN, ..._PASSWORD.
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
# Answers that another try cannot change: what is not there, what exists, what is forbidden.
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
# The clients' own kinds that say the same of credentials and settings (botocore, google-auth), by name: they are no
# subclasses of anything that tells them apart.
_REFUSALS = (
    "NoCredentials",
    "PartialCredentials",
    "ParamValidation",
    "ProfileNotFound",
    "NoRegion",
    "DefaultCredential",
)

T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """A file as the store lists it."""

    identity: str
    bytes: int


class Bucket:
    """`address` is s3://bucket/place and the like. Raises InputError when its client is not installed.

    A request that fails is tried again for `retry_s` seconds; then StorageError says so, and ends with `remedy`.
    """

    def __init__(
        self,
        address: str,
        *,
        retry_s: float,
        remedy: str = "earlier results are intact, run the same command again once mended",
    ) -> None:
        self.address = address.rstrip("/")
        self.retry_s = retry_s
        self._remedy = remedy
        scheme = address.split("://", 1)[0]
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}  # other machines write here, too
        if scheme == "s3":
            # A request that hangs is given up and tried again; uploads of large files are many requests.
            options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60}
        if scheme == "file":
            options["auto_mkdir"] = True  # as a bucket has no folders to make
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.address, **options)
        except ImportError:
            package, extra = PACKAGES[scheme]
            raise InputError(
                f"{self.address}: {package} is not installed; run pip install 'gpt2train[{extra}]'"
            ) from None
        except Exception as e:  # what its client says of its own settings
            raise InputError(
                f"{self.address}: {reason(e)}; mend the settings of its client in the environment"
            ) from None

    def list(self, below: str = "") -> dict[str, Stored]:
        """All files of the place, or of a folder in it, by their names. Raises FileNotFoundError for no such bucket."""

        def find() -> Mapping[str, Mapping[str, Any]]:
            found = self._fs.find(self._path(below), detail=True)
            return found if isinstance(found, dict) else {}

        found = {
            path.removeprefix(self._root).strip("/"): _stored(info)
            for path, info in sorted(self._attempt("list", find).items())
            if info.get("type", "file") == "file" and not path.endswith("/")
        }
        for name in found:
            if {"..", "."} & set(name.split("/")) or "\\" in name or "\0" in name:
                raise InputError(f"{self.address}: holds {name!r}, which is no path below it; remove it there")
        return found

    def put(self, name: str, content: Path | bytes) -> Stored:
        """Store a local file, or bytes, under `name`; what was there before is there until all has come."""

        def put() -> Stored:
            if isinstance(content, bytes):
                expected = len(content)
                self._fs.pipe_file(self._path(name), content)
            else:
                expected = content.stat().st_size
                self._fs.put_file(str(content), self._path(name))
            stored = _stored(self._fs.info(self._path(name)))
            if stored.bytes != expected:
                raise OSError(f"{stored.bytes} bytes came of {expected}")
            return stored

        return self._attempt(f"put {name}", put)

    def create(self, name: str, content: bytes) -> bool:
        """Store bytes unless there is such a file; whether it was this call that did.

        S3 (If-None-Match, since 2024) and GCS (ifGenerationMatch) decide it in one step. Of a store that cannot, two
        calls at the same moment may both believe to have made the file, so it is read once more.
        """

        def create() -> bool:
            with contextlib.suppress(FileExistsError):  # maybe by an earlier try of this call, whose answer was lost
                self._fs.pipe_file(self._path(name), content, mode="create")
            return bool(self._fs.cat_file(self._path(name)) == content)

        return self._attempt(f"create {name}", create)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None when there is none."""
        try:
            return bytes(self._attempt(f"read {name}", lambda: self._fs.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def get(self, name: str, to: Path, expected: Stored) -> None:
        """Bring a file here, whole or not at all. Raises FileNotFoundError when it is no more there."""

        def get() -> None:
            with write_atomic(to) as temporary:
                self._fs.get_file(self._path(name), str(temporary))
                if (size := temporary.stat().st_size) != expected.bytes:
                    raise OSError(f"{size} bytes came of {expected.bytes}")

        self._attempt(f"get {name}", get)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:

            def remove(path: str = self._path(name)) -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

            self._attempt(f"remove {name}", remove)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/") if name else self._root

    def _attempt(self, what: str, do: Callable[[], T]) -> T:
        """`do()`, again and again for `retry_s` seconds while the store or the way to it fails."""
        end, wait_s = time.monotonic() + self.retry_s, FIRST_WAIT_S
        while True:
            try:
                return do()
            except (FileNotFoundError, FileExistsError):
                raise
            except PipelineError:  # the local disk
                raise
            except Exception as e:
                refused = isinstance(e, _ANSWERS) or type(e).__name__.startswith(_REFUSALS)
                if refused or time.monotonic() + wait_s > end:
                    kind = "refused" if refused else f"failed for {self.retry_s:g} s"
                    remedy = f"check rights and credentials; {self._remedy}" if refused else self._remedy
                    raise StorageError(f"{self.address}: {what}: {kind} ({reason(e)}); {remedy}") from None
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # not all transfers at the same moment
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _stored(info: Mapping[str, Any]) -> Stored:
    marks = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "modified", "created"))
    return Stored(str(next((m for m in marks if m), "")), int(info.get("size") or 0))


def reason(e: BaseException) -> str:
    """An error's first line, without what the environment keeps secret and without credentials in addresses."""
    text = (str(e).strip().split("\n")[0] or type(e).__name__)[:300]
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "…")
    return re.sub(r"://[^/@\s]*@", "://…@", text)
