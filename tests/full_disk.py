"""A corpus on a disk that is full again and again, for test_corpus_damage.py, which runs this in a mount of its own.

    python full_disk.py TEXTS ONE_GO DISK

DISK is an empty tmpfs. It starts with next to no room; at each stop it gets some more, so that the runs stop at
different writes. Prints a line of JSON: what each run came to, and the files that differ from ONE_GO in the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from corpora import files_of
from inline import Inline

from data_pipeline import pipeline
from data_pipeline.config import CorpusConfig, LanguageConfig, Source, TokenizeConfig
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import PipelineError

STEP_BYTES = 24 << 10


def config_of(texts: Path, out: Path) -> CorpusConfig:
    return CorpusConfig(
        source=Source.dataset,
        path=str(texts),
        out=str(out),
        shards=3,
        workers=1,
        progress=False,
        language=LanguageConfig(keep=[]),
        tokenize=TokenizeConfig(validation_fraction=0.2, shard_tokens=4_096),
    )


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def main(texts: Path, one_go: Path, disk: Path) -> None:
    pipeline._executor = lambda config, out: Inline()  # type: ignore[assignment]
    runs: list[dict[str, object]] = []
    size = 8 << 10
    while True:
        resize(disk, size)
        try:
            build_corpus(config_of(texts, disk / "corpus"))
        except PipelineError as e:
            left = [p.name for p in disk.rglob(".*.tmp")]
            steps = len(list(disk.rglob("*.done.json")))
            runs.append({"kind": type(e).__name__, "code": e.exit_code, "says": str(e), "left": left, "steps": steps})
            size += STEP_BYTES
        else:
            break
    there, here = files_of(one_go), files_of(disk / "corpus")
    differ = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    print("SAID " + json.dumps({"runs": runs, "differ": differ, "bytes": size}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
