"""What the fetch appends to, stored in segments while it grows, and brought back whole."""

from __future__ import annotations

import json
from pathlib import Path

from buckets import QUICK, memory_fixture  # noqa: F401 (a fixture)
from corpora import files_of

from data_pipeline.storage.bucket import Bucket
from data_pipeline.storage.growing import Growing, segments_of


def add_pages(folder: Path, numbers: range, part: int = 0) -> None:
    """As a shard's fetch does: a record to the WARC file, a line of it to the journal, requests to the audit log."""
    warc, journal = folder / f"warc/00000-{part:03d}.warc.gz", folder / "fetch/00000.journal.jsonl"
    for path in (warc, journal):
        path.parent.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        with open(warc, "ab") as f:
            f.write(b"record of page %d\n" % n * 50)
            end = f.tell()
        with open(journal, "a") as f:
            f.write(json.dumps({"url": f"u{n}", "state": "kept", "part": part, "end": end}) + "\n")
        with open(folder / "fetch/00000.audit.jsonl", "a") as f:
            f.write(json.dumps({"asked": n}) + "\n")


def restored(bucket: Bucket, folder: Path) -> dict[str, bytes]:
    there = bucket.list()
    Growing(bucket, folder).restore({n: s for n, s in there.items() if not n.startswith(".")}, segments_of(there))
    return files_of(folder)


def test_growing_files_are_stored_up_to_what_can_never_change(memory: str, tmp_path: Path) -> None:
    bucket, here = Bucket(f"{memory}/corpus", retry_s=QUICK.retry_s), tmp_path / "here"
    growing = Growing(bucket, here)
    growing.begin({})
    add_pages(here, range(4))
    assert growing.sync({}) == sum(len(c) for c in files_of(here).values())
    assert restored(bucket, tmp_path / "a") == files_of(here)
    assert growing.sync({}) == 0
    before = files_of(here)
    # A record whose line is not written yet, and half a line: neither is stored.
    with open(here / "warc/00000-000.warc.gz", "ab") as f:
        f.write(b"half a rec")
    with open(here / "fetch/00000.journal.jsonl", "a") as f:
        f.write('{"url": "u9", "sta')
    assert growing.sync({}) == 0
    assert restored(bucket, tmp_path / "b") == before
    # They are cut at the next start, as the fetch does, and it goes on; a process that knows nothing adds to it.
    for name, content in before.items():
        (here / name).write_bytes(content)
    add_pages(here, range(4, 6))
    add_pages(here, range(6, 8), part=1)
    growing = Growing(bucket, here)
    growing.begin(segments_of(bucket.list()))
    growing.sync({})
    assert restored(bucket, tmp_path / "c") == files_of(here)


def test_segments_that_differ_from_what_lies_here_are_replaced(memory: str, tmp_path: Path) -> None:
    bucket, here = Bucket(f"{memory}/corpus", retry_s=QUICK.retry_s), tmp_path / "here"
    growing = Growing(bucket, here)
    growing.begin({})
    add_pages(here, range(3))
    growing.sync({})
    add_pages(here, range(3, 5))
    growing.sync({})
    for path in list(here.rglob("*.*")):  # the machine went down and took the end back; then it went another way
        path.unlink()
    add_pages(here, range(3))
    add_pages(here, range(10, 14))
    growing = Growing(bucket, here)
    growing.begin(segments_of(bucket.list()))
    growing.sync({})
    assert restored(bucket, tmp_path / "a") == files_of(here)
    # A segment that was damaged in the bucket ends what is put together; what follows is fetched again.
    damaged = max(n for n in bucket.list() if "journal" in n)
    bucket.put(damaged, b"x" * bucket.list()[damaged].bytes)
    journal = restored(bucket, tmp_path / "b")["fetch/00000.journal.jsonl"]
    assert files_of(here)["fetch/00000.journal.jsonl"].startswith(journal)
    assert journal.count(b"\n") == 3


def test_files_stored_whole_may_grow_on(memory: str, tmp_path: Path) -> None:
    bucket, here = Bucket(f"{memory}/corpus", retry_s=QUICK.retry_s), tmp_path / "here"
    add_pages(here, range(3))
    whole = {name: bucket.put(name, content).bytes for name, content in files_of(here).items()}
    add_pages(here, range(3, 5))
    growing = Growing(bucket, here)
    growing.begin({})
    growing.sync(whole)
    assert restored(bucket, tmp_path / "a") == files_of(here)
    for name, content in files_of(here).items():
        bucket.put(name, content)
        growing.drop(name)
    assert not segments_of(bucket.list())
