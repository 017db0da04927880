"""A corpus in a bucket: a real S3 server over loopback, killed runs, failing requests, two machines, one lease."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from buckets import QUICK, config_fixture, memory_fixture, same, stored  # noqa: F401 (fixtures)
from corpora import files_of
from inline import inline  # noqa: F401 (a fixture)

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'gpt2train[s3]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors")

import s3
from s3 import ENVIRONMENT, SECRET, Door

from data_pipeline.config import CorpusConfig, TokenizeConfig
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import InputError, LockedError, StorageError
from data_pipeline.storage.bucket import Bucket
from data_pipeline.storage.growing import segments_of
from data_pipeline.storage.lease import Lease

PATIENCE_S = 280
"""A busy machine may take minutes for what takes it seconds."""


@pytest.fixture(scope="module")
def behind() -> Iterator[str]:
    with s3.server() as address:
        yield address


@pytest.fixture
def door(behind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """An S3 endpoint that the environment names, with credentials."""
    import s3fs

    door = Door(behind)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": door.url}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield door
    s3fs.S3FileSystem.clear_instance_cache()
    door.shutdown()
    door.server_close()


@pytest.fixture
def bucket(door: Door, request: pytest.FixtureRequest) -> str:
    """s3://NAME of an empty bucket."""
    import s3fs

    name = f"b{abs(hash(request.node.nodeid)):x}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.mark.usefixtures("inline")
def test_a_corpus_in_a_bucket_is_the_local_one_byte_for_byte(
    config: CorpusConfig, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_corpus(config)
    remote = replace(config, out=f"{bucket}/deep/corpus", work=str(tmp_path / "work"))
    build_corpus(remote)
    local = files_of(Path(config.out))
    assert len(local) > 40
    assert same(local, stored(remote.out)) == []
    assert "out: s3://" in stored(remote.out)["config.yaml"].decode()
    said = capfd.readouterr().err
    assert "files sent" in said
    build_corpus(remote)  # nothing is done, made or sent again but what every run writes anew
    assert same(local, stored(remote.out)) == []
    changed = replace(remote, tokenize=TokenizeConfig(validation_fraction=0.2))  # fewer files of tokens
    build_corpus(changed)
    assert "removed" in capfd.readouterr().err
    assert {n for n in stored(remote.out) if n.startswith("tokens/train")} == {
        "tokens/train_00000.bin",
        "tokens/train_00000.idx",
    }
    # Another machine, which has nothing of it: all is brought, nothing is done again.
    build_corpus(replace(changed, work=str(tmp_path / "elsewhere")))
    again = capfd.readouterr().err
    assert "bringing" in again
    assert " again" not in again
    assert again.count("nothing to do") >= 4


@pytest.mark.usefixtures("inline")
def test_what_failed_on_its_way_is_sent_and_brought_again(
    config: CorpusConfig, door: Door, bucket: str, tmp_path: Path
) -> None:
    build_corpus(config)
    remote = replace(config, out=f"{bucket}/corpus", work=str(tmp_path / "work"))

    def judge(method: str, path: str, before: int) -> str:
        if before or not path.split("?")[0].endswith((".parquet", ".bin", ".json")):
            return ""
        kinds = {"PUT": ("500", "reset", "lost"), "GET": ("500", "reset", "cut")}.get(method, ("500",))
        return kinds[sum(path.encode()) % 3 % len(kinds)]

    door.judge = judge
    build_corpus(remote)
    build_corpus(replace(remote, work=str(tmp_path / "elsewhere")))
    door.judge = lambda *_: ""
    assert all(door.done[fault] >= 5 for fault in ("500", "reset", "lost", "cut")), door.done
    assert same(files_of(Path(config.out)), stored(remote.out)) == []
    (elsewhere,) = (tmp_path / "elsewhere" / "corpora").iterdir()
    assert same(files_of(Path(config.out)), files_of(elsewhere)) == []


@pytest.mark.usefixtures("inline")
def test_a_store_that_stays_away_ends_the_run_with_code_4_and_no_secret(
    config: CorpusConfig, door: Door, bucket: str, tmp_path: Path
) -> None:
    remote = replace(config, out=f"{bucket}/corpus", work=str(tmp_path / "work"), storage=replace(QUICK, retry_s=1))
    door.judge = lambda method, path, before: "500" if method == "PUT" and "/filter/" in path else ""
    with pytest.raises(StorageError, match=r"put filter/.*failed for 1 s .*earlier results are intact") as error:
        build_corpus(remote)
    assert error.value.exit_code == 4
    assert SECRET not in str(error.value)
    door.judge = lambda *_: ""
    build_corpus(remote)
    build_corpus(config)
    assert same(files_of(Path(config.out)), stored(remote.out)) == []
    everything = [*(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()), *stored(remote.out).values()]
    for secret in (SECRET, ENVIRONMENT["AWS_ACCESS_KEY_ID"]):
        assert not any(secret.encode() in content for content in everything)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damage_in_the_bucket_is_noticed_and_mended(
    config: CorpusConfig, memory: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    remote = replace(config, out=f"{memory}/corpus", work=str(tmp_path / "work"))
    build_corpus(remote)
    whole = stored(remote.out)
    place = Bucket(remote.out, retry_s=QUICK.retry_s)
    for name in ("extract/00001.parquet", "filter/00000.done.json", "tokens/train_00000.bin"):
        content = bytearray(whole[name])
        content[len(content) // 2] ^= 1
        place.remove([name])
        if damage != "removed":
            place.put(name, bytes(content) if damage == "flipped" else bytes(content[: len(content) // 2]))
    assert len(same(whole, stored(remote.out))) == 3
    for work in ("elsewhere", "work"):
        capfd.readouterr()
        build_corpus(replace(remote, work=str(tmp_path / work)))
        assert same(whole, stored(remote.out)) == [], work
        if work == "elsewhere":
            assert "extract: reading" in capfd.readouterr().err  # this machine had no other copy: it was made anew


@pytest.mark.usefixtures("inline")
def test_another_machine_goes_on_and_the_first_one_learns_of_it(
    config: CorpusConfig, memory: str, tmp_path: Path
) -> None:
    one = replace(config, out=f"{memory}/corpus", work=str(tmp_path / "one"))
    two = replace(one, work=str(tmp_path / "two"), tokenize=TokenizeConfig(validation_fraction=0.2, seed=7))
    build_corpus(one)
    build_corpus(two)
    after = stored(two.out)
    (folder,) = (tmp_path / "one" / "corpora").iterdir()
    (folder / "documents" / "00009.parquet").write_bytes(b"never sent")
    build_corpus(replace(one, tokenize=two.tokenize))
    assert same(after, stored(one.out)) == []
    assert same(after, files_of(folder)) == []


def command(config: CorpusConfig, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "gpt2train", "corpus", "source=dataset", f"path={config.path}", f"out={config.out}",
        f"work={config.work}", "shards=3", "workers=1", "progress=false", "language.keep=[]", "storage.lease_s=1.5",
        "storage.retry_s=20", "tokenize.validation_fraction=0.2", "tokenize.shard_tokens=4096", "recipe=extract_only",
        *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_and_another_machine_each_time(config: CorpusConfig, bucket: str, tmp_path: Path) -> None:
    """Killed when so many files were stored; the next start has only what is in the bucket."""
    local = replace(config, out=str(tmp_path / "one_go"))
    subprocess.run(command(local), check=True, capture_output=True, timeout=PATIENCE_S)
    kills = 0
    for number, files in enumerate((15, 35)):
        remote = replace(config, out=f"{bucket}/corpus", work=str(tmp_path / f"machine{number}"))
        process = subprocess.Popen(command(remote), stderr=subprocess.PIPE, start_new_session=True)
        place = Bucket(remote.out, retry_s=QUICK.retry_s)
        while process.poll() is None and len([n for n in place.list() if not n.startswith(".")]) < files:
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2
    last = replace(config, out=f"{bucket}/corpus", work=str(tmp_path / "last"))
    said = subprocess.run(command(last), capture_output=True, timeout=PATIENCE_S, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "taken over from process" in said.stderr
    assert same(files_of(Path(local.out)), stored(last.out)) == []


# ── the lease ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_run_at_a_time(config: CorpusConfig, memory: str, tmp_path: Path) -> None:
    said: list[str] = []
    first = Lease(f"{memory}/corpus", QUICK, said.append)
    assert first.acquire() == 0
    try:
        with pytest.raises(LockedError, match=rf"in use by process {os.getpid()} on") as error:
            build_corpus(replace(config, out=f"{memory}/corpus", work=str(tmp_path / "work")))
        assert error.value.exit_code == 3
    finally:
        first.release()
    second = Lease(f"{memory}/corpus", QUICK, said.append)
    assert second.acquire() == 1
    second.release()
    assert said == []  # released, so nobody waited


def test_a_run_of_another_machine_is_watched_before_it_is_taken_over(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.storage import lease

    said: list[str] = []
    alive = Lease(f"{memory}/corpus", QUICK, said.append)
    alive.acquire()
    monkeypatch.setattr(lease, "_process", dict)  # as if this were another machine
    other = Lease(f"{memory}/corpus", QUICK, said.append)
    with pytest.raises(LockedError, match="in use by"):
        other.acquire()
    alive._end.set()  # its beat stops, as if it had died
    assert alive._thread is not None
    alive._thread.join()
    assert other.acquire() == 1
    assert "which is dead" in said[-1]
    # The first one was only asleep: its next beat tells it.
    alive._end.clear()
    alive._keep()
    assert alive.lost
    with pytest.raises(LockedError, match="in use by"):
        alive.require()
    alive.release()
    other.release()


def test_of_many_at_once_one_gets_it(bucket: str, door: Door) -> None:
    # Answers get lost, and a request that is sent again must know its own earlier one.
    door.judge = lambda method, path, before: "lost" if method == "PUT" and ".json" in path and not before else ""
    leases = [Lease(f"{bucket}/corpus", QUICK, lambda line: None) for _ in range(6)]
    got: list[Lease] = []
    start = threading.Barrier(len(leases))

    def take(one: Lease) -> None:
        start.wait()
        try:
            one.acquire()
        except LockedError:
            return
        got.append(one)

    threads = [threading.Thread(target=take, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.number for one in got] == [1]
    got[0].release()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fetch_goes_on_elsewhere_from_what_was_stored(bucket: str, tmp_path: Path) -> None:
    from test_growing import restored
    from test_pipeline import Handler, settings, url_list

    asked: Counter[str] = Counter()

    class Counting(Handler):
        def do_GET(self) -> None:
            asked[f"{self.headers['Host']}{self.path}"] += 1
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    url_list(tmp_path, address)

    def start(machine: str, *more: str) -> subprocess.Popen[str]:
        overrides = [
            *settings(tmp_path, address, Path("/none")),
            "shards=2",
            "storage.lease_s=1.5",
            "storage.sync_every_s=1",
        ]
        overrides += [f"out={bucket}/corpus", f"work={tmp_path / machine}", "stages=[urls,fetch]", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "gpt2train", "corpus", *overrides],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    place = Bucket(f"{bucket}/corpus", retry_s=QUICK.retry_s)
    first = start("one", "fetch.delay_s=0.5")
    while first.poll() is None and not any("journal" in n for n in place.list() if n.startswith(".growing/")):
        time.sleep(0.05)
    stored_lines = [part for parts in segments_of(place.list()).items() if "journal" in parts[0] for part in parts[1]]
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert stored_lines
    known = restored(place, tmp_path / "look")
    lines = [json.loads(x) for n, c in known.items() if "journal" in n for x in c.splitlines()]
    decided = {line["url"] for line in lines if "state" in line}
    assert decided
    second = start("two", "fetch.delay_s=0")
    said = second.communicate(timeout=PATIENCE_S)[1]
    server.shutdown()
    server.server_close()
    assert second.returncode == 0, said
    pages = {f"http://{name}" for name, n in asked.items() if n > 1 and not name.endswith("/robots.txt")}
    assert not pages & decided  # what was stored is not asked for again
    everything = stored(f"{bucket}/corpus")
    assert not segments_of(place.list())
    tables = {n: pq.read_table(pa.BufferReader(c)) for n, c in everything.items() if n.endswith(".parquet")}
    listed = sum(t.num_rows for n, t in tables.items() if n in ("urls/00000.parquet", "urls/00001.parquet"))
    journals = [c for n, c in everything.items() if n.endswith(".journal.jsonl")]
    assert sum(c.count(b'"state"') for c in journals) == listed > 40
    assert sum(t.num_rows for n, t in tables.items() if n.startswith("fetch/") and "verdicts" in n) == listed


def test_a_bucket_that_is_not_there_is_told_as_a_setting(config: CorpusConfig, door: Door, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out=s3://no-such-bucket/corpus: .*bucket"):
        build_corpus(replace(config, out="s3://no-such-bucket/corpus", work=str(tmp_path / "work")))
