"""Take-down: domains and URLs → the rows of a corpus that are theirs, and what keeps them out from then on.

Flows in: a file of domains and URLs, the corpus's tables. Flows out: `forget.json` in the corpus folder, which every
later run obeys (their rows end as dropped, `forgotten`, before extraction), `tokenize/forgotten.parquet`, the places
that they had among the token shards, so that shards without them keep every byte; and if asked, blanked responses in
the corpus's own WARC files.

A document that had been dropped as a duplicate of a forgotten one would come back in its place: such copies are
forgotten, too, by their URLs. Nothing new enters a corpus by a take-down, but for documents that only the forgotten
ones had linked to a better copy.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config import CorpusConfig, UrlListConfig
from data_pipeline.crawl import urls
from data_pipeline.layout import Corpus, read_config
from data_pipeline.lists import read_list
from data_pipeline.records import DROPPED, CorruptionError, InputError
from data_pipeline.store import read_json, write_json, write_table

REASON = "forgotten"

# A document's place among the token shards after it is gone: no URL, no text, the digest for the order alone.
TOMBSTONE_SCHEMA = pa.schema([("index", pa.int64()), ("digest", pa.string()), ("tokens", pa.int64())])


@dataclass(frozen=True)
class ForgetList:
    """What is to be forgotten. `urls` maps a URL to why, for the ledger."""

    domains: frozenset[str]
    urls: Mapping[str, str]

    def because(self, *addresses: str | None) -> str | None:
        """Why a row with these addresses (URL, where it was redirected to, its domain) goes; None if it stays."""
        for address in addresses:
            if not address:
                continue
            if address in self.urls:
                return self.urls[address]
            for name in _domains_of(address):
                if name in self.domains:
                    return f"domain {name}"
        return None

    def rows(self, table: pa.Table) -> dict[int, str]:
        """index → why, of those rows of a table of pages or documents that are to be forgotten."""
        names = [n for n in ("url", "final_url", "domain") if n in table.column_names]
        columns = (table[name].to_pylist() for name in ["index", *names])
        found = {index: self.because(*addresses) for index, *addresses in zip(*columns, strict=True)}
        return {index: why for index, why in found.items() if why}


def _domains_of(address: str) -> list[str]:
    """The host of a URL, or a domain, and every domain above it."""
    labels = (_host(address) if "://" in address else address).lower().split(".")
    return [".".join(labels[start:]) for start in range(len(labels))]


def _host(url: str) -> str:
    with suppress(ValueError):  # brackets that do not match
        return urlsplit(url).hostname or ""
    return ""


def read_forget_list(corpus: Corpus) -> ForgetList | None:
    """What this corpus has forgotten; None where nobody asked it to."""
    if not corpus.forget_list.exists():
        return None
    remedy = "remove it and give forget= all lists again, or what they named comes back"
    stored = read_json(corpus.forget_list, remedy)
    if not {"domains", "urls"} <= set(stored):
        raise CorruptionError(f"{corpus.forget_list}: is damaged (no `domains` and `urls`); {remedy}")
    return ForgetList(frozenset(stored["domains"]), stored["urls"])


def parse_entries(entries: Sequence[str]) -> ForgetList:
    """Entries with `:` are URLs, as given and as normalized; others are domains. Raises InputError for neither."""
    domains: set[str] = set()
    addresses: dict[str, str] = {}
    for entry in entries:
        if ":" in entry:
            addresses[entry] = "URL"
            with suppress(urls.InvalidUrl):  # such a URL stands in the corpus as it was given
                addresses[urls.normalize(entry, UrlListConfig())] = "URL"
            continue
        try:
            domains.add(urls.host_of(urls.normalize(f"http://{entry.lstrip('.')}/", UrlListConfig())))
        except urls.InvalidUrl as e:
            raise InputError(f"forget: {entry}: {e}; give a domain such as example.com, or a URL") from None
    return ForgetList(frozenset(domains), addresses)


@dataclass(frozen=True)
class TakeDown:
    """What one call of `forget` means for a corpus as it is now."""

    rules: ForgetList
    """All that is forgotten from now on: earlier lists, this one, and copies of forgotten documents."""
    documents: pa.Table
    """index and url, among others, of the texts that go now."""
    copies: int
    """How many of the rules were added because they name copies."""
    unmatched: list[str]
    """Entries of this list that no row of the corpus ever had to do with."""


def plan(config: CorpusConfig) -> TakeDown:
    """Look up what `config.forget` concerns; writes nothing. Raises InputError for a list or folder without use."""
    corpus = Corpus(Path(config.out))
    tables = sorted(corpus.folder("extract").glob("[0-9]*[0-9].parquet"))
    if not tables:
        raise InputError(f"out={config.out}: no documents were extracted there; give the folder of a corpus")
    entries = read_list(config.forget, "forget")
    new = parse_entries(entries)
    before = read_forget_list(corpus) or ForgetList(frozenset(), {})
    rules = ForgetList(before.domains | new.domains, {**before.urls, **new.urls})
    columns = ["index", "url", "domain"]
    going = []
    for path in tables:
        rows = pq.read_table(path, columns=columns)
        finals: dict[int, str] = {}
        pages = corpus.folder("fetch") / path.name
        if pages.exists():  # where redirects led
            fetched = pq.read_table(pages, columns=["index", "final_url"])
            finals = dict(zip(fetched["index"].to_pylist(), fetched["final_url"].to_pylist(), strict=True))
        final_urls = [finals.get(index) for index in rows["index"].to_pylist()]
        rows = rows.append_column("final_url", pa.array(final_urls, pa.string()))
        wanted = pa.array(list(rules.rows(rows)), pa.int64())
        going.append(rows.filter(pc.is_in(rows["index"], value_set=wanted)))
    documents = pa.concat_tables(going)
    copies = _copies(corpus, documents["index"].combine_chunks())
    rules = ForgetList(rules.domains, {**copies, **rules.urls})
    return TakeDown(rules, documents, len(copies), _unmatched(corpus, entries))


def _unmatched(corpus: Corpus, entries: Sequence[str]) -> list[str]:
    """Those entries that name no row of the corpus, whatever became of it."""
    keys = {entry: {*rules.domains, *rules.urls} for entry in entries for rules in [parse_entries([entry])]}
    open_keys = set().union(*keys.values())
    for stage in ("urls", "fetch", "extract"):  # those on their way, and those that a verdict ended
        for path in sorted(corpus.folder(stage).glob("[0-9]*.parquet")):
            names = [n for n in pq.read_schema(path).names if n in ("url", "final_url", "domain")]
            for column in pq.read_table(path, columns=names).columns:
                for address in column.unique().to_pylist():
                    if address:
                        open_keys -= {address, *_domains_of(address)}
    return [entry for entry, named in keys.items() if named <= open_keys]


def _copies(corpus: Corpus, forgotten: pa.Array) -> dict[str, str]:
    """URL → why, of the documents that gave way to a forgotten one."""
    if not corpus.duplicates.exists():
        return {}
    rows = pq.read_table(corpus.duplicates, columns=["index", "twin", "twin_url"])
    rows = rows.filter(pc.is_in(rows["twin"], value_set=forgotten))
    twins = dict(zip(rows["index"].to_pylist(), rows["twin_url"].to_pylist(), strict=True))
    found: dict[str, str] = {}
    for path in sorted(corpus.folder("dedup").glob("[0-9]*.signatures.parquet")) if twins else []:
        table = pq.read_table(path, columns=["index", "url"])
        for index, url in zip(table["index"].to_pylist(), table["url"].to_pylist(), strict=True):
            if index in twins:
                found[url] = f"copy of {twins[index]}"
    return found


def settings_of(config: CorpusConfig) -> CorpusConfig:
    """The corpus's own settings, to run the stages from extraction on that it was run with."""
    stored = read_config(Corpus(Path(config.out)))
    stored.out, stored.workers, stored.progress = config.out, config.workers, config.progress
    return stored


def remember(corpus: Corpus, takedown: TakeDown) -> None:
    """Write tokenize/forgotten.parquet, then forget.json. Only under the lock; the same again changes nothing."""
    index = takedown.documents["index"].combine_chunks()
    places = [pq.read_table(corpus.tombstones)] if corpus.tombstones.exists() else []
    for part in sorted(corpus.folder("tokenize").glob("[0-9]*.documents.parquet")):
        rows = pq.read_table(part, columns=TOMBSTONE_SCHEMA.names)
        places.append(rows.filter(pc.is_in(rows["index"], value_set=index)))
    if places:
        table = pa.concat_tables(places).group_by(["index", "digest"]).aggregate([("tokens", "max")])
        table = table.rename_columns(TOMBSTONE_SCHEMA.names).sort_by([("index", "ascending"), ("digest", "ascending")])
        if table.num_rows:
            write_table(table.cast(TOMBSTONE_SCHEMA), corpus.tombstones)
    rules = takedown.rules
    write_json({"domains": sorted(rules.domains), "urls": dict(sorted(rules.urls.items()))}, corpus.forget_list)


def setting(rows: Mapping[int, str]) -> dict[str, str]:
    """What a shard's extraction depends on besides its settings: nothing where no row is forgotten."""
    if not rows:
        return {}
    content = json.dumps(sorted(rows.items()))
    return {"forgotten": f"{len(rows)} rows, {sha256(content.encode()).hexdigest()[:12]}"}


def mark(verdicts: pa.Table, rows: Mapping[int, str]) -> pa.Table:
    """Verdicts (VERDICT_SCHEMA) in which the `rows` ended as dropped, forgotten."""
    marked = [
        {**row, "state": DROPPED, "reason": REASON, "detail": rows[row["index"]], "numbers": "{}"}
        if row["index"] in rows
        else row
        for row in verdicts.to_pylist()
    ]
    return pa.Table.from_pylist(marked, schema=verdicts.schema)


# ── the archive ─────────────────────────────────────────────────────────────────────────────────────────────────────

_BLANK = (
    b"WARC/1.1\r\nWARC-Type: metadata\r\nWARC-Record-ID: <urn:uuid:00000000-0000-4000-8000-000000000000>\r\n"
    b"WARC-Date: 1970-01-01T00:00:00Z\r\nContent-Type: text/plain\r\nContent-Length: 7\r\n\r\nremoved\r\n\r\n"
)
_BLOCK = 1 << 20


def archived_pages(corpus: Corpus) -> pa.Table:
    """warc_file and warc_offset of every response that this corpus has forgotten, whatever became of its text."""
    rules = read_forget_list(corpus)
    found = [pa.table({"warc_file": pa.array([], pa.string()), "warc_offset": pa.array([], pa.int64())})]
    for path in sorted(corpus.folder("fetch").glob("[0-9]*[0-9].parquet")) if rules else []:
        assert rules is not None
        rows = pq.read_table(path, columns=["index", "url", "final_url", "domain", "warc_file", "warc_offset"])
        wanted = pa.array(list(rules.rows(rows)), pa.int64())
        found.append(rows.filter(pc.is_in(rows["index"], value_set=wanted)).select(["warc_file", "warc_offset"]))
    return pa.concat_tables(found)


def blank_responses(corpus: Corpus, pages: pa.Table) -> tuple[int, int]:
    """Write over the responses of `pages` in the corpus's own WARC files; (responses blanked, left as they are).

    Each record is a gzip member of its own (WARC 1.1, annex D). In its place comes a member of the same length that
    holds an empty record, filled up by the comment that RFC 1952 (2.3) allows in a member's header, so that no other
    offset changes. Files outside the corpus folder are the user's and stay; so do members too short or not readable.
    """
    blanked = left = 0
    for file, offset in zip(pages["warc_file"].to_pylist(), pages["warc_offset"].to_pylist(), strict=True):
        path = corpus.out / (file or "")
        if not file or not path.is_file() or not path.resolve().is_relative_to(corpus.out.resolve()):
            left += 1
            continue
        with open(path, "r+b") as archive:
            size = _member_bytes(archive.fileno(), offset)
            member = _blank_member(size)
            if member is None:
                left += 1
                continue
            os.pwrite(archive.fileno(), member, offset)
            os.fsync(archive.fileno())
            blanked += 1
    return blanked, left


def _member_bytes(file: int, offset: int) -> int:
    """Compressed bytes of the gzip member at `offset`; 0 where none can be read."""
    member, position = zlib.decompressobj(wbits=31), offset
    with suppress(zlib.error):
        while not member.eof and (data := os.pread(file, _BLOCK, position)):
            position += len(data)
            member.decompress(data, 1)
            while not member.eof and member.unconsumed_tail:
                member.decompress(member.unconsumed_tail, _BLOCK)
    return position - len(member.unused_data) - offset if member.eof else 0


def _blank_member(size: int) -> bytes | None:
    """A gzip member of exactly `size` bytes that holds an empty record; None when that is too few."""
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(_BLANK) + packer.flush()
    head = b"\x1f\x8b\x08\x10" + bytes(4) + b"\x00\xff"  # RFC 1952, 2.3: deflate, FCOMMENT, no time, unknown system
    foot = struct.pack("<II", zlib.crc32(_BLANK), len(_BLANK))
    fill = size - len(head) - 1 - len(body) - len(foot)
    return head + b" " * fill + b"\x00" + body + foot if fill >= 0 else None
