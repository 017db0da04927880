"""What datatrove says of the same texts, and what it costs: run by the Python of an environment of its own.

    PYTHON peer_datatrove.py texts.json answers.json

In: a JSON list of texts. Out: {"verdicts": {recipe: [reason or null, …]}, "texts": {recipe: [text left, …]},
"cpu_s": {recipe or "minhash": seconds}}. Processor seconds of this process, after one text as a warm-up.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.hashing import HashConfig


def verdict(filters: list, text: str) -> tuple[str | None, str]:
    """(reason of the first filter that drops the text, the text left)."""
    document = Document(text=text, id="x")
    for rule in filters:
        result = rule.filter(document)
        if result is not True:
            reason = result[1] if isinstance(result, tuple) else type(rule).__name__
            return reason, document.text
    return None, document.text


def main() -> None:
    logging.disable(logging.CRITICAL)
    texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recipes = {
        "gopher": [GopherRepetitionFilter(), GopherQualityFilter()],
        "c4": [C4QualityFilter()],
        "fineweb": [
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            C4QualityFilter(filter_no_terminal_punct=False),
            FineWebQualityFilter(),
        ],
    }
    answers: dict[str, dict] = {"verdicts": {}, "texts": {}, "cpu_s": {}}
    for name, filters in recipes.items():
        verdict(filters, texts[0])
        started = time.process_time()
        results = [verdict(filters, text) for text in texts]
        answers["cpu_s"][name] = time.process_time() - started
        answers["verdicts"][name] = [reason for reason, _ in results]
        answers["texts"][name] = [text for _, text in results]
    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)
    signer = MinhashDedupSignature(output_folder=str(Path(sys.argv[2]).parent / "signatures"), config=config)
    for first in (texts[:1], texts):
        started = time.process_time()
        for text in first:
            shingles = signer.get_shingles(text)
            if len(shingles):
                signer.get_signature(shingles)
        answers["cpu_s"]["minhash"] = time.process_time() - started
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
