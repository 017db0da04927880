"""Documents → which of them are duplicates, and which copy stays.

In, shard by shard: documents. Out: signatures (`sign_shard`), from all of them together the rows that go
(`find_duplicates`), and each shard's verdicts (`dedup_verdicts`). Nothing depends on the order of documents or shards.

Exact duplicates have the same words, whatever their case, spacing and punctuation. Near-duplicates are found by
MinHash (Broder, 1997) over sets of word n-grams, with locality-sensitive hashing (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", 3.4): the permutations' minima are cut into bands, and two documents that agree in a whole
band are linked. What is linked, directly or through others, is one cluster; its best document stays.

Cost: signing 20 MB of text a second (2,000 long pages); joining eight million signatures, 40 s of processor time and
7 GB.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.clean.ngrams import HASH_VERSION, hash_ngrams, random_uint64, splitmix
from data_pipeline.config import DedupConfig, Keep
from data_pipeline.records import DROPPED, CorruptionError, Verdict, verdict_table

# Part of every signature; a change of normalization or signature must raise it, or old and new ones would be joined.
DEDUP_VERSION = 1

SIGNATURE_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("url", pa.string()),
        ("exact", pa.binary(16)),  # BLAKE2b-128 of the normalized text
        ("characters", pa.int64()),
        ("date", pa.string()),
        ("bands", pa.list_(pa.uint64())),  # one hash a band; none for fewer words than a shingle
    ]
)

DUPLICATE_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # of a document that goes
        ("twin", pa.int64()),  # index of the one that stays in its place
        ("twin_url", pa.string()),
        ("kind", pa.string()),  # exact: the same normalized text as the twin; near: another text of its cluster;
        # old_exact, old_near: the twin is another corpus's, and `twin` is below 0
        ("cluster_size", pa.int64()),
    ]
)

_WORD = re.compile(r"\w+")


def normalize_for_exact(text: str) -> str:
    """The words of `text` parted by single spaces: NFKC, case folded, without punctuation.

    A text without any word (only signs or emoji) keeps its signs, so that such texts are not all alike.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(folded) or folded.split())


def _metadata(config: DedupConfig) -> dict[bytes, bytes]:
    """What signatures must have in common to be joined."""
    version = f"{DEDUP_VERSION}.{HASH_VERSION}"
    shape = f"{config.ngram}-grams {config.bands}x{config.rows}" if config.near else "exact only"
    return {b"signature": f"version {version}, {shape}".encode()}


def sign_shard(documents: pa.Table, config: DedupConfig) -> pa.Table:
    """Signatures (SIGNATURE_SCHEMA with the kind of signature in its metadata) of `documents`, sorted by index."""
    documents = documents.select(["index", "url", "text", "date"]).sort_by("index")
    exact, characters, shingles = [], [], []
    for text in documents["text"].to_pylist():
        normalized = normalize_for_exact(text)
        exact.append(hashlib.blake2b(normalized.encode(), digest_size=16).digest())
        characters.append(len(text))
        shingles.append(hash_ngrams(normalized, config.ngram) if config.near else np.empty(0, np.uint64))
    schema = SIGNATURE_SCHEMA.with_metadata(_metadata(config))
    return pa.Table.from_arrays(
        [
            documents["index"],
            documents["url"],
            pa.array(exact, pa.binary(16)),
            pa.array(characters, pa.int64()),
            documents["date"],
            _bands(shingles, config.bands, config.rows),
        ],
        schema=schema,
    )


def _bands(shingles: Sequence[np.ndarray], bands: int, rows: int) -> pa.Array:
    """list<uint64>[documents]: each document's band hashes, an empty list for a document without shingles."""
    signed = np.array([len(s) > 0 for s in shingles], bool)
    lengths = np.where(signed, bands, 0)
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    if not signed.any():
        return pa.ListArray.from_arrays(offsets, pa.array([], pa.uint64()))
    minima = minhash([s for s in shingles if len(s)], bands * rows)
    by_band = minima.reshape(-1, bands, rows)
    # A band's hash covers its number, too: equal minima in different bands do not meet.
    weights = random_uint64(rows, seed=2) | np.uint64(1)
    hashes = splitmix((by_band * weights).sum(axis=2, dtype=np.uint64) + random_uint64(bands, seed=3))
    return pa.ListArray.from_arrays(offsets, pa.array(hashes.ravel()))


def minhash(shingles: Sequence[np.ndarray], permutations: int) -> np.ndarray:
    """uint64[documents, permutations]: the least value of each document's shingles under each permutation.

    Shingles are uniform 64-bit hashes, none of the arrays empty. A permutation is x → a·x + b modulo 2^64 with an odd
    a, which is one to one.
    """
    factors = random_uint64(permutations, seed=0) | np.uint64(1)
    summands = random_uint64(permutations, seed=1)
    minima = np.empty((len(shingles), permutations), np.uint64)
    start = 0
    while start < len(shingles):
        # Some documents at a time, so that a permutation's values stay in the processor's cache.
        stop, size = start, 0
        while stop < len(shingles) and (stop == start or size + len(shingles[stop]) <= _MINHASH_BLOCK):
            size += len(shingles[stop])
            stop += 1
        block = np.concatenate(shingles[start:stop])
        offsets = np.cumsum([0, *(len(s) for s in shingles[start : stop - 1])])
        values = np.empty_like(block)
        for p in range(permutations):
            np.multiply(block, factors[p], out=values)
            np.add(values, summands[p], out=values)
            minima[start:stop, p] = np.minimum.reduceat(values, offsets)
        start = stop
    return minima


_MINHASH_BLOCK = 1 << 16  # shingles: 0.5 MB of values


def find_duplicates(
    signatures: pa.Table, config: DedupConfig, old: pa.Table | None = None, links: Sequence[np.ndarray] | None = None
) -> pa.Table:
    """The documents that go (DUPLICATE_SCHEMA), sorted by index, from all shards' `signatures` (`read_signatures`).

    `old` are signatures of documents that other corpora keep: whoever shares a cluster with one of them goes. `links`
    are pairs of rows, those of `old` first, that `bands` found already; then the column `bands` is not needed.
    """
    rows = signatures
    if old is not None:
        # Below 0, so that they stand before all others in the order of the index, and are told from them.
        below = pa.array(np.arange(-old.num_rows, 0))
        rows = pa.concat_tables([old.set_column(0, "index", below).select(rows.column_names), rows])
    if rows.num_rows == 0:
        return DUPLICATE_SCHEMA.empty_table()
    order = pc.sort_indices(rows, [("index", "ascending")])
    rows = rows.take(order)
    exact = exact_digests(rows)
    if links is None:
        cluster = clusters(rows, config)
    else:
        cluster = _connected_components(rows.num_rows, links)[order.to_numpy()]
    best = _best_of_each(cluster, rows, config.keep)  # row of the one that stays, for each row
    index = rows["index"].to_numpy()
    goes = np.flatnonzero((best != np.arange(len(best))) & (index >= 0))
    sizes = np.bincount(cluster)[cluster[goes]]
    twins = rows.select(["index", "url"]).take(best[goes])
    same = (exact[goes] == exact[best[goes]]).all(axis=1)
    kind = np.where(same, "exact", "near").astype(object)
    kind[index[best[goes]] < 0] = "old_" + kind[index[best[goes]] < 0]
    return pa.Table.from_arrays(
        [
            rows["index"].take(goes),
            twins["index"],
            twins["url"],
            pa.array(kind, pa.string()),
            pa.array(sizes, pa.int64()),
        ],
        schema=DUPLICATE_SCHEMA,
    )


def exact_digests(rows: pa.Table) -> np.ndarray:
    """uint64[rows, 2]: both halves of the exact digests."""
    return np.frombuffer(b"".join(rows["exact"].to_pylist()), "<u8").reshape(-1, 2)


def clusters(rows: pa.Table, config: DedupConfig) -> np.ndarray:
    """int[rows]: the number of the cluster that each row (SIGNATURE_SCHEMA) belongs to."""
    exact = exact_digests(rows)
    links = []
    if config.exact:
        links.append(exact_links(exact))
    if config.near:
        bands = rows["bands"].combine_chunks()
        signed = np.flatnonzero(pc.list_value_length(bands).to_numpy(zero_copy_only=False))
        hashes = bands.flatten().to_numpy().reshape(-1, config.bands)
        links += [links_of(hashes[:, band], signed) for band in range(config.bands)]
    return _connected_components(len(exact), links)


def exact_links(exact: np.ndarray) -> np.ndarray:
    """int64[links, 2]: pairs of rows that chain all rows of equal digest (`exact_digests`) together."""
    # Links of equal first halves, made in the order of the second halves, so that equal digests are neighbors.
    order = np.argsort(exact[:, 1], kind="stable")
    pairs = links_of(exact[order, 0], order)
    return pairs[exact[pairs[:, 0], 1] == exact[pairs[:, 1], 1]]


def read_signatures(paths: Sequence[Path], config: DedupConfig, columns: Sequence[str] | None = None) -> pa.Table:
    """The signatures in `paths` (Parquet), one after another; all their columns, or `columns`.

    Raises:
        CorruptionError: a file holds signatures of another version or with other settings.
    """
    tables = []
    for path in paths:
        table = pq.read_table(path, columns=list(columns) if columns else None)
        found, wanted = (table.schema.metadata or {}).get(b"signature", b""), _metadata(config)[b"signature"]
        if found != wanted:
            raise CorruptionError(
                f"{path}: signatures of kind '{found.decode()}', needed '{wanted.decode()}'; "
                f"remove the file and run again"
            )
        tables.append(table)
    return pa.concat_tables(tables) if tables else SIGNATURE_SCHEMA.empty_table()


def links_of(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64[links, 2]: pairs of `rows` that chain all rows of equal key together; linear in the rows."""
    ordered = np.sort(keys)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return np.empty((0, 2), np.int64)
    # Few keys occur twice: only their rows are put in order, which costs more than sorting bare keys.
    places = np.minimum(np.searchsorted(repeated, keys), len(repeated) - 1)
    candidates = np.flatnonzero(repeated[places] == keys)
    order = candidates[np.argsort(keys[candidates], kind="stable")]
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    return np.stack([rows[order[same]], rows[order[same + 1]]], axis=1)


def _connected_components(count: int, links: Sequence[np.ndarray]) -> np.ndarray:
    """int[count]: the number of each row's cluster."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([*links, np.empty((0, 2), np.int64)])
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _best_of_each(cluster: np.ndarray, rows: pa.Table, keep: Keep) -> np.ndarray:
    """int64[rows]: for each row, the row of its cluster that stays; `rows` are sorted by index, ties go to the lowest.

    longest: most characters. earliest: least date, documents without one last. first: lowest index. A row with an
    index below 0, of an older corpus, stays before all others.
    """
    if keep is Keep.longest:
        rank = -rows["characters"].to_numpy()
    elif keep is Keep.earliest:
        dates = [date or "~" for date in rows["date"].to_pylist()]  # after every digit
        rank = np.unique(np.array(dates), return_inverse=True)[1]
    else:
        rank = np.zeros(len(cluster), np.int64)
    new = rows["index"].to_numpy() >= 0
    order = np.lexsort((np.arange(len(cluster)), rank, new, cluster))
    first = np.append(True, np.diff(cluster[order]) != 0)
    return order[np.flatnonzero(first)][cluster]


def dedup_verdicts(documents: pa.Table, duplicates: pa.Table) -> pa.Table:
    """One verdict for each row of `documents` (any table with `index` and `url`), sorted by index.

    `duplicates` is the whole result of `find_duplicates`. A document that stays for others carries the size of its
    cluster, too.
    """
    documents = documents.select(["index", "url"]).sort_by("index")
    mine = duplicates.filter(pc.is_in(duplicates["index"], documents["index"].combine_chunks()))
    going = {row["index"]: row for row in mine.to_pylist()}
    stays = duplicates.filter(pc.is_in(duplicates["twin"], documents["index"].combine_chunks()))
    sizes = dict(zip(stays["twin"].to_pylist(), stays["cluster_size"].to_pylist(), strict=True))
    verdicts = []
    for index, url in zip(documents["index"].to_pylist(), documents["url"].to_pylist(), strict=True):
        if row := going.get(index):
            reason, numbers = f"{row['kind']}_duplicate", {"cluster_size": row["cluster_size"]}
            verdicts.append(Verdict(index, url, DROPPED, reason, row["twin_url"], numbers))
        else:
            verdicts.append(Verdict(index, url, numbers={"cluster_size": sizes.get(index, 1)}))
    return verdict_table(verdicts)
