"""Take-down: domains and URLs → the rows of a corpus that are theirs, and what keeps them out from then on.

Flows in: a file of domains and URLs, the corpus's tables. Flows out: `forget.json` in the corpus folder, which every
later run obeys (their rows end as dropped, `forgotten`, before extraction), `tokenize/forgotten.parquet`, the places
that they had among the token shards, so that shards without them keep every byte; and if asked, blanked responses in
the corpus's own WARC files.

A document that had been dropped as a duplicate of a forgotten one would come back in its place: such copies are
forgotten, too, by their URLs; in a dataset, whose URLs need not be unique, by their texts. Nothing new enters a corpus
by a take-down, but for documents that only the forgotten ones had linked to a better copy.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config import STAGES, CorpusConfig, Source, UrlListConfig
from data_pipeline.crawl import urls
from data_pipeline.crawl.url_syntax import domain_named, host_of, is_public_suffix, without_credentials
from data_pipeline.layout import Corpus, read_config
from data_pipeline.records import DROPPED, CorruptionError, InputError
from data_pipeline.store import json_text, read_json, write_json, write_table

REASON = "forgotten"

# A document's place among the token shards after it is gone: no URL, no text, the digest for the order alone.
TOMBSTONE_SCHEMA = pa.schema([("index", pa.int64()), ("digest", pa.string()), ("tokens", pa.int64())])


_AS_IT_STANDS = UrlListConfig(strip_tracking=False, max_url_bytes=1 << 30)
"""How a row's URL is read: what comes from a WARC file or a dataset may differ in its tracking parameters alone."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_PORT = re.compile(r"(?:localhost|[^:]*\.[^:]*):[0-9]*(?:[/?#]|\Z)")


@dataclass(frozen=True)
class ForgetList:
    """What is to be forgotten. `urls` and `texts` (sha256 hex of a text) map to why, for the ledger."""

    domains: frozenset[str]
    urls: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)

    def because(self, *addresses: str | None, digest: str | None = None) -> str | None:
        """Why a row with these addresses (URL, where it was redirected to, its domain) goes; None if it stays."""
        for address in dict.fromkeys(addresses):
            if not address:
                continue
            for spelling in _spellings(address) if self.urls else ():
                if spelling in self.urls:
                    return self.urls[spelling]
            for name in _domains_of(address) if self.domains else ():
                if name in self.domains:
                    return f"domain {name}"
        return self.texts.get(digest) if digest else None

    def rows(self, table: pa.Table) -> dict[int, str]:
        """index → why, of those rows of a table of pages or documents that are to be forgotten."""
        names = [n for n in ("url", "final_url", "domain") if n in table.column_names]
        columns = [table[name].to_pylist() for name in ["index", *names]]
        digests = table["digest"].to_pylist() if "digest" in table.column_names else [None] * table.num_rows
        found = {
            index: self.because(*addresses, digest=digest)
            for digest, index, *addresses in zip(digests, *columns, strict=True)
        }
        return {index: why for index, why in found.items() if why}

    def stored(self) -> dict[str, Any]:
        """As it stands in forget.json, without its digest."""
        texts = {"texts": dict(sorted(self.texts.items()))} if self.texts else {}
        return {"domains": sorted(self.domains), "urls": dict(sorted(self.urls.items())), **texts}

    def digest(self) -> str:
        """sha256 hex of what is stored, written as forget.json was before it held its own."""
        return sha256(json_text(self.stored()).encode()).hexdigest()


def _spellings(address: str) -> list[str]:
    """A URL as it stands, without a password (as a list holds it), and in normal form."""
    found = [address, without_credentials(address)]
    with suppress(urls.InvalidUrl):
        found.append(urls.normalize(address, _AS_IT_STANDS))
    return found


def _domains_of(address: str) -> list[str]:
    """The host of a URL, or a domain, and every domain above it."""
    labels = _host(address).split(".")
    return [".".join(labels[start:]) for start in range(len(labels))]


def _host(address: str) -> str:
    """The host of a URL, with or without a scheme, or a domain: in normal form where it has one; "" without any."""
    bare = address
    if "://" in address:
        with suppress(urls.InvalidUrl):
            return host_of(urls.normalize(address, _AS_IT_STANDS))
        bare = ""
        with suppress(ValueError):  # brackets that do not match
            bare = urlsplit(address).hostname or ""
    with suppress(urls.InvalidUrl):
        return host_of(urls.normalize(f"http://{bare.lstrip('/')}", _AS_IT_STANDS))
    return bare.lower()


_REMEDY = (
    'restore it from a copy, or write {"domains": [], "urls": {}} there and give forget= all lists again: '
    "what it named and they do not comes back"
)


def read_forget_list(corpus: Corpus) -> ForgetList | None:
    """What this corpus has forgotten; None where nobody asked it to. Raises CorruptionError.

    forget.json ends with the sha256 of the rest. One without it is taken as it is: an older one, or edited by hand.
    """
    if not corpus.forget_list.exists():
        return None
    stored = read_json(corpus.forget_list, _REMEDY)
    written = stored.pop("sha256", None)
    domains, addresses, texts = stored.get("domains"), stored.get("urls"), stored.get("texts", {})
    if (
        not set(stored) <= {"domains", "urls", "texts"}
        or not (isinstance(domains, list) and isinstance(addresses, dict) and isinstance(texts, dict))
        or not all(isinstance(value, str) for value in (*domains, *addresses.values(), *texts.values()))
    ):
        raise CorruptionError(f"{corpus.forget_list}: is damaged (not `domains`, `urls`, `texts`, `sha256`); {_REMEDY}")
    rules = ForgetList(frozenset(domains), addresses, texts)
    if written is not None and written != (got := rules.digest()):
        raise CorruptionError(
            f"{corpus.forget_list}: is damaged (sha256 {got[:12]}…, written as {str(written)[:12]}…); {_REMEDY}; "
            "or, if you edited it, take its line `sha256` out"
        )
    return rules


def _write_forget_list(corpus: Corpus, rules: ForgetList) -> None:
    write_json({**rules.stored(), "sha256": rules.digest()}, corpus.forget_list)


def check_memory(corpus: Corpus) -> None:
    """Whether what was forgotten is still known. Raises CorruptionError where forget.json or the places in the token
    shards are damaged, or are missing although the corpus was made with them.

    A forget.json without its sha256 (see `read_forget_list`) gets it. Only under the lock.
    """
    rules = read_forget_list(corpus)
    if rules is not None:
        if "sha256" not in read_json(corpus.forget_list, _REMEDY):
            _write_forget_list(corpus, rules)
    else:
        traces = [corpus.tombstones] if corpus.tombstones.exists() else []
        traces += [
            m for m in sorted(corpus.folder("extract").glob("*.done.json")) if "forgotten" in _marker(m, "settings")
        ]
        if traces:
            raise CorruptionError(f"{corpus.forget_list}: is missing, but {traces[0]} knows of a take-down; {_REMEDY}")
    if corpus.tombstones.exists():
        read_tombstones(corpus.tombstones)
        return
    packed = corpus.folder("tokenize") / "tokens.done.json"
    if corpus.tombstones.relative_to(corpus.out).as_posix() in _marker(packed, "inputs"):
        raise CorruptionError(
            f"{corpus.tombstones}: is missing; restore it from a copy, or remove {packed}: "
            "the token shards are then packed anew, and their files border elsewhere"
        )


def _marker(path: Path, part: str) -> Mapping[str, Any]:
    """A part of a step's marker; empty where there is none, or it is torn."""
    with suppress(FileNotFoundError, CorruptionError):
        found = read_json(path, "").get(part)
        return found if isinstance(found, dict) else {}
    return {}


def read_tombstones(path: Path) -> pa.Table:
    """TOMBSTONE_SCHEMA. Raises CorruptionError where it is not what was written."""
    remedy = (
        "restore it from a copy, or remove it and tokens.done.json beside it: the token shards are then packed anew"
    )
    try:
        table = pq.read_table(path)
        sound = table.schema.equals(TOMBSTONE_SCHEMA)
        written = (table.schema.metadata or {}).get(b"sha256")
        got = _digest_of(table) if sound else ""
    except (pa.ArrowException, ValueError, TypeError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # the machine's, not Arrow's
            raise
        raise CorruptionError(f"{path}: is damaged ({str(e).splitlines()[0]}); {remedy}") from None
    if not sound or (written is not None and written.decode("ascii", "replace") != got):
        raise CorruptionError(f"{path}: is damaged (not what was written); {remedy}")
    return table.replace_schema_metadata(None)


def _digest_of(tombstones: pa.Table) -> str:
    """sha256 hex of what a table of TOMBSTONE_SCHEMA says, however it is stored."""
    digest = sha256("\n".join(tombstones["digest"].to_pylist()).encode())
    for name in ("index", "tokens"):
        digest.update(tombstones[name].to_numpy().tobytes())
    return digest.hexdigest()


def url_rules(settings: CorpusConfig) -> UrlListConfig:
    """How the URLs of a list are brought into the form that they have in a corpus."""
    return settings.url_list if settings.source is Source.urls else _AS_IT_STANDS


def parse_entries(entries: Sequence[str], rules: UrlListConfig = _AS_IT_STANDS) -> ForgetList:
    """Entries with a scheme are URLs, as given and as normalized by `rules`; others are domains.

    Raises InputError with a line for each that is neither, or that would take what many own.
    """
    domains: set[str] = set()
    addresses: dict[str, str] = {}
    faults = []
    for entry in entries:
        if _SCHEME.match(entry) and not _PORT.match(entry):
            addresses[without_credentials(entry)] = "URL"
            with suppress(urls.InvalidUrl):  # such a URL stands in the corpus as it was given
                addresses[urls.normalize(entry, rules)] = "URL"
            continue
        try:
            domain = domain_named(entry)
        except urls.InvalidUrl as e:
            faults.append(f"forget: {entry}: {e}; give a domain such as example.com, or a URL with http:// or https://")
            continue
        if is_public_suffix(domain):
            faults.append(f"forget: {entry}: all domains that end so; name those that are meant, or URLs")
        domains.add(domain)
    if faults:
        raise InputError("\n".join(faults))
    return ForgetList(frozenset(domains), addresses)


@dataclass(frozen=True)
class TakeDown:
    """What one call of `forget` means for a corpus as it is now."""

    rules: ForgetList
    """All that is forgotten from now on: earlier lists, this one, and copies of forgotten documents."""
    documents: pa.Table
    """index and url, among others, of the texts that go now."""
    copies: int
    """How many documents go, too, because they gave way to one of these as duplicates."""
    unmatched: list[str]
    """Entries of this list that no row of the corpus ever had to do with."""


def plan(corpus: Corpus, entries: Sequence[str], settings: CorpusConfig) -> TakeDown:
    """Look up what the `entries` of a list concern in a corpus of these settings; writes nothing.

    Raises InputError for entries without use, CorruptionError for a damaged forget.json.
    """
    new = parse_entries(entries, url_rules(settings))
    before = read_forget_list(corpus) or ForgetList(frozenset(), {})
    rules = ForgetList(before.domains | new.domains, {**before.urls, **new.urls}, before.texts)
    going = []
    for path in _numbered(corpus, "extract"):
        rows = pq.read_table(path, columns=["index", "url", "domain", "digest"])
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
    # URLs are unique in a crawl; a dataset's need not be, and other texts of the same URL are no copies.
    urls_too = {} if settings.source is Source.dataset else {url: why for url, _, why in copies}
    texts_too = {digest: why for _, digest, why in copies} if settings.source is Source.dataset else {}
    rules = ForgetList(rules.domains, {**urls_too, **rules.urls}, {**texts_too, **rules.texts})
    return TakeDown(rules, documents, len(copies), _unmatched(corpus, entries, url_rules(settings)))


def _numbered(corpus: Corpus, stage: str) -> list[Path]:
    """The shards' tables of a stage."""
    return sorted(corpus.folder(stage).glob("[0-9]*[0-9].parquet"))


def _unmatched(corpus: Corpus, entries: Sequence[str], form: UrlListConfig) -> list[str]:
    """Those entries that name no row of the corpus, whatever became of it."""
    keys = {entry: {*rules.domains, *rules.urls} for entry in entries for rules in [parse_entries([entry], form)]}
    open_keys = set().union(*keys.values())
    for stage in ("urls", "fetch", "extract"):  # those on their way, and those that a verdict ended
        for path in sorted(corpus.folder(stage).glob("[0-9]*.parquet")):
            names = [n for n in pq.read_schema(path).names if n in ("url", "final_url", "domain")]
            for column in pq.read_table(path, columns=names).columns:
                for address in column.unique().to_pylist():
                    if address:
                        open_keys -= {*_spellings(address), *_domains_of(address)}
    return [without_credentials(entry) for entry, named in keys.items() if named <= open_keys]


def _copies(corpus: Corpus, forgotten: pa.Array) -> list[tuple[str, str, str]]:
    """URL, digest of the extracted text, and why, of the documents that gave way to a forgotten one."""
    if not corpus.duplicates.exists():
        return []
    rows = pq.read_table(corpus.duplicates, columns=["index", "twin", "twin_url"])
    rows = rows.filter(pc.is_in(rows["twin"], value_set=forgotten))
    twins = dict(zip(rows["index"].to_pylist(), rows["twin_url"].to_pylist(), strict=True))
    found = []
    for path in _numbered(corpus, "extract") if twins else []:
        table = pq.read_table(path, columns=["index", "url", "digest"])
        for index, url, digest in zip(*(table[n].to_pylist() for n in ("index", "url", "digest")), strict=True):
            if index in twins:
                found.append((url, digest, f"copy of {without_credentials(twins[index])}"))
    return found


def settings_of(config: CorpusConfig) -> CorpusConfig:
    """The corpus's own settings, to run the stages from extraction on that it was run with."""
    stored = read_config(Corpus(Path(config.out)))
    stored.out, stored.workers, stored.progress = config.out, config.workers, config.progress
    return stored


def stages_made(corpus: Corpus) -> list[str]:
    """The stages from extraction on, up to the last that left anything in the corpus: all that hold its texts.

    Raises InputError where there is none.
    """
    later = STAGES[STAGES.index("extract") :]
    made = [stage for stage in later if any(corpus.folder(stage).glob("[0-9]*"))]
    if "extract" not in made:
        raise InputError(f"out={corpus.out}: no documents were extracted there; give the folder of a corpus")
    return list(later[: later.index(made[-1]) + 1])


def remember(corpus: Corpus, takedown: TakeDown) -> None:
    """Write tokenize/forgotten.parquet, then forget.json. Only under the lock; the same again changes nothing."""
    index = takedown.documents["index"].combine_chunks()
    places = [read_tombstones(corpus.tombstones)] if corpus.tombstones.exists() else []
    for part in sorted(corpus.folder("tokenize").glob("[0-9]*.documents.parquet")):
        rows = pq.read_table(part, columns=TOMBSTONE_SCHEMA.names)
        places.append(rows.filter(pc.is_in(rows["index"], value_set=index)))
    if places:
        table = pa.concat_tables(places).group_by(["index", "digest"]).aggregate([("tokens", "max")])
        table = table.rename_columns(TOMBSTONE_SCHEMA.names).sort_by([("index", "ascending"), ("digest", "ascending")])
        if table.num_rows:
            table = table.cast(TOMBSTONE_SCHEMA)
            write_table(table.replace_schema_metadata({"sha256": _digest_of(table)}), corpus.tombstones)
    _write_forget_list(corpus, takedown.rules)


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
