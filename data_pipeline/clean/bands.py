"""The join of near-duplicates in parts: each part links documents by one band, or by their exact digests.

In: the signatures of all shards (and of other corpora), file by file, of which a part reads what it compares: one
64-bit hash a document. Out: pairs of rows, numbered as the files follow one another; `dedup.find_duplicates` makes
clusters of all pairs. A part holds 40 bytes a document, whatever the number of bands, so that 100 million documents
fit a worker of 4 GB; parts run beside one another, on one machine or many. Who finds a pair makes no difference to the
clusters, so the result is the one of the join in a single task, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.clean.dedup import exact_digests, exact_links, links_of
from data_pipeline.config import DedupConfig

EXACT = -1
"""The part that links equal texts; the others are numbered as their bands."""

LINK_SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.int64())])


def parts_of(config: DedupConfig) -> list[int]:
    """The parts that a join has."""
    return [*([EXACT] if config.exact else []), *(range(config.bands) if config.near else [])]


def columns_of(part: int) -> list[str]:
    """What a part reads of the signatures."""
    return ["exact"] if part == EXACT else ["bands"]


def link(tables: Iterable[pa.Table], config: DedupConfig, part: int) -> pa.Table:
    """LINK_SCHEMA: pairs of rows of `tables` (SIGNATURE_SCHEMA, at least `columns_of(part)`), one after another."""
    if part == EXACT:
        digests = [exact_digests(table) for table in tables]
        pairs = exact_links(np.concatenate(digests) if digests else np.empty((0, 2), np.uint64))
        return _table(pairs)
    keys, rows, start = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for table in tables:
        bands = table["bands"].combine_chunks()
        signed = np.flatnonzero(pc.list_value_length(bands).to_numpy(zero_copy_only=False))
        keys.append(bands.flatten().to_numpy().reshape(-1, config.bands)[:, part].copy())
        rows.append(signed + start)
        start += table.num_rows
    return _table(links_of(np.concatenate(keys), np.concatenate(rows)))


def _table(pairs: np.ndarray) -> pa.Table:
    return pa.table([pa.array(pairs[:, 0], pa.int64()), pa.array(pairs[:, 1], pa.int64())], schema=LINK_SCHEMA)
