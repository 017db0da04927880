"""Text datasets → documents: .txt, .jsonl and .parquet files, saved Hugging Face datasets, or one by name.

For those who have their texts already (source=dataset): the rows enter the pipeline where extraction would have ended.
Rows are cut into shards in their own order: 5,000 rows or 16 MB of text a shard, or round robin over a given number.
A .txt file is one document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.layout import Corpus
from data_pipeline.records import DOCUMENT_SCHEMA, DROPPED, InputError, Verdict, numbers_to_json, verdict_table
from data_pipeline.store import write_table

ENDINGS = (".txt", ".jsonl", ".parquet")
SHARD_ROWS = 5_000
SHARD_BYTES = 16_000_000
HUB_TIMEOUT_S = 10.0


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


def read_rows(path: str, text_column: str) -> Iterator[dict[str, Any]]:
    """Rows with at least `text` and `url`. Raises InputError where the column is missing or a file cannot be read."""
    files = dataset_files(path)
    if not files:
        yield from _hub_rows(path, text_column)
    for file in files:
        name = file.name if Path(path).is_file() else file.relative_to(path).as_posix()
        try:
            for number, row in enumerate(_file_rows(file, text_column)):
                yield {**row, "text": row.get(text_column), "url": row.get("url") or f"dataset:{name}#{number}"}
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"path={file}: cannot be read ({e}); mend it or take it out") from e


def _file_rows(file: Path, text_column: str) -> Iterator[dict[str, Any]]:
    if file.suffix == ".txt":
        yield {text_column: file.read_bytes().decode("utf-8-sig", errors="replace"), "title": file.stem}
    elif file.suffix == ".jsonl":
        with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise InputError(f"path={file}: line {number} is no JSON object; mend it or take it out")
                _require_column(row, text_column, file)
                yield row
    elif file.suffix == ".arrow":
        from datasets import Dataset

        for row in Dataset.from_file(str(file)):
            _require_column(row, text_column, file)
            yield row
    else:
        parquet = pq.ParquetFile(file)
        _require_column(dict.fromkeys(parquet.schema_arrow.names), text_column, file)
        for batch in parquet.iter_batches(batch_size=1_000):
            yield from batch.to_pylist()


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
) -> tuple[int, list[Path]]:
    """Write extract/NNNNN.parquet and its verdicts for all rows; return how many shards, and the files.

    `forgotten` tells of a row's URL and domain why it was taken down, or None.

    Memory: one shard of 16 MB of text, or all of them with a given number of `shards`.
    """
    files: list[Path] = []
    made = 0

    def flush(k: int, documents: list[dict[str, Any]], verdicts: list[Verdict]) -> None:
        write_table(pa.Table.from_pylist(documents, schema=DOCUMENT_SCHEMA), corpus.table("extract", k))
        write_table(verdict_table(verdicts), corpus.verdicts("extract", k))
        files.extend((corpus.table("extract", k), corpus.verdicts("extract", k)))

    pending: list[tuple[list[dict[str, Any]], list[Verdict], int]] = [([], [], 0) for _ in range(max(shards, 1))]
    rows = 0
    for rows, row in enumerate(read_rows(path, text_column), 1):
        index = rows - 1
        slot = index % shards if shards else 0
        documents, verdicts, size = pending[slot]
        document, verdict = _document(index, row)
        if document is not None and forgotten and (why := forgotten(document["url"], document.get("domain"))):
            document, verdict = None, Verdict(index, verdict.url, DROPPED, "forgotten", why)
        verdicts.append(verdict)
        if document is not None:
            documents.append(document)
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
    return made, files


def _document(index: int, row: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Verdict]:
    url, text = str(row["url"]), row["text"]
    if not isinstance(text, str) or not text.strip():
        return None, Verdict(index, url, DROPPED, "no_text")
    encoded = text.encode("utf-8", errors="replace")  # a lone surrogate in JSON becomes "?"
    optional = {
        k: str(row[k])
        for k in ("title", "author", "date", "language", "domain", "fetched_at")
        if row.get(k) is not None
    }
    document = {
        **optional,
        "index": index,
        "url": url,
        "text": encoded.decode("utf-8"),
        "digest": hashlib.sha256(encoded).hexdigest(),
        "numbers": numbers_to_json({"characters": len(text)}),
    }
    return document, Verdict(index, url)
