"""What the fetch of one shard has decided so far, on disk so that `kill -9` at any moment loses nothing that was done.

    response → WARC record → journal line         (one write each; the line holds where the record ends)
    now and then: sync the WARC, write a mark into the journal, sync the journal

After a crash a torn last line is cut, lines whose WARC record is not whole are taken back (only lines behind the last
mark can be that, and only after the machine itself went down), and the WARC is cut where the last good record ends.
What is journaled is never fetched again; what was under way is. A line is known by its URL, not by its place in the
list: when the list changes, what both lists hold is not fetched a second time. A line of `retry` opens URLs again:
their earlier lines stay, and the newest decision of a URL is the one that counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_pipeline.crawl.warc import Exchange, WarcError, WarcWriter, is_whole, read_response
from data_pipeline.records import KEPT
from data_pipeline.store import lock, raise_storage_error, storage_errors, write_atomic

log = logging.getLogger(__name__)


def warc_path(corpus: Path, number: int, part: int) -> Path:
    return corpus / warc_name(number, part)


def warc_name(number: int, part: int) -> str:
    """Relative to the corpus folder."""
    return f"warc/{number:05d}-{part:03d}.warc.gz"


def journal_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.journal.jsonl"


def audit_path(folder: Path, number: int) -> Path:
    """One line for each request: when, to what, how long it waited, and which rule let it through."""
    return folder / f"{number:05d}.audit.jsonl"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The decisions in the order they were made; a torn last line does not count. Empty when there is no journal."""
    return [line for line in _lines(path)[0] if "state" in line]


def newest_decisions(path: Path) -> dict[str, dict[str, Any]]:
    """URL → its decision; one that was opened again has none until it is decided anew."""
    return _newest(_lines(path)[0])


def decisions_and_tries(path: Path) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """(URL → its decision, as in `newest_decisions`; URL → how often it was decided)."""
    lines = _lines(path)[0]
    return _newest(lines), Counter(line["url"] for line in lines if "state" in line)


def _newest(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    newest: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "state" in line:
            newest[line["url"]] = line
        else:
            for url in line.get("reopened", ()):
                newest.pop(url, None)
    return newest


def rounds_of(path: Path) -> set[int]:
    """The rounds of `retry` that this journal has taken part in."""
    return {line["round"] for line in _lines(path)[0] if "reopened" in line}


def reopen(path: Path, number: int, urls: list[str]) -> None:
    """Take the decisions on `urls` back, in round `number`: one line, synced."""
    journal = AppendOnly(path, _lines(path)[1])
    try:
        journal.write({"round": number, "reopened": urls})
        _sync_and_close([journal.duplicate()], path)
    finally:
        journal.close()


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(whole lines, the byte at which the last of them ends)."""
    if not path.exists():
        return [], 0
    lines: list[dict[str, Any]] = []
    end = 0
    with open(path, "rb") as f:
        for raw in f:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break  # what stands behind a torn line was never synced, so it is not relied on
            lines.append(line)
            end += len(raw)
    return lines, end


_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def _encoded(line: dict[str, Any]) -> bytes:
    return _encode(line).encode("utf-8", "replace") + b"\n"


# A cluster may take a node for dead that only lost touch with it, and hand its shards to another while the first still
# writes: what appends to a file needs its own lock. Until the first one notices, the other waits this long.
LOCK_WAIT_S = 120.0


class AppendOnly:
    """A file of JSON lines, each in one write, so that a killed process tears at most the last one."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o644)
            os.ftruncate(self._file, keep_bytes)

    def write(self, line: dict[str, Any]) -> None:
        data = _encoded(line)
        try:
            written = os.write(self._file, data)
            if written != len(data):  # no room: the torn line is cut at the next start
                os.write(self._file, data[written:])
        except OSError as e:
            raise_storage_error(e, self.path)

    def duplicate(self) -> int:
        return os.dup(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ShardLog:
    """Journal, WARC files and audit log of one shard, opened where an earlier process left them."""

    def __init__(self, folder: Path, number: int, corpus: Path, max_warc_bytes: int) -> None:
        self.folder, self.number, self.corpus, self.max_warc_bytes = folder, number, corpus, max_warc_bytes
        self._own = ExitStack()
        self._own.enter_context(lock(folder, f".{number:05d}.lock", LOCK_WAIT_S))
        path = journal_path(folder, number)
        lines, end = _lines(path)
        good = self._whole(lines)
        self._decisions = sum("state" in line for line in good)
        lost = sum("state" in line for line in lines) - self._decisions
        if lost:
            log.warning("%s: %d pages are not whole in their WARC file and are fetched again", path, lost)
            good = [line for line in good if "mark" not in line]
            with write_atomic(path) as temporary:
                temporary.write_bytes(b"".join(_encoded(line) for line in [*good, {"mark": self._decisions}]))
            end = path.stat().st_size
        self.done = set(_newest(good))
        kept = [line for line in good if line.get("state") == KEPT]
        self.part: int = kept[-1]["part"] if kept else 0
        self._offset: int = kept[-1]["end"] if kept else 0
        self._remove_later_parts()
        self._journal = AppendOnly(path, end)
        audit = audit_path(folder, number)
        self.audit = AppendOnly(audit, _lines(audit)[1])
        self._writer: WarcWriter | None = None
        self._dirty = self.closed = False

    def _whole(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines that hold: a WARC record missing at one place takes all kept lines after it back."""
        marked = max((line["mark"] for line in lines if "mark" in line), default=0)  # so many decisions are safe
        good: list[dict[str, Any]] = []
        sizes: dict[int, int] = {}
        decisions = 0
        torn = False
        for line in lines:
            decisions += "state" in line
            if line.get("state") == KEPT:
                part = line["part"]
                if part not in sizes:
                    file = warc_path(self.corpus, self.number, part)
                    sizes[part] = file.stat().st_size if file.exists() else -1
                torn = torn or line["end"] > sizes[part] or (decisions > marked and not self._readable(line))
                if torn:
                    continue
            good.append(line)
        return good

    def _readable(self, line: dict[str, Any]) -> bool:
        file = warc_path(self.corpus, self.number, line["part"])
        try:
            kind = "revisit" if "unchanged" in line else "response"
            if not is_whole(file, line["offset"], line["end"], kind):
                return False
            if kind == "revisit":
                return True
            body = read_response(file, line["offset"], max_bytes=1 << 30).body
        except (WarcError, OSError):
            return False
        return hashlib.sha256(body).hexdigest() == line["digest"]

    def _remove_later_parts(self) -> None:
        """WARC files that no line of the journal speaks of."""
        for file in sorted((self.corpus / "warc").glob(f"{self.number:05d}-*.warc.gz")):
            if int(file.name[6:-8]) > self.part:
                file.unlink()

    def add(self, line: dict[str, Any], exchange: Exchange | None = None) -> None:
        """Journal one decision, its page first. A kept line is given `part`, `offset`, `end` and `digest`."""
        if exchange is not None:
            digest = hashlib.sha256(exchange.body)
            offset, end = self._warc().write(exchange, digest.digest())
            line = {**line, "part": self.part, "offset": offset, "end": end, "digest": digest.hexdigest()}
        assert line["url"] not in self.done, f"{line['url']} was decided twice"
        self._journal.write(line)
        self.done.add(line["url"])
        self._decisions += 1
        self._dirty = True

    def _warc(self) -> WarcWriter:
        if self._writer is not None and self._writer.offset >= self.max_warc_bytes:
            self._writer.sync()
            self._writer.close()
            self._writer = None
            self.part, self._offset = self.part + 1, 0
        if self._writer is None:
            self._writer = WarcWriter(warc_path(self.corpus, self.number, self.part), self._offset)
        return self._writer

    async def sync(self) -> None:
        """Make everything so far survive a power cut, while the event loop goes on."""
        if not self._dirty:
            return
        decisions, files = self._begin_sync()
        await asyncio.get_running_loop().run_in_executor(None, _sync_and_close, files, self.folder)
        if not self.closed:
            self._journal.write({"mark": decisions})

    def _begin_sync(self) -> tuple[int, list[int]]:
        """(decisions so far, descriptors of what holds them: pages first, then the lines that speak of them)."""
        self._dirty = False
        files = [self._journal.duplicate(), self.audit.duplicate()]
        return self._decisions, [self._writer.duplicate(), *files] if self._writer is not None else files

    def close(self) -> None:
        if self.closed:
            return
        if self._dirty:
            decisions, files = self._begin_sync()
            _sync_and_close(files, self.folder)
            self._journal.write({"mark": decisions})
        self.closed = True
        for file in (self._writer, self._journal, self.audit):
            if file is not None:
                file.close()
        self._own.close()


def _sync_and_close(files: list[int], folder: Path) -> None:
    try:
        with storage_errors(folder):
            for file in files:
                os.fsync(file)
    finally:
        for file in files:
            os.close(file)
