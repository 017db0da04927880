"""The join of near-duplicates at size: synthetic signatures of millions of documents, their clusters known.

    python -m benchmarks.join [--documents 8000000] [--shards 80] [--json out.json]

Writes signature shards as `dedup.sign_shard` makes them (14 bands; random digests and band hashes; each hundredth
document heads a family of 2 to 5 whose members share one band with the one before, so that only the components find
them, each thousandth has an exact copy), then reads and joins them in a process of its own, as a corpus run does.
Prints the time, the peak memory of that process, and how many of the planted families came out whole.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.clean import dedup
from data_pipeline.config import DedupConfig

FAMILY_EVERY = 100
COPY_EVERY = 1_000


def families(first: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(row of each member but the first, row of the member before it) of a shard's planted families."""
    draw = np.random.default_rng(seed)
    heads = np.arange(0, count - 5, FAMILY_EVERY)
    sizes = draw.integers(2, 6, len(heads))
    members = np.concatenate([head + np.arange(1, size) for head, size in zip(heads, sizes, strict=True)])
    return first + members, first + members - 1


def write_shard(path: Path, first: int, count: int, seed: int, config: DedupConfig) -> None:
    draw = np.random.default_rng((seed, 1))
    bands = draw.integers(0, 1 << 64, (count, config.bands), np.uint64)
    member, before = (rows - first for rows in families(first, count, seed))
    for row, earlier, band in zip(member, before, draw.integers(0, config.bands, len(member)), strict=True):
        bands[row, band] = bands[earlier, band]
    digests = draw.integers(0, 1 << 64, (count, 2), np.uint64)
    copies = np.arange(50, count - 1, COPY_EVERY)  # 50 is a row of no family
    digests[copies + 1], bands[copies + 1] = digests[copies], bands[copies]
    offsets = pa.array(np.arange(0, count * config.bands + 1, config.bands), pa.int32())
    schema = dedup.SIGNATURE_SCHEMA.with_metadata(dedup._metadata(config))
    table = pa.Table.from_arrays(
        [
            pa.array(np.arange(first, first + count)),
            pa.array([f"https://example-{i % 9973}.org/{i:08d}/a-headline" for i in range(first, first + count)]),
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), count, [None, pa.py_buffer(digests.tobytes())]),
            pa.array(draw.integers(100, 20_000, count)),
            pa.array(["2026-11-01"] * count),
            pa.ListArray.from_arrays(offsets, pa.array(bands.ravel())),
        ],
        schema=schema,
    )
    pq.write_table(table, path)


def join(folder: Path) -> None:
    """The measured process: signatures → the documents that go."""
    config = DedupConfig()
    started = time.monotonic()
    rows = dedup.read_signatures(sorted(folder.glob("*.signatures.parquet")), config)
    read_s, read_mb = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    duplicates = dedup.find_duplicates(rows, config)
    seconds = time.monotonic() - started
    pq.write_table(duplicates, folder / "duplicates.parquet")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "read_s": round(read_s, 1),
        "read_mb": read_mb,
        "seconds": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": usage.ru_maxrss >> 10,
    }
    (folder / "figures.json").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8_000_000)
    parser.add_argument("--shards", type=int, default=80)
    parser.add_argument("--folder", type=Path, help="where to work (1.5 GB for 8 million); default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--join", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.join:
        join(arguments.join)
        return
    config = DedupConfig()
    count = arguments.documents // arguments.shards
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        for k in range(arguments.shards):
            write_shard(folder / f"{k:05d}.signatures.parquet", k * count, count, k, config)
        subprocess.run([sys.executable, "-m", "benchmarks.join", "--join", str(folder)], check=True)
        figures = json.loads((folder / "figures.json").read_text())
        duplicates = pq.read_table(folder / "duplicates.parquet")
    figures["documents"] = count * arguments.shards
    found = dict(zip(duplicates["index"].to_pylist(), duplicates["twin"].to_pylist(), strict=True))
    whole = planted = 0
    for k in range(arguments.shards):
        members: dict[int, list[int]] = {}
        for row, before in zip(*(a.tolist() for a in families(k * count, count, k)), strict=True):
            members.setdefault(row - row % count % FAMILY_EVERY, [row - row % count % FAMILY_EVERY]).append(row)
            assert before in members[row - row % count % FAMILY_EVERY]
        planted += len(members)
        whole += sum(len({found.get(row, row) for row in rows}) == 1 for rows in members.values())
    exact = duplicates["kind"].to_pylist().count("exact")
    figures |= {"families": planted, "families_whole": whole, "exact_copies": exact, "duplicates": duplicates.num_rows}
    for name, value in figures.items():
        print(f"{name:<16}{value:>14,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
