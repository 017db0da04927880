"""Documents, one after another → a folder of token shards, its manifest last.

In: uint16 ids of a document, ended by `<|endoftext|>`, with the document's index, URL and digest. Out: the files that
token_shards describes, synced to disk. The folder's name is the caller's matter: pack publishes it with a rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.store import sync_folder
from data_pipeline.token_shards import (
    BLOCK_BYTES,
    DOCUMENTS,
    DOCUMENTS_SCHEMA,
    FORMAT,
    MANIFEST,
    ROW_GROUP_ROWS,
    SPLITS,
    TOKEN,
    VERSION,
    describe,
    fingerprint,
    write_index,
)
from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY


class TokenShardWriter:
    """Writes a folder of token shards, one document after another; `finish` writes the manifest and syncs all to disk.

    >>> with TokenShardWriter(folder, shard_tokens=100_000_000, tokenizer_sha256=load().sha256) as writer:
    ...     writer.append("train", tokens, index=0, url="https://…", digest="…")
    ...     manifest = writer.finish(made_from="…", settings={})

    Memory: the file under way's lengths, 16,384 rows of documents.parquet and 8 MB of tokens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_tokens: int,
        tokenizer_sha256: str,
        vocabulary: int = VOCABULARY,
        end_of_text: int = END_OF_TEXT,
    ) -> None:
        """`folder` exists and is empty: whoever publishes it renames it once `finish` has returned.

        Another `vocabulary`, with its own `end_of_text`, is for experiments: a small ladder need not pay for 50,257.
        """
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._tokenizer_sha256 = tokenizer_sha256
        self._vocabulary, self._end_of_text = vocabulary, end_of_text
        self._splits: dict[str, dict[str, Any]] = {s: {"tokens": 0, "documents": 0, "files": []} for s in SPLITS}
        self._split = SPLITS[0]
        self._rows: list[tuple[str, int, int, int, str, str]] = []
        self._bin: BinaryIO | None = None
        self._number = 0  # of the file under way in its split
        self._room = shard_tokens  # left in it
        self._parquet = pq.ParquetWriter(folder / DOCUMENTS, DOCUMENTS_SCHEMA, compression="zstd")

    def __enter__(self) -> TokenShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bin is not None:
            self._bin.close()
        self._parquet.close()

    def append(self, split: str, tokens: np.ndarray, *, index: int, url: str, digest: str) -> None:
        """Add a document: tokens[n], uint16, ended by END_OF_TEXT. All of train comes before validation."""
        assert tokens.dtype == TOKEN, f"tokens are {tokens.dtype}, not uint16"
        assert tokens[-1] == self._end_of_text, "a document ends with END_OF_TEXT"
        count = len(tokens)
        self._make_room(split, count)
        if self._bin is None:
            self._open_file()
        totals = self._splits[split]
        self._rows.append((split, totals["tokens"], count, index, url, digest))
        self._lengths.append(count)
        self._file_tokens += count
        totals["tokens"] += count
        totals["documents"] += 1
        self._block += tokens.view(np.uint8).data
        if len(self._block) >= BLOCK_BYTES:
            self._write_block()
        if len(self._rows) == ROW_GROUP_ROWS:
            self._write_rows()

    def pass_over(self, split: str, tokens: int) -> None:
        """Leave out a document of `tokens` tokens that was taken down: files border where they did with it."""
        self._make_room(split, tokens)

    def _make_room(self, split: str, tokens: int) -> None:
        """Go on to the file that a document of `tokens` tokens belongs to."""
        if split != self._split:
            assert SPLITS.index(split) > SPLITS.index(self._split), "train comes before validation"
            self._close_file()
            self._write_rows()  # a row group holds one split alone
            self._split, self._number, self._room = split, 0, self._shard_tokens
        if tokens > self._room and self._room < self._shard_tokens:
            self._close_file()
            self._number += 1  # also of a file that nothing is left of: those behind it keep their names
            self._room = self._shard_tokens
        self._room -= tokens

    def finish(self, *, made_from: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Close and sync all files, write the manifest last, and return it.

        made_from: what identifies the documents and everything that made them; settings: those of this step. Both go
        into the manifest, and so into its fingerprint.
        """
        self._close_file()
        self._write_rows()
        self._parquet.close()
        with open(self._folder / DOCUMENTS, "rb") as f:
            os.fsync(f.fileno())
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": {"name": "gpt2", "sha256": self._tokenizer_sha256},
            "vocabulary": self._vocabulary,
            "end_of_text": self._end_of_text,
            "dtype": "uint16, little-endian",
            "made_from": made_from,
            "settings": settings,
            "splits": self._splits,
            "documents": describe(self._folder / DOCUMENTS),
        }
        manifest["fingerprint"] = fingerprint(manifest)
        with open(self._folder / MANIFEST, "w", encoding="utf-8") as text:
            json.dump(manifest, text, indent=1)
            text.write("\n")
            text.flush()
            os.fsync(text.fileno())
        sync_folder(self._folder)
        return manifest

    def _open_file(self) -> None:
        self._name = f"{self._split}_{self._number:05d}"
        self._bin = open(self._folder / f"{self._name}.bin", "wb", buffering=0)  # noqa: SIM115 (closed by _close_file)
        self._block = bytearray()
        self._digest = hashlib.sha256()
        self._file_tokens = 0
        self._lengths: list[int] = []

    def _write_block(self) -> None:
        assert self._bin is not None
        largest = np.frombuffer(self._block, TOKEN).max()
        assert largest < self._vocabulary, f"token {largest} is not below the vocabulary of {self._vocabulary}"
        self._digest.update(self._block)
        _write_all(self._bin, self._block)
        self._block = bytearray()

    def _write_rows(self) -> None:
        if self._rows:
            columns = [
                pa.array(c, t) for c, t in zip(zip(*self._rows, strict=True), DOCUMENTS_SCHEMA.types, strict=True)
            ]
            self._parquet.write_table(pa.table(columns, schema=DOCUMENTS_SCHEMA), row_group_size=ROW_GROUP_ROWS)
            self._rows.clear()

    def _close_file(self) -> None:
        if self._bin is None:
            return
        if self._block:
            self._write_block()
        os.fsync(self._bin.fileno())
        self._bin.close()
        self._bin = None
        index = self._folder / f"{self._name}.idx"
        write_index(index, np.array(self._lengths, np.int64))
        self._splits[self._split]["files"].append(
            {
                "file": f"{self._name}.bin",
                "bytes": self._file_tokens * TOKEN.itemsize,
                "sha256": self._digest.hexdigest(),
                "tokens": self._file_tokens,
                "documents": len(self._lengths),
                "index": describe(index),
            }
        )


def _write_all(f: BinaryIO, content: bytearray) -> None:
    """A raw write may be short (a signal, a full disk): go on until it is whole or raises."""
    view = memoryview(content)
    while view:
        view = view[f.write(view) :]
