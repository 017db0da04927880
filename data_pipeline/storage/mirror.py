"""The work folder and what a bucket has of it.

A finished step is sent as its files, then its marker; so whoever finds the marker finds what it speaks for, and the
marker's hashes prove it. What is not made by a step (the number of shards, settings, take-down lists) goes before, the
report and the ledger at the end, when also what is no more here is removed there.

At the start either this folder or the bucket knows more. The lease tells: when nobody held it since this folder did,
the folder stands and lacks at most what was lost; otherwise the folder becomes what is stored. `.stored.jsonl` in the
folder remembers what was the same on both sides, so that nothing is sent or brought twice.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import StorageConfig
from data_pipeline.records import PipelineError
from data_pipeline.storage.bucket import Bucket, Stored
from data_pipeline.storage.growing import Growing, segments_of
from data_pipeline.storage.lease import Lease
from data_pipeline.store import Step, read_marker, recorded_outputs, write_json

RECORD = ".stored.jsonl"
LEASE = ".lease.json"
LOOSE = ("shards.json", "config.yaml", "forget.json", "fetch/retry.json", "tokenize/forgotten.parquet")
"""What a run on another machine needs besides the steps."""
LAST = (".done.json", "manifest.json", "summary.json")
"""Files that speak for others, and go after them."""
STOP_RETRY_S = 5.0
"""A run that is stopped does not try for longer: whoever stopped it may not wait."""


@dataclass(frozen=True)
class Same:
    """A file that was the same here and there: the store's identity of it, and size and time of writing here."""

    identity: str
    bytes: int
    mtime_ns: int


class Mirror:
    """`folder` and `bucket`, under the folder's lock and the bucket's lease."""

    def __init__(self, bucket: Bucket, folder: Path, config: StorageConfig, say: Callable[[str], None]) -> None:
        self.bucket = bucket
        self.folder = folder
        self.config = config
        self._say = say
        self.sent_files = self.sent_bytes = 0
        self._same: dict[str, Same] = {}
        self._record_lock = threading.Lock()
        self._growing = Growing(bucket, folder)
        self._growing_lock = threading.Lock()
        self._loose_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(config.transfers, thread_name_prefix="store")
        self._under_way: list[Future[None]] = []
        self._end = threading.Event()
        self._watch: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._lease: Lease | None = None

    # ── from there ──────────────────────────────────────────────────────────────────────────────────────────────

    def pull(self, before: int) -> None:
        """Bring what this folder lacks. `before`: the last lease's number; LEASE in the folder says if it was ours."""
        self._read_record()
        ours = before == 0 or before == self._last_lease()
        stored = self.bucket.list()
        segments = segments_of(stored)
        files = {name: s for name, s in stored.items() if not _hidden(name)}
        for name, same in list(self._same.items()):
            if name not in files or files[name].identity != same.identity:
                self._note(name, None)  # removed or written there by somebody: if this folder stands, sent again
        wanted = []
        for name in files:
            if not (self.folder / name).exists() or (not ours and self._changed(name)):
                wanted.append(name)
        grown = {f: parts for f, parts in segments.items() if not ours or not (self.folder / f).exists()}
        wanted = [name for name in wanted if name not in grown]
        if wanted or grown:
            self._say(
                f"{self.bucket.address}: bringing {len(wanted) + len(grown):,} files, "
                f"{sum(files[name].bytes for name in wanted) / 1e6:,.1f} MB"
            )
        wanted.sort(key=lambda name: name.endswith(LAST))
        list(self._pool.map(lambda name: self._get(name, files[name]), wanted))
        self._growing.restore(files, grown)
        if not ours:
            known = {*files, *segments}
            for path in [p for p in _local_files(self.folder) if p.relative_to(self.folder).as_posix() not in known]:
                path.unlink()
        self._growing.begin(segments)

    def _last_lease(self) -> int | None:
        """The lease under which this folder was last the one that counts."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.folder / LEASE).read_text())
            if isinstance(found, dict) and found.get("address") == self.bucket.address:
                return int(found.get("number", 0))
        return None

    def _get(self, name: str, stored: Stored) -> None:
        self.bucket.get(name, self.folder / name, stored)
        self._note(name, stored)

    # ── to there ────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, lease: Lease) -> None:
        """From now on this folder is the one that counts; what the fetch adds is sent now and then."""
        self._lease = lease
        write_json({"number": lease.number, "address": self.bucket.address}, self.folder / LEASE)
        self._watch = threading.Thread(target=self._sync_now_and_then, daemon=True)
        self._watch.start()

    def send_step(self, step: Step, beside: Sequence[Path] = ()) -> None:
        """Send a step that was marked: what it needs `beside` its files, its files, its marker. Returns before that.

        Raises what an earlier sending came to, LockedError when another run has taken over.
        """
        self._check()
        marker = read_marker(step)
        if marker is None:
            return
        files = [self._name(p) for p in (*beside, *(step.outputs or recorded_outputs(step, marker)))]
        files = [name for name in dict.fromkeys(files) if self._changed(name)]
        if not files and not self._changed(self._name(step.marker)):
            return
        self._put_loose()
        while len(self._under_way) >= 4 * self.config.transfers:
            self._under_way.pop(0).exception()
        self._under_way = [f for f in self._under_way if not f.done()]
        # One thread a step keeps its order; the files of a step with many go by several.
        self._under_way.append(self._pool.submit(self._send_in_order, files, self._name(step.marker)))

    def _send_in_order(self, files: Sequence[str], marker: str) -> None:
        try:
            for name in files:
                self._put(name)
            self._put(marker)
            with self._growing_lock:
                for name in files:
                    if name.endswith((".jsonl", ".warc.gz")):
                        self._growing.drop(name)
        except BaseException as e:
            self._failed = self._failed or e
            raise

    def finish(self) -> None:
        """Send all that has changed, what speaks for others last; remove there what is no more here."""
        self._stop_watching()
        for future in self._under_way:
            future.exception()
        self._check()
        names = [self._name(path) for path in _local_files(self.folder)]
        for last in (False, True):
            changed = [n for n in names if n.endswith(LAST) is last and self._changed(n)]
            list(self._pool.map(self._put, changed))
        here = set(names)
        gone = [n for n in self.bucket.list() if n not in here and not n.startswith(".lease/")]
        self.bucket.remove(sorted(gone, key=lambda name: not name.endswith(LAST)))
        for name in gone:
            self._note(name, None)
        self._pool.shutdown()
        if self.sent_files or gone:
            removed = f", {len(gone):,} removed" if gone else ""
            sent = f"{self.sent_files:,} files sent, {self.sent_bytes / 1e6:,.1f} MB{removed}"
            self._say(f"{self.bucket.address}: {sent}")
        else:
            self._say(f"{self.bucket.address}: stored before, nothing to send")

    def stop(self) -> None:
        """An end before the end: what is on its way arrives, and what the fetch has added is sent."""
        self.bucket.retry_s = min(self.bucket.retry_s, STOP_RETRY_S)
        for future in self._under_way:
            future.cancel()
        self._stop_watching()
        if self._failed is None and not (self._lease and self._lease.lost):
            with contextlib.suppress(PipelineError, OSError):
                self._put_loose()
                self._sync()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _sync_now_and_then(self) -> None:
        try:
            while not self._end.wait(self.config.sync_every_s):
                self._sync()
        except BaseException as e:
            self._failed = self._failed or e

    def _sync(self) -> None:
        with self._growing_lock:
            if any(self.folder.glob("fetch/[0-9]*.journal.jsonl")):
                self._put_loose()  # without the number of shards a journal is of no use
                self.sent_bytes += self._growing.sync(self._whole())

    def _put_loose(self) -> None:
        with self._loose_lock:
            for name in LOOSE:
                if self._changed(name):
                    self._put(name)

    def _whole(self) -> dict[str, int]:
        with self._record_lock:
            return {name: same.bytes for name, same in self._same.items()}

    def _stop_watching(self) -> None:
        self._end.set()
        if self._watch is not None:
            self._watch.join()

    def _check(self) -> None:
        if self._lease is not None:
            self._lease.require()
        if self._failed is not None:
            raise self._failed

    def _put(self, name: str) -> None:
        if self._lease is not None and self._lease.lost:
            return
        path = self.folder / name
        while True:
            try:
                before = path.stat()
                stored = self.bucket.put(name, path)
                after = path.stat()
            except FileNotFoundError:
                return  # a part that was joined meanwhile
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                break  # else it was written anew while it was read
        self._note(name, stored, before.st_mtime_ns)
        with self._record_lock:
            self.sent_files += 1
            self.sent_bytes += stored.bytes

    # ── the same on both sides ──────────────────────────────────────────────────────────────────────────────────

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _changed(self, name: str) -> bool:
        """Whether a file lies here that was not the same on both sides when it was last looked at."""
        try:
            stat = (self.folder / name).stat()
        except FileNotFoundError:
            return False
        same = self._same.get(name)
        return same is None or (same.bytes, same.mtime_ns) != (stat.st_size, stat.st_mtime_ns)

    def _note(self, name: str, stored: Stored | None, mtime_ns: int | None = None) -> None:
        with self._record_lock:
            if stored is None:
                self._same.pop(name, None)
                line: list[object] = [name, None]
            else:
                mtime_ns = (self.folder / name).stat().st_mtime_ns if mtime_ns is None else mtime_ns
                self._same[name] = Same(stored.identity, stored.bytes, mtime_ns)
                line = [name, [stored.identity, stored.bytes, mtime_ns]]
            with open(self.folder / RECORD, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def _read_record(self) -> None:
        """Torn lines are left out: a file more is compared, that is all."""
        path = self.folder / RECORD
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError):
                name, same = json.loads(line)
                if same is None:
                    self._same.pop(name, None)
                else:
                    self._same[name] = Same(*same)


def _hidden(name: str) -> bool:
    """Whether a file is the run's own and no part of a corpus: locks, halves, records."""
    return any(part.startswith(".") for part in name.split("/"))


def _local_files(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder).as_posix()))
