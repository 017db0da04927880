"""Memory and rows per second of the URL stage: a list of a million (or five) URLs → shards, in a process of its own.

The list's shape is that of link lists: many rows of few domains, few rows of many (Zipf), one in ten a duplicate.

    python benchmarks/urls.py [--rows 1000000 5000000] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_pipeline.config import UrlListConfig
from data_pipeline.crawl.urls import count_urls, write_url_shards
from data_pipeline.entrances import ROWS_PER_SHARD


def write_list(path: Path, rows: int) -> None:
    """`rows` URLs, of which a tenth stands there for the second time."""
    chance = random.Random(1)
    endings = ("com", "org", "net", "co.uk", "de")
    with open(path, "w", encoding="ascii") as f:
        for i in range(rows):
            number = i if i % 10 else chance.randrange(i + 1)
            domain = int(rows / 20 * ((number * 2654435761 % (1 << 32)) / (1 << 32)) ** 3)
            f.write(f"https://www.site{domain}.{endings[domain % 5]}/news/{number % 4000}/article-{number}.html?id=7\n")


def measure(pipe: Connection, path: Path, out: Path) -> None:
    config = UrlListConfig()
    started = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.monotonic()
    shards = max(8, -(-count_urls(path, config) // ROWS_PER_SHARD))
    counts = write_url_shards(path, out, shards, config)
    wall_s = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send(
        {
            "rows": counts["rows"],
            "kept": counts["kept"],
            "shards": shards,
            "rows_per_s": counts["rows"] / wall_s,
            "start_mb": started.ru_maxrss / 1024,
            "peak_mb": peak.ru_maxrss / 1024,
        }
    )


def run(rows: int) -> dict[str, Any]:
    """Figures of the stage over a list of `rows` URLs: rows, kept, shards, rows_per_s, start_mb, peak_mb."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        write_list(path, rows)
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("spawn").Process(target=measure, args=(there, path, Path(folder) / "out"))
        child.start()
        figures: dict[str, Any] = here.recv()
        child.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    print(f"{'rows':>10}{'kept':>10}{'shards':>8}{'rows/s':>9}{'peak MB':>9}   {platform.machine()}", flush=True)
    figures = []
    for rows in arguments.rows:
        f = run(rows)
        figures.append(f)
        print(
            f"{f['rows']:>10,}{f['kept']:>10,}{f['shards']:>8,}{f['rows_per_s']:>9,.0f}{f['peak_mb']:>9,.0f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
