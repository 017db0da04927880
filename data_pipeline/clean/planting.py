"""Documents → known near-duplicates of some of them → recall and precision of the deduplication of this very run.

In: the documents that are signed. Out: signatures of edited copies with their true Jaccard similarity to their source
(`plant_shard`), and from the real join over all documents and copies, which copies met their source
(`measure_planted`). The copies take part in that measurement alone, never in the corpus.

Half of the copies are near-duplicates (similarity 0.8 to 0.98), half are texts that are merely alike (0.1 to 0.4). A
copy is made by writing made-up words over some of the source's, evenly spread. Which documents, which words: from the
documents' digests alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.clean.dedup import SIGNATURE_SCHEMA, clusters, normalize_for_exact, sign_shard
from data_pipeline.clean.ngrams import hash_ngrams
from data_pipeline.config import DedupConfig

NEAR_JACCARD = 0.8
"""From here on two texts are near-duplicates, as in Lee et al., arXiv:2107.06499, appendix A."""
NEAR_TARGETS, ALIKE_TARGETS = (0.8, 0.98), (0.1, 0.4)
MIN_WORDS = 100
"""Of shorter texts one word more or less is too great a step."""

PLANT_SCHEMA = pa.schema([*SIGNATURE_SCHEMA, ("source", pa.int64()), ("jaccard", pa.float64())])


def plant_shard(documents: pa.Table, config: DedupConfig, count: int) -> pa.Table:
    """`count` near-duplicates and `count` alike texts (PLANT_SCHEMA) of `documents`; fewer if there are fewer sources.

    `index` numbers the copies from 0; `source` is the index of the document that a copy was made from.
    """
    rows = documents.select(["index", "text", "digest"]).to_pylist()
    rows.sort(key=lambda row: (blake2b(row["digest"].encode(), person=b"plant").digest(), row["index"]))
    copies: list[dict[str, Any]] = []
    sources: list[int] = []
    jaccards: list[float] = []
    planted = 0
    for row in rows:
        words = normalize_for_exact(row["text"]).split(" ")
        if planted == count:
            break
        if len(words) < max(MIN_WORDS, 4 * config.ngram):
            continue
        for kind, (low, high) in enumerate((NEAR_TARGETS, ALIKE_TARGETS)):
            target = low + (high - low) * (planted + 0.5) / count
            copy = _edited(words, target, config.ngram, row["digest"])
            copies.append({"index": len(copies), "url": f"planted:{row['index']}:{kind}", "text": copy, "date": None})
            sources.append(row["index"])
            jaccards.append(jaccard(" ".join(words), copy, config.ngram))
        planted += 1
    schema = pa.schema(
        [("index", pa.int64()), ("url", pa.string()), ("text", pa.large_string()), ("date", pa.string())]
    )
    signed = sign_shard(pa.Table.from_pylist(copies, schema=schema), config)
    table = signed.append_column("source", pa.array(sources, pa.int64()))
    return table.append_column("jaccard", pa.array(jaccards, pa.float64()))


def jaccard(one: str, other: str, ngram: int) -> float:
    """Jaccard similarity of the sets of word n-grams of two normalized texts, counted exactly."""
    a, b = np.unique(hash_ngrams(one, ngram)), np.unique(hash_ngrams(other, ngram))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


def _edited(words: Sequence[str], target: float, ngram: int, salt: str) -> str:
    """`words` with some written over so that the similarity is about `target`.

    m words that lie at least n apart change n·m of S n-grams: J = (S - n·m) / (S + n·m).
    """
    shingles = len(words) - ngram + 1
    changes = max(1, int(shingles * (1 - target) / (1 + target) / ngram))
    edited = list(words)
    for i in range(changes):
        place = ngram - 1 + (i * (shingles - ngram)) // changes
        edited[place] = "w" + blake2b(f"{salt}{target}{i}".encode(), digest_size=6).hexdigest()
    return " ".join(edited)


def measure_planted(signatures: pa.Table, planted: Sequence[pa.Table], config: DedupConfig) -> dict[str, float | int]:
    """{"planted", "recall", "precision", …} of the join over all `signatures` and copies.

    recall: of the copies of a similarity of at least NEAR_JACCARD, the share that came into their source's cluster.
    precision: of the copies that did, the share of such a similarity.
    """
    copies = pa.concat_tables(planted)
    together = pa.concat_tables(
        [signatures.replace_schema_metadata(None), copies.select(SIGNATURE_SCHEMA.names).replace_schema_metadata(None)]
    )
    cluster = clusters(together, config)
    place = {index: row for row, index in enumerate(signatures["index"].to_pylist())}
    source = np.array([place[index] for index in copies["source"].to_pylist()], np.int64)
    joined = cluster[signatures.num_rows :] == cluster[source]
    near = copies["jaccard"].to_numpy() >= NEAR_JACCARD
    found = int((joined & near).sum())
    return {
        "planted": int(near.sum()),
        "found": found,
        "alike": int((~near).sum()),
        "alike_joined": int((joined & ~near).sum()),
        "recall": round(found / max(int(near.sum()), 1), 4),
        "precision": round(found / max(int(joined.sum()), 1), 4),
    }
