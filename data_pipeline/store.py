"""Files that are whole or absent: atomic writes, hashes, the marker of a finished step, the lock of a corpus folder.

A step (one shard of one stage) is finished when its marker says so, and the marker is believed only while it fits:
the same version and settings, the same input bytes, and outputs whose sha256 is still what was written. Anything else
is named and done again. "A file exists" proves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.layout import Corpus
from data_pipeline.records import CorruptionError, InputError, LockedError, StorageError

# Errors of the machine, not of the program: the run ends with StorageError and goes on once they are mended.
_MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    errno.ENOMEM,  # of a file to be mapped
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that the machine causes at `path` into a StorageError with a remedy."""
    try:
        yield
    except OSError as e:
        raise_storage_error(e, path)


def raise_storage_error(error: OSError, path: Path) -> NoReturn:
    """`storage_errors` for a place that is passed a million times, where a context costs more than the work."""
    if error.errno not in _MACHINE_ERRORS:
        raise error
    raise StorageError(
        f"{path}: {os.strerror(error.errno or 0)}; earlier results are intact, run the same command again once mended"
    ) from error


@contextmanager
def corruption_errors(path: Path) -> Iterator[None]:
    """Turn what Arrow says of the damaged result `path` into a CorruptionError with the remedy."""
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # the machine's, not Arrow's
            raise
        raise CorruptionError(f"{path}: is damaged; run `gpt2train corpus` again, which makes it anew") from e


@contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed, on failure removed."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other machines may write here, too
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    sync_file(folder)


def write_table(table: pa.Table, path: Path) -> None:
    """A Parquet file whose bytes depend on the table's content alone."""
    with write_atomic(path) as temporary:
        pq.write_table(table.combine_chunks(), temporary, compression="zstd", row_group_size=10_000)


def write_json(value: object, path: Path) -> None:
    with write_atomic(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises CorruptionError with `remedy` for anything else, FileNotFoundError for none."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as e:
        raise CorruptionError(f"{path}: is damaged ({e}); {remedy}") from None
    if not isinstance(found, dict):
        raise CorruptionError(f"{path}: is damaged (no JSON object); {remedy}")
    return found


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(f)


def _sha256(f: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed run left half-written. Only under the lock."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
    """Own `folder` until the block ends; the kernel frees the lock of a dead process.

    With another `name`, own a part of it. Raises LockedError when after `wait_s` seconds another process still has it.
    """
    path = folder / name
    deadline = time.monotonic() + wait_s
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        f = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held open for the whole run)
    try:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # the second is how a network file system may say it
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
            f.seek(0)
            owner = f.read().strip() or "another process, maybe one that reads it for dedup.against"
            raise LockedError(f"out={folder}: in use by {owner}; wait for it, or give another folder")
        with storage_errors(path):  # not through `f`, which would try again what it could not write when it is closed
            os.ftruncate(f.fileno(), 0)
            os.pwrite(f.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # who has the folder next may be one that reads it, and writes no name
                os.ftruncate(f.fileno(), 0)
    finally:
        f.close()


@contextmanager
def lock_shared(folder: Path) -> Iterator[None]:
    """Read `folder` until the block ends: others may, too, but none may own it. Nothing is written there.

    Raises LockedError when a process owns it. A folder that was never owned here, or whose lock may not be opened, is
    read without one.
    """
    path = folder / ".lock"
    try:
        f = open(path, encoding="utf-8")  # noqa: SIM115 (held open until the block ends)
    except (FileNotFoundError, PermissionError):
        yield
        return
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise LockedError(f"in use by {f.read().strip() or 'another process'}; wait for it") from None
        yield


@dataclass(frozen=True)
class Step:
    """One unit of work whose result is files: a shard of a stage, or a stage's global part."""

    stage: str
    name: str
    folder: Path
    settings: Mapping[str, Any]
    """JSON values that decide the result, besides the inputs."""
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    """Empty when only the work tells how many there are; then the marker lists them."""
    version: int = 1
    """Raised when the code changes what it makes of the same input."""

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.name}.done.json"


@dataclass
class Hashes:
    """sha256 of files, computed once per size and modification time within this process."""

    known: dict[Path, tuple[int, int, str]] = field(default_factory=dict)

    def of(self, path: Path) -> str | None:
        """None when there is no such file."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        cached = self.known.get(path)
        if cached and cached[:2] == (stat.st_size, stat.st_mtime_ns):
            return cached[2]
        digest = sha256_file(path)
        self.known[path] = (stat.st_size, stat.st_mtime_ns, digest)
        return digest


def read_marker(step: Step) -> dict[str, Any] | None:
    """The step's marker; None when there is none, or it is not what was written."""
    return read_signed(step.marker)


def read_signed(path: Path) -> dict[str, Any] | None:
    """What `write_signed` wrote to `path`; None when there is no such file, or it is not what was written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    return found if found.pop("sha256", None) == _sha256_of(found) else None


def write_signed(value: Mapping[str, Any], path: Path) -> None:
    """A JSON object with its own sha256: its numbers are used, and nothing else would tell a flipped digit."""
    write_json({**value, "sha256": _sha256_of(value)}, path)


def _sha256_of(value: Mapping[str, Any]) -> str:
    """sha256 hex of `value` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def why_not_done(step: Step, hashes: Hashes) -> str | None:
    """None when the step's result stands; otherwise why it has to be made: "" if it never was, or what changed."""
    marker = read_marker(step)
    if marker is None:
        return "its marker is torn" if step.marker.exists() else ""
    if changed := _what_changed(step, marker, hashes):
        return changed
    written = marker.get("outputs", {})
    defects = []
    for name, got in _hashes_of(step.outputs or recorded_outputs(step, marker), step, hashes).items():
        if got is None:
            defects.append(f"{name} is missing")
        elif got != written.get(name):
            defects.append(f"{name} is damaged (sha256 {got[:12]}…, written as {str(written.get(name))[:12]}…)")
    return "; ".join(defects) or None


def _what_changed(step: Step, marker: Mapping[str, Any], hashes: Hashes) -> str:
    """Version, settings or inputs that are others than those of the marker; empty: the same result would be made."""
    if marker.get("version") != step.version:
        return f"made by version {marker.get('version')} of this stage, now {step.version}"
    before, now = marker.get("settings", {}), json.loads(json.dumps(dict(step.settings)))
    if before != now:
        changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        return "settings changed: " + ", ".join(f"{k} {before.get(k)} → {now.get(k)}" for k in changed)
    inputs = _hashes_of(step.inputs, step, hashes)
    if marker.get("inputs") != inputs:
        old = marker.get("inputs", {})
        changed = [k for k in sorted({*old, *inputs}) if old.get(k) != inputs.get(k)]
        return f"input changed: {', '.join(changed[:3])}{' …' if len(changed) > 3 else ''}"
    if others := archives_changed(step, marker, hashes):
        return f"archive changed: {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"
    return ""


def describe_archive(path: Path) -> dict[str, Any]:
    """What tells a WARC file from another: {"bytes", "mtime_ns", "sha256"}. Raises InputError if it changes meanwhile.

    sha256 of the whole: whoever asks has just read it, so it comes from memory and costs a tenth of indexing it.
    """
    before = path.stat()
    digest = sha256_file(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise changed_while_read(path)
    return {"bytes": after.st_size, "mtime_ns": after.st_mtime_ns, "sha256": digest}


def archives_changed(step: Step, marker: Mapping[str, Any], hashes: Hashes) -> list[str]:
    """Those of the marker's `archives` that hold something else now.

    Size and time of writing are enough while they are the same, so that terabytes are not read at every start; one that
    was only touched is read once (`renew`). One that is not there has not changed: what was made of it stands.
    """
    changed = []
    for name, seen in marker.get("archives", {}).items():
        path, now = look_at_archive(step, name)
        if now is None or now == (seen["bytes"], seen["mtime_ns"]):
            continue
        if now[0] != seen["bytes"] or hashes.of(path) != seen["sha256"]:
            changed.append(name)
    return changed


def renew(step: Step) -> None:
    """Write the marker of a step that stands with the times at which its archives were touched since."""
    marker = read_marker(step)
    if marker is None or not marker.get("archives"):
        return
    times = {name: now[1] for name in marker["archives"] if (now := look_at_archive(step, name)[1])}
    archives = {n: {**seen, "mtime_ns": times.get(n, seen["mtime_ns"])} for n, seen in marker["archives"].items()}
    if archives != marker["archives"]:
        write_signed({**marker, "archives": archives}, step.marker)


def look_at_archive(step: Step, name: str) -> tuple[Path, tuple[int, int] | None]:
    """Where an archive lies, its bytes and time of writing; None: it is not there."""
    path = Path(name)
    try:
        path = Corpus(step.folder.parent).archive(name)
        stat = path.stat()
    except FileNotFoundError:
        return path, None
    return path, (stat.st_size, stat.st_mtime_ns)


def would_be_the_same(step: Step, hashes: Hashes) -> bool:
    """Whether the step was done before with these settings and inputs, whatever became of its outputs since."""
    marker = read_marker(step)
    return marker is not None and not _what_changed(step, marker, hashes)


def standing_outputs(folders: Sequence[Path], hashes: Hashes) -> set[str]:
    """Names (below the corpus folder) of the outputs of those steps in `folders` that were made of what is there now.

    That is told by the markers alone, whatever the settings of this run: a step's inputs in the corpus have to be the
    bytes that it was made of, and themselves to stand. The outputs are not read.
    """
    markers = [m for folder in folders for path in sorted(folder.glob("*.done.json")) if (m := read_signed(path))]
    makers = {name: i for i, marker in enumerate(markers) for name in marker.get("outputs", {})}
    known: dict[int, bool] = {}

    def stands(i: int) -> bool:
        if i not in known:
            known[i] = False  # no step is made of its own outputs
            inputs = {n: d for n, d in markers[i].get("inputs", {}).items() if not re.match(r"\d+:", n)}
            corpus = folders[0].parent
            known[i] = all(hashes.of(corpus / name) == digest for name, digest in inputs.items()) and all(
                stands(makers[name]) for name in inputs if name in makers
            )
        return known[i]

    return {name for name, i in makers.items() if stands(i)}


def stands_but_for(step: Step, setting: str, hashes: Hashes) -> bool:
    """Whether the step's result stands in all but that `setting` is another one now."""
    marker = read_marker(step)
    if marker is None:
        return False
    before = {name: value for name, value in step.settings.items() if name != setting}
    if setting in marker.get("settings", {}):
        before[setting] = marker["settings"][setting]
    return why_not_done(replace(step, settings=before), hashes) is None


def recorded_outputs(step: Step, marker: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files that a marker speaks for."""
    return tuple(step.folder.parent / name for name in marker.get("outputs", {}))


def input_hashes(step: Step, hashes: Hashes) -> dict[str, str | None]:
    """What the step is made of now, as its marker will say it: to be taken before the work, for `mark_done`."""
    return _hashes_of(step.inputs, step, hashes)


def mark_done(
    step: Step,
    counts: Mapping[str, Any],
    hashes: Hashes,
    outputs: Sequence[Path] = (),
    before: Mapping[str, str | None] | None = None,
) -> None:
    """Write the marker, last of all: `counts` is what the step says of its rows, `before` its inputs before the work.

    `archives` among the counts: WARC files that the result depends on, by the names that pages give them, each as
    `describe_archive` saw it; the step is due again when one of them is another file.

    Raises StorageError when a file that was written, maybe by another machine, is not seen here; InputError when an
    input changed while it was read, as nobody knows what the outputs are made of. That costs a look at its size and
    time of writing; it is read again only where these changed.
    """
    inputs = input_hashes(step, hashes)
    if before is not None and inputs != before:
        names = _names(step.inputs, step)
        raise changed_while_read(next(p for n, p in zip(names, step.inputs, strict=True) if before.get(n) != inputs[n]))
    written = _hashes_of(step.outputs or outputs, step, hashes)
    unseen = [name for name, digest in written.items() if digest is None]
    if unseen:
        raise StorageError(
            f"{step.folder.parent / unseen[0]}: written, but not to be seen; on NFS, mount with lookupcache=positive, "
            "then run the same command again"
        )
    marker = {
        "stage": step.stage,
        "version": step.version,
        "settings": dict(step.settings),
        "inputs": inputs,
        "outputs": written,
        "counts": {name: count for name, count in counts.items() if name != "archives"},
    }
    if "archives" in counts:
        marker["archives"] = counts["archives"]
    write_signed(marker, step.marker)


def prune(folder: Path, shards: int) -> list[Path]:
    """Remove the numbered files of `folder` whose shard is none of `shards` (a run with more shards left them)."""
    gone = [p for p in folder.glob("[0-9][0-9][0-9][0-9][0-9]*.*") if _shard_of(p) >= shards and p.is_file()]
    for path in gone:
        path.unlink()
    return gone


def _shard_of(path: Path) -> int:
    """The shard whose number a file's name begins with; -1 for a name that only looks like it."""
    number = path.name.split(".")[0]
    return int(number) if number.isdecimal() else -1


def changed_while_read(path: Path) -> InputError:
    return InputError(f"{path}: changed while it was read; leave it as it is and run the same command again")


def _hashes_of(paths: Sequence[Path], step: Step, hashes: Hashes) -> dict[str, str | None]:
    """sha256 by `_names`."""
    return {name: hashes.of(path) for name, path in zip(_names(paths, step), paths, strict=True)}


def _names(paths: Sequence[Path], step: Step) -> list[str]:
    """Names that stay when the corpus is moved: below its folder the path, else number and file name."""
    corpus = step.folder.parent
    return [
        path.relative_to(corpus).as_posix() if path.is_relative_to(corpus) else f"{i}:{path.name}"
        for i, path in enumerate(paths)
    ]
