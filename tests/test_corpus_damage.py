"""A disk that is full, fails or forgets: the code and the remedy, earlier results intact, and in the end every byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from corpora import PROSE, files_of, write_texts
from full_disk import config_of
from inline import inline, work_inline  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.config import CorpusConfig, Source
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import CorruptionError, StorageError

pytestmark = pytest.mark.usefixtures("inline")
OWN_MOUNTS = ("unshare", "--mount", "--map-root-user")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", PROSE[:6])


@pytest.fixture(scope="module")
def one_go(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that was made in one go."""
    out = tmp_path_factory.mktemp("one_go") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        work_inline(patch)
        build_corpus(config_of(texts, out))
    return out


@cache
def own_mounts_fail() -> str:
    if not shutil.which("unshare"):
        return "unshare is needed for a mount of its own"
    tried = subprocess.run(
        [*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip()


@pytest.mark.slow
def test_a_disk_that_is_full_at_one_write_after_another(texts: Path, one_go: Path, tmp_path: Path) -> None:
    if why := own_mounts_fail():
        pytest.skip(f"no mount namespace here: {why}")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=8k none "$1" && shift && exec "$@"'
    command = [sys.executable, str(Path(__file__).with_name("full_disk.py")), str(texts), str(one_go), str(disk)]
    result = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", script, "sh", str(disk), *command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    (answer,) = [line for line in result.stdout.split("\n") if line.startswith("SAID ")] or [result.stderr[-3000:]]
    said = json.loads(answer.removeprefix("SAID "))
    assert len(said["runs"]) >= 8
    for run in said["runs"]:
        assert (run["kind"], run["code"]) == ("StorageError", 4), run
        assert "No space left on device; earlier results are intact" in run["says"]
        assert run["left"] == []  # halves go, so that their room is free
    steps = [run["steps"] for run in said["runs"]]
    assert steps == sorted(steps)  # nothing that was finished is lost
    assert len({run["says"] for run in said["runs"]}) >= 6  # at different files
    assert said["differ"] == []


def stopped_at(build: Callable[[], object], places: set[str]) -> None:
    """Build; note the file at which a failing disk stops it."""
    with pytest.raises(StorageError, match="Input/output error; earlier results are intact") as error:
        build()
    assert error.value.exit_code == 4
    places.add(str(error.value).split(":")[0])


@pytest.mark.slow
def test_an_error_of_the_disk_at_one_write_after_another(
    texts: Path, one_go: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync is where a disk that failed to write says so; a rename is where a folder's block cannot be written."""
    calls, fail_at = 0, -1

    def failing(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        failing(name)
    build_corpus(config_of(texts, tmp_path / "count"))
    whole, rng, places = calls, random.Random(5), set()
    assert whole > 150
    out = tmp_path / "failing"
    for n in range(8):  # spread over all calls of a whole run; every second stop is of a run that had been stopped
        if n % 2 == 0:
            shutil.rmtree(out, ignore_errors=True)
            calls, fail_at = 0, rng.randrange(n * whole // 8, (n + 1) * whole // 8) + 1
        else:
            calls, fail_at = 0, rng.randrange(1, 12)
        stopped_at(lambda: build_corpus(config_of(texts, out)), places)
        assert not list(out.rglob(".*.tmp"))
    fail_at = -1
    build_corpus(config_of(texts, out))
    assert len(places) >= 4
    assert files_of(out) == files_of(one_go)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", "cut", "flipped", "empty"])
def test_whatever_file_is_damaged_all_bytes_come_back(
    texts: Path, one_go: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every file of a corpus, a third of them at a time."""
    out, rng = tmp_path / "corpus", random.Random(kind)
    shutil.copytree(one_go, out)
    expected = files_of(one_go)
    names = [name for name in expected if name not in ("README.md", "report.html", "summary.json")]
    rng.shuffle(names)
    for third in range(3):
        damaged = names[third::3]
        for name in damaged:
            path, content = out / name, bytearray(expected[name])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.unlink()
            if kind == "flipped":
                path.write_bytes(content)
            elif kind != "missing":
                path.write_bytes(b"" if kind == "empty" else content[: len(content) // 2])
        capfd.readouterr()
        build_corpus(config_of(texts, out))
        said = capfd.readouterr().err
        assert " again" in said
        assert files_of(out) == expected


def test_the_number_of_shards_is_found_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another number would deal all URLs out anew, and fetch them anew."""
    (tmp_path / "urls.txt").write_text("".join(f"https://site{i}.example.com/{i}\n" for i in range(20)))
    config = CorpusConfig(
        source=Source.urls, urls=str(tmp_path / "urls.txt"), out=str(tmp_path / "out"), shards=3, stages=["urls"]
    )
    config.progress = False
    build_corpus(config)
    file, config.shards = tmp_path / "out" / "shards.json", 0
    whole = file.read_bytes()
    for damage in (b"", b"{", b"[]", None):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        build_corpus(config)
        assert file.read_bytes() == whole
    marker = tmp_path / "out" / "urls" / "all.done.json"
    file.write_bytes(whole.replace(b": 3", b": 2"))  # one bit
    build_corpus(config)
    assert file.read_bytes() == whole
    assert "finished before" in capfd.readouterr().err
    file.write_text('{"shards": 2}')  # by a version that kept no hash
    build_corpus(config)
    assert file.read_bytes() == whole
    assert "shards.json: said 2, the markers know 3: mended" in capfd.readouterr().err
    marker.write_bytes(marker.read_bytes().replace(b'"shards": 3', b'"shards": 2'))
    build_corpus(config)
    assert "its marker is torn" in capfd.readouterr().err
    marker.unlink()
    file.write_text('{"shards": 3}')
    build_corpus(config)
    assert file.read_bytes() == whole
    marker.unlink()
    file.write_bytes(whole.replace(b": 3", b": 2"))
    with pytest.raises(CorruptionError, match=r"shards\.json: is damaged \(its sha256 does not fit\); restore it"):
        build_corpus(config)
    file.write_bytes(b"{")
    with pytest.raises(CorruptionError, match=r"shards\.json: is damaged .*restore it from a copy"):
        build_corpus(config)
