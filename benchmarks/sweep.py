"""A ladder of six sizes on thirteen novels: learning rates by rule, the law, its forecast of the largest size.

    python -m benchmarks.sweep [BOOKS] [OUT]

BOOKS: a folder of .txt files (by default ../shared/data/books). OUT: where tokens and runs go and stay, so that a
bench that was killed goes on (by default a folder under the system's temporary one). It drives the `sweep` command as
a user would: four learning rates on the three smallest sizes, then every size with three amounts of tokens at the rate
of the rule. The law is fitted without the largest size. Prints the sweep's table; `OUT/ladder/sweep.html` shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.books import VOCABULARY, write_books

SIZES = ("3x32x2", "3x48x3", "3x64x2", "4x96x3", "5x128x4", "6x192x6")
STEPS = (128, 256, 512)
RATES = (0.002, 0.004, 0.008, 0.016)
MISS = 0.03
"""How far the forecast of the largest size may be off."""


def main() -> int:
    books = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data/books")
    out = Path(sys.argv[2] if len(sys.argv) > 2 else Path(tempfile.gettempdir()) / "gpt2train-bench-sweep")
    if not list(books.glob("*.txt")):
        print(f"benchmarks.sweep: no .txt files in {books}; give the folder of some novels", file=sys.stderr)
        return 0
    tokens = out / "books" / "tokens"
    if not (tokens / "manifest.json").exists():
        print(write_books(books, tokens))
    given = [
        f"sizes=[{','.join(SIZES)}]",
        f"steps={','.join(map(str, STEPS))}",
        f"rates=[{','.join(map(str, RATES))}]",
        f"data={tokens}",
        f"out={out / 'ladder'}",
        f"model.vocabulary={VOCABULARY}",
        "model.context=128",
        "batch.sequences=8",
        "batch.micro=8",
        "device=cpu",
        "precision=fp32",
        "zero.stage=0",
        "evaluate.every_steps=100000",
        "evaluate.sequences=512",
        "checkpoint.every_steps=0",
    ]
    code = subprocess.run([sys.executable, "-m", "gpt2train", "sweep", *given], check=False).returncode
    if code:
        return code
    (law,) = json.loads((out / "ladder" / "scaling.json").read_text())["laws"].values()
    miss = law["largest_miss"]
    print(f"largest miss of the held-out size: {miss:.2%}" if miss is not None else "no law was found")
    return 0 if miss is not None and miss <= MISS else 1


if __name__ == "__main__":
    sys.exit(main())
