"""Near-duplicates by datasketch, with the same shingles, bands and rows; run by an environment's own Python.

    PYTHON peer_datasketch.py texts.json answers.json

Out: {"cpu_s": {"minhash": seconds of signing, "join": seconds of LSH}, "pairs": [[i, j], …] of texts in one bucket}.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from datasketch import MinHash, MinHashLSH

BANDS, ROWS, NGRAM = 14, 8, 5


def main() -> None:
    texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.process_time()
    signed = []
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        shingles = {" ".join(words[i : i + NGRAM]).encode() for i in range(len(words) - NGRAM + 1)}
        sketch = MinHash(num_perm=BANDS * ROWS)
        sketch.update_batch(shingles)
        signed.append(sketch if shingles else None)
    minhash = time.process_time() - started
    started = time.process_time()
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    pairs = []
    for i, sketch in enumerate(signed):
        if sketch is not None:
            pairs += [[j, i] for j in index.query(sketch)]
            index.insert(i, sketch)
    join = time.process_time() - started
    answers = {"cpu_s": {"minhash": minhash, "join": join}, "pairs": pairs}
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
