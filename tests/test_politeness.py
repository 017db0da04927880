"""Politeness and fairness at scale, as the servers see them, and the order of the end."""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from web import (
    NOT_FOUND,
    Crawl,
    Request,
    Site,
    names,
    outcome,
    response,
    start_child,
)

from data_pipeline.crawl import scheduler
from data_pipeline.crawl.fetch import fetch_shards
from data_pipeline.crawl.fetch_journal import audit_path

# ---- politeness and fairness, as the servers see them -----------------------------------------------------------


def check_delays(folder: Path, site: Site, hosts: int, urls_per_host: int, delay_s: float) -> dict[str, float]:
    """Fetch `urls_per_host` pages of each host; figures of what the server saw."""
    site.default = response()
    site.pages = {"/robots.txt": NOT_FOUND}
    host_names = [f"h{i}.test" for i in range(hosts)]
    run = Crawl(
        folder,
        [f"http://{h}:{site.port}/{i}" for i in range(urls_per_host) for h in host_names],
        shards=4,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(folder, host_names),
        delay_s=delay_s,
    )
    begin = time.monotonic()
    results = run.run()
    wall_s = time.monotonic() - begin
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    starts: dict[str, list[float]] = collections.defaultdict(list)
    for request in site.requests:
        starts[request.host].append(request.at)
    assert {len(s) for s in starts.values()} == {urls_per_host + 1}  # and robots.txt
    assert len(starts) == hosts
    gaps = [b - a for s in starts.values() for a, b in itertools.pairwise(s)]
    assert min(gaps) >= delay_s
    audit = [json.loads(x) for s in run.shards for x in audit_path(s.folder, s.number).read_text().splitlines()]
    assert len(audit) == len(site.requests)
    # No slower than politeness asks for: each host's requests one delay apart, all hosts side by side.
    return {"least_gap_s": min(gaps), "wall_s": wall_s, "least_wall_s": urls_per_host * delay_s, "requests": len(gaps)}


def test_a_hundred_hosts_are_never_asked_faster_than_their_delay(tmp_path: Path, site: Site) -> None:
    figures = check_delays(tmp_path, site, hosts=100, urls_per_host=8, delay_s=0.2)
    assert figures["wall_s"] < 20 * figures["least_wall_s"]  # one host after the other it would be 100 times


@pytest.mark.soak
def test_a_hundred_hosts_for_a_minute(tmp_path: Path, site: Site) -> None:
    print(check_delays(tmp_path, site, hosts=100, urls_per_host=300, delay_s=0.2))


class GoodAndDripping:
    """A fetch in a process of its own over hosts of a server in another: `good` hosts with `urls_each` pages, and so
    many that drip, two URLs each, which stand first in the list."""

    def __init__(
        self, folder: Path, good: int, urls_each: int, drippers: int, every_s: float, timeout_s: float, delay_s: float
    ) -> None:
        self.good, self.urls_each, self.drippers = good, urls_each, drippers
        folder.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("drip_server.py")), str(every_s)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.server.stdout is not None
        port = int(self.server.stdout.readline())
        good_names, bad_names = [f"g{i}.test" for i in range(good)], [f"d{i}.test" for i in range(drippers)]
        self.run = Crawl(
            folder,
            [f"http://{h}:{port}/{i}" for h in bad_names for i in range(2)]
            + [f"http://{h}:{port}/{i}" for h in good_names for i in range(urls_each)],
            shards=8,
            allow_addresses=[f"127.0.0.1:{port}"],
            hosts_file=names(folder, bad_names + good_names),
            delay_s=delay_s,
            timeout_s=timeout_s,
        )
        self.fetch = start_child(self.run)

    def figures(self) -> dict[str, float]:
        """Once it is through: good pages a second, from the first request to the last of a good page, as the server saw
        them; the median time between two good pages of a host; how many hosts dripped at once, and their drops."""
        _, errors = self.fetch.communicate()
        assert self.fetch.returncode == 0, errors
        told, _ = self.server.communicate()
        seen = json.loads(told)
        reasons = collections.Counter(outcome(r) for r in self.run.results().values())
        pages = self.good * self.urls_each
        assert reasons[("kept", None)] == pages
        assert reasons[("failed", "timeout")] == 2 * self.drippers
        assert seen["pages"] == {f"g{i}.test": self.urls_each for i in range(self.good)}
        wall_s = seen["last_good_at"] - seen["first_at"]
        return {"rate": pages / wall_s, **{name: seen[name] for name in ("median_gap_s", "most_dripping", "drops")}}


def test_dripping_hosts_leave_the_good_ones_their_rate(tmp_path: Path) -> None:
    """With and without them at the same time, so that whatever else the machine does hits both. A few pages are soon
    through, so the time between two pages of a host tells more than the rate, in which the start weighs; and the delay
    is long beside what a busy machine adds to it."""

    def start(name: str, drippers: int) -> GoodAndDripping:
        return GoodAndDripping(tmp_path / name, 20, 6, drippers, every_s=0.5, timeout_s=1.5, delay_s=0.8)

    alone, beside = start("alone", 0), start("beside", 150)
    there, here = beside.figures(), alone.figures()
    assert there["most_dripping"] > 50
    assert here["median_gap_s"] > 0.8 * there["median_gap_s"]
    assert there["rate"] > 0.4 * here["rate"]  # at full size 0.9, see below


@pytest.mark.soak
@pytest.mark.parametrize("every_s", [0.5, 0.05])
def test_a_thousand_dripping_hosts_leave_the_good_ones_their_rate(tmp_path: Path, every_s: float) -> None:
    """The undisturbed rate is taken before and after, since a machine's mood may change in these minutes."""

    def good(drippers: int, name: str) -> dict[str, float]:
        return GoodAndDripping(tmp_path / name, 100, 150, drippers, every_s, timeout_s=20, delay_s=0.2).figures()

    before, beside, after = good(0, "before"), good(1000, "beside"), good(0, "after")
    alone = (before["rate"] + after["rate"]) / 2
    print(
        f"good pages a second: alone {before['rate']:.0f} and {after['rate']:.0f}, beside {beside['most_dripping']:.0f}"
        f" hosts that drip every {every_s:g} s {beside['rate']:.0f} ({beside['rate'] / alone:.2f}); "
        f"{beside['drops']:,.0f} drops"
    )
    assert beside["most_dripping"] > 950
    assert beside["rate"] >= 0.9 * alone


def test_a_host_that_says_too_much_is_asked_more_slowly(tmp_path: Path, site: Site) -> None:
    """A server that allows one request in 0.4 s, and a fetch that would ask every 0.1 s."""
    served = [0.0]

    async def limited(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.at - served[0] < 0.4:
            writer.write(response(b"", "429 Too Many Requests"))
        else:
            writer.write(response())
        served[0] = request.at if request.at - served[0] >= 0.4 else served[0]

    site.default = limited
    urls = [f"http://127.0.0.1:{site.port}/{i}" for i in range(8)]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        robots=False,
        delay_s=0.1,
        retries=3,
        retry_wait_s=0.05,
    )
    assert {outcome(r) for r in run.run().values()} == {("kept", None)}
    # Asked every 0.1 s, three of four requests would be refused; stretched to 0.4 s, a few at the start and now and
    # then one when the delay has eased too far.
    assert len(site.requests) - len(urls) <= 4


# ---- the order of the end ---------------------------------------------------------------------------------------


def test_the_longest_queue_goes_first(tmp_path: Path, site: Site) -> None:
    site.default = response()
    hosts = [f"small{i}.test" for i in range(40)]
    urls = [f"http://{h}:{site.port}/" for h in hosts] + [f"http://big.test:{site.port}/{i}" for i in range(12)]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, ["big.test", *hosts]),
        robots=False,
        concurrency=1,
        delay_s=0.05,
    )
    run.run()
    asked = [r.host for r in site.requests]
    assert asked[0] == "big.test"  # although it stands last in the list
    assert asked[1] != "big.test"  # and the others go in between, while its delay lasts
    assert collections.Counter(asked) == {"big.test": 12, **dict.fromkeys(hosts, 1)}


def test_shards_with_the_longest_queue_are_opened_first(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "OPEN_SHARDS", 1)
    site.default = response()
    hosts = {0: "a.test", 1: "b.test", 2: "c.test"}
    counts = {0: 2, 1: 9, 2: 5}
    run = Crawl(tmp_path, [], shards=3, allow_addresses=[f"127.0.0.1:{site.port}"], robots=False)
    run.config.hosts_file = names(tmp_path, list(hosts.values()))
    for k, shard in enumerate(run.shards):
        run.write(shard, [f"http://{hosts[k]}:{site.port}/{i}" for i in range(counts[k])])
    run.run()
    assert [h for h, _ in itertools.groupby(r.host for r in site.requests)] == ["b.test", "c.test", "a.test"]


def test_the_slowest_host_tells_when_the_end_can_come(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ESTIMATE_EVERY_S", 0.25)
    site.default = response()
    urls = [f"http://slow.test:{site.port}/{i}" for i in range(12)]
    urls += [f"http://h{i}.test:{site.port}/" for i in range(50)]
    run = Crawl(
        tmp_path,
        urls,
        allow_addresses=[f"127.0.0.1:{site.port}"],
        hosts_file=names(tmp_path, ["slow.test", *(f"h{i}.test" for i in range(50))]),
        robots=False,
        delay_s=0.1,
    )
    notes: list[tuple[float, str]] = []

    def on_note(line: str) -> None:
        notes.append((time.monotonic(), line))

    fetch_shards(run.shards, run.config, run.folder, lambda done, total: None, on_note=on_note)
    end = time.monotonic()
    assert notes
    for at, line in notes:
        assert "slow.test" in line
        told_s = float(line.split(" s to go")[0].rpartition(" ")[2].replace(",", ""))
        assert told_s - 1 <= end - at < told_s + 2
