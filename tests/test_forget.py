"""Take-downs: what goes, what stays byte for byte as it was, and the steps that saw what is gone.

A corpus of real prose is built once from a WARC file; what a take-down leaves of it is held against one that never had
what was taken down.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import PROSE, documents, ledger, settings, tree, warc_pages, write_lines, write_texts
from inline import inline_module  # noqa: F401 (a fixture that every test here uses)
from omegaconf import OmegaConf
from warcio.archiveiterator import ArchiveIterator

from data_pipeline import forget
from data_pipeline.config import (
    CorpusConfig,
    QualityConfig,
    Source,
    UrlListConfig,
)
from data_pipeline.layout import Corpus
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import ConfigError, CorruptionError, InputError
from data_pipeline.token_shards import TokenShards
from gpt2train.cli import main
from gpt2train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("inline_module")


def test_what_is_to_be_forgotten() -> None:
    rules = forget.parse_entries(["Example.COM", ".sub.example.org", "https://one.example.net/a?b=1", "dataset:x#3"])
    for addresses in (
        ("https://example.com/",),
        ("http://www.example.com:8080/x",),
        ("https://a.sub.example.org/",),
        ("https://other.test/", "https://example.com/landing"),
        ("https://one.example.net/a?b=1",),
        ("dataset:x#3",),
        ("dataset:y", None, "example.com"),
    ):
        assert rules.because(*addresses), addresses
    for addresses in (
        ("https://notexample.com/",),
        ("https://example.com.evil.test/",),
        ("https://example.org/",),
        ("https://one.example.net/a",),
        ("https://[broken/",),
        (None, ""),
    ):
        assert rules.because(*addresses) is None, addresses


def test_a_domain_is_found_however_its_urls_are_written() -> None:
    rules = forget.parse_entries(
        ["müller.example", "trail.example", "ex.example", "https://u:secret@t.example/x?utm_source=1"]
    )
    for url in (
        "http://müller.example/ä",
        "http://xn--mller-kva.example/",
        "https://www.Trail.example./",
        "http://%65x.example:8080/p",
        "ftp://EX.example./file",
        "//ex.example/p",
        "ex.example/p",
        "HTTPS://t.example:443/x?utm_source=1#top",
        "https://me:mine@t.example/x?utm_source=1",
    ):
        assert rules.because(url), url
    for url in ("https://t.example/x", "urn:trail.example", "dataset:ex.example#1", "a title about ex.example", ""):
        assert rules.because(url) is None, url
    assert "secret" not in str(rules.urls)
    # A URL list was stripped of tracking parameters before its pages were fetched.
    listed = forget.parse_entries(["https://t.example/x?utm_source=1"], UrlListConfig())
    assert listed.because("https://t.example/x")


def test_what_names_no_domain_takes_none() -> None:
    bad = ["d3.example/p3", "//d3.example/p3", "a@d3.example", "d3.example:8080/x", "d3.example?p", "*.d3.example"]
    bad += ["exa mple", "d3.example#p", "example", "co.uk"]
    with pytest.raises(InputError) as e:
        forget.parse_entries(["good.example", *bad, "https://d3.example/p3"])
    assert [line.split(": ")[1] for line in str(e.value).split("\n")] == bad
    assert "write d3.example;" in str(e.value)


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """A corpus from a WARC file; the longest of three near copies is bad.test's."""
    folder = tmp_path_factory.mktemp("crawl")
    texts = {f"https://site{i}.test/": text for i, text in enumerate(PROSE[:16])}
    texts["https://www.bad.test/1"] = PROSE[20] + "\n\nAnd that is all there is to say about it, dear reader."
    texts["https://site.test/copy"] = PROSE[20]
    texts["https://bad.test/2"] = PROSE[21]
    warc_pages(folder / "pages.warc.gz", texts)
    config = settings(folder / "out", folder / "pages.warc.gz", source=Source.warc, quality=QualityConfig(), shards=4)
    build_corpus(config)
    assert ledger(folder / "out")["https://site.test/copy"]["reason"] == "near_duplicate"
    return config


def fabricated_run(folder: Path, data: Path) -> TrainConfig:
    """A run folder as training leaves it: 40 steps of 2 sequences of 64 tokens."""
    folder.mkdir()
    config = TrainConfig(
        model=ModelConfig("tiny", layers=1, channels=8, heads=1, context=64),
        data=DataConfig(path=str(data)),
        batch=BatchConfig(sequences=2),
        steps=60,
        seed=3,
    )
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in range(1, 41)))
    fingerprint = TokenShards.open(data).fingerprint
    (folder / "versions.json").write_text(json.dumps({"data": {"path": str(data), "fingerprint": fingerprint}}))
    return config


def test_a_take_down_is_a_corpus_that_never_had_it(
    crawl: CorpusConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(crawl.out, out)
    before = json.loads((out / "tokens/manifest.json").read_text())
    was_in = {r["url"] for r in documents(out).values()}
    run = fabricated_run(tmp_path / "run", out / "tokens")
    expected = []
    split = TokenShards.open(out / "tokens").split("train")
    gone = [d for d in split.documents(0, split.tokens) if "bad.test" in d.url]
    from gpt2train.trace import documents_of_step

    for step in range(1, 41):
        if any("bad.test" in seen.document.url for seen in documents_of_step(split, run, step)):
            expected.append(step)
    assert gone
    assert expected

    (tmp_path / "domains.txt").write_text("bad.test\n")
    assert main(["corpus", f"forget={tmp_path / 'domains.txt'}", f"out={out}", f"runs=[{tmp_path / 'run'}]"]) == 0
    said = capfd.readouterr()
    assert f"{len(expected)} of 40 steps saw {len(gone)} texts" in said.out
    listed = said.out.strip().rsplit(": ", 1)[1]
    numbers = [n for part in listed.split(", ") for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)]
    assert numbers == expected

    rows_now = ledger(out)
    assert {u: r["reason"] for u, r in rows_now.items() if r["reason"] == "forgotten"} == dict.fromkeys(
        ("https://www.bad.test/1", "https://bad.test/2", "https://site.test/copy"), "forgotten"
    )
    assert rows_now["https://site.test/copy"]["detail"] == "copy of https://www.bad.test/1"
    assert was_in - set(documents(out)) == {"https://www.bad.test/1", "https://bad.test/2"}
    assert set(documents(out)) <= was_in
    needle = "dear reader"
    for file in sorted(out.rglob("*.parquet")):
        assert not any(needle in str(v) for row in pq.read_table(file).to_pylist() for v in row.values()), file

    # Only the shards concerned changed.
    after = json.loads((out / "tokens/manifest.json").read_text())
    old = {f["file"]: f["sha256"] for s in before["splits"].values() for f in s["files"]}
    new = {f["file"]: f["sha256"] for s in after["splits"].values() for f in s["files"]}
    concerned = concerned_files(before, Path(crawl.out) / "tokens")
    assert {name for name in old if new.get(name) != old[name]} == concerned
    assert 0 < len(concerned) < len(old)
    assert f"{len(new) - len([n for n in new if old.get(n) == new[n]])} files written" in said.err

    # The same bytes as a corpus whose pages were refused from the start, and nothing to do the next time.
    fresh = tmp_path / "fresh"
    (fresh / "tokenize").mkdir(parents=True)
    shutil.copy(out / "forget.json", fresh / "forget.json")
    shutil.copy(out / "tokenize/forgotten.parquet", fresh / "tokenize/forgotten.parquet")
    build_corpus(replace(crawl, out=str(fresh)))
    for folder in ("extract", "filter", "dedup", "decontaminate", "documents", "ledger", "tokens"):
        made = {n: h for n, h in tree(fresh / folder).items() if not n.endswith(".done.json")}
        assert made == {n: h for n, h in tree(out / folder).items() if not n.endswith(".done.json")}, folder
    capfd.readouterr()
    state = tree(out / "tokens")
    build_corpus(replace(crawl, out=str(out)))
    assert "again" not in capfd.readouterr().err
    assert tree(out / "tokens") == state
    TokenShards.open(out / "tokens")


def take_down(out: Path, *entries: str) -> None:
    listed = out.with_name("list.txt")
    listed.write_text("\n".join(entries))
    build_corpus(CorpusConfig(out=str(out), forget=str(listed), progress=False, workers=1))


def test_a_take_down_runs_all_that_holds_texts_and_fetches_nothing(
    crawl: CorpusConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever stages the last run was asked for."""
    out = tmp_path / "out"
    shutil.copytree(crawl.out, out)
    build_corpus(replace(crawl, out=str(out), stages=["fetch"]))
    capfd.readouterr()
    take_down(out, "bad.test")
    assert "index" not in capfd.readouterr().err
    assert len(documents(out)) == len(documents(Path(crawl.out))) - 2
    assert not any("bad.test" in url for url in documents(out))
    assert len(TokenShards.open(out / "tokens").manifest["splits"]) == 2
    table = pq.read_table(out / "tokens/documents.parquet")
    assert not any("bad.test" in url for url in table["url"].to_pylist())
    # What there was not before is not made.
    half = tmp_path / "half"
    build_corpus(replace(crawl, out=str(half), stages=["fetch", "extract", "filter"]))
    build_corpus(replace(crawl, out=str(half), stages=["fetch"]))
    take_down(half, "bad.test")
    assert not any((half / "dedup").glob("*"))
    for stage in ("extract", "filter"):
        rows = [r for f in (half / stage).glob("*.verdicts.parquet") for r in pq.read_table(f).to_pylist()]
        assert sum("bad.test" in r["url"] for r in rows if r["state"] == "kept") == 0, stage


def test_a_take_down_that_is_forgotten_itself_is_told(
    crawl: CorpusConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(crawl.out, out)
    take_down(out, "bad.test")
    rules, places = out / "forget.json", out / "tokenize/forgotten.parquet"
    whole = {path: path.read_bytes() for path in (rules, places)}
    again = replace(crawl, out=str(out))
    state = tree(out)

    def fails(match: str) -> None:
        for run in (lambda: build_corpus(again), lambda: take_down(out, "site1.test")):
            with pytest.raises(CorruptionError, match=match):
                run()
        for path, content in whole.items():
            path.write_bytes(content)

    rules.write_bytes(whole[rules].replace(b"bad.test", b"bed.test"))
    fails(r"forget\.json: is damaged \(sha256 .*if you edited it")
    rules.write_bytes(whole[rules].replace(b"sha256", b"rha256"))
    fails(r"forget\.json: is damaged")
    rules.unlink()
    fails(r"forget\.json: is missing, but .*forgotten\.parquet knows of a take-down")
    rules.unlink()
    places.unlink()
    fails(r"forget\.json: is missing, but .*extract.*done\.json knows")
    places.unlink()
    fails(r"forgotten\.parquet: is missing; .*remove .*tokens\.done\.json")
    digests = pq.read_table(places)["digest"].to_pylist()
    rewritten = pq.read_table(places).set_column(1, "digest", pa.array([d[::-1] for d in digests]))
    pq.write_table(rewritten, places)
    fails(r"forgotten\.parquet: is damaged \(not what was written\)")
    for place in range(0, len(whole[places]), 97):  # Parquet has no checksums of its own
        flipped = bytearray(whole[places])
        flipped[place] ^= 1
        places.write_bytes(flipped)
        try:
            assert forget.read_tombstones(places).equals(pq.read_table(pa.BufferReader(whole[places])))
        except CorruptionError:
            continue
    places.write_bytes(whole[places])
    build_corpus(again)
    capfd.readouterr()
    assert {n: h for n, h in tree(out).items() if n not in ("config.yaml", ".lock")} == {
        n: h for n, h in state.items() if n not in ("config.yaml", ".lock")
    }

    # Edited by hand: without its digest it is taken as it is, and sealed.
    rules.write_text('{"domains": [], "urls": {}}')
    build_corpus(again)
    assert "sha256" in json.loads(rules.read_text())
    assert sum("bad.test" in url for url in documents(out)) == 2


def test_nothing_of_a_killed_packing_outlives_the_last_document(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.jsonl", PROSE[:3])
    out = tmp_path / "out"
    build_corpus(settings(out, tmp_path / "texts.jsonl"))
    for killed in (".tokens.partial", ".tokens.old"):
        shutil.copytree(out / "tokens", out / killed)
    take_down(out, *(f"site{i}.test" for i in range(3)))
    assert not [p for p in out.iterdir() if "tokens" in p.name]


def test_of_equal_urls_only_the_copies_go(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A dataset's URLs need not be unique: one text of a forum is a copy of what was taken down."""
    items = [{"url": "https://gone.test/x", "text": PROSE[0] + "\n\nLonger."}]
    items += [{"url": "https://forum.test/", "text": text} for text in PROSE[:6]]
    write_lines(tmp_path / "texts.jsonl", items)
    config = settings(tmp_path / "out", tmp_path / "texts.jsonl")
    build_corpus(config)
    capfd.readouterr()
    take_down(tmp_path / "out", "gone.test")
    assert "1 texts go, and 1 copies" in capfd.readouterr().err
    rows = [r for f in (tmp_path / "out/documents").glob("*.parquet") for r in pq.read_table(f).to_pylist()]
    assert sorted(r["text"] for r in rows) == sorted(PROSE[1:6])
    build_corpus(config)
    assert "again" not in capfd.readouterr().err


def concerned_files(manifest: dict[str, object], tokens: Path) -> set[str]:
    """Names of the .bin files that hold a document of bad.test, by the positions of documents.parquet."""
    found = set()
    table = pq.read_table(tokens / "documents.parquet").to_pylist()
    splits: dict[str, dict[str, list[dict[str, object]]]] = manifest["splits"]  # type: ignore[assignment]
    for name, split in splits.items():
        ends = np.cumsum([int(str(f["tokens"])) for f in split["files"]])
        for row in table:
            if row["split"] == name and "bad.test" in row["url"]:
                found.add(str(split["files"][int(np.searchsorted(ends, row["position"], side="right"))]["file"]))
    return found


@pytest.mark.soak
def test_a_killed_take_down_is_finished_by_the_next(crawl: CorpusConfig, tmp_path: Path) -> None:
    """Whole processes, killed at moments that spread over the run; the last one is left to finish."""
    (tmp_path / "domains.txt").write_text("bad.test\n")

    def command(out: Path) -> list[str]:
        settings = [f"forget={tmp_path / 'domains.txt'}", f"out={out}", "workers=1", "progress=false"]
        return [sys.executable, "-m", "gpt2train", "corpus", *settings]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(crawl.out, whole)
    shutil.copytree(crawl.out, killed)
    started = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True, timeout=200)
    took = time.monotonic() - started
    kills = 0
    for share in (0.5, 0.7, 0.85):
        process = subprocess.Popen(command(killed), stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=share * took)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills
    subprocess.run(command(killed), check=True, capture_output=True, timeout=200)
    for folder in ("extract", "documents", "ledger", "tokens"):
        assert tree(killed / folder) == tree(whole / folder), folder
    assert json.loads((killed / "forget.json").read_text()) == json.loads((whole / "forget.json").read_text())


def test_blanked_responses_leave_all_others_where_they_were(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "warc").mkdir(parents=True)
    texts = {f"https://site{i}.test/": PROSE[i] for i in range(5)}
    offsets = warc_pages(out / "warc/a.warc.gz", texts)
    before = (out / "warc/a.warc.gz").read_bytes()
    shutil.copy(out / "warc/a.warc.gz", tmp_path / "mine.warc.gz")
    urls = ["https://site1.test/", "https://site3.test/"]
    table = pa.table(
        {
            "warc_file": ["warc/a.warc.gz", "warc/a.warc.gz", str(tmp_path / "mine.warc.gz"), "../mine.warc.gz", None],
            "warc_offset": [*(offsets[u] for u in urls), 0, 0, None],
        }
    )
    assert forget.blank_responses(Corpus(out), table) == (2, 3)
    assert (tmp_path / "mine.warc.gz").read_bytes() == before
    after = (out / "warc/a.warc.gz").read_bytes()
    assert len(after) == len(before)
    with open(out / "warc/a.warc.gz", "rb") as f:
        records = []
        iterator = ArchiveIterator(f)
        for record in iterator:
            uri = record.rec_headers.get_header("WARC-Target-URI")
            body = record.content_stream().read()
            records.append((record.rec_type, uri, iterator.get_record_offset()))
            assert uri is None or b"<p>" + escape(texts[uri])[:20].encode() in body
    assert [r for r in records if r[0] == "response"] == [("response", u, offsets[u]) for u in texts if u not in urls]
    assert [r[0] for r in records].count("metadata") == 2
    assert forget.blank_responses(Corpus(out), table) == (2, 3), "a second time changes nothing"
    assert (out / "warc/a.warc.gz").read_bytes() == after


def test_a_list_without_use_is_refused(crawl: CorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"forget=.*No such file"):
        build_corpus(replace(crawl, forget=str(tmp_path / "none.txt")))
    (tmp_path / "list.txt").write_text("bad.test\n")
    with pytest.raises(InputError, match="is no corpus folder"):
        build_corpus(replace(crawl, out=str(tmp_path / "empty"), forget=str(tmp_path / "list.txt")))
    with pytest.raises(ConfigError, match="belongs to forget"):
        build_corpus(replace(crawl, forget_archive=True))
