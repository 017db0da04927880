"""Whole files, markers that fit, the lock."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.records import LockedError, StorageError
from data_pipeline.store import (
    Hashes,
    Step,
    lock,
    mark_done,
    prune,
    remove_temporaries,
    storage_errors,
    why_not_done,
    write_atomic,
    write_table,
)


def make_step(folder: Path, **changes: object) -> Step:
    folder.mkdir(exist_ok=True)
    (folder.parent / "in.txt").exists() or (folder.parent / "in.txt").write_text("input")
    arguments = {
        "stage": "s",
        "name": "00000",
        "folder": folder,
        "settings": {"a": 1},
        "inputs": (folder.parent / "in.txt",),
        "outputs": (folder / "out.txt",),
    } | changes
    return Step(**arguments)  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    path.write_text("old")

    def tear() -> None:
        with write_atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        tear()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_is_named_with_exit_code_4(tmp_path: Path) -> None:
    def fill() -> None:
        with write_atomic(tmp_path / "f") as temporary:
            with open("/dev/full", "w") as full:
                full.write("x" * 10_000)
            temporary.touch()

    with pytest.raises(StorageError, match="No space left on device; earlier results are intact") as error:
        fill()
    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_disguised(tmp_path: Path) -> None:
    def wrong() -> None:
        with write_atomic(tmp_path / "f"):
            raise OSError(errno.ENOTDIR, "a bug")

    with pytest.raises(NotADirectoryError):
        wrong()


def test_a_table_always_has_the_same_bytes(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(30_000)), "b": ["x"] * 30_000})
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    write_table(table, tmp_path / "a")
    write_table(chunked, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_step_stands_until_something_changes(tmp_path: Path) -> None:
    step = make_step(tmp_path / "s")
    assert why_not_done(step, Hashes()) == ""
    (tmp_path / "s" / "out.txt").write_text("result")
    mark_done(step, {"rows": 1}, Hashes())
    assert why_not_done(step, Hashes()) is None

    assert why_not_done(make_step(tmp_path / "s", settings={"a": 2}), Hashes()) == "settings changed: a 1 → 2"
    assert "version 1" in str(why_not_done(make_step(tmp_path / "s", version=2), Hashes()))
    (tmp_path / "in.txt").write_text("other input")
    assert why_not_done(step, Hashes()) == "input changed: in.txt"
    (tmp_path / "in.txt").write_text("input")
    (tmp_path / "s" / "out.txt").write_text("resulT")
    assert "out.txt is damaged" in str(why_not_done(step, Hashes()))
    (tmp_path / "s" / "out.txt").unlink()
    assert why_not_done(step, Hashes()) == "s/out.txt is missing"


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe"])
def test_a_torn_marker_is_no_marker(tmp_path: Path, torn: bytes) -> None:
    step = make_step(tmp_path / "s")
    (tmp_path / "s" / "out.txt").write_text("result")
    mark_done(step, {}, Hashes())
    step.marker.write_bytes(torn)
    assert why_not_done(step, Hashes())


def test_outputs_that_only_the_work_knows_are_checked_too(tmp_path: Path) -> None:
    step = make_step(tmp_path / "s", outputs=())
    made = tmp_path / "s" / "00007.txt"
    made.write_text("x")
    mark_done(step, {}, Hashes(), [made])
    assert why_not_done(step, Hashes()) is None
    made.write_text("y")
    assert "00007.txt is damaged" in str(why_not_done(step, Hashes()))


def test_prune_takes_only_numbered_files_of_shards_that_are_no_more(tmp_path: Path) -> None:
    stay = ["00000.parquet", "00000.done.json", "all.done.json", "00001-000.warc.gz", "file_00001.parquet"]
    go = ["00001.done.json", "00001.parquet", "00012.signatures.parquet"]
    for name in (*stay, *go):
        (tmp_path / name).touch()
    assert sorted(p.name for p in prune(tmp_path, 1)) == go
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)
    assert not prune(tmp_path / "none", 1)


def hold(folder: Path, held: str) -> None:
    with lock(folder):
        Path(held).touch()
        time.sleep(60)


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    held = tmp_path / "held"
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "c", str(held)))
    process.start()
    assert process.pid
    deadline = time.monotonic() + 200
    while not held.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)

    def second() -> None:
        with lock(tmp_path / "c"):
            pass

    with pytest.raises(LockedError, match=f"in use by process {process.pid} on"):
        second()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    second()


def test_a_disk_that_is_full_at_the_very_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"\.lock: No space left on device"), lock(tmp_path):
        pass
    monkeypatch.undo()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_memory_that_a_file_cannot_be_mapped_into_is_the_machines() -> None:
    with pytest.raises(StorageError, match="Cannot allocate memory"), storage_errors(Path("tokens")):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_half_written_files_of_a_killed_run_go(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".00000.parquet.123.tmp").write_text("half")
    (tmp_path / "s" / "00000.parquet").write_text(json.dumps("whole"))
    remove_temporaries(tmp_path)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["00000.parquet"]
