"""datatrove from a WARC file to tokens, with the steps of our `recipe=gopher`; run by the Python of its environment.

    PYTHON peer_datatrove_pipeline.py WARC_FOLDER TOKENIZER_JSON OUT

Read, trafilatura, language (by py3langid on both sides: datatrove's own asks for a model from the network), Gopher's
quality and repetition rules, MinHash (14 × 8 hashes of 5-word shingles, 64 bits), GPT-2's tokens. One task at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from py3langid.langid import MODEL_FILE, LanguageIdentifier


class English(BaseFilter):
    """As our language stage judges: py3langid's probability of English."""

    name = "English"

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least
        self._identifier: LanguageIdentifier | None = None  # made in the worker: it does not travel

    def filter(self, doc: Document) -> bool:
        if self._identifier is None:
            self._identifier = LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)
        language, score = self._identifier.classify(doc.text)
        return language == "en" and score >= self.least


def main() -> None:
    warcs, tokenizer, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)

    def run(name: str, steps: list, tasks: int = 1) -> None:
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=1, logging_dir=str(out / "logs" / name)).run()

    texts, signatures, buckets, removed = (str(out / n) for n in ("texts", "signatures", "buckets", "removed"))
    read = WarcReader(warcs, glob_pattern="*.warc.gz")
    rules = [English(0.7), GopherRepetitionFilter(), GopherQualityFilter()]
    run("clean", [read, Trafilatura(timeout=10), *rules, JsonlWriter(texts)])
    run("signatures", [JsonlReader(texts), MinhashDedupSignature(signatures, config=config)])
    run("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], tasks=config.num_buckets)
    run("cluster", [MinhashDedupCluster(buckets, removed, config=config)])
    tokens = DocumentTokenizer(
        output_folder=str(out / "tokens"),
        tokenizer_name_or_path=tokenizer,
        eos_token="<|endoftext|>",
        shuffle_documents=False,
    )
    run("tokens", [JsonlReader(texts), MinhashDedupFilter(removed), tokens])


if __name__ == "__main__":
    main()
