"""What a crawl does beyond one pass: retries, second crawls, rescues."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warcio.archiveiterator import ArchiveIterator
from web import (
    HTML,
    NOT_FOUND,
    Crawl,
    Handler,
    Request,
    Site,
    closing,
    outcome,
    redirect,
    response,
)

from data_pipeline.bounds import check
from data_pipeline.config import FETCH_REASONS, CorpusConfig, FetchConfig, Source, UrlListConfig
from data_pipeline.crawl import rescue, retry, scheduler, spill, warc
from data_pipeline.crawl.fetch import FetchShard, finish_shard, read_journal
from data_pipeline.crawl.fetch_journal import journal_path, newest_decisions
from data_pipeline.crawl.url_syntax import shard_of
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import PAGE_SCHEMA, ConfigError, InputError

# ---- retries ----------------------------------------------------------------------------------------------------


class Weather:
    """Names that resolve or not, statuses that come or not: what changes between two rounds."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.down = {"down.test", "away.test"}
        site.default = response()
        site.pages = {
            "/robots.txt": NOT_FOUND,
            "/429": response(b"", "429 Too Many Requests"),
            "/404": NOT_FOUND,
            "/503": response(b"", "503 Busy"),
            "/reset": closing(b""),
            "/image": response(b"\x89PNG", Content_Type="image/png"),
        }

    async def lookup(self, host: str) -> list[str]:
        if host in self.down:
            raise OSError("no such host")
        return ["127.0.0.1"]

    def urls(self) -> dict[str, str]:
        up = {p: f"http://up.test:{self.site.port}{p}" for p in ("/ok", *self.site.pages) if p != "/robots.txt"}
        return up | {h: f"http://{h}:{self.site.port}/" for h in sorted(self.down)}


def test_a_retry_asks_again_for_the_named_reasons_alone(tmp_path: Path, site: Site) -> None:
    weather = Weather(site)
    urls = weather.urls()
    run = Crawl(tmp_path, list(urls.values()), shards=2, allow_addresses=[f"127.0.0.1:{site.port}"])
    first = run.run(weather.lookup)
    assert outcome(first[urls["down.test"]]) == ("failed", "dns")
    assert retry.begin_round(tmp_path / "fetch", run.shards, []) is None

    weather.down.remove("down.test")
    site.pages["/429"] = site.pages["/503"] = response()
    site.requests.clear()
    begun = retry.begin_round(tmp_path / "fetch", run.shards, ["dns", "http_429", "connect"])
    assert begun is not None
    assert sum(begun.waiting.values()) == 4
    second = run.run(weather.lookup)
    retry.end_round(tmp_path / "fetch")
    assert sorted(site.paths()) == ["/", "/429", "/reset", "/reset"]  # a kept-alive connection was closed under one
    changed = {u for u in first if outcome(first[u]) != outcome(second[u])}
    assert changed == {urls["/429"], urls["down.test"]}
    assert outcome(second[urls["/503"]]) == ("failed", "http_status")
    assert outcome(second[urls["away.test"]]) == ("failed", "dns")
    assert json.loads(second[urls["away.test"]]["numbers"])["rounds"] == 2
    assert "rounds" not in json.loads(second[urls["/404"]]["numbers"])
    history = [line for s in run.shards for line in read_journal(journal_path(s.folder, s.number))]
    assert [line["state"] for line in history if line["url"] == urls["/429"]] == ["failed", "kept"]
    assert len(history) == len(urls) + 4
    assert run.check_warcs() >= 1

    third = retry.begin_round(tmp_path / "fetch", run.shards, ["http_status"])
    assert third is not None
    assert sum(third.waiting.values()) == 2  # 404 and 503
    final = run.run(weather.lookup)
    retry.end_round(tmp_path / "fetch")
    assert outcome(final[urls["/503"]]) == ("kept", None)


def test_a_round_is_begun_once_however_often_it_is_killed(tmp_path: Path, site: Site) -> None:
    weather = Weather(site)
    urls = weather.urls()
    run = Crawl(tmp_path, list(urls.values()), shards=2, allow_addresses=[f"127.0.0.1:{site.port}"])
    run.run(weather.lookup)
    folder = tmp_path / "fetch"
    begun = retry.begin_round(folder, run.shards, ["dns"])
    assert begun is not None
    again = retry.begin_round(folder, run.shards, ["dns", "http_404"])  # killed before the first request
    assert again == begun
    site.requests.clear()
    run.run(weather.lookup)
    for _ in range(2):  # killed once both had failed anew: the round is not begun a second time
        after = retry.begin_round(folder, run.shards, ["dns"])
        assert after is not None
        assert after.waiting == {}
    retry.end_round(folder)
    assert site.requests == []
    lines = [read_journal(journal_path(s.folder, s.number)) for s in run.shards]
    assert collections.Counter(line["url"] for part in lines for line in part if line.get("reason") == "dns") == {
        urls["down.test"]: 2,
        urls["away.test"]: 2,
    }


def test_a_torn_retry_line_opens_nothing(tmp_path: Path, site: Site) -> None:
    weather = Weather(site)
    run = Crawl(tmp_path, list(weather.urls().values()), allow_addresses=[f"127.0.0.1:{site.port}"])
    run.run(weather.lookup)
    journal = journal_path(tmp_path / "fetch", 0)
    whole = newest_decisions(journal)
    size = journal.stat().st_size
    retry.begin_round(tmp_path / "fetch", run.shards, ["dns"])
    assert len(newest_decisions(journal)) == len(whole) - 2
    os.truncate(journal, journal.stat().st_size - 5)
    assert newest_decisions(journal) == whole
    begun = retry.begin_round(tmp_path / "fetch", run.shards, ["dns"])
    assert begun is not None
    assert begun.waiting == {0: 2}
    assert journal.read_bytes()[size:].count(b"\n") == 1


@pytest.mark.parametrize("reason", ["dsn", "http_9", "kept", "600"])
def test_a_reason_that_is_none_is_told(reason: str) -> None:
    (fault,) = check(CorpusConfig(urls="x", retry=[reason]))
    assert fault.startswith(f"retry={reason}: must be a reason of the fetch or an HTTP status")
    assert check(CorpusConfig(urls="x", retry=["dns", "http_429", "429", "timeout"])) == []


def test_every_reason_of_the_fetch_can_be_retried() -> None:
    sources = [f.read_text() for f in Path(scheduler.__file__).parent.rglob("*.py")]
    raised = {r for text in sources for r in re.findall(r'(?:Fetch|Body)Error\(\s*"(\w+)"', text)}
    assert len(raised) > 15
    assert raised | scheduler.DROPPED_REASONS | {"out_of_budget", "robots_unreachable"} == set(FETCH_REASONS)


# ---- a second crawl ---------------------------------------------------------------------------------------------


def conditional(body: bytes, etag: str = "", last_modified: str = "", **headers: str) -> Handler:
    """Answers 304 when asked by the validator that it gave."""

    async def handle(request: Request, writer: asyncio.StreamWriter) -> None:
        known = (etag and request.headers.get("if-none-match") == etag) or (
            not etag and last_modified and request.headers.get("if-modified-since") == last_modified
        )
        fields = {"ETag": etag, "Last_Modified": last_modified, **headers}
        if known:
            writer.write(response(b"", "304 Not Modified", **{**fields, "Content_Length": "", "Content_Type": ""}))
        else:
            writer.write(response(body, **fields))

    return handle


def corpus_table(run: Crawl) -> None:
    """Write the page tables where a pipeline would."""
    for shard in run.shards:
        pages, _ = finish_shard(shard, run.folder)
        pq.write_table(pages, shard.folder / f"{shard.number:05d}.parquet")


def second(folder: Path, before: Crawl, urls: list[str]) -> Crawl:
    run = Crawl(folder, urls, allow_addresses=before.config.allow_addresses)
    run.shards = [
        FetchShard(s.urls, s.folder, s.number, before.folder / "fetch" / f"{s.number:05d}.parquet") for s in run.shards
    ]
    return run


def test_pages_that_did_not_change_are_not_sent_again(tmp_path: Path, site: Site) -> None:
    date = "Sat, 21 Nov 2026 10:00:00 GMT"
    site.pages = {
        "/robots.txt": NOT_FOUND,
        "/etag": conditional(HTML + b"etag", etag='W/"a-1"'),
        "/date": conditional(HTML + b"date", last_modified=date),
        "/moved": redirect("/target"),
        "/target": conditional(HTML + b"target", etag='"t"'),
        "/changed": conditional(HTML + b"old", etag='"1"'),
        "/plain": response(HTML + b"plain"),
        "/hidden": conditional(HTML + b"hidden", etag='"h"'),
        "/odd": conditional(HTML + b"odd", etag='"\xff"'),
    }
    paths = ["/etag", "/date", "/moved", "/changed", "/plain", "/hidden", "/odd"]
    urls = [f"http://127.0.0.1:{site.port}{p}" for p in paths]
    first = Crawl(tmp_path / "first", urls, allow_addresses=[f"127.0.0.1:{site.port}"])
    assert {outcome(r) for r in first.run().values()} == {("kept", None)}
    assert not any({"if-none-match", "if-modified-since"} & r.headers.keys() for r in site.requests)
    corpus_table(first)

    site.pages["/changed"] = conditional(HTML + b"new", etag='"2"')
    site.pages["/hidden"] = conditional(HTML + b"hidden", etag='"h"', X_Robots_Tag="noindex")
    site.requests.clear()
    again = second(tmp_path / "second", first, urls)
    results = {u.rpartition("/")[2]: r for u, r in again.run().items()}
    sent = {r.path: r.headers for r in site.requests}
    assert sent["/etag"]["if-none-match"] == 'W/"a-1"'
    assert sent["/date"]["if-modified-since"] == date
    assert sent["/target"]["if-none-match"] == '"t"'
    assert "if-none-match" not in sent["/moved"]
    assert "if-none-match" not in sent["/odd"]  # what is no ASCII could not be sent back as it came
    assert outcome(results.pop("hidden")) == ("dropped", "noindex")
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    unchanged = {name for name, r in results.items() if "not_modified" in json.loads(r["numbers"])}
    assert unchanged == {"etag", "date", "moved"}
    for name, row in results.items():
        text = {"moved": b"target", "changed": b"new"}.get(name, name.encode())
        assert again.body(row) == HTML + text
        assert row["page"]["warc_file"].startswith(str(first.folder.resolve()) if name in unchanged else "warc/")
    records = []
    with open(tmp_path / "second" / "warc" / "00000-000.warc.gz", "rb") as stream:
        for record in ArchiveIterator(stream):
            records.append((record.rec_type, record.rec_headers.get_header("WARC-Refers-To-Target-URI")))
            if record.rec_type == "revisit":
                assert record.rec_headers.get_header("WARC-Profile").endswith("/revisit/server-not-modified")
                assert record.http_headers.get_statuscode() == "304"
                assert record.rec_headers.get_header("WARC-Refers-To-Date")
    refers = sorted(str(url).rpartition("/")[2] for kind, url in records if kind == "revisit")
    assert refers == ["date", "etag", "target"]
    assert again.check_warcs() == 1
    assert collections.Counter(e.reason for e in warc.index_warc(tmp_path / "second/warc/00000-000.warc.gz")) == {
        "revisit": 3,
        None: 3,
    }

    corpus_table(again)  # a third crawl asks by what the second one heard, and finds the first one's bytes
    third = second(tmp_path / "third", again, urls)
    results = {u.rpartition("/")[2]: r for u, r in third.run().items()}
    assert third.body(results["etag"]) == HTML + b"etag"
    assert results["etag"]["page"]["warc_file"].startswith(str(first.folder.resolve()))
    assert "not_modified" in json.loads(results["changed"]["numbers"])


def test_what_the_earlier_corpus_lost_is_sent_again(tmp_path: Path, site: Site) -> None:
    site.pages = {f"/{i}": conditional(HTML + b"%d" % i, etag=f'"{i}"') for i in range(4)}
    urls = [f"http://127.0.0.1:{site.port}/{i}" for i in range(4)]
    first = Crawl(tmp_path / "first", urls, allow_addresses=[f"127.0.0.1:{site.port}"])
    rows = first.run()
    corpus_table(first)
    file = tmp_path / "first" / "warc" / "00000-000.warc.gz"
    data = bytearray(file.read_bytes())
    data[rows[urls[1]]["page"]["warc_offset"] + 60] ^= 0xFF
    file.write_bytes(data)
    site.requests.clear()
    again = second(tmp_path / "second", first, urls)
    results = again.run()
    assert {outcome(r) for r in results.values()} == {("kept", None)}
    assert collections.Counter(site.paths()) == {"/0": 1, "/1": 2, "/2": 1, "/3": 1}
    assert [again.body(results[u]) for u in urls] == [HTML + b"%d" % i for i in range(4)]


def test_a_304_that_nobody_asked_for_is_no_page(tmp_path: Path, site: Site) -> None:
    site.pages = {"/": response(b"", "304 Not Modified", Content_Length="", ETag='"x"')}
    (row,) = (
        Crawl(tmp_path, [f"http://127.0.0.1:{site.port}/"], allow_addresses=[f"127.0.0.1:{site.port}"]).run().values()
    )
    assert outcome(row) == ("failed", "http_status")
    assert row["detail"] == "304"


def test_a_torn_revisit_record_is_fetched_again(tmp_path: Path, site: Site) -> None:
    site.pages = {"/a": conditional(HTML, etag='"a"')}
    url = f"http://127.0.0.1:{site.port}/a"
    first = Crawl(tmp_path / "first", [url], allow_addresses=[f"127.0.0.1:{site.port}"])
    first.run()
    corpus_table(first)
    again = second(tmp_path / "second", first, [url])
    again.run()
    journal = journal_path(tmp_path / "second" / "fetch", 0)
    journal.write_bytes(b"".join(x for x in journal.read_bytes().splitlines(keepends=True) if b'"mark"' not in x))
    file = tmp_path / "second" / "warc" / "00000-000.warc.gz"
    whole = file.read_bytes()
    asked = len(site.paths())
    again.run()  # nothing vouches for the record, but it is whole
    assert len(site.paths()) == asked
    journal.write_bytes(b"".join(x for x in journal.read_bytes().splitlines(keepends=True) if b'"mark"' not in x))
    line = read_journal(journal)[0]
    data = bytearray(whole)
    data[(line["offset"] + line["end"]) // 2 - 100] ^= 0xFF
    file.write_bytes(data)
    (row,) = again.run().values()
    assert outcome(row) == ("kept", None)
    assert again.check_warcs() == 1


# ---- dead links and archives at hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "detail", "dead"),
    [
        ("dns", "no such host", True),
        ("timeout", "x", True),
        ("http_status", "404", True),
        ("http_status", "410", True),
        ("http_status", "503", True),
        ("http_status", "403", False),
        ("http_status", "451", False),
        ("http_status", "302 without Location", False),
        ("http_status", "429", False),
        ("robots_unreachable", "x", False),
        ("too_large", "x", False),
        ("out_of_budget", "x", False),
    ],
)
def test_dead_is_not_refused(reason: str, detail: str, dead: bool) -> None:
    assert rescue.is_dead(reason, detail) is dead


def test_an_index_of_any_size_is_split_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables, cut into many spilled pieces, against the same done in memory at once."""
    monkeypatch.setattr(spill, "SPILL_BYTES", 2000)
    chance = random.Random(7)
    fields = dict.fromkeys(PAGE_SCHEMA.names) | {"status": 200, "content_type": "text/html", "payload_digest": ""}
    rows = [
        {
            **fields,
            "index": i,
            "url": f"http://h{chance.randrange(30)}.example.org:80/{chance.randrange(9)}?utm_source=x",
            "fetched_at": f"2026-11-{chance.randrange(1, 29):02d}T00:00:00Z",
            "warc_file": "x.warc.gz",
            "warc_offset": i,
        }
        for i in range(600)
    ] + [{**fields, "index": 600, "url": "no url", "fetched_at": "2026-11-01T00:00:00Z"}]
    chance.shuffle(rows)
    indexes = [tmp_path / f"{k}.in" for k in range(2)]
    for k, index in enumerate(indexes):
        part = [
            row | {"final_url": row["url"], "domain": "", "warc_file": "", "warc_offset": row["index"]} for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(part[k::2], schema=PAGE_SCHEMA), index)
    outputs = [tmp_path / "out" / f"{k}.parquet" for k in range(4)]
    outputs[0].parent.mkdir()
    counts = rescue.split_index(indexes, outputs, UrlListConfig())
    newest: dict[str, str] = {}
    for row in rows[:]:
        if row["url"] != "no url":
            url = row["url"].replace(":80/", "/").partition("?")[0]
            newest[url] = max(newest.get(url, ""), row["fetched_at"])
    found = [row for output in outputs for row in pq.read_table(output).to_pylist()]
    assert counts == {"rows": len(newest)}
    assert {row["url"]: row["fetched_at"] for row in found} == newest
    for k, output in enumerate(outputs):
        domains = set(pq.read_table(output)["domain"].to_pylist())
        assert all(shard_of(domain, 4) == k for domain in domains)
    assert [f.name for f in outputs[0].parent.iterdir() if "tmp" in f.name] == []


def pipeline_config(folder: Path, site: Site, out: str, **settings: Any) -> CorpusConfig:
    fetch = {
        "allow_addresses": [f"127.0.0.1:{site.port}"],
        "hosts_file": str(folder / "hosts"),
        "contact": "https://example.org/crawler",
        "delay_s": 0.0,
        "retries": 0,
        **settings.pop("fetch", {}),
    }
    return CorpusConfig(
        urls=str(folder / "list.txt"),
        out=str(folder / out),
        shards=settings.pop("shards", 0),
        workers=1,
        progress=False,
        fetch=FetchConfig(**fetch),
        **settings,
    )


def ledger(out: Path) -> dict[str, dict[str, Any]]:
    rows = [r for f in sorted((out / "ledger").glob("*.parquet")) for r in pq.read_table(f).to_pylist()]
    return {r["url"].rpartition(".test")[2].partition("/")[2]: r for r in rows}


PROSE = "This is a page about the mountains and the people who live in them, and about the tea that they drink. " * 20


def prose(title: str) -> bytes:
    return f"<html><head><title>{title}</title></head><body><article><p>{title}. {PROSE}</p></article></body>".encode()


@pytest.mark.slow
def test_the_whole_pipeline_retries_refetches_and_rescues(tmp_path: Path, site: Site) -> None:
    """First crawl → one with retry → a second crawl by `since` → dead links rescued from the first one's archive."""
    site.pages = {
        "/robots.txt": NOT_FOUND,
        "/stays": conditional(prose("stays"), etag='"s"'),
        "/dies": response(prose("dies")),
        "/leaves": response(prose("leaves")),
        "/hides": response(prose("hides").replace(b"<title>", b"<meta name=robots content=noindex><title>")),
        "/busy": response(b"", "429 Too Many Requests"),
        "/never": NOT_FOUND,
    }
    (tmp_path / "hosts").write_text("127.0.0.1 a.test b.test\n")
    paths = [p for p in site.pages if p != "/robots.txt"]
    (tmp_path / "list.txt").write_text(
        "".join(f"http://{'ab'[i % 2]}.test:{site.port}{p}\n" for i, p in enumerate(paths))
    )
    lenient = {"respect_noai": False}
    stages = ["urls", "fetch", "extract", "filter", "dedup", "decontaminate"]
    first = pipeline_config(tmp_path, site, "first", shards=3, stages=stages, fetch=lenient)
    assert build_corpus(first) == 0
    rows = ledger(tmp_path / "first")
    assert outcome(rows["busy"]) == ("failed", "http_status")

    site.pages["/busy"] = response(prose("busy"))
    site.requests.clear()
    first.retry = ["http_429"]
    assert build_corpus(first) == 0
    assert site.paths() == ["/busy"]
    rows = ledger(tmp_path / "first")
    assert len(rows) == len(paths)
    assert rows["busy"]["stage"] != "fetch"
    summary = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert summary["urls"]["in"] == len(paths) == sum(summary["urls"][s] for s in ("kept", "dropped", "failed"))
    site.requests.clear()
    site.pages["/dies"] = response(b"", "410 Gone")
    site.pages["/hides"] = NOT_FOUND
    site.pages["/leaves"] = response(b"", "403 Forbidden")
    settings = {"since": str(tmp_path / "first"), "rescue": str(tmp_path / "first" / "warc")}
    again = pipeline_config(tmp_path, site, "second", stages=stages, fetch=settings)
    again.dedup.near = False  # the pages are much alike
    assert build_corpus(again) == 0
    rows = ledger(tmp_path / "second")
    assert len(rows) == len(paths)
    assert json.loads((tmp_path / "second" / "shards.json").read_text())["shards"] == 3
    assert outcome(rows["stays"]) == ("kept", None)
    assert json.loads(rows["stays"]["numbers"])["not_modified"] == 1
    assert outcome(rows["dies"]) == ("kept", None)
    assert json.loads(rows["dies"]["numbers"])["rescued"] == "http_status"
    assert outcome(rows["leaves"]) == outcome(rows["never"]) == ("failed", "http_status")
    assert outcome(rows["hides"]) == ("dropped", "noindex")
    documents = [r for f in (tmp_path / "second" / "documents").glob("*.parquet") for r in pq.read_table(f).to_pylist()]
    by_title = {d["title"]: d for d in documents}
    assert by_title.keys() == {"stays", "dies", "busy"}
    assert json.loads(by_title["dies"]["numbers"])["rescued"] == "http_status"
    assert by_title["dies"]["text"].startswith("dies. This is a page")
    assert by_title["stays"]["text"].startswith("stays. This is a page")
    assert "rescued" not in json.loads(by_title["busy"]["numbers"])

    again.fetch.rescue = ""  # without it those links are dead again
    assert build_corpus(again) == 0
    assert outcome(ledger(tmp_path / "second")["dies"]) == ("failed", "http_status")


def test_a_second_crawl_needs_the_same_shards(tmp_path: Path, site: Site) -> None:
    (tmp_path / "hosts").write_text("")
    (tmp_path / "list.txt").write_text(f"http://127.0.0.1:{site.port}/\n")
    site.default = response()
    assert build_corpus(pipeline_config(tmp_path, site, "first", shards=2, stages=["urls", "fetch"])) == 0
    since = {"since": str(tmp_path / "first")}
    other = pipeline_config(tmp_path, site, "other", shards=3, stages=["urls", "fetch"], fetch=since)
    with pytest.raises(InputError, match=r"fetch\.since=.*must be a corpus of 3 shards"):
        build_corpus(other)
    itself = pipeline_config(tmp_path, site, "first", fetch=since)
    with pytest.raises(ConfigError, match=r"fetch\.since=.*must be another corpus than out"):
        build_corpus(itself)
    nothing = pipeline_config(tmp_path, site, "nothing", fetch={"rescue": str(tmp_path / "missing")}, shards=2)
    with pytest.raises(InputError, match=r"fetch\.rescue=.*there is no such WARC file"):
        build_corpus(nothing)
    assert nothing.source is Source.urls
