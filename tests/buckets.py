"""A corpus that lies in a bucket: its settings, a bucket in memory, and what lies there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import corpora
import pytest
from corpora import write_texts

from data_pipeline.config import CorpusConfig, LanguageConfig, Source, StorageConfig, TokenizeConfig
from data_pipeline.storage.bucket import Bucket

PROSE = corpora.PROSE[:10]
QUICK = StorageConfig(lease_s=1.5, retry_s=20, sync_every_s=1)


@pytest.fixture(name="memory")
def memory_fixture(request: pytest.FixtureRequest) -> Iterator[str]:
    """memory://NAME, for what does not depend on the kind of store."""
    from fsspec.implementations.memory import MemoryFileSystem

    yield f"memory://m{abs(hash(request.node.nodeid)):x}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(name="config")
def config_fixture(tmp_path: Path) -> CorpusConfig:
    """A corpus of ten texts in three shards in a local folder, not built yet."""
    return CorpusConfig(
        source=Source.dataset,
        path=str(write_texts(tmp_path / "texts.jsonl", PROSE)),
        out=str(tmp_path / "local"),
        shards=3,
        workers=1,
        progress=False,
        language=LanguageConfig(keep=[]),
        tokenize=TokenizeConfig(validation_fraction=0.2, shard_tokens=4_096),
        storage=QUICK,
    )


def stored(address: str) -> dict[str, bytes]:
    """What lies in the bucket, without what is the run's own."""
    place = Bucket(address, retry_s=QUICK.retry_s)
    return {name: place.read(name) or b"" for name in place.list() if not name.startswith(".")}


OWN = ("config.yaml",)
"""Files that name the place itself."""


def same(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    """Names of the files that differ."""
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name) and name not in OWN]
