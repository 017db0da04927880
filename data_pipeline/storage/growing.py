"""What the fetch appends to, stored while it grows: a store cannot append, so each addition becomes a segment.

    fetch/00003.journal.jsonl → .growing/fetch/00003.journal.jsonl/000000000000-000000004711-0f3a…

A segment's name holds the bytes that it covers and the beginning of their sha256. Only what can never change again is
sent: of a journal its whole lines, of a WARC file the records that those lines speak of, and the records before the
lines. So whatever moment a machine is lost at, what is stored is a journal whose pages are all there. On another
machine the segments are put together again. When a shard is finished its files are stored whole and their segments go.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.records import KEPT
from data_pipeline.storage.bucket import Bucket, Stored
from data_pipeline.store import write_atomic

FOLDER = ".growing"
SEGMENT_BYTES = 64 << 20
"""Bytes of a segment at most; so much of a file is in memory at a time."""


@dataclass(frozen=True, order=True)
class Segment:
    """Bytes [start, stop) of a growing file, and the first 16 digits of their sha256."""

    start: int
    stop: int
    digest: str

    @property
    def name(self) -> str:
        return f"{self.start:012d}-{self.stop:012d}-{self.digest}"


def segments_of(stored: dict[str, Stored]) -> dict[str, list[Segment]]:
    """File → its segments, from a listing of the place."""
    found: dict[str, list[Segment]] = {}
    for name in stored:
        if name.startswith(f"{FOLDER}/"):
            file, _, segment = name.removeprefix(f"{FOLDER}/").rpartition("/")
            start, stop, digest = segment.split("-")
            found.setdefault(file, []).append(Segment(int(start), int(stop), digest))
    return {file: sorted(segments) for file, segments in found.items()}


class Growing:
    """The journals, audit logs and WARC files below `folder` that no finished shard has stored whole yet."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self.bucket = bucket
        self.folder = folder
        self._sent: dict[str, list[Segment]] = {}
        self._checked: set[str] = set()

    def restore(self, stored: dict[str, Stored], segments: dict[str, list[Segment]]) -> list[str]:
        """Put files together that are not stored whole, or have grown since; their names."""
        for file, parts in segments.items():
            with write_atomic(self.folder / file) as temporary:
                end = 0
                if file in stored:
                    self.bucket.get(file, temporary, stored[file])
                    end = stored[file].bytes
                with open(temporary, "ab") as f:
                    for part in parts:
                        if part.start == end:
                            content = self.bucket.read(f"{FOLDER}/{file}/{part.name}") or b""
                            if _digest(content) != part.digest or len(content) != part.stop - part.start:
                                break  # damaged: what follows is fetched again
                            f.write(content)
                            end = part.stop
        return list(segments)

    def begin(self, segments: dict[str, list[Segment]]) -> None:
        """What is stored at the start of a run; it is compared with what lies here before anything is added."""
        self._sent = dict(segments)
        self._checked.clear()

    def sync(self, whole: dict[str, int]) -> int:
        """Send what has been added since the last time; how many bytes. `whole`: file → bytes of it stored whole."""
        sent = 0
        for journal in sorted(self.folder.glob("fetch/[0-9]*.journal.jsonl")):
            name = journal.relative_to(self.folder).as_posix()
            end, ends = self._stable(journal)
            for warc, stop in sorted(ends.items()):
                sent += self._send(warc, stop, whole.get(warc, 0))
            sent += self._send(name, end, whole.get(name, 0))
            audit = name.replace(".journal.", ".audit.")
            if (self.folder / audit).exists():
                sent += self._send(audit, _end_of_lines(self.folder / audit), whole.get(audit, 0))
        return sent

    def _stable(self, journal: Path) -> tuple[int, dict[str, int]]:
        """(bytes of the journal's whole lines, WARC file → bytes that they speak of)."""
        number, end = journal.name.split(".")[0], 0
        ends: dict[str, int] = {}
        with open(journal, "rb") as f:
            for raw in f:
                if not raw.endswith(b"\n"):
                    break
                try:
                    line = json.loads(raw)
                except ValueError:
                    break
                end += len(raw)
                if line.get("state") == KEPT and "end" in line:
                    warc = f"warc/{number}-{line['part']:03d}.warc.gz"
                    ends[warc] = max(ends.get(warc, 0), line["end"])
        return end, ends

    def _send(self, file: str, stop: int, whole: int) -> int:
        """Store bytes of `file` up to `stop` that are not stored yet; how many."""
        path = self.folder / file
        if not path.exists():
            return 0
        sent = self._sent.setdefault(file, [])
        if file not in self._checked:
            self._drop_what_differs(file, sent, whole)
            self._checked.add(file)
        start = sent[-1].stop if sent else whole
        first = start
        with open(path, "rb") as f:
            f.seek(start)
            while start < stop:
                content = f.read(min(SEGMENT_BYTES, stop - start))
                if not content:
                    break
                segment = Segment(start, start + len(content), _digest(content))
                self.bucket.put(f"{FOLDER}/{file}/{segment.name}", content)
                sent.append(segment)
                start = segment.stop
        return start - first

    def _drop_what_differs(self, file: str, sent: list[Segment], whole: int) -> None:
        """Remove segments that are not what lies here: a machine that went down may have taken lines back."""
        end, keep = whole, []
        with open(self.folder / file, "rb") as f:
            for segment in sent:
                f.seek(segment.start)
                if segment.start != end or _digest(f.read(segment.stop - segment.start)) != segment.digest:
                    break
                keep.append(segment)
                end = segment.stop
        # The last first: what is left at any moment is a beginning.
        self.bucket.remove(f"{FOLDER}/{file}/{segment.name}" for segment in reversed(sent[len(keep) :]))
        sent[:] = keep

    def drop(self, file: str) -> None:
        """Remove the segments of a file that is stored whole now."""
        gone = self._sent.pop(file, [])
        self._checked.discard(file)
        self.bucket.remove(f"{FOLDER}/{file}/{segment.name}" for segment in reversed(gone))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _end_of_lines(path: Path) -> int:
    """Bytes up to the last whole line."""
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        while size:
            start = max(0, size - (1 << 16))
            f.seek(start)
            at = f.read(size - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            size = start
    return 0
