"""The folder of tokens that training reads: its format, its reader and the proof that it is whole.

In: a folder that `token_writer` made. Out: tokens by position, and the documents they come from. In the folder lie

    train_00000.bin, …        raw little-endian uint16 ids, documents ended by `<|endoftext|>` (nanoGPT maps these)
    train_00000.idx, …        where each document lies: Megatron-LM's MMapIndexedDataset (also GPT-NeoX)
    validation_00000.bin/.idx
    documents.parquet         split, position, tokens, index, url, digest: every token is traceable to its URL
    manifest.json             counts, bytes and sha256 of all these files and of the tokenizer; written last

Positions count tokens from the start of a split's stream, which is its .bin files one after another. A document is
never cut by a file's border: a file is closed before the document that would take it beyond `shard_tokens`, and one
that is longer by itself gets a larger file of its own.

The manifest's `fingerprint` is the sha256 over the rest of the manifest, so a changed byte anywhere, the manifest
included, is found. `TokenShards.open` reads 2 bytes per token once to prove it (about 1 GB/s); reading a window costs
a copy from the page cache.

    TokenShardError                 exit code 1
    ├── NotTokenShardsError         2   no such folder, or nothing in it that was written here
    └── CorruptTokenShardsError     5   `defects` names every file that is not what the manifest says
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT, VERSION = "gpt2train token shards", 1
SPLITS = ("train", "validation")
TOKEN = np.dtype("<u2")
MANIFEST, DOCUMENTS = "manifest.json", "documents.parquet"

# Megatron-LM, megatron/core/datasets/indexed_dataset.py: _INDEX_HEADER, the version, and DType.uint16. After the header
# come int32 lengths[sequences], int64 pointers[sequences] in bytes, int64 document_indices[documents + 1].
INDEX_MAGIC, INDEX_VERSION, INDEX_UINT16 = b"MMIDIDX\x00\x00", 1, 8
INDEX_HEADER = struct.Struct("<9sQBQQ")

DOCUMENTS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("position", pa.int64()),  # of its first token, in the split's stream
        ("tokens", pa.int64()),  # with its <|endoftext|>
        ("index", pa.int64()),  # of its URL in the list
        ("url", pa.string()),
        ("digest", pa.string()),  # sha256 hex of its text in UTF-8
    ],
)
ROW_GROUP_ROWS = 16_384  # what tracing one position reads of documents.parquet
BLOCK_BYTES = 8 << 20  # written and checked at a time


class TokenShardError(Exception):
    exit_code = 1


class NotTokenShardsError(TokenShardError):
    exit_code = 2


class CorruptTokenShardsError(TokenShardError):
    exit_code = 5

    def __init__(self, folder: Path, defects: Sequence[str]) -> None:
        self.defects = list(defects)
        lines = "\n".join(f"  {d}" for d in self.defects)
        super().__init__(
            f"{folder}: the token shards are not what their manifest says:\n{lines}\n"
            f"restore the folder, or remove it and run `gpt2train corpus` again"
        )


@dataclass(frozen=True, slots=True)
class DocumentSpan:
    """A document at positions [start, stop) of its split, its `<|endoftext|>` included."""

    start: int
    stop: int
    url: str
    digest: str


# ---------------------------------------------------------------------------------------------------------- reading


class TokenSplit:
    """The token stream of one split, made by `TokenShards.split`.

    It may be pickled: the paths travel, not the tokens, and the other process maps the files anew. Reading from several
    threads is safe.
    """

    def __init__(self, name: str, folder: Path, files: Sequence[dict[str, Any]]) -> None:
        self.name = name
        self._folder = folder
        self._files = [(f["file"], f["tokens"]) for f in files]
        self._starts = [0, *itertools.accumulate(tokens for _, tokens in self._files)]
        self._maps: dict[int, np.ndarray] = {}
        self._spans: list[tuple[int, np.ndarray]] | None = None
        self.tokens: int = self._starts[-1]
        """Tokens in the stream."""
        self.document_count: int = sum(f["documents"] for f in files)

    def __len__(self) -> int:
        return self.tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_spans": None}

    def read(self, start: int, stop: int) -> np.ndarray:
        """tokens[stop - start], uint16: a copy of positions [start, stop), over file borders where they come.

        Raises IndexError unless 0 <= start <= stop <= tokens.
        """
        self._check_range(start, stop)
        out = np.empty(stop - start, np.uint16)
        number, position = bisect_right(self._starts, start) - 1, start
        while position < stop:
            file_start, end = self._starts[number], min(self._starts[number + 1], stop)
            out[position - start : end - start] = self._map(number)[position - file_start : end - file_start]
            number, position = number + 1, end
        return out

    def documents(self, start: int, stop: int) -> list[DocumentSpan]:
        """The documents that overlap positions [start, stop), in order. Raises IndexError as `read` does.

        The first call reads the positions of all the split's documents (8 bytes each stay in memory).
        """
        self._check_range(start, stop)
        found: list[DocumentSpan] = []
        with pq.ParquetFile(self._folder / DOCUMENTS) as parquet:
            if self._spans is None:
                self._spans = list(_bounds(parquet, self.name))
            for group, bounds in self._spans:
                # bounds[i] and bounds[i + 1] are where the group's document i starts and stops.
                first = max(int(np.searchsorted(bounds, start, side="right")) - 1, 0)
                last = min(int(np.searchsorted(bounds, stop, side="left")), len(bounds) - 1)
                if start < stop and first < last:
                    rows = parquet.read_row_group(group, columns=["url", "digest"]).slice(first, last - first)
                    for i, row in enumerate(rows.to_pylist(), start=first):
                        found.append(DocumentSpan(int(bounds[i]), int(bounds[i + 1]), row["url"], row["digest"]))
        return found

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = self._folder / self._files[number][0]
            # As a plain array: slicing a np.memmap object costs several times more.
            self._maps[number] = np.asarray(np.memmap(path, dtype=TOKEN, mode="r"))
        return self._maps[number]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"positions [{start}, {stop}) are not within the {self.tokens} tokens of {self.name}")


class TokenShards:
    """A folder of token shards that was checked when it was opened.

    >>> shards = TokenShards.open("corpus/tokens")
    >>> shards.split("train").read(0, 1025)
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> TokenShards:
        """Read the manifest and check the folder against it; raises a TokenShardError.

        verify: read every byte (sizes, sha256, ids below the vocabulary, indexes that agree with the tokens), in
        parallel threads. Without it only the manifest and the sizes are checked.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        try:
            defects = find_defects(folder, manifest, read_all=verify)
        except (KeyError, TypeError) as e:
            defects = [f"{MANIFEST}: its fingerprint is right, but it lacks or garbles an entry ({e!r})"]
        if defects:
            raise CorruptTokenShardsError(folder, defects)
        return cls(folder, manifest)

    def split(self, name: str) -> TokenSplit:
        """The split `train` or `validation`; the latter may hold 0 tokens. Raises KeyError for another name."""
        return TokenSplit(name, self.folder, self.manifest["splits"][name]["files"])

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest: it changes with any token, URL, setting or input that went into the folder."""
        return self.manifest["fingerprint"]

    @property
    def tokenizer_sha256(self) -> str:
        """`Tokenizer.sha256` of the vocabulary that made the tokens."""
        return self.manifest["tokenizer"]["sha256"]

    @property
    def vocabulary(self) -> int:
        """All ids are below this."""
        return self.manifest["vocabulary"]


def _bounds(parquet: pq.ParquetFile, split: str) -> Iterator[tuple[int, np.ndarray]]:
    """(row group, bounds[documents + 1]) of the split's row groups; each row group holds one split alone."""
    for group in range(parquet.num_row_groups):
        rows = parquet.read_row_group(group, columns=["split", "position", "tokens"])
        if rows["split"][0].as_py() == split:
            starts, tokens = rows["position"].to_numpy(), rows["tokens"].to_numpy()
            yield group, np.append(starts, starts[-1] + tokens[-1])


# --------------------------------------------------------------------------------------------------------- checking


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whole and of this version; raises a TokenShardError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        left = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        if left:
            raise CorruptTokenShardsError(folder, [f"{MANIFEST}: missing beside {left[0]}"]) from None
        what = "holds no token shards" if folder.is_dir() else "there is no such folder"
        raise NotTokenShardsError(
            f"{folder}: {what}; give the folder that `gpt2train corpus` wrote (OUT/tokens)"
        ) from None
    except NotADirectoryError:
        raise NotTokenShardsError(f"{folder}: not a folder; give the folder that holds {MANIFEST}") from None
    except OSError as e:
        raise NotTokenShardsError(f"{path}: {e.strerror}; make it readable") from e
    except ValueError as e:
        raise CorruptTokenShardsError(folder, [f"{MANIFEST}: not JSON ({e})"]) from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptTokenShardsError(folder, [f"{MANIFEST}: not a manifest of {FORMAT}"])
    if manifest.get("version") != VERSION:
        raise NotTokenShardsError(
            f"{path}: version {manifest.get('version')} of the format, this program reads {VERSION}; make it anew"
        )
    expected = fingerprint(manifest)
    if manifest.get("fingerprint") != expected:
        raise CorruptTokenShardsError(
            folder,
            [f"{MANIFEST}: changed: fingerprint {expected}, it says {manifest.get('fingerprint')}"],
        )
    return manifest


def token_cache(cache: str | Path = "") -> Path:
    """`cache`, or gpt2train/tokens in the user's cache folder (XDG Base Directory Specification 0.8)."""
    return Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2train" / "tokens")


def fetch_token_shards(address: str, cache: str | Path = "") -> Path:
    """Bring the token shards at `address` (s3://…, gs://…) into a folder of their own below `token_cache(cache)`.

    Each file is checked against the manifest, which comes last, and files that are there already and are whole are not
    brought again. The folder is named by the manifest's fingerprint: other shards at the same address get another one.
    Several processes may call it at once: one brings, the others wait. A local path is returned as it is.

    Raises a TokenShardError, or the PipelineError (of `records`) of a bucket that cannot be read.
    """
    from data_pipeline.config import StorageConfig
    from data_pipeline.storage.address import address_fault, is_address, local_path, shown
    from data_pipeline.storage.bucket import Bucket, Stored
    from data_pipeline.store import lock, sha256_file

    if not is_address(address):
        return Path(local_path(address))
    if fault := address_fault(address):
        raise NotTokenShardsError(f"{shown(address)}: {fault}; see docs/storage.md")
    cache = token_cache(cache)
    bucket = Bucket(address, retry_s=StorageConfig().retry_s)
    content = bucket.read(MANIFEST)
    if content is None:
        raise NotTokenShardsError(f"{address}: holds no {MANIFEST}; give the place of OUT/tokens")
    arriving = cache / f".arriving-{hashlib.sha256(content).hexdigest()[:16]}"
    with lock(arriving, wait_s=FETCH_WAIT_S):
        (arriving / MANIFEST).write_bytes(content)
        manifest = read_manifest(arriving)
        folder = cache / manifest["fingerprint"][:16]
        files = [f for split in SPLITS for f in manifest["splits"][split]["files"]]
        entries = [*files, *(f["index"] for f in files), manifest["documents"]]
        outside = [entry["file"] for entry in entries if Path(entry["file"]).name != entry["file"]]
        if outside:
            raise CorruptTokenShardsError(folder, [f"{outside[0]}: a file outside the folder"])

        def bring(entry: dict[str, Any]) -> str:
            path = folder / entry["file"]
            if path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]:
                return ""
            try:
                bucket.get(entry["file"], path, Stored("", entry["bytes"]))
            except FileNotFoundError:
                return f"{entry['file']}: missing in the bucket"
            got = sha256_file(path)
            return "" if got == entry["sha256"] else _compare(entry, got)[0]

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            defects = [defect for defect in threads.map(bring, entries) if defect]
        if defects:
            raise CorruptTokenShardsError(folder, defects)
        os.replace(arriving / MANIFEST, folder / MANIFEST)
    return folder


FETCH_WAIT_S = 24 * 3600.0
"""How long a process waits for another one of the machine that brings the same shards: as long as that takes."""


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 hex over the manifest without its `fingerprint`, as JSON with sorted keys and no spaces."""
    rest = {k: v for k, v in manifest.items() if k != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find_defects(folder: Path, manifest: dict[str, Any], *, read_all: bool) -> list[str]:
    """What in `folder` is not as the manifest says, one line per file and defect; empty when all is well."""
    files = [(split, f) for split in SPLITS for f in manifest["splits"][split]["files"]]
    entries = [*(f for _, f in files), *(f["index"] for _, f in files), manifest["documents"]]
    defects = [line for entry in entries for line in _size_defects(folder, entry)]
    for split, f in files:
        if f["bytes"] != TOKEN.itemsize * f["tokens"] or not f["tokens"]:
            defects.append(f"{f['file']}: the manifest gives {split} {f['tokens']} tokens in {f['bytes']} bytes")
    if defects or not read_all:
        return defects
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # sha256 and numpy let go of the GIL
        tokens = [threads.submit(_token_defects, folder, f, manifest) for _, f in files]
        rest = [threads.submit(_hash_defects, folder, e) for e in entries[len(files) :]]
        defects = [line for future in (*tokens, *rest) for line in future.result()]
    # What the files say of each other matters once each is what was written.
    return defects or _document_defects(folder, manifest)


def _size_defects(folder: Path, entry: dict[str, Any]) -> list[str]:
    if Path(entry["file"]).name != entry["file"]:
        return [f"{entry['file']}: a file outside the folder"]
    try:
        size = (folder / entry["file"]).stat().st_size
    except OSError as e:
        return [f"{entry['file']}: {'missing' if isinstance(e, FileNotFoundError) else e.strerror}"]
    if size == entry["bytes"]:
        return []
    what = "empty" if not size else "truncated" if size < entry["bytes"] else "too long"
    odd = ", an odd number" if size % 2 and entry["file"].endswith(".bin") else ""
    return [f"{entry['file']}: {what}: {size} bytes{odd}, written as {entry['bytes']}"]


def _hash_defects(folder: Path, entry: dict[str, Any]) -> list[str]:
    return _compare(entry, describe(folder / entry["file"])["sha256"])


def describe(path: Path) -> dict[str, Any]:
    """`file`, `bytes` and `sha256` of a file, as the manifest holds them."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _token_defects(folder: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """One pass over a .bin file: its sha256, the largest id, and as many `<|endoftext|>` as documents."""
    vocabulary, end_of_text = manifest["vocabulary"], manifest["end_of_text"]
    digest, ends, start = hashlib.sha256(), 0, 0
    defects: list[str] = []
    with open(folder / entry["file"], "rb") as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
            tokens = np.frombuffer(block, TOKEN)
            ends += int(np.count_nonzero(tokens == end_of_text))
            if not defects and tokens.max() >= vocabulary:
                at = int(np.argmax(tokens >= vocabulary))
                defects.append(
                    f"{entry['file']}: token {tokens[at]} at {start + at} is not below the vocabulary of {vocabulary}"
                )
            start += len(tokens)
    defects += _compare(entry, digest.hexdigest())
    if not defects and ends != entry["documents"]:
        defects.append(f"{entry['file']}: {ends} ends of documents, the manifest says {entry['documents']}")
    return defects


def _compare(entry: dict[str, Any], got: str) -> list[str]:
    return [] if got == entry["sha256"] else [f"{entry['file']}: changed: sha256 {got}, written as {entry['sha256']}"]


def _document_defects(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Do the .idx files, documents.parquet, the counts and the ends of documents in the .bin files agree?"""
    defects: list[str] = []
    try:
        parquet = pq.ParquetFile(folder / DOCUMENTS)
    except pa.ArrowException as e:
        return [f"{DOCUMENTS}: not Parquet ({e})"]
    with parquet:
        for split in SPLITS:
            said = manifest["splits"][split]
            bounds = [b for _, b in _bounds(parquet, split)]
            lengths = np.concatenate([np.diff(b) for b in bounds]) if bounds else np.empty(0, np.int64)
            indexed: list[np.ndarray] = []
            for f in said["files"]:
                tokens = np.memmap(folder / f["file"], dtype=TOKEN, mode="r")
                try:
                    of_file = read_index(folder / f["index"]["file"])
                except ValueError as e:
                    defects.append(f"{f['index']['file']}: {e}")
                    continue
                indexed.append(of_file)
                ends = np.cumsum(of_file, dtype=np.int64)
                end = manifest["end_of_text"]
                if len(ends) != f["documents"] or ends[-1] != len(tokens) or (tokens[ends - 1] != end).any():
                    defects.append(f"{f['index']['file']}: disagrees with {f['file']} on where documents end")
            starts = np.concatenate([[0], np.cumsum(lengths)])
            if not defects and not (
                np.array_equal(lengths, np.concatenate([np.empty(0, np.int32), *indexed]))
                and all(starts[i] == b[0] for b, i in zip(bounds, _firsts(bounds), strict=True))
                and (said["tokens"], said["documents"]) == (starts[-1], len(lengths))
            ):
                defects.append(f"{DOCUMENTS}: disagrees with the .idx files or the counts of {split}")
    return defects


def _firsts(bounds: Sequence[np.ndarray]) -> list[int]:
    return [0, *itertools.accumulate(len(b) - 1 for b in bounds)][: len(bounds)]


# ---------------------------------------------------------------------------------------------------- Megatron's index


def write_index(path: Path, lengths: np.ndarray) -> None:
    """lengths[documents], in tokens, as a .idx file of Megatron-LM: each document is one sequence."""
    assert 0 < lengths.min() <= lengths.max() < 2**31, "Megatron-LM counts a document's tokens in an int32"
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(path, "wb") as f:
        f.write(INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, INDEX_UINT16, len(lengths), len(lengths) + 1))
        f.write(lengths.astype("<i4").tobytes())
        f.write(((ends - lengths) * TOKEN.itemsize).astype("<i8").tobytes())
        f.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        f.flush()
        os.fsync(f.fileno())


def read_index(path: Path) -> np.ndarray:
    """lengths[documents], int32, in tokens, of a .idx file in which each document is one sequence.

    Raises ValueError when it is none, or does not agree with itself.
    """
    content = path.read_bytes()
    if len(content) < INDEX_HEADER.size:
        raise ValueError(f"{len(content)} bytes, shorter than its header")
    magic, version, dtype, sequences, documents = INDEX_HEADER.unpack_from(content)
    if (magic, version, dtype) != (INDEX_MAGIC, INDEX_VERSION, INDEX_UINT16):
        raise ValueError(f"not an index of uint16 tokens (starts with {magic!r}, version {version}, type {dtype})")
    if documents != sequences + 1 or len(content) != INDEX_HEADER.size + 12 * sequences + 8 * documents:
        raise ValueError(f"{sequences} sequences and {documents} document borders do not fit {len(content)} bytes")
    lengths = np.frombuffer(content, "<i4", sequences, INDEX_HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, INDEX_HEADER.size + 4 * sequences)
    borders = np.frombuffer(content, "<i8", documents, INDEX_HEADER.size + 12 * sequences)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if not (np.array_equal(pointers, starts * TOKEN.itemsize) and np.array_equal(borders, np.arange(documents))):
        raise ValueError("its pointers do not follow from its lengths")
    return lengths
