"""Documents → token ids, shard by shard; then all shards → one shuffled folder of token shards.

`tokenize_shard` (one process per shard): a Parquet file of documents → a part, which is two files: the raw uint16 ids
of its documents one after another, each ended by `<|endoftext|>`, and a table of PART_SCHEMA in the same order.

`write_token_shards` (one process): all parts → train and validation as token_shards describes. Which split a document
goes to, and where it stands there, follows from its digest, its index and the seed alone: the same documents give the
same bytes, whatever shards they came in. Tokens are copied from memory-mapped parts, one document at a time; what stays
in memory is about 250 bytes a document (its URL and digest above all).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import tokenizer
from data_pipeline.config import TokenizeConfig
from data_pipeline.records import CorruptionError, InputError
from data_pipeline.store import sha256_file, storage_errors, sync_folder, write_atomic
from data_pipeline.token_shards import TOKEN
from data_pipeline.token_writer import TokenShardWriter

PART_SCHEMA = pa.schema(
    [("index", pa.int64()), ("url", pa.string()), ("digest", pa.string()), ("tokens", pa.int64())],
)
BATCH_ROWS = 1_000  # documents read, encoded, written or reported at a time
OPEN_PARTS = 256  # parts mapped at once: each holds a file descriptor, of which a process has 1,024 by default


def tokenize_shard(documents: Path, tokens_out: Path, documents_out: Path) -> dict[str, Any]:
    """Encode the documents (DOCUMENT_SCHEMA) of one shard, in their order.

    Each output file appears whole or not at all. Returns {"documents", "tokens", "text_bytes"}; tokens include one
    `<|endoftext|>` a document.
    """
    encode = tokenizer.load().encode
    end = np.array([tokenizer.END_OF_TEXT], TOKEN)
    counts = {"documents": 0, "tokens": 0, "text_bytes": 0}
    with (
        write_atomic(tokens_out) as tokens_path,
        write_atomic(documents_out) as documents_path,
        pq.ParquetFile(documents) as rows,
        open(tokens_path, "wb", buffering=1 << 20) as tokens_file,
        pq.ParquetWriter(documents_path, PART_SCHEMA, compression="zstd") as table,
    ):
        # The other cores have shards of their own; and a batch's strings all at once would cost their memory anew.
        for batch in rows.iter_batches(BATCH_ROWS, columns=["index", "url", "text", "digest"], use_threads=False):
            lengths = []
            for text in batch["text"]:
                ids = encode(text.as_py()).astype(TOKEN, copy=False)
                tokens_file.write(ids.data)
                tokens_file.write(end.data)
                lengths.append(len(ids) + 1)
            columns = [batch["index"], batch["url"], batch["digest"], pa.array(lengths, pa.int64())]
            table.write_table(pa.table(columns, schema=PART_SCHEMA))
            counts["documents"] += len(lengths)
            counts["text_bytes"] += pc.sum(pc.binary_length(batch["text"])).as_py() or 0
            counts["tokens"] += sum(lengths)
    return counts


def write_token_shards(
    parts: Sequence[tuple[Path, Path]],
    out: Path,
    config: TokenizeConfig,
    fingerprint: str,
    on_progress: Callable[[int], None] | None = None,
    tombstones: Path | None = None,
) -> dict[str, Any]:
    """Shuffle the documents of all `parts` (tokens_out, documents_out of `tokenize_shard`) into the folder `out`.

    `out` is replaced as a whole, by renames, once everything is on disk; a run killed before leaves it as it was, or,
    in the instant between the two renames, absent. `fingerprint` identifies what made the documents and goes into the
    manifest as `made_from`. `on_progress` gets the number of documents written since its last call. `tombstones` is a
    table (index, digest, tokens) of documents that were taken down: files border as they did with them, and a file of
    the folder before that has the same bytes stays as it lies.

    Returns {"documents", "tokens", "train_documents", "train_tokens", "validation_documents", "validation_tokens",
    "files", "files_unchanged"}.
    Raises InputError when there is no document at all, CorruptionError when a part does not agree with itself.
    """
    documents, starts, part_of = _read_parts(parts, tombstones)
    if not (part_of >= 0).any():
        raise InputError(f"{out}: no document is left to make token shards of; see the ledger for why each one went")
    validation, order = _arrange(documents, config, part_of >= 0)
    lengths = documents["tokens"].to_numpy()
    partial, old = _beside(out)
    with storage_errors(out), contextlib.ExitStack() as on_failure:
        for left_by_a_killed_run in (partial, old):
            shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
        on_failure.callback(shutil.rmtree, partial, ignore_errors=True)  # a full disk gets its room back
        partial.mkdir(parents=True)

        @functools.lru_cache(OPEN_PARTS)
        def tokens_of(part: int) -> np.ndarray:
            return np.asarray(np.memmap(parts[part][0], dtype=TOKEN, mode="r"))

        with TokenShardWriter(
            partial, shard_tokens=config.shard_tokens, tokenizer_sha256=tokenizer.load().sha256
        ) as writer:
            for split, chosen in (("train", order[~validation[order]]), ("validation", order[validation[order]])):
                for first in range(0, len(chosen), BATCH_ROWS):
                    batch = chosen[first : first + BATCH_ROWS]
                    chosen_rows = documents.take(batch)
                    rows = zip(*(chosen_rows[name].to_pylist() for name in ("index", "url", "digest")), strict=True)
                    places = zip(part_of[batch].tolist(), starts[batch].tolist(), lengths[batch].tolist(), strict=True)
                    for (part, start, length), (index, url, digest) in zip(places, rows, strict=True):
                        if part < 0:
                            writer.pass_over(split, length)
                            continue
                        tokens = tokens_of(part)[start : start + length]
                        writer.append(split, tokens, index=index, url=url, digest=digest)
                    if on_progress:
                        on_progress(len(batch))
            manifest = writer.finish(
                made_from=fingerprint,
                settings={
                    "seed": config.seed,
                    "shard_tokens": config.shard_tokens,
                    "validation_fraction": config.validation_fraction,
                },
            )
        unchanged = _keep_unchanged(out, partial, manifest)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    splits = manifest["splits"]
    return {
        "documents": sum(s["documents"] for s in splits.values()),
        "tokens": sum(s["tokens"] for s in splits.values()),
        **{f"{name}_{what}": s[what] for name, s in splits.items() for what in ("documents", "tokens")},
        "files": sum(len(s["files"]) for s in splits.values()),
        "files_unchanged": unchanged,
    }


def _beside(out: Path) -> tuple[Path, Path]:
    """Where token shards for `out` are written, and where those before them wait to be removed."""
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


def remove_token_shards(out: Path) -> None:
    """Remove the folder `out`, and what a run that was killed while packing left beside it."""
    for folder in (out, *_beside(out)):
        shutil.rmtree(folder, ignore_errors=True)


def _keep_unchanged(old: Path, new: Path, manifest: dict[str, Any]) -> int:
    """Link those .bin and .idx files of `old` into `new` that have the same bytes; how many .bin files that are.

    So a take-down rewrites, on disk and for whoever copies the folder, only the shards concerned.
    """
    unchanged = 0
    for split in manifest["splits"].values():
        for entry in split["files"]:
            for described in (entry, entry["index"]):
                before = old / described["file"]
                if before.is_file() and before.stat().st_size == described["bytes"]:
                    if sha256_file(before) != described["sha256"]:
                        continue
                    unchanged += described is entry
                    with contextlib.suppress(OSError):  # no hard links here: the new file has the same bytes
                        link = new / f".{described['file']}.link"
                        os.link(before, link)
                        os.replace(link, new / described["file"])
    sync_folder(new)
    return unchanged


def _read_parts(parts: Sequence[tuple[Path, Path]], tombstones: Path | None) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """All parts' documents as one table, each one's first token in its part, and its part's number (-1: taken down)."""
    tables, starts, part_of = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, (tokens_path, documents_path) in enumerate(parts):
        table = pq.read_table(documents_path, schema=PART_SCHEMA)
        ends = np.cumsum(table["tokens"].to_numpy())
        expected = int(ends[-1]) * TOKEN.itemsize if len(ends) else 0
        size = tokens_path.stat().st_size if tokens_path.exists() else 0
        if size != expected:
            raise CorruptionError(
                f"{tokens_path}: {size} bytes, but {documents_path.name} counts {expected}; remove both and run again"
            )
        tables.append(table)
        starts.append(ends - table["tokens"].to_numpy())
        part_of.append(np.full(len(ends), number))
    if tombstones is not None and tombstones.exists():
        gone = pq.read_table(tombstones)
        here = {pair for t in tables for pair in zip(t["index"].to_pylist(), t["digest"].to_pylist(), strict=True)}
        pairs = zip(gone["index"].to_pylist(), gone["digest"].to_pylist(), strict=True)
        gone = gone.filter(pa.array([pair not in here for pair in pairs], pa.bool_()))
        urls = pa.nulls(gone.num_rows, pa.string())
        columns = [gone["index"], urls, gone["digest"], gone["tokens"]]
        tables.append(pa.table(columns, schema=PART_SCHEMA))
        starts.append(np.zeros(gone.num_rows, np.int64))
        part_of.append(np.full(gone.num_rows, -1))
    # large_string: the URLs and digests of some millions of documents are more than the 2 GiB that string can index.
    wide = pa.schema([f.with_type(pa.large_string()) if f.type == pa.string() else f for f in PART_SCHEMA])
    documents = pa.concat_tables([t.cast(wide) for t in tables]).combine_chunks() if tables else wide.empty_table()
    return documents, np.concatenate(starts), np.concatenate(part_of)


def _hashed(keyed: blake2b, values: Iterable[bytes]) -> Iterator[bytes]:
    """The hash of each value by the key, size and person of `keyed`, which has hashed nothing yet."""
    for value in values:
        of_value = keyed.copy()
        of_value.update(value)
        yield of_value.digest()


def _arrange(documents: pa.Table, config: TokenizeConfig, living: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """validation[documents], bool, and order[documents]: the rows in the order in which they are written.

    Both follow from keyed hashes of the digest, so that adding a document moves no other to the other split, and the
    split does not follow from the seed. Equal hashes (equal texts) are ordered by index. living[documents], bool: those
    that were not taken down; their split is the one that they would have without the others.
    """
    count = documents.num_rows
    seed = config.seed.to_bytes(8, "little", signed=True)
    by_split, by_order = blake2b(digest_size=8, person=b"split"), blake2b(digest_size=16, key=seed, person=b"order")
    split_key, order_key = np.empty(count, np.uint64), np.empty((count, 2), np.uint64)
    for first in range(0, count, BATCH_ROWS):  # all digests as Python objects would be 100 bytes a document more
        rows = slice(first, first + BATCH_ROWS)
        digests = [digest.encode() for digest in documents["digest"][rows].to_pylist()]
        split_key[rows] = np.frombuffer(b"".join(_hashed(by_split, digests)), "<u8")
        order_key[rows] = np.frombuffer(b"".join(_hashed(by_order, digests)), "<u8").reshape(-1, 2)
    index = documents["index"].to_numpy()
    order = np.lexsort((index, order_key[:, 1], order_key[:, 0]))
    validation = split_key < np.uint64(int(config.validation_fraction * 2**64))
    # So few documents that chance left a split empty: it gets the one whose hash lies nearest to it. One document alone
    # is for training. First among all, for where those that were taken down stood; then among those that are left.
    by_key = np.lexsort((index, split_key))
    for ranked in (by_key, by_key[living[by_key]]):
        if len(ranked) and validation[ranked].all():
            validation[ranked[-1]] = False
        elif config.validation_fraction > 0 and len(ranked) >= 2 and not validation[ranked].any():
            validation[ranked[0]] = True
    return validation, order
