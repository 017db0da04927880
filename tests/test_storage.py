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
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline import Inline

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'gpt2train[s3]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors")

import s3
from s3 import ENVIRONMENT, SECRET, Door

from data_pipeline import pipeline
from data_pipeline.account.why import WhyConfig, why
from data_pipeline.bounds import check
from data_pipeline.config import CorpusConfig, LanguageConfig, Source, StorageConfig, TokenizeConfig
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import InputError, LockedError, StorageError
from data_pipeline.storage.bucket import Bucket
from data_pipeline.storage.growing import Growing, segments_of
from data_pipeline.storage.lease import Lease
from data_pipeline.token_shards import CorruptTokenShardsError, NotTokenShardsError, TokenShards, fetch_token_shards

PROSE = [text for _, text in sorted(topics.items()) if len(text) > 1_500][:10]
PATIENCE_S = 280
"""A busy machine may take minutes for what takes it seconds."""
QUICK = StorageConfig(lease_s=1.5, retry_s=20, sync_every_s=1)


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


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """memory://NAME, for what does not depend on the kind of store."""
    from fsspec.implementations.memory import MemoryFileSystem

    yield f"memory://m{abs(hash(request.node.nodeid)):x}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_executor", lambda config, out: Inline())


def write_texts(path: Path, texts: list[str]) -> Path:
    rows = ({"url": f"https://site{i}.test/{i}", "text": text} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    """A corpus of ten texts in three shards in a local folder, not built yet."""
    return CorpusConfig(
        source=Source.dataset,
        path=str(write_texts(tmp_path / "texts.jsonl", PROSE)),
        out=str(tmp_path / "local"),
        shards=3,
        workers=1,
        progress=False,
        language=LanguageConfig(keep=[]),
        tokenize=TokenizeConfig(validation_fraction=0.2, shard_tokens=4_096),
        storage=QUICK,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, without what is the run's own."""
    names = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in names.items() if not f"/{name}".count("/.")}


def stored(address: str) -> dict[str, bytes]:
    """What lies in the bucket, without what is the run's own."""
    place = Bucket(address, QUICK)
    return {name: place.read(name) or b"" for name in place.list() if not name.startswith(".")}


OWN = ("config.yaml",)
"""Files that name the place itself."""


def same(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    """Names of the files that differ."""
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name) and name not in OWN]


@pytest.mark.usefixtures("_inline")
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


@pytest.mark.usefixtures("_inline")
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


@pytest.mark.usefixtures("_inline")
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
    everything = [*files_of(tmp_path).values(), *stored(remote.out).values()]
    for secret in (SECRET, ENVIRONMENT["AWS_ACCESS_KEY_ID"]):
        assert not any(secret.encode() in content for content in everything)


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damage_in_the_bucket_is_noticed_and_mended(
    config: CorpusConfig, memory: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    remote = replace(config, out=f"{memory}/corpus", work=str(tmp_path / "work"))
    build_corpus(remote)
    whole = stored(remote.out)
    place = Bucket(remote.out, QUICK)
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


@pytest.mark.usefixtures("_inline")
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
        place = Bucket(remote.out, QUICK)
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


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("out", "bound"),
    [
        (f"s3://me:{SECRET}@bucket/corpus", "holds credentials"),
        (f"s3://bucket/corpus?X-Amz-Signature={SECRET}", "holds a query"),
        ("s3://bucket", "must name a bucket and a place in it"),
        ("https://example.org/corpus", "must be a local path or begin with s3://"),
        ("file://corpus", "absolute path"),
    ],
)
def test_addresses_that_cannot_be_are_refused_without_their_secrets(out: str, bound: str) -> None:
    for faults in (check(CorpusConfig(urls="x", out=out)), check(CorpusConfig(urls=out))):
        assert len(faults) == 1
        assert bound in faults[0]
        assert SECRET not in faults[0]


def test_settings_out_of_bounds_are_named() -> None:
    def faults(**changes: Any) -> list[str]:
        return [f.split("=")[0] for f in check(CorpusConfig(urls="x", **changes))]

    assert faults(out="s3://bucket/corpus") == []
    for name in ("transfers", "sync_every_s", "lease_s", "retry_s"):
        assert faults(storage=StorageConfig(**{name: 0})) == [f"storage.{name}"]
    assert faults(work="s3://bucket/work") == ["work"]
    assert faults(out="s3://bucket/corpus", executor=pipeline.Executor.ray) == ["work"]


@pytest.mark.usefixtures("_inline")
def test_file_addresses_are_local_folders(config: CorpusConfig, tmp_path: Path) -> None:
    build_corpus(replace(config, out=f"file://{tmp_path}/by_address", path=f"file://{config.path}"))
    assert (tmp_path / "by_address" / "tokens" / "manifest.json").exists()


def test_a_bucket_that_is_not_there_is_told_as_a_setting(config: CorpusConfig, door: Door, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out=s3://no-such-bucket/corpus: .*bucket"):
        build_corpus(replace(config, out="s3://no-such-bucket/corpus", work=str(tmp_path / "work")))


# ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("_inline")
def test_inputs_come_from_buckets_and_are_named_by_their_addresses(
    config: CorpusConfig, memory: str, tmp_path: Path
) -> None:
    place = Bucket(f"{memory}/in", QUICK)
    place.put("texts/a.jsonl", Path(config.path).read_bytes())
    place.put("test.txt", PROSE[3].encode())
    remote = replace(config, path=f"{memory}/in/texts", work=str(tmp_path / "work"), out=str(tmp_path / "out"))
    remote.decontaminate.paths = [f"{memory}/in/test.txt"]
    build_corpus(remote)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["documents"] == len(PROSE)
    assert summary["contamination"][0]["name"] == "test"
    assert summary["contamination"][0]["share"] == 1.0
    marker = json.loads((tmp_path / "out" / "extract" / "all.done.json").read_text())
    assert marker["settings"]["path"] == f"{memory}/in/texts"
    copies = {p: p.stat().st_mtime_ns for p in (tmp_path / "work" / "inputs").rglob("*.jsonl")}
    assert len(copies) == 1
    build_corpus(remote)
    assert {p: p.stat().st_mtime_ns for p in copies} == copies  # compared, not brought again
    place.put("texts/b.txt", b"Another text of some words, which was not there before. " * 20)
    build_corpus(remote)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["documents"] == len(PROSE) + 1
    with pytest.raises(InputError) as error:
        build_corpus(replace(remote, path=f"{memory}/in/none", report=replace(remote.report, domains="/none")))
    assert [line.split("=")[0] for line in str(error.value).split("\n")] == ["path", "report.domains"]


# ── what the fetch appends to ───────────────────────────────────────────────────────────────────────────────────────


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
    bucket, here = Bucket(f"{memory}/corpus", QUICK), tmp_path / "here"
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
    bucket, here = Bucket(f"{memory}/corpus", QUICK), tmp_path / "here"
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
    bucket, here = Bucket(f"{memory}/corpus", QUICK), tmp_path / "here"
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fetch_goes_on_elsewhere_from_what_was_stored(bucket: str, tmp_path: Path) -> None:
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

    place = Bucket(f"{bucket}/corpus", QUICK)
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


@pytest.mark.usefixtures("_inline")
def test_token_shards_are_brought_and_checked(config: CorpusConfig, memory: str, tmp_path: Path) -> None:
    build_corpus(config)
    local = Path(config.out) / "tokens"
    place = Bucket(f"{memory}/tokens", QUICK)
    for name, content in files_of(local).items():
        place.put(name, content)
    folder = fetch_token_shards(place.address, tmp_path / "cache")
    assert files_of(folder) == files_of(local)
    assert TokenShards.open(folder).fingerprint == TokenShards.open(local).fingerprint
    assert fetch_token_shards(str(local), tmp_path / "cache") == local
    # Damage here is mended from there, and nothing else is brought.
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "train_00000.bin").write_bytes(b"\0" * (folder / "train_00000.bin").stat().st_size)
    assert fetch_token_shards(place.address, tmp_path / "cache") == folder
    assert files_of(folder) == files_of(local)
    assert {n for n, t in times.items() if (folder / n).stat().st_mtime_ns != t} == {"train_00000.bin"}
    # Damage there is named.
    place.put("train_00000.bin", b"\0" * (local / "train_00000.bin").stat().st_size)
    place.remove(["documents.parquet"])
    with pytest.raises(CorruptTokenShardsError) as error:
        fetch_token_shards(place.address, tmp_path / "other")
    assert [d.split(":")[0] for d in error.value.defects] == ["train_00000.bin", "documents.parquet"]
    place.remove(["manifest.json"])
    with pytest.raises(NotTokenShardsError, match=r"holds no manifest\.json"):
        fetch_token_shards(place.address, tmp_path / "other")
    with pytest.raises(NotTokenShardsError, match="holds credentials") as refused:
        fetch_token_shards(f"s3://me:{SECRET}@bucket/tokens", tmp_path / "other")
    assert SECRET not in str(refused.value)


@pytest.mark.usefixtures("_inline")
def test_a_corpus_in_a_bucket_is_looked_at(
    config: CorpusConfig,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gpt2train.commands.joined import write_report

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = replace(config, out=f"{memory}/corpus")  # and no `work`: it is below the user's cache
    build_corpus(remote)
    assert (tmp_path / "cache" / "gpt2train" / "corpora").is_dir()
    capsys.readouterr()
    assert why(WhyConfig("https://site3.test/3", remote.out)) == 0
    said = capsys.readouterr().out
    assert "kept" in said
    assert "tokens: " in said
    assert write_report([f"path={remote.out}"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.read_text().startswith("<!doctype html>")
    brought = {p.parent.name for p in page.parent.rglob("*.parquet")}
    assert {"ledger", "documents"} <= brought
    assert not list(page.parent.rglob("*.bin"))  # tokens are not needed, and not brought
    assert build_corpus(replace(remote, what_if=["dedup.near=false"])) == 0
    Bucket(f"{memory}/lists", QUICK).put("gone.txt", b"site3.test\n")
    build_corpus(replace(remote, forget=f"{memory}/lists/gone.txt"))
    assert why(WhyConfig("https://site3.test/3", remote.out)) == 0
    assert "dropped at extract: forgotten" in capsys.readouterr().out
    for place, bound in ((f"{memory}/nothing", "holds no corpus"), (f"s3://me:{SECRET}@b/c", "holds credentials")):
        with pytest.raises(InputError, match=bound) as error:
            why(WhyConfig("https://site3.test/3", place))
        assert SECRET not in str(error.value)
