"""One shard of one stage: files in, files out. These run in worker processes, each on its own files only.

Every function writes its tables atomically and returns counts; `pipeline` decides which are due and marks them done.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import forget, old_corpus, pack
from data_pipeline.account import ledger
from data_pipeline.clean import bands, contamination, dedup, extract, language, personal, planting, quality
from data_pipeline.clean.html_text import Rejected
from data_pipeline.config import (
    DecontaminateConfig,
    DedupConfig,
    DocumentsConfig,
    ExtractConfig,
    FetchConfig,
    LanguageConfig,
    QualityConfig,
    UrlListConfig,
)
from data_pipeline.crawl import fetch, rescue, robots, warc
from data_pipeline.crawl.url_syntax import without_credentials
from data_pipeline.crawl.warc import WarcError
from data_pipeline.executors import tick
from data_pipeline.layout import Corpus
from data_pipeline.records import (
    DOCUMENT_SCHEMA,
    DROPPED,
    FAILED,
    KEPT,
    PAGE_SCHEMA,
    VERDICT_SCHEMA,
    InputError,
    Verdict,
    numbers_to_json,
    verdict_table,
)
from data_pipeline.store import changed_while_read, describe_archive, storage_errors, write_json, write_table

CHANGES_SCHEMA = pa.schema([("index", pa.int64()), ("language", pa.string()), ("text", pa.large_string())])


def count_states(verdicts: pa.Table) -> dict[str, Any]:
    """{"rows": n, "kept": n, "dropped": n, "failed": n}."""
    states = [s.as_py() for s in verdicts["state"]]
    return {"rows": len(states), **{s: states.count(s) for s in ("kept", "dropped", "failed")}}


def _kept(table: pa.Table, verdicts: Path) -> pa.Table:
    """The rows of `table` (sorted by index) whose verdict is `kept`."""
    states = pq.read_table(verdicts, columns=["index", "state"])
    indexes = states.filter(pc.equal(states["state"], KEPT))["index"]
    return table.filter(pc.is_in(table["index"], value_set=indexes.combine_chunks()))


def read_documents(corpus: Corpus, k: int, before: str) -> pa.Table:
    """Shard `k`'s documents (DOCUMENT_SCHEMA) as they enter the stage `before`: as earlier stages left them."""
    documents = pq.read_table(corpus.table("extract", k))
    stages = ("filter", "dedup", "decontaminate", "documents")
    for stage in stages[: stages.index(before)]:
        documents = _kept(documents, corpus.verdicts(stage, k))
        if stage == "filter":
            documents = _with_changes(documents, pq.read_table(corpus.changes(k)))
        elif stage == "decontaminate":
            documents = _with_changes(documents, pq.read_table(corpus.cut(k)))
    return documents


def _with_changes(documents: pa.Table, changes: pa.Table) -> pa.Table:
    rows = {r["index"]: r for r in changes.to_pylist()}
    out = []
    for document in documents.to_pylist():
        change = rows.get(document["index"])
        if change:
            document["language"] = change["language"] or document["language"]
            if change["text"] is not None:
                document["text"] = change["text"]
                document["digest"] = extract.text_digest(change["text"])
        out.append(document)
    return pa.Table.from_pylist(out, schema=DOCUMENT_SCHEMA)


def index_warc_file(
    path: Path, name: str, number: int, out: Path, verdicts_out: Path, agent: str | None
) -> dict[str, Any]:
    """Pages and verdicts of one WARC file; a record's index is the file's number and its place in it. A user name and
    a password in a URL stay in the archive.

    `name` is what pages call the file: `path`, or the address that it is a copy of. Pages whose headers refuse `agent`
    are dropped as `noindex`; None: they are not looked at.
    """
    begun = path.stat()
    pages: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []

    def refused(response: warc.WarcResponse) -> str | None:
        return robots.refusal_in_headers(response.header_values, agent) if agent is not None else None

    for place, record in enumerate(warc.index_warc(path, refused=refused)):
        index = number << 32 | place
        url = without_credentials(record.url)
        verdicts.append(Verdict(index, url, record.state, record.reason, record.detail))
        if record.state == KEPT:
            pages.append(
                {
                    "index": index,
                    "url": url,
                    "final_url": url,
                    "domain": record.domain,
                    "status": record.status,
                    "content_type": record.content_type,
                    "fetched_at": record.fetched_at,
                    "warc_file": name,
                    "warc_offset": record.offset,
                    "payload_digest": record.payload_digest,
                }
            )
        tick(1)
    write_table(pa.Table.from_pylist(pages, schema=PAGE_SCHEMA), out)
    write_table(verdict_table(verdicts), verdicts_out)
    seen = describe_archive(path)
    if (begun.st_size, begun.st_mtime_ns) != (seen["bytes"], seen["mtime_ns"]):
        raise changed_while_read(path)
    return {"rows": len(verdicts), "archives": {name: seen}}


def fetch_group(
    shards: Sequence[fetch.FetchShard], config: FetchConfig, out: Path, progress: bool = False
) -> dict[str, Any]:
    """Fetch until each URL of these shards has a state in its journal; `progress`: tell when the end can come."""
    done = 0

    def on_progress(now: int, _total: int) -> None:
        nonlocal done
        tick(now - done)
        done = now

    def on_note(line: str) -> None:
        if progress:
            print(line, file=sys.stderr, flush=True)

    return {"decided": fetch.fetch_shards(shards, config, out, on_progress, on_note=on_note)}


def finish_fetch(shard: fetch.FetchShard, out: Path, archived: rescue.Rescue | None) -> dict[str, Any]:
    """Journal → pages and verdicts, in the order of the URL list."""
    corpus = Corpus(out)
    pages, verdicts = fetch.finish_shard(shard, out, archived)
    write_table(pages, corpus.table("fetch", shard.number))
    write_table(verdicts, corpus.verdicts("fetch", shard.number))
    return count_states(verdicts)


def split_rescue_index(indexes: Sequence[Path], outputs: Sequence[Path], config: UrlListConfig) -> dict[str, Any]:
    """Archived pages of all WARC files at hand → one table for each shard of the URL list."""
    return rescue.split_index(indexes, outputs, config)


def extract_pages(out: Path, k: int, config: ExtractConfig, languages: Sequence[str]) -> dict[str, Any]:
    corpus = Corpus(out)
    outputs = (corpus.table("extract", k), corpus.verdicts("extract", k))
    return extract_rows(out, k, config, languages, 0, None, outputs)


def extract_rows(
    out: Path,
    k: int,
    config: ExtractConfig,
    languages: Sequence[str],
    start: int,
    rows: int | None,
    outputs: tuple[Path, Path],
) -> dict[str, Any]:
    """Documents and verdicts of `rows` pages (None: all) of shard `k`, from row `start` on.

    `languages`: pages surely in none of them are left out; empty: all are taken. A record that cannot be read costs its
    page, and the marker remembers the file, so that the shard is due again once that is mended. Raises InputError when
    a whole file is missing.
    """
    corpus = Corpus(out)
    damaged: dict[str, dict[str, Any]] = {}

    def read_body(page: dict[str, Any]) -> tuple[bytes, str] | Rejected:
        tick(1)
        name, offset = page["warc_file"], page["warc_offset"]
        try:
            path = corpus.archive(name)
            with storage_errors(path):
                response = warc.read_response(path, offset)
        except FileNotFoundError:
            raise InputError(
                f"{name}: is not there, and pages of it are to be extracted; put it back where it was, then run the "
                f"same command again"
            ) from None
        except WarcError as e:
            fault = str(e)
        else:
            if hashlib.sha256(response.body).hexdigest() == page["payload_digest"]:
                return response.body, response.content_type
            fault = "other bytes"
        if name not in damaged:
            damaged[name] = describe_archive(path)
        return Rejected(FAILED, "warc_damaged", f"{name} at {offset}: {fault}", {})

    pages = pq.read_table(corpus.table("fetch", k)).slice(start, rows)
    forgotten = (forget.read_forget_list(corpus) or forget.ForgetList(frozenset(), {})).rows(pages)
    gone = pc.is_in(pages["index"], value_set=pa.array(list(forgotten), pa.int64()))
    documents, verdicts = extract.extract_shard(pages.filter(pc.invert(gone)), config, read_body, languages)
    refused = pages.filter(gone).select(["index", "url"]).to_pylist()
    taken_down = verdict_table(
        [Verdict(p["index"], p["url"], DROPPED, forget.REASON, forgotten[p["index"]]) for p in refused]
    )
    verdicts = pa.concat_tables([verdicts, taken_down]).sort_by("index")
    write_table(documents, outputs[0])
    write_table(verdicts, outputs[1])
    return {**count_states(verdicts), "archives": damaged}


def damaged_archives(pages: Path, verdicts: Path) -> set[str]:
    """The WARC files of which records of a shard could not be read when it was extracted."""
    rows = pq.read_table(verdicts, columns=["index", "reason"])
    failed = rows.filter(pc.equal(rows["reason"], "warc_damaged"))["index"].combine_chunks()
    table = pq.read_table(pages, columns=["index", "warc_file"])
    return set(table.filter(pc.is_in(table["index"], value_set=failed))["warc_file"].to_pylist())


def join_extracted(
    out: Path, k: int, parts: Sequence[tuple[Path, Path]], archives: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The parts of a large shard, in their order: the same tables that `extract_pages` would have made in one go.

    `archives`: the damaged ones that the parts' markers remember; the shard's does from now on.
    """
    corpus = Corpus(out)
    verdicts = pa.concat_tables([pq.read_table(v) for _, v in parts])
    write_table(pa.concat_tables([pq.read_table(d) for d, _ in parts]), corpus.table("extract", k))
    write_table(verdicts, corpus.verdicts("extract", k))
    return {**count_states(verdicts), "archives": dict(archives)}


def forget_pages(out: Path, k: int, archives: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Take forgotten rows out of what was extracted: the same tables that extraction would make now, without it.

    `archives`: the damaged ones that the shard's marker remembers.
    """
    corpus = Corpus(out)
    rules = forget.read_forget_list(corpus)
    assert rules is not None
    forgotten = rules.rows(pq.read_table(corpus.table("fetch", k)))
    documents = pq.read_table(corpus.table("extract", k))
    gone = pc.is_in(documents["index"], value_set=pa.array(list(forgotten), pa.int64()))
    verdicts = forget.mark(pq.read_table(corpus.verdicts("extract", k)), forgotten)
    write_table(documents.filter(pc.invert(gone)), corpus.table("extract", k))
    write_table(verdicts, corpus.verdicts("extract", k))
    tick(verdicts.num_rows)
    return {**count_states(verdicts), "archives": dict(archives)}


def filter_documents(out: Path, k: int, languages: LanguageConfig, rules: QualityConfig) -> dict[str, Any]:
    """Language first, then quality on what is left; the numbers of both stay with the row."""
    corpus = Corpus(out)
    documents = pq.read_table(corpus.table("extract", k))
    by_language, codes = language.filter_language(documents, languages)
    languages_found = dict(zip(documents["index"].to_pylist(), codes.to_pylist(), strict=True))
    left = documents.filter(pc.equal(by_language["state"], KEPT))
    by_quality, changed = quality.filter_quality(left, rules)
    rules_said = {row["index"]: row for row in by_quality.to_pylist()}
    rows, changes = [], []
    for row in by_language.to_pylist():
        index = row["index"]
        if index in rules_said:
            said = rules_said[index]
            said["numbers"] = numbers_to_json({**json.loads(row["numbers"]), **json.loads(said["numbers"])})
            row = said
        rows.append(row)
        changes.append({"index": index, "language": languages_found[index], "text": changed.get(index)})
    verdicts = pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)
    write_table(verdicts, corpus.verdicts("filter", k))
    write_table(pa.Table.from_pylist(changes, schema=CHANGES_SCHEMA), corpus.changes(k))
    tick(len(rows))
    return count_states(verdicts)


def sign_documents(out: Path, k: int, config: DedupConfig) -> dict[str, Any]:
    corpus = Corpus(out)
    signatures = dedup.sign_shard(read_documents(corpus, k, "dedup"), config)
    write_table(signatures, corpus.signatures(k))
    tick(signatures.num_rows)
    return {"rows": signatures.num_rows}


def join_duplicates(out: Path, shards: int, config: DedupConfig) -> dict[str, Any]:
    """The one step of the pipeline that sees all documents at once: their signatures, not their texts."""
    corpus = Corpus(out)
    rows = dedup.read_signatures([corpus.signatures(k) for k in range(shards)], config)
    old = [old_corpus.signatures(Path(folder), config) for folder in config.against]
    duplicates = dedup.find_duplicates(rows, config, pa.concat_tables(old) if old else None)
    write_table(duplicates, corpus.duplicates)
    return {"duplicates": duplicates.num_rows}


def link_documents(out: Path, shards: int, config: DedupConfig, part: int) -> dict[str, Any]:
    """One part of the join: pairs of documents that agree in one band, or word for word."""
    corpus, columns = Corpus(out), bands.columns_of(part)

    def tables() -> Iterator[pa.Table]:
        for folder in config.against:
            yield old_corpus.signatures(Path(folder), config, columns)
        for k in range(shards):
            yield dedup.read_signatures([corpus.signatures(k)], config, columns)

    pairs = bands.link(tables(), config, part)
    write_table(pairs, corpus.links(part))
    return {"links": pairs.num_rows}


def join_links(out: Path, shards: int, config: DedupConfig) -> dict[str, Any]:
    """All parts' pairs → the same table as `join_duplicates`."""
    corpus, columns = Corpus(out), ["index", "url", "exact", "characters", "date"]
    rows = dedup.read_signatures([corpus.signatures(k) for k in range(shards)], config, columns)
    old = [old_corpus.signatures(Path(folder), config, columns) for folder in config.against]
    tables = [pq.read_table(corpus.links(part)) for part in bands.parts_of(config)]
    links = [np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1) for table in tables]
    duplicates = dedup.find_duplicates(rows, config, pa.concat_tables(old) if old else None, links)
    write_table(duplicates, corpus.duplicates)
    return {"duplicates": duplicates.num_rows}


def plant_duplicates(out: Path, k: int, config: DedupConfig, count: int) -> dict[str, Any]:
    corpus = Corpus(out)
    planted = planting.plant_shard(read_documents(corpus, k, "dedup"), config, count)
    write_table(planted, corpus.planted(k))
    tick(planted.num_rows)
    return {"rows": planted.num_rows}


def measure_planted(out: Path, shards: int, config: DedupConfig) -> dict[str, Any]:
    """Recall and precision of the join, by copies whose sources are known."""
    corpus = Corpus(out)
    rows = dedup.read_signatures([corpus.signatures(k) for k in range(shards)], config)
    measured = planting.measure_planted(rows, [pq.read_table(corpus.planted(k)) for k in range(shards)], config)
    write_json(measured, corpus.planting)
    return dict(measured)


def drop_duplicates(out: Path, k: int) -> dict[str, Any]:
    corpus = Corpus(out)
    verdicts = dedup.dedup_verdicts(pq.read_table(corpus.signatures(k)), pq.read_table(corpus.duplicates))
    write_table(verdicts, corpus.verdicts("dedup", k))
    tick(verdicts.num_rows)
    return count_states(verdicts)


def decontaminate(out: Path, k: int, config: DecontaminateConfig, finish: DocumentsConfig) -> dict[str, Any]:
    """Evaluation texts first, then personal data: both may change a text that is kept, and the ledger counts both."""
    corpus = Corpus(out)
    documents = read_documents(corpus, k, "decontaminate")
    sets = [contamination.read_evaluation_set(Path(p)) for p in config.paths]
    verdicts, found, texts = contamination.scan_shard(documents, contamination.build_index(sets, config), config)
    if finish.mask_personal_data:
        verdicts, texts = _mask(documents, verdicts, texts)
    changes = [{"index": index, "text": text} for index, text in sorted(texts.items())]
    write_table(pa.Table.from_pylist(changes, schema=CHANGES_SCHEMA), corpus.cut(k))
    write_table(verdicts, corpus.verdicts("decontaminate", k))
    write_table(pa.table({"ngram": pa.array(found, type=pa.uint64())}), corpus.found_ngrams(k))
    tick(documents.num_rows)
    return count_states(verdicts)


def _mask(documents: pa.Table, verdicts: pa.Table, texts: dict[int, str]) -> tuple[pa.Table, dict[int, str]]:
    """Verdicts with the numbers of what was masked, and the texts that changed, those before among them."""
    before: dict[int, str] = dict(zip(documents["index"].to_pylist(), documents["text"].to_pylist(), strict=True))
    changed: dict[int, str] = {}
    rows = []
    for row in verdicts.to_pylist():
        index = row["index"]
        if row["state"] == KEPT:
            text, counts = personal.mask(texts.get(index, before[index]))
            row["numbers"] = numbers_to_json({**json.loads(row["numbers"]), **counts})
            if text != before[index]:
                changed[index] = text
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA), changed


def report_contamination(out: Path, shards: int, config: DecontaminateConfig) -> dict[str, Any]:
    """The paper's table: of each evaluation set, the share of its n-grams that the corpus holds."""
    corpus = Corpus(out)
    sets = [contamination.read_evaluation_set(Path(p)) for p in config.paths]
    found = [pq.read_table(corpus.found_ngrams(k))["ngram"].to_numpy() for k in range(shards)]
    rows = contamination.overlap_report(contamination.build_index(sets, config), found)
    write_json(rows, corpus.contamination)
    return {"sets": len(rows)}


def write_documents(out: Path, k: int) -> dict[str, Any]:
    """The corpus itself: what all stages kept, with what they measured."""
    corpus = Corpus(out)
    documents = read_documents(corpus, k, "documents")
    origin = ledger.origin_numbers(corpus, k)
    measured = {
        row["index"]: row["numbers"]
        for row in pq.read_table(corpus.verdicts("filter", k), columns=["index", "numbers"]).to_pylist()
    }
    numbers = [
        numbers_to_json({**json.loads(before or "{}"), **json.loads(measured[index]), **origin.get(index, {})})
        for index, before in zip(documents["index"].to_pylist(), documents["numbers"].to_pylist(), strict=True)
    ]
    column = documents.schema.get_field_index("numbers")
    documents = documents.set_column(column, "numbers", pa.array(numbers, type=pa.string()))
    write_table(documents, corpus.table("documents", k))
    tick(documents.num_rows)
    return {"documents": documents.num_rows, "characters": pc.sum(pc.utf8_length(documents["text"])).as_py() or 0}


def tokenize_documents(out: Path, k: int) -> dict[str, Any]:
    corpus = Corpus(out)
    counts = pack.tokenize_shard(corpus.table("documents", k), *corpus.part(k))
    tick(int(counts["documents"]))
    return counts


def write_ledger(out: Path, k: int, stages: Sequence[str]) -> dict[str, Any]:
    return ledger.write_ledger_shard(Corpus(out), k, stages)


def split_warc_index(out: Path, parts: Sequence[tuple[Path, Path]], shards: int) -> dict[str, Any]:
    """Pages and verdicts of all WARC files → `shards` contiguous ranges; of one URL's responses the first stays."""
    corpus = Corpus(out)
    pages = pa.concat_tables([pq.read_table(p) for p, _ in parts])
    verdicts = pa.concat_tables([pq.read_table(v) for _, v in parts])
    first: dict[str, int] = {}
    repeated = {
        index
        for index, url in zip(pages["index"].to_pylist(), pages["url"].to_pylist(), strict=True)
        if first.setdefault(url, index) != index
    }
    per_shard = -(-max(verdicts.num_rows, 1) // shards)
    for k in range(shards):
        rows = verdicts.slice(k * per_shard, per_shard).to_pylist()
        for row in rows:
            if row["index"] in repeated:
                row |= {"state": DROPPED, "reason": "duplicate_url"}
        indexes = pa.array([row["index"] for row in rows if row["state"] == KEPT], type=pa.int64())
        write_table(pages.filter(pc.is_in(pages["index"], value_set=indexes)), corpus.table("fetch", k))
        write_table(pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA), corpus.verdicts("fetch", k))
    return {"rows": verdicts.num_rows}
