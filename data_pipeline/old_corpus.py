"""Another corpus, as `dedup.against` reads it: the signatures of the documents that it keeps.

Its markers tell whether it was finished, and the hashes in them whether its files are what was written; nothing else
would tell a flipped bit, which would only find other duplicates. The markers are looked at before any work and again
before the join, where the files are hashed, too: once a run, by the process that hands out the tasks. Tasks read, under
a shared lock that this process holds, and trust what it found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.clean import dedup
from data_pipeline.config import DedupConfig
from data_pipeline.layout import Corpus
from data_pipeline.records import KEPT, CorruptionError, InputError, LockedError
from data_pipeline.store import Hashes, lock_shared, read_signed


def require_finished(folder: Path) -> None:
    """Follow the markers from the signatures to the last verdicts. Raises InputError where they do not fit.

    So they do not where a stage was run again and those after it were not.
    """
    corpus = Corpus(folder)
    join = _join_marker(folder)
    for k in range(_shards(join)):
        signed, joined, last = (
            _marker(corpus, stage, name)
            for stage, name in (("dedup", f"{k:05d}.signatures"), ("dedup", f"{k:05d}"), ("decontaminate", f"{k:05d}"))
        )
        if signed is None or joined is None or last is None:
            raise _unfinished(folder)
        verdicts = _name(corpus, corpus.verdicts("dedup", k))
        fits = (
            signed["outputs"] == {name: join["inputs"].get(name) for name in signed["outputs"]}
            and joined["inputs"] == {**signed["outputs"], **join["outputs"]}
            and last["inputs"].get(verdicts) == joined["outputs"].get(verdicts)
            and signed["inputs"].items() <= last["inputs"].items()
        )
        if not fits:
            raise InputError(
                f"dedup.against={folder}: in shard {k} later stages were made of other results than lie there; "
                "run `gpt2train corpus` there to its end first"
            )


def require_whole(folder: Path, hashes: Hashes) -> None:
    """Hold the files that are read against their markers. Raises CorruptionError, after `require_finished`."""
    require_finished(folder)
    corpus = Corpus(folder)
    for k, files in enumerate(index(folder)):
        markers = _marker(corpus, "dedup", f"{k:05d}.signatures"), _marker(corpus, "decontaminate", f"{k:05d}")
        for path, marker in zip(files, markers, strict=True):
            written, found = (marker or {"outputs": {}})["outputs"].get(_name(corpus, path)), hashes.of(path)
            if found is None or found != written:
                fault = "is missing" if found is None else f"is damaged (sha256 {found[:12]}…, written as {written})"
                raise _damaged(folder, path, fault)


@contextmanager
def held(folders: Sequence[str], hashes: Hashes) -> Iterator[None]:
    """Keep other runs from changing the corpora in `folders`, which are found finished and whole.

    Raises InputError, CorruptionError, and LockedError where a run is at work.
    """
    with ExitStack() as locks:
        for folder in dict.fromkeys(folders):
            try:
                locks.enter_context(lock_shared(Path(folder)))
            except LockedError as e:
                raise LockedError(f"dedup.against={folder}: {e}") from None
            require_whole(Path(folder), hashes)
        yield


def index(folder: Path) -> list[tuple[Path, Path]]:
    """(signatures, last verdicts) of each shard. Raises InputError for a folder without them."""
    corpus = Corpus(folder)
    return [(corpus.signatures(k), corpus.verdicts("decontaminate", k)) for k in range(_shards(_join_marker(folder)))]


def signatures(folder: Path, config: DedupConfig, columns: Sequence[str] | None = None) -> pa.Table:
    """Signatures (all columns, or `columns`) of the documents that the corpus in `folder` kept to its end.

    Raises InputError for signatures of another kind, CorruptionError for files that cannot be read.
    """
    needed = None if columns is None else list(dict.fromkeys(["index", *columns]))
    tables = []
    for signed, verdicts in index(folder):
        try:
            table = dedup.read_signatures([signed], config, needed)
        except CorruptionError as e:
            raise InputError(
                f"dedup.against={folder}: its signatures are of another kind; give the dedup.ngram, bands and rows "
                f"that it was made with, or run it again ({e})"
            ) from None
        except (pa.ArrowException, OSError) as e:
            raise _unreadable(folder, signed, e) from e
        try:
            states = pq.read_table(verdicts, columns=["index", "state"])
        except (pa.ArrowException, OSError) as e:
            raise _unreadable(folder, verdicts, e) from e
        kept = states.filter(pc.equal(states["state"], KEPT))["index"]
        tables.append(table.filter(pc.is_in(table["index"], value_set=kept.combine_chunks())))
    return pa.concat_tables(tables)


def _join_marker(folder: Path) -> dict[str, Any]:
    marker = _marker(Corpus(folder), "dedup", "duplicates")
    if marker is None or not _shards(marker):
        raise _unfinished(folder)
    return marker


def _shards(join: dict[str, Any]) -> int:
    """The join's inputs are all shards' signatures, and files of other corpora."""
    return sum(re.fullmatch(r"dedup/\d+\.signatures\.parquet", name) is not None for name in join["inputs"])


def _marker(corpus: Corpus, stage: str, name: str) -> dict[str, Any] | None:
    return read_signed(corpus.folder(stage) / f"{name}.done.json")


def _name(corpus: Corpus, path: Path) -> str:
    return path.relative_to(corpus.out).as_posix()


def _unfinished(folder: Path) -> InputError:
    return InputError(f"dedup.against={folder}: no corpus that was run up to decontaminate; finish it first")


def _damaged(folder: Path, path: Path, fault: str) -> CorruptionError:
    return CorruptionError(
        f"dedup.against={folder}: {_name(Corpus(folder), path)} {fault}; run `gpt2train corpus` there again, "
        "which makes it anew"
    )


def _unreadable(folder: Path, path: Path, e: Exception) -> Exception:
    """The machine's errors as they are, with their number; what Arrow says of bytes as a CorruptionError."""
    return e if isinstance(e, OSError) and e.errno is not None else _damaged(folder, path, "is damaged")
