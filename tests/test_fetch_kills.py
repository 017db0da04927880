"""A fetch that is killed, stopped, out of room or torn, and goes on."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from web import (
    HTML,
    Crawl,
    Site,
    decided,
    killable,
    outcome,
    response,
    start_child,
)

from data_pipeline.crawl import warc
from data_pipeline.crawl.fetch import finish_shard
from data_pipeline.crawl.fetch_journal import journal_path
from data_pipeline.records import CorruptionError, StorageError

# ---- a process that is killed -----------------------------------------------------------------------------------


def test_kill_9_loses_no_url_and_fetches_none_twice_but_those_under_way(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 800)
    chance = random.Random(9)
    kills = 0
    while kills < 5:
        before = decided(run)
        child = start_child(run)
        aim = before + chance.randrange(20, 120)
        while decided(run) < aim and child.poll() is None:
            time.sleep(0.005)
        assert child.poll() is None, child.communicate()[1].decode()
        child.kill()
        child.communicate()
        kills += 1
    child = start_child(run)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors.decode()
    results = run.results()
    assert len(results) == 800
    assert collections.Counter(outcome(r) for r in results.values()) == {
        ("kept", None): 799,
        ("failed", "http_status"): 1,
    }
    assert run.check_warcs() > 4
    for url, row in results.items():
        if row["state"] == "kept":
            assert run.body(row).startswith(HTML + b"/" + url.rpartition("/")[2].encode())
    asked = collections.Counter(site.paths())
    assert set(asked) == {f"/{i}" for i in range(800)}
    assert sum(asked.values()) - 800 <= kills * 8  # one request under way at each of eight hosts
    stored = [e.url for f in (tmp_path / "warc").iterdir() for e in warc.index_warc(f)]
    assert len(stored) == len(set(stored)) == 799


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_fetch_with_whole_files(tmp_path: Path, site: Site, number: signal.Signals) -> None:
    run = killable(tmp_path, site, 200)
    child = start_child(run)
    while decided(run) < 30 and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(number)
    _, errors = child.communicate(timeout=10)
    assert child.returncode == (-signal.SIGTERM if number == signal.SIGTERM else -signal.SIGINT), errors.decode()
    assert run.check_warcs() >= 4
    assert 30 <= decided(run) < 200
    assert len(run.run()) == 200
    assert sum(collections.Counter(site.paths()).values()) <= 200 + 8


def test_torn_files_are_mended(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 40)
    run.run()
    shard = run.shards[0]
    journal = journal_path(shard.folder, 0)
    lines = journal.read_bytes().split(b"\n")
    kept = [json.loads(line) for line in lines if b'"kept"' in line]
    last = max(kept, key=lambda line: (line["part"], line["end"]))
    file = tmp_path / warc_name(last)
    # The machine went down: the journal's last line is torn, the last page is cut, and no mark vouches for it.
    lines = [line for line in lines if line and b'"mark"' not in line]
    journal.write_bytes(b"\n".join(lines) + b"\n" + b'{"index": 999, "sta')
    with open(file, "r+b") as f:
        f.truncate(last["end"] - 10)
    with pytest.raises(CorruptionError, match="expected at least"):
        finish_shard(shard, tmp_path)
    asked = len(site.paths())
    results = run.run()
    assert len(results) == 40
    assert len(site.paths()) - asked == 1  # that page alone
    assert run.check_warcs() >= 1


def warc_name(line: dict[str, Any]) -> str:
    return f"warc/00000-{line['part']:03d}.warc.gz"


def test_a_flipped_page_that_nothing_vouches_for_is_fetched_again(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 8)
    run.run()
    journal = journal_path(run.shards[0].folder, 0)
    lines = [line for line in journal.read_bytes().split(b"\n") if line and b'"mark"' not in line]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    line = next(json.loads(x) for x in lines if b'"kept"' in x)
    with open(tmp_path / warc_name(line), "r+b") as f:
        f.seek((line["offset"] + line["end"]) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 0x40]))
    results = run.run()
    assert all(run.body(row) for row in results.values() if row["state"] == "kept")
    assert run.check_warcs() >= 1


def test_a_page_whose_request_record_is_lost_is_fetched_again(tmp_path: Path, site: Site) -> None:
    """The response is whole, but the blocks behind it, where its request stands, were never written."""
    run = killable(tmp_path, site, 8)
    run.run()
    journal = journal_path(run.shards[0].folder, 0)
    lines = [line for line in journal.read_bytes().split(b"\n") if line and b'"mark"' not in line]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    line = [json.loads(x) for x in lines if b'"kept"' in x][-1]
    with open(tmp_path / warc_name(line), "r+b") as f:
        f.truncate(line["end"] - 40)
        f.truncate(line["end"])
    asked = len(site.paths())
    assert len(run.run()) == 8
    assert len(site.paths()) == asked + 1
    assert run.check_warcs() >= 1


def test_whatever_a_power_cut_leaves_the_next_run_ends_whole(tmp_path: Path, site: Site) -> None:
    """Journal and pages lose random ends, independently of each other, as files do that were not synced in time."""
    run = killable(tmp_path, site, 24)
    first = {u: outcome(r) for u, r in run.run().items()}
    chance = random.Random(5)
    for _ in range(12):
        for shard in run.shards:
            journal = journal_path(shard.folder, shard.number)
            lines = [line for line in journal.read_bytes().split(b"\n") if line and b'"mark"' not in line]
            data = b"\n".join(lines) + b"\n"
            journal.write_bytes(data[: chance.randrange(len(data) + 1)])
        for file in (tmp_path / "warc").iterdir():
            fate = chance.randrange(4)
            size = file.stat().st_size
            if fate == 0:
                file.unlink()
            elif fate < 3:
                os.truncate(file, chance.randrange(size + 1))
            if fate == 2:
                os.truncate(file, size)  # the length was written, the blocks were not
        results = run.run()
        assert {u: outcome(r) for u, r in results.items()} == first
        assert run.check_warcs() >= 1
        for url, row in results.items():
            if row["state"] == "kept":
                assert run.body(row).startswith(HTML + b"/" + url.rpartition("/")[2].encode())


def test_a_full_disk_ends_the_run_and_leaves_no_half_record(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killable(tmp_path, site, 40)
    real, room = os.write, [60_000]

    def write(descriptor: int, data: bytes) -> int:
        if len(data) > 1000:  # pages, not journal lines
            if room[0] <= 0:
                raise OSError(28, "No space left on device")
            data = data[: room[0]]
            room[0] -= len(data)
        return real(descriptor, data)

    monkeypatch.setattr(warc.os, "write", write)
    with pytest.raises(StorageError, match="No space left"):
        run.run()
    room[0] = 1 << 30
    assert run.check_warcs() >= 1
    assert len(run.run()) == 40
    assert run.check_warcs() >= 1


def test_a_changed_list_fetches_only_what_is_new(tmp_path: Path, site: Site) -> None:
    site.default = response()
    base, allow = f"http://127.0.0.1:{site.port}", [f"127.0.0.1:{site.port}"]
    Crawl(tmp_path, [f"{base}/{i}" for i in range(6)], allow_addresses=allow).run()
    asked = len(site.paths())
    changed = [f"{base}/{i}" for i in (9, 5, 3, 8, 1)]  # other places in the list, some gone, some new
    results = Crawl(tmp_path, changed, allow_addresses=allow).run()
    assert [results[u]["index"] for u in changed] == list(range(5))
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    assert sorted(site.paths()[asked:]) == ["/8", "/9"]
    for url in changed:
        page = results[url]["page"]
        assert warc.read_response(tmp_path / page["warc_file"], page["warc_offset"]).url == url


def test_a_finished_fetch_asks_for_nothing(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 16)
    first = run.run()
    asked = len(site.requests)
    assert run.run() == first
    assert len(site.requests) == asked


# ---- 25 kills ---------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_25_kills_lose_no_url(tmp_path: Path, site: Site) -> None:
    run = killable(tmp_path, site, 4000)
    chance = random.Random(25)
    kills = 0
    while kills < 25:
        before = decided(run)
        child = start_child(run)
        aim = before + chance.randrange(10, 150)
        while decided(run) < aim and child.poll() is None:
            time.sleep(0.005)
        assert child.poll() is None, child.communicate()[1].decode()
        child.kill()
        child.communicate()
        kills += 1
    child = start_child(run)
    _, errors = child.communicate(timeout=250)
    assert child.returncode == 0, errors.decode()
    results = run.results()
    assert collections.Counter(outcome(r) for r in results.values()) == {
        ("kept", None): 3999,
        ("failed", "http_status"): 1,
    }
    assert run.check_warcs() > 4
    asked = collections.Counter(site.paths())
    assert set(asked) == {f"/{i}" for i in range(4000)}
    twice = sum(asked.values()) - 4000
    assert twice <= kills * 8  # one request under way at each of eight hosts
    stored = [e.url for f in (tmp_path / "warc").iterdir() for e in warc.index_warc(f)]
    assert len(stored) == len(set(stored)) == 3999
    print(f"25 kills, 4,000 URLs: none lost, {twice} asked for twice, of at most {kills * 8} under way")
