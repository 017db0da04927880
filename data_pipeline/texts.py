"""Text datasets → documents: .txt, .jsonl and .parquet files, saved Hugging Face datasets, or one by name.

For those who have their texts already (source=dataset): the rows enter the pipeline where extraction would have ended.
Rows are cut into shards in their own order: 5,000 rows or 16 MB of text a shard, or round robin over a given number.
A .txt file is one document.

Files are UTF-8, or UTF-16 where a byte order mark says so. What cannot be read of a row costs that alone: characters
are replaced and counted in the document's `unreadable_characters`, a value of another column is left out, and a row
that cannot be read at all fails as `unreadable_row`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.crawl.url_syntax import without_credentials
from data_pipeline.layout import Corpus
from data_pipeline.records import DOCUMENT_SCHEMA, DROPPED, FAILED, InputError, Verdict, numbers_to_json, verdict_table
from data_pipeline.store import write_table

ENDINGS = (".txt", ".jsonl", ".parquet")
SHARD_ROWS = 5_000
SHARD_BYTES = 16_000_000
HUB_TIMEOUT_S = 10.0
OPTIONAL = ("title", "author", "date", "language", "domain", "fetched_at")
"""Columns that are taken over where a row has them."""

# What stands where a character was not read: U+FFFD, NUL (of UTF-16 without a mark), and lone surrogates.
_UNREADABLE = re.compile("[\ufffd\0\ud800-\udfff]")


def dataset_files(path: str) -> list[Path]:
    """The local files that `path` stands for; empty when it is no local path (then it names a Hub dataset)."""
    root = Path(path)
    if root.is_file():
        if root.suffix not in ENDINGS:
            raise InputError(f"path={path}: must end in {', '.join(ENDINGS)}; convert it first")
        return [root]
    if root.is_dir():
        if (root / "dataset_info.json").is_file():  # written by datasets.save_to_disk
            return sorted(root.glob("*.arrow"))
        files = sorted(p for p in root.rglob("*") if p.suffix in ENDINGS and not p.name.startswith("."))
        if not files:
            raise InputError(f"path={path}: holds no {', '.join(ENDINGS)} file; give the folder that does")
        return files
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or root.suffix in ENDINGS:
        raise InputError(f"path={path}: there is no such file or folder; check the path")
    return []


@dataclass(frozen=True)
class Unreadable:
    """A row of which nothing but its place is known."""

    why: str
    url: str = ""


def read_rows(path: str, text_column: str) -> Iterator[dict[str, Any] | Unreadable]:
    """Rows with at least `text` and `url`. Raises InputError where the column is missing or a file cannot be read."""
    files = dataset_files(path)
    if not files:
        yield from _hub_rows(path, text_column)
    for file in files:
        name = file.name if Path(path).is_file() else file.relative_to(path).as_posix()
        try:
            for number, row in enumerate(_file_rows(file, text_column)):
                if isinstance(row, Unreadable):
                    yield Unreadable(row.why, f"dataset:{name}#{number}")
                    continue
                yield {**row, "text": row.get(text_column), "url": row.get("url") or f"dataset:{name}#{number}"}
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"path={file}: cannot be read ({e}); mend it or take it out") from e


def _file_rows(file: Path, text_column: str) -> Iterator[dict[str, Any] | Unreadable]:
    if file.suffix == ".txt":
        yield {text_column: file.read_bytes().decode(_encoding(file), errors="replace"), "title": file.stem}
    elif file.suffix == ".jsonl":
        with open(file, encoding=_encoding(file), errors="replace", newline="\n") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                except RecursionError:
                    yield Unreadable(f"line {number}: nested too deep")
                    continue
                if not isinstance(row, dict):
                    raise InputError(f"path={file}: line {number} is no JSON object; mend it or take it out")
                _require_column(row, text_column, file)
                yield row
    elif file.suffix == ".arrow":
        from datasets import Dataset

        for table in Dataset.from_file(str(file)).with_format("arrow").iter(batch_size=1_000):
            _require_column(dict.fromkeys(table.column_names), text_column, file)
            for batch in table.to_batches():
                yield from _batch_rows(batch)
    else:
        parquet = pq.ParquetFile(file)
        _require_column(dict.fromkeys(parquet.schema_arrow.names), text_column, file)
        for batch in parquet.iter_batches(batch_size=1_000):
            yield from _batch_rows(batch)


def _encoding(file: Path) -> str:
    """What the byte order mark says (Unicode 16, 2.13), else UTF-8."""
    with open(file, "rb") as f:
        return "utf-16" if f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of `batch`, text of other bytes repaired, values that Python has none for left out."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # of one value: bytes that are no UTF-8, a date beyond the year 9999
        columns = [[_value(v) for v in batch.column(i)] for i in range(batch.num_columns)]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StringScalar | pa.LargeStringScalar):
            return value.as_buffer().to_pybytes().decode("utf-8", errors="replace")
    except (ValueError, OverflowError):
        pass
    return None


def require_hub_dataset(name: str) -> None:
    """One question to the Hub, of at most HUB_TIMEOUT_S: reading a set that is not there would be tried for half a
    minute. Raises InputError. Not asked where HF_HUB_OFFLINE is set, as the set may lie in the local cache."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as e:  # its client raises kinds of its own: unknown name, gated, no network, no such host
        raise _no_hub_dataset(name, e) from None


def _no_hub_dataset(name: str, e: Exception) -> InputError:
    reason = str(e).strip().split("\n")[0]
    return InputError(
        f"path={name}: no such file or folder here, and no Hugging Face dataset of this name could be had ({reason}); "
        "check the name, the network, and HF_TOKEN for one that is not public"
    )


def _hub_rows(name: str, text_column: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        rows = iter(load_dataset(name, split="train", streaming=True))
    except Exception as e:  # datasets raises a dozen kinds: offline, unknown name, gated, no train split
        raise _no_hub_dataset(name, e) from e
    for number, row in enumerate(rows):
        _require_column(row, text_column, name)
        yield {**row, "text": row[text_column], "url": row.get("url") or f"dataset:{name}#{number}"}


def _require_column(row: Mapping[str, Any], text_column: str, where: object) -> None:
    if text_column not in row:
        raise InputError(
            f"text_column={text_column}: not in {where}, which has {', '.join(map(str, row))}; give text_column=NAME"
        )


def write_document_shards(
    path: str,
    text_column: str,
    corpus: Corpus,
    shards: int,
    forgotten: Callable[..., str | None] | None = None,
) -> tuple[int, list[Path], int]:
    """Write extract/NNNNN.parquet and its verdicts for all rows.

    Returns how many shards, the files, and how many documents hold characters that could not be read.

    `forgotten` tells of a row's URL, domain and digest why it was taken down, or None.

    Memory: one shard of 16 MB of text, or all of them with a given number of `shards`.
    """
    files: list[Path] = []
    made = 0

    def flush(k: int, documents: list[dict[str, Any]], verdicts: list[Verdict]) -> None:
        write_table(pa.Table.from_pylist(documents, schema=DOCUMENT_SCHEMA), corpus.table("extract", k))
        write_table(verdict_table(verdicts), corpus.verdicts("extract", k))
        files.extend((corpus.table("extract", k), corpus.verdicts("extract", k)))

    pending: list[tuple[list[dict[str, Any]], list[Verdict], int]] = [([], [], 0) for _ in range(max(shards, 1))]
    rows = unreadable = 0
    for rows, row in enumerate(read_rows(path, text_column), 1):
        index = rows - 1
        slot = index % shards if shards else 0
        documents, verdicts, size = pending[slot]
        document, verdict = _document(index, row)
        if document is not None and forgotten:
            why = forgotten(document["url"], document.get("domain"), digest=document["digest"])
            if why:
                document, verdict = None, Verdict(index, verdict.url, DROPPED, "forgotten", why)
        verdicts.append(verdict)
        if document is not None:
            documents.append(document)
            unreadable += '"unreadable_characters"' in document["numbers"]
            size += len(document["text"])
        pending[slot] = (documents, verdicts, size)
        if not shards and (len(verdicts) >= SHARD_ROWS or size >= SHARD_BYTES):
            flush(made, documents, verdicts)
            made += 1
            pending[slot] = ([], [], 0)
    if rows == 0:
        raise InputError(f"path={path}: holds no rows; give a dataset with texts")
    for documents, verdicts, _ in pending:
        if verdicts or shards:
            flush(made, documents, verdicts)
            made += 1
    return made, files, unreadable


def _document(index: int, row: Mapping[str, Any] | Unreadable) -> tuple[dict[str, Any] | None, Verdict]:
    if isinstance(row, Unreadable):
        return None, Verdict(index, row.url, FAILED, "unreadable_row", row.why)
    try:
        url, text = without_credentials(_clean(row["url"])), row["text"]
        if not isinstance(text, str) or not text.strip():
            return None, Verdict(index, url, DROPPED, "no_text")
        optional = {k: _clean(row[k]) for k in OPTIONAL if row.get(k) is not None}
        if "domain" in optional:  # often all that stands before the path
            optional["domain"] = optional["domain"].rpartition("@")[2]
    except RecursionError:
        return None, Verdict(index, f"dataset:#{index}", FAILED, "unreadable_row", "nested too deep")
    numbers = {"characters": len(text)}
    if unreadable := len(_UNREADABLE.findall(text)):
        numbers["unreadable_characters"] = unreadable
    text = _clean(text)
    document = {
        **optional,
        "index": index,
        "url": url,
        "text": text,
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "numbers": numbers_to_json(numbers),
    }
    return document, Verdict(index, url)


def _clean(value: Any) -> str:
    """As a text that UTF-8 can hold: a lone surrogate, which JSON can name, becomes "?"."""
    return str(value).encode("utf-8", errors="replace").decode()
