"""Inputs in a bucket → local copies, brought once and compared by the store's identity ever after.

A copy lies below `work/inputs/`, in a folder named by its address, so that every setting and every run that names the
same address shares it. A folder in a bucket is copied as a folder; what it no longer holds is removed here, too.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data_pipeline.config import CorpusConfig, StorageConfig
from data_pipeline.records import InputError
from data_pipeline.storage.address import is_address, local_path
from data_pipeline.storage.bucket import Bucket
from data_pipeline.store import lock, write_json

ALL = ("*",)
OLD_INDEX = (
    *("dedup/*.signatures.parquet", "dedup/*.done.json"),
    *("decontaminate/*.verdicts.parquet", "decontaminate/*.done.json"),
)
"""What `dedup.against` reads of another corpus."""
WAIT_S = 3600.0
"""How long one run waits for another that is bringing the same copy."""


def folder_of(address: str, work: Path, kind: str) -> Path:
    """Where copies from `address` lie: a readable name and enough of a hash."""
    address = address.rstrip("/")
    return work / kind / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{Path(address).name}"


def bring(address: str, work: Path, config: StorageConfig, only: tuple[str, ...] = ALL) -> Path:
    """The local copy of a file or folder at `address`. Raises FileNotFoundError when there is nothing."""
    # Of one address all is brought here, and parts of it elsewhere: what one reader does not need another does.
    kind = "inputs" if only == ALL else f"parts/{hashlib.sha256(repr(only).encode()).hexdigest()[:8]}"
    home = folder_of(address, work, kind)
    bucket = Bucket(address, retry_s=config.retry_s)
    with lock(home, wait_s=WAIT_S):
        there = {n: s for n, s in bucket.list().items() if not n or any(fnmatch(n, pattern) for pattern in only)}
        if not there:
            raise FileNotFoundError(address)
        one_file = list(there) == [""]
        root = home / "copy" / Path(bucket.address).name
        record = home / "copied.json"
        had = _read(record)

        def fetch(name: str) -> None:
            path, stored = (root / name if name else root), there[name]
            stands = path.is_file() and path.stat().st_size == stored.bytes and had.get(name) == stored.identity
            if not stands:
                bucket.get(name, path, stored)

        with ThreadPoolExecutor(config.transfers) as pool:
            list(pool.map(fetch, there))
        if not one_file:
            for path in [p for p in root.rglob("*") if p.is_file() and p.relative_to(root).as_posix() not in there]:
                path.unlink()
        write_json({name: stored.identity for name, stored in there.items()}, record)
    return root


def _read(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Inputs:
    """The settings with local paths, the faults of those that could not be had, and the copies' own names."""

    def __init__(self, config: CorpusConfig, work: Path) -> None:
        self.faults: list[str] = []
        self.address_of: dict[str, str] = {}
        """Local path of a copy → its address."""
        self._work, self._storage = work, config.storage
        c = config
        self.config = replace(
            c,
            out=local_path(c.out),
            urls=self._local("urls", c.urls),
            path=self._local("path", c.path),
            forget=self._local("forget", c.forget),
            url_list=replace(
                c.url_list,
                blocked_domains_file=self._local("url_list.blocked_domains_file", c.url_list.blocked_domains_file),
            ),
            fetch=replace(
                c.fetch,
                hosts_file=self._local("fetch.hosts_file", c.fetch.hosts_file),
                rescue=self._local("fetch.rescue", c.fetch.rescue),
                since=local_path(c.fetch.since),
            ),
            quality=replace(
                c.quality,
                blocked_words_file=self._local("quality.blocked_words_file", c.quality.blocked_words_file),
            ),
            dedup=replace(c.dedup, against=[self._local("dedup.against", p, OLD_INDEX) for p in c.dedup.against]),
            decontaminate=replace(
                c.decontaminate, paths=[self._local("decontaminate.paths", p) for p in c.decontaminate.paths]
            ),
            report=replace(c.report, domains=self._local("report.domains", c.report.domains)),
        )

    def _local(self, setting: str, value: str, only: tuple[str, ...] = ALL) -> str:
        if not is_address(value):
            return local_path(value)
        try:
            path = bring(value, self._work, self._storage, only)
        except FileNotFoundError:
            self.faults.append(f"{setting}={value}: there is nothing; check the bucket and the name")
        except InputError as e:
            self.faults.append(f"{setting}={e}")
        else:
            self.address_of[str(path)] = value.rstrip("/")
            return str(path)
        return value
