"""URL lists → normalized, blocked, unique URLs, in shards by registrable domain.

    .txt .csv .tsv .jsonl .cdxj .parquet (.gz .xz .zst), or a folder of them
      │ read_url_list     one row after the other: position, raw URL, score
      │ normalize         url_syntax: the normal form is the URL's identity
      │ rules             length, scheme, domain, extension, pattern, karma, self posts
      │ spill             one file a shard, so that memory holds one shard at a time
      ▼ unique            the first of equal URLs stays; they always meet, as a domain is in one shard
    out/00000.parquet (URL_SCHEMA, kept) and out/00000.verdicts.parquet (VERDICT_SCHEMA, every row)

A row's `index` is its position among the list's non-empty rows, files of a folder in the order of their names.
Every row of the list ends up in exactly one verdict; rows that have no domain lie in shard 0.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipeline.config import UrlListConfig
from data_pipeline.crawl import cc_index
from data_pipeline.crawl.spill import Spill
from data_pipeline.crawl.url_syntax import (
    InvalidUrl,
    domain_named,
    host_of,
    normalize,
    path_and_query,
    registrable_domain,
    shard_of,
    without_credentials,
)
from data_pipeline.records import DROPPED, KEPT, URL_SCHEMA, InputError, Verdict, verdict_table
from data_pipeline.store import storage_errors, write_table

__all__ = [
    "InvalidUrl",
    "count_urls",
    "normalize",
    "read_domains",
    "read_url_list",
    "registrable_domain",
    "shard_of",
    "write_url_shards",
]

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".cdxj", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
URL_COLUMNS = ("url", "URL", "link")
MAX_LINE_BYTES = 32 << 20
"""A longer line of a list is read past, and its row ends as `url_too_long`: memory stays bounded."""
SHOWN_CHARACTERS = 2000
"""So much of an over-long URL is kept in its verdict."""


@dataclass(frozen=True, slots=True)
class ListRow:
    """A row as it stands in the list. `fault`: why it holds no URL."""

    url: str
    score: float | None = None
    is_self: bool = False
    fault: str | None = None
    fault_reason: str = "invalid_url"


def read_url_list(path: Path, config: UrlListConfig) -> Iterator[tuple[int, str, float | None]]:
    """(position, raw URL, score) of every row that is not empty, in the order of the list.

    Raises InputError for a list that cannot be read: missing, no rights, a form that is not known, a missing column.
    """
    for position, row in enumerate(_rows(path, config)):
        yield position, row.url, row.score


def count_urls(path: Path, config: UrlListConfig) -> int:
    """Rows of the list. Raises InputError when there are none."""
    total = sum(1 for _ in _rows(path, config))
    if not total:
        raise InputError(f"urls={path}: holds no URL; give a list with one http(s) URL a line")
    return total


# ---- reading ----------------------------------------------------------------------------------------------------


def _rows(path: Path, config: UrlListConfig) -> Iterator[ListRow]:
    for file in list_files(path):
        form = _form(file)
        try:
            if form == ".parquet":
                yield from _parquet_rows(file, config)
                continue
            with _open(file) as stream:
                if form == ".txt":
                    yield from _text_rows(stream)
                elif form in (".csv", ".tsv"):
                    yield from _csv_rows(stream, file, config, "," if form == ".csv" else "\t")
                else:
                    yield from _json_rows(stream, file, config, cdxj=form == ".cdxj")
        except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, pa.ArrowInvalid, csv.Error) as e:
            raise InputError(f"urls={file}: cannot be read ({e}); check that the file is whole and readable") from e


def list_files(path: Path) -> list[Path]:
    """The files of a list, in order. Raises InputError where there are none."""
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _form(p) and not p.name.startswith("."))
            if not files:
                raise InputError(f"urls={path}: the folder holds no list; {_known_forms()}")
            return files
        if not path.exists():
            raise InputError(f"urls={path}: there is no such file or folder; give the path of a URL list")
    except OSError as e:
        raise InputError(f"urls={path}: {e.strerror}; check the path and its rights") from e
    if not _form(path):
        raise InputError(f"urls={path}: not a form that is known; {_known_forms()}")
    return [path]


def _known_forms() -> str:
    return f"give {' '.join(FORMATS)}, plain or as {' '.join(COMPRESSIONS)}"


def _form(path: Path) -> str | None:
    """The ending that tells how to read `path`. Two are known by their names instead: Pushshift's dumps `RS_2005-06.xz`
    are JSON lines, Common Crawl's `cdx-00000.gz` are CDXJ."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        if path.name.startswith("RS_") and not (suffixes and suffixes[-1] in FORMATS):
            return ".jsonl"
        if path.name.startswith("cdx-") and not suffixes:
            return ".cdxj"
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if suffix == ".zst":  # Pushshift's dumps need a window of 2 GiB
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        return cast(IO[bytes], decompressor.stream_reader(open(path, "rb"), read_across_frames=True, closefd=True))
    return open(path, "rb")


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines without their ends (LF or CRLF) and without a byte-order mark; at most MAX_LINE_BYTES + 1 of each."""
    buffer = bytearray()
    first, skipping = True, False
    while True:
        block = stream.read(1 << 20)
        if not block:
            break
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            if not skipping:
                buffer += block[start:end]
                yield _bare(buffer, first)
                first = False
            skipping = False
            buffer.clear()
            start = end + 1
        if not skipping:
            buffer += block[start:]
            if len(buffer) > MAX_LINE_BYTES:
                yield bytes(buffer[: MAX_LINE_BYTES + 1])
                buffer.clear()
                skipping, first = True, False
    if buffer and not skipping:
        yield _bare(buffer, first)


def _bare(line: bytearray, first: bool) -> bytes:
    raw = bytes(line[:-1] if line.endswith(b"\r") else line)
    return raw.removeprefix(codecs.BOM_UTF8) if first else raw


def _text_rows(stream: IO[bytes]) -> Iterator[ListRow]:
    for line in _lines(stream):
        text = line.decode("utf-8", "replace").strip()
        if text and not text.startswith("#"):
            yield ListRow(text)


def _json_rows(stream: IO[bytes], file: Path, config: UrlListConfig, cdxj: bool) -> Iterator[ListRow]:
    key = config.column
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            yield ListRow(
                _shown(line.decode("utf-8", "replace")), fault="the line is too long", fault_reason="url_too_long"
            )
            continue
        try:
            value = json.loads(cc_index.json_of(line) if cdxj else line)
        except (ValueError, RecursionError) as e:
            yield ListRow(_shown(line.decode("utf-8", "replace")), fault=f"not JSON: {str(e)[:200]}")
            continue
        if isinstance(value, str):
            yield ListRow(value)
            continue
        if not isinstance(value, dict):
            yield ListRow(_shown(line.decode("utf-8", "replace")), fault="neither an object nor a string")
            continue
        if not key:
            key = _column(list(value), file, config)
        url = value.get(key)
        if not isinstance(url, str):
            yield ListRow(_shown(line.decode("utf-8", "replace")), fault=f"line {number} has no text under {key!r}")
            continue
        refusal = cc_index.refusal(value) if cc_index.is_index_row(value) else None
        if refusal is not None:
            yield ListRow(_shown(url), fault=refusal[1], fault_reason=refusal[0])
            continue
        yield ListRow(url, _score(value.get(config.score_column)), value.get("is_self") is True)


def _csv_rows(stream: IO[bytes], file: Path, config: UrlListConfig, delimiter: str) -> Iterator[ListRow]:
    csv.field_size_limit(MAX_LINE_BYTES + 1)
    # The csv module sees the line ends, which may stand within quotes.
    reader = csv.reader((line.decode("utf-8", "replace") + "\n" for line in _lines(stream)), delimiter=delimiter)
    header = next(reader, None)
    if header is None:
        return
    header = [name.strip() for name in header]
    if len(header) == 1 and re.match(r"https?://", header[0], re.IGNORECASE):
        raise InputError(f"urls={file}: the first line is a URL, not column names; add a header or name the file .txt")
    column = header.index(_column(header, file, config))
    score = header.index(config.score_column) if config.score_column in header else None
    for fields in reader:
        if not any(fields):
            continue
        if len(fields) <= column:
            yield ListRow(_shown(delimiter.join(fields)), fault=f"only {len(fields)} fields")
            continue
        yield ListRow(fields[column], _score(fields[score]) if score is not None and len(fields) > score else None)


def _parquet_rows(file: Path, config: UrlListConfig) -> Iterator[ListRow]:
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        column = _column(names, file, config)
        wanted = [column, *(n for n in (config.score_column, "is_self") if n in names and n != column)]
        for batch in parquet.iter_batches(batch_size=10_000, columns=wanted):
            columns: dict[str, Sequence[Any]] = {n: batch.column(n).to_pylist() for n in wanted}
            scores = columns.get(config.score_column, [None] * batch.num_rows)
            selves = columns.get("is_self", [None] * batch.num_rows)
            for url, score, is_self in zip(columns[column], scores, selves, strict=True):
                if isinstance(url, str):
                    yield ListRow(url, _score(score), is_self is True)
                else:
                    yield ListRow("", fault="null" if url is None else f"a {type(url).__name__}, not text")


def _column(names: list[str], file: Path, config: UrlListConfig) -> str:
    if config.column:
        if config.column in names:
            return config.column
        raise InputError(f"urls={file}: no column {config.column!r} among {', '.join(names)}; give url_list.column")
    for name in URL_COLUMNS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise InputError(f"urls={file}: none of {', '.join(names) or 'no columns'} is a URL column; give url_list.column")


def _score(value: object) -> float | None:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    return None


def _shown(text: str) -> str:
    """A row's text for its verdict: cut, and without a password that may stand in it."""
    text = without_credentials(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


# ---- rules ------------------------------------------------------------------------------------------------------


def read_domains(entries: Sequence[str], setting: str) -> set[str]:
    """The hosts that a list of domains names. Raises InputError with a line for each entry that is no bare domain."""
    domains, faults = set(), []
    for entry in entries:
        try:
            domains.add(domain_named(entry))
        except InvalidUrl as e:
            faults.append(f"{setting}={entry}: {e}; give a domain such as example.com")
    if faults:
        raise InputError("\n".join(faults))
    return domains


class UrlRules:
    """The list's rules over one row; all of them look at the normal form."""

    def __init__(self, config: UrlListConfig) -> None:
        self.config = config
        self.extensions = {e.lower().lstrip(".") for e in config.blocked_extensions}
        self.patterns = [re.compile(p) for p in config.blocked_patterns]
        self.domains = read_domains(config.blocked_domains, "url_list.blocked_domains")

    def verdict(self, index: int, row: ListRow) -> tuple[Verdict, str]:
        """(the row's verdict before the search for duplicates, its registrable domain or "")."""
        numbers = {} if row.score is None else {"score": row.score}
        if row.fault is not None:
            return Verdict(index, _shown(row.url), DROPPED, row.fault_reason, row.fault, numbers), ""
        try:
            url = normalize(row.url, self.config)
        except InvalidUrl as e:
            return Verdict(index, _shown(row.url), DROPPED, e.reason, str(e), numbers), ""
        host = host_of(url)
        domain = registrable_domain(host)
        reason, detail = self._refusal(url, host, row)
        return Verdict(index, url, DROPPED if reason else KEPT, reason, detail, numbers), domain

    def _refusal(self, url: str, host: str, row: ListRow) -> tuple[str | None, str | None]:
        if row.is_self:
            return "self_post", None
        if row.score is not None and row.score < self.config.min_score:
            return "low_score", f"{row.score:g} < url_list.min_score={self.config.min_score}"
        if self.domains:
            labels = host.split(".")
            for start in range(len(labels)):
                name = ".".join(labels[start:])
                if name in self.domains:
                    return "blocked_domain", name
        ending = path_and_query(url).partition("?")[0].rpartition("/")[2].rpartition(".")
        if ending[1] and ending[2].lower() in self.extensions:
            return "blocked_extension", ending[2].lower()
        for pattern in self.patterns:
            if pattern.search(url):
                return "blocked_pattern", pattern.pattern
        return None, None


# ---- sharding ---------------------------------------------------------------------------------------------------


def write_url_shards(path: Path, out: Path, shards: int, config: UrlListConfig) -> dict[str, Any]:
    """Write every shard's kept URLs and verdicts below `out`; the same list and settings give the same bytes.

    Returns {"rows", "kept", "dropped", "reasons": {reason: rows}}. Raises InputError when no URL of the list can be
    fetched, before anything is written.
    """
    rules = UrlRules(config)
    reasons: dict[str, int] = {}
    with storage_errors(out), Spill(out / ".spill.tmp") as spill:
        usable = rows = 0
        example: Verdict | None = None
        for index, row in enumerate(_rows(path, config)):
            v, domain = rules.verdict(index, row)
            rows += 1
            usable += v.state == KEPT
            example = example or (v if v.state != KEPT else None)
            shard = shard_of(domain, shards) if domain else 0
            spill.add(shard, [v.index, v.url, v.state, v.reason, v.detail, v.numbers, domain])
        if not rows:
            raise InputError(f"urls={path}: holds no URL; give a list with one http(s) URL a line")
        if not usable:
            assert example is not None
            raise InputError(
                f"urls={path}: none of its {rows} rows can be fetched, the first because of {example.reason} "
                f"({example.detail or example.url[:80]}); give a list with one http(s) URL a line"
            )
        for shard in range(shards):
            _write_shard(out, shard, ((Verdict(*fields), domain) for *fields, domain in spill.read(shard)), reasons)
    dropped = sum(reasons.values())
    return {"rows": rows, "kept": rows - dropped, "dropped": dropped, "reasons": dict(sorted(reasons.items()))}


def _write_shard(out: Path, shard: int, rows: Iterator[tuple[Verdict, str]], reasons: dict[str, int]) -> None:
    """Unique by URL; spilled rows come in the order of the list, so the first one stays."""
    first: dict[str, int] = {}
    verdicts: list[Verdict] = []
    kept: list[dict[str, object]] = []
    for verdict, domain in rows:
        if verdict.state == KEPT:
            twin = first.setdefault(verdict.url, verdict.index)
            if twin != verdict.index:
                detail = f"row {twin} is the same URL"
                verdict = Verdict(verdict.index, verdict.url, DROPPED, "duplicate_url", detail, verdict.numbers)
            else:
                kept.append({"index": verdict.index, "url": verdict.url, "domain": domain})
        if verdict.reason:
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
        verdicts.append(verdict)
    write_table(pa.Table.from_pylist(kept, schema=URL_SCHEMA), out / f"{shard:05d}.parquet")
    write_table(verdict_table(verdicts), out / f"{shard:05d}.verdicts.parquet")
