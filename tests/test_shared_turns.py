"""Several fetching processes and one host: they take turns, whoever dies in between."""

from __future__ import annotations

import fcntl
import itertools
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from web import NOT_FOUND, Crawl, Site, names, outcome, redirect, response, start_child

from data_pipeline.crawl import shared_turns
from data_pipeline.crawl.shared_turns import BUSY_WAIT_S, SharedTurns

OTHER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from data_pipeline.crawl.shared_turns import SharedTurns
    turns = SharedTurns(Path(sys.argv[1]), 100.0)
    for line in sys.stdin:
        word, host, wait_s = line.split()
        print(turns.claim(host) if word == "claim" else turns.release(host, float(wait_s)), flush=True)
    """
)


class Other:
    """Another process with the same turns."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", OTHER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_host_has_one_turn_at_a_time_over_all_processes(tmp_path: Path) -> None:
    turns, other = SharedTurns(tmp_path / "turns", 100.0), Other(tmp_path / "turns")
    try:
        assert turns.claim("a.test") == 0.0
        assert turns.claim("a.test") == BUSY_WAIT_S  # not twice in one process either
        assert float(other.say("claim a.test 0")) == BUSY_WAIT_S
        assert float(other.say("claim b.test 0")) == 0.0
        assert turns.claim("b.test") == BUSY_WAIT_S
        turns.release("a.test", 50.0)
        assert 49.0 < float(other.say("claim a.test 0")) <= 50.0
        assert 49.0 < turns.claim("a.test") <= 50.0
        other.say("release b.test 0")
        assert turns.claim("b.test") == 0.0
        turns.release("b.test", 0.0)
        assert float(other.say("claim b.test 0")) == 0.0
        other.kill()  # in the middle of its turn
        assert turns.claim("b.test") == 0.0
    finally:
        other.kill()
        turns.close()


def test_a_clock_that_was_set_back_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = SharedTurns(tmp_path / "turns", 100.0)
    now = time.time()
    monkeypatch.setattr(shared_turns.time, "time", lambda: now + 86_400)
    assert turns.claim("a.test") == 0.0
    turns.release("a.test", 10.0)
    monkeypatch.setattr(shared_turns.time, "time", lambda: now)
    assert turns.claim("a.test") == 0.0
    turns.close()


def test_two_hosts_of_one_slot_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_turns, "SLOTS", 1)
    turns = SharedTurns(tmp_path / "turns", 100.0)
    assert turns.claim("a.test") == 0.0
    assert turns.claim("b.test") == BUSY_WAIT_S
    with open(tmp_path / "turns", "rb+") as f:  # the lock is there
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 8, 8)
    turns.release("a.test", 0.0)
    assert turns.claim("b.test") == 0.0
    turns.close()


def test_two_processes_keep_the_delay_of_a_host_that_redirects_lead_to(tmp_path: Path, site: Site) -> None:
    """Each has hosts of its own; all their pages, and one host's robots.txt, lead to a host that is in no list."""
    delay_s, hosts = 0.1, [f"h{i}.test" for i in range(6)]
    site.default = redirect(f"http://third.test:{site.port}/landing")
    site.pages = {
        "/robots.txt": NOT_FOUND,
        "h1.test/robots.txt": redirect(f"http://third.test:{site.port}/robots.txt"),
        **{f"third.test/{i}": response() for i in range(20)},
        **{
            f"{host}/{k}": redirect(f"http://third.test:{site.port}/{3 * i + k}")
            for i, host in enumerate(hosts)
            for k in range(3)
        },
    }
    run = Crawl(
        tmp_path,
        [f"http://{h}:{site.port}/{k}" for k in range(3) for h in hosts],
        shards=2,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, ["third.test", *hosts]),
        delay_s=delay_s,
        processes=2,
        timeout_s=30.0,
    )
    children = [start_child(run, [k]) for k in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors.decode()
    assert {outcome(row) for row in run.results().values()} == {("kept", None)}
    starts = [r.at for r in site.requests if r.host == "third.test"]
    assert len(starts) == 18 + 2 + 1  # pages, each process's own look at robots.txt, and h1's
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert min(gaps) >= delay_s
