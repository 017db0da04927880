"""A corpus folder that is used again, wrongly or for the last time: what is left of it, and what the user is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import corpora
import pyarrow.parquet as pq
import pytest
from corpora import files_of, warc_pages, write_texts
from inline import inline, work_inline  # noqa: F401 (a fixture that every test here uses)

from data_pipeline import stages, tasks, token_shards
from data_pipeline import texts as datasets
from data_pipeline.account.ledger import why_nothing_is_left
from data_pipeline.account.report import write_corpus_report
from data_pipeline.account.why import WhyConfig, why
from data_pipeline.bounds import check
from data_pipeline.clean import language
from data_pipeline.config import (
    LANGUAGES,
    STAGES,
    CorpusConfig,
    CorpusReportConfig,
    DecontaminateConfig,
    DedupConfig,
    ExtractConfig,
    LanguageConfig,
    QualityConfig,
    Source,
    TokenizeConfig,
)
from data_pipeline.crawl import urls
from data_pipeline.executors import stopped_by_sigterm
from data_pipeline.layout import Corpus, read_config
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import CorruptionError, InputError, StoppedError
from data_pipeline.store import read_signed, sha256_file, write_signed

PROSE = corpora.PROSE[:6]
pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    """A corpus of six texts in three shards, not built yet."""
    return CorpusConfig(
        source=Source.dataset,
        path=str(write_texts(tmp_path / "texts.jsonl", PROSE)),
        out=str(tmp_path / "out"),
        shards=3,
        workers=1,
        progress=False,
        language=LanguageConfig(keep=[]),
        tokenize=TokenizeConfig(validation_fraction=0.2),
    )


def texts_of(out: Path) -> list[str]:
    files = sorted((out / "documents").glob("*.parquet"))
    return [text for file in files for text in pq.read_table(file)["text"].to_pylist()]


# ── fewer shards than before ────────────────────────────────────────────────────────────────────────────────────────


def test_fewer_shards_leave_nothing_of_the_higher_ones(config: CorpusConfig, tmp_path: Path) -> None:
    out = Path(config.out)
    build_corpus(config)
    for stale in ("fetch/00002.journal.jsonl", "urls/00001.parquet", "warc/00002-000.warc.gz", "fetch/retry.json"):
        (out / stale).parent.mkdir(exist_ok=True)
        (out / stale).touch()
    build_corpus(replace(config, path=str(write_texts(tmp_path / "other.jsonl", PROSE[:2])), shards=1))
    left = {p.relative_to(out).as_posix() for p in out.rglob("0000[1-9]*")}
    assert left == {"warc/00002-000.warc.gz"}
    assert (out / "fetch/retry.json").exists()
    assert sorted(texts_of(out)) == sorted(PROSE[:2])
    fresh = tmp_path / "fresh"
    build_corpus(replace(config, path=str(tmp_path / "other.jsonl"), shards=1, out=str(fresh)))
    for folder in ("extract", "filter", "dedup", "decontaminate", "documents", "tokenize", "ledger"):
        assert sorted(p.name for p in (out / folder).iterdir()) == sorted(p.name for p in (fresh / folder).iterdir())


def test_what_is_no_longer_measured_leaves_no_file(config: CorpusConfig, tmp_path: Path) -> None:
    build_corpus(replace(config, dedup=DedupConfig(plant=4)))
    assert list((tmp_path / "out/dedup").glob("*planted*"))
    build_corpus(config)
    build_corpus(replace(config, out=str(tmp_path / "fresh")))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_warc_file_that_was_taken_out_leaves_no_file(config: CorpusConfig, tmp_path: Path) -> None:
    folder = tmp_path / "warcs"
    folder.mkdir()
    for name, texts in (("a.warc.gz", PROSE[:3]), ("b.warc.gz", PROSE[3:])):
        warc_pages(folder / name, {f"https://{name}.test/{i}": text for i, text in enumerate(texts)})
    config = replace(config, source=Source.warc, path=str(folder))
    build_corpus(config)
    (folder / "b.warc.gz").unlink()
    build_corpus(config)
    build_corpus(replace(config, out=str(tmp_path / "fresh")))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_warc_files_of_one_name_in_two_folders(config: CorpusConfig, tmp_path: Path) -> None:
    folder = tmp_path / "warcs"
    for place, texts in (("a", PROSE[:2]), ("b", PROSE[2:])):
        (folder / place).mkdir(parents=True)
        warc_pages(folder / place / "x.warc.gz", {f"https://{place}.test/{i}": t for i, t in enumerate(texts)})
    build_corpus(replace(config, source=Source.warc, path=str(folder)))
    out = tmp_path / "out"
    assert [pq.read_metadata(out / f"fetch/file_0000{i}.parquet").num_rows for i in (0, 1)] == [2, 4]
    markers = [read_signed(out / f"fetch/file_0000{i}.done.json") for i in (0, 1)]
    assert [marker and marker["counts"]["rows"] for marker in markers] == [2, 4]


@pytest.mark.parametrize(
    "files",
    [["documents/2024.pdf"], ["fetch/00099.notes.txt"], ["README.md", "config.yaml"], ["tokens/x.bin"]],
)
def test_a_folder_with_files_of_somebody_else_is_refused(
    config: CorpusConfig, tmp_path: Path, files: list[str]
) -> None:
    out = tmp_path / "out"
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("{}")
    with pytest.raises(InputError, match="which a corpus would write over, and no corpus; give a new folder"):
        build_corpus(config)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == sorted(files)


def test_a_folder_with_other_names_is_taken(config: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/list.txt").write_text("mine")
    build_corpus(config)
    (tmp_path / "out/config.yaml").unlink()  # markers alone say that it is a corpus
    build_corpus(config)
    assert (tmp_path / "out/list.txt").read_text() == "mine"


def test_a_validation_split_of_few_documents_is_said(
    config: CorpusConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "texts.jsonl", [f"{text} {i}" for i in range(6) for text in PROSE])
    build_corpus(replace(config, dedup=DedupConfig(near=False), tokenize=TokenizeConfig(validation_fraction=0.001)))
    said = capfd.readouterr().err
    assert "the validation split has 1 of 36 documents" in said
    assert "than 0.001 gives it more" in said


def test_so_many_shards_are_refused() -> None:
    assert check(CorpusConfig(urls="x", shards=10_000)) == []
    (fault,) = check(CorpusConfig(urls="x", shards=100_000))
    assert fault == "shards=100000: must lie in [0, 10,000], where 0 is automatic; leave it out"


# ── WARC files that change ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def archive(config: CorpusConfig, tmp_path: Path) -> tuple[CorpusConfig, Path, list[int]]:
    """A corpus of six pages in one WARC file, that file, and where its pages begin."""
    path = tmp_path / "warcs" / "pages.warc.gz"
    path.parent.mkdir()
    offsets = warc_pages(path, {f"https://site{i}.test/{i}": text for i, text in enumerate(PROSE)})
    config = replace(config, source=Source.warc, path=str(path.parent))
    build_corpus(config)
    return config, path, [*offsets.values()]


def reasons(out: str) -> dict[str, int]:
    return dict(json.loads(Path(out, "summary.json").read_text())["stages"][1]["reasons"])


def without_archives(marker: Path) -> None:
    """As the version before wrote it."""
    done = read_signed(marker)
    assert done
    times = marker.stat().st_atime_ns, marker.stat().st_mtime_ns
    done.pop("archives")
    write_signed(done, marker)
    os.utime(marker, ns=times)


@pytest.mark.parametrize("in_parts", [False, True])
def test_pages_of_a_damaged_warc_file_come_back_with_it(
    archive: tuple[CorpusConfig, Path, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    in_parts: bool,
) -> None:
    config, path, _ = archive
    whole, time_ns = path.read_bytes(), path.stat().st_mtime_ns
    if in_parts:
        monkeypatch.setattr(stages, "LEAST_PART_ROWS", 1)
    other = replace(config, extract=ExtractConfig(min_characters=101))
    path.write_bytes(whole[:-2_000] + bytes(2_000))
    os.utime(path, ns=(time_ns, time_ns))  # rot, not a new file
    build_corpus(other)
    assert reasons(config.out) == {"failed:warc_damaged": 1}
    capfd.readouterr()
    build_corpus(other)  # nothing has changed: nothing is done again
    assert " again" not in capfd.readouterr().err
    marker = next(p for p in Path(config.out, "extract").glob("*.done.json") if (read_signed(p) or {}).get("archives"))
    path.write_bytes(whole)
    time_ns = path.stat().st_mtime_ns
    build_corpus(other)
    assert f"extract: 1 of 3 shards again: archive changed: {path}" in capfd.readouterr().err
    assert reasons(config.out) == {}
    fresh = replace(other, out=f"{config.out}.fresh")
    build_corpus(fresh)
    assert files_of(Path(config.out)) == files_of(Path(fresh.out))
    # The version before did not remember the file: such a shard is tried once more.
    path.write_bytes(whole[:-2_000] + bytes(2_000))
    os.utime(path, ns=(time_ns, time_ns))
    build_corpus(config)
    assert reasons(config.out) == {"failed:warc_damaged": 1}
    without_archives(marker)
    path.write_bytes(whole)
    os.utime(path, ns=(time_ns, time_ns))
    capfd.readouterr()
    build_corpus(config)
    assert "extract: 1 of 3 shards again, once: they have pages of damaged WARC files" in capfd.readouterr().err
    assert reasons(config.out) == {}


def test_a_warc_file_that_is_missing_is_named_and_costs_no_page(archive: tuple[CorpusConfig, Path, list[int]]) -> None:
    config, path, _ = archive
    second = path.with_name("a.warc.gz")
    warc_pages(second, {f"https://second.test/{i}": text for i, text in enumerate(PROSE)})
    build_corpus(config)
    whole = files_of(Path(config.out))
    path.rename(path.with_suffix(".away"))
    extract = replace(config, extract=ExtractConfig(min_characters=101), stages=["extract"])
    with pytest.raises(InputError, match=r"pages\.warc\.gz: is not there, and pages of it are to be extracted; put it"):
        build_corpus(extract)
    build_corpus(replace(config, stages=["extract"]))
    later = [*STAGES[STAGES.index("filter") :]]
    build_corpus(replace(config, quality=QualityConfig(min_words=5), stages=later))  # needs no page
    path.with_suffix(".away").rename(path)
    build_corpus(config)
    assert files_of(Path(config.out)) == whole


@pytest.mark.parametrize("of_before", [False, True])
def test_a_warc_file_replaced_by_one_of_the_same_size_is_noticed(
    archive: tuple[CorpusConfig, Path, list[int]], capfd: pytest.CaptureFixture[str], of_before: bool
) -> None:
    config, path, offsets = archive
    index = Path(config.out, "fetch", "file_00000.done.json")
    if of_before:
        without_archives(index)
    build_corpus(config)
    os.utime(path, ns=(0, 5 * 10**9))
    capfd.readouterr()
    build_corpus(config)  # touched: read, but nothing behind it is done again
    said = capfd.readouterr().err
    assert (" again" in said) is of_before
    assert "extract: finished before" in said
    assert (read_signed(index) or {})["archives"][str(path)]["mtime_ns"] == 5 * 10**9
    whole, ends = path.read_bytes(), [*offsets, path.stat().st_size]
    pages = [whole[begin:end] for begin, end in pairwise(ends)]
    path.write_bytes(b"".join(reversed(pages)))
    assert path.stat().st_size == len(whole)
    with pytest.raises(InputError, match=r"path=.*pages\.warc\.gz: is another file than the one that was indexed"):
        build_corpus(replace(config, stages=["extract"], extract=ExtractConfig(min_characters=101)))
    build_corpus(config)
    assert reasons(config.out) == {}
    fresh = replace(config, out=f"{config.out}.fresh")
    build_corpus(fresh)
    assert files_of(Path(config.out)) == files_of(Path(fresh.out))


# ── some stages only ────────────────────────────────────────────────────────────────────────────────────────────────


def test_stages_made_of_what_has_changed_are_named_and_left_out(
    config: CorpusConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    out = Path(config.out)
    build_corpus(config)
    whole = files_of(out)
    hard = replace(config, quality=QualityConfig(min_words=350))
    build_corpus(replace(hard, stages=["filter"]))
    said = "dedup, decontaminate, tokenize: made of what has changed since, and left out of the ledger; run without"
    assert said in capfd.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert [stage["stage"] for stage in summary["stages"]] == ["extract", "filter"]
    assert 0 < summary["urls"]["kept"] < len(PROSE)
    assert not {"documents", "tokens"} & set(summary)
    build_corpus(replace(hard, stages=["filter", "dedup"]))
    assert "decontaminate, tokenize: made of" in capfd.readouterr().err
    build_corpus(replace(hard, stages=["tokenize"]))  # of documents of before: as asked for, and said
    assert "decontaminate, tokenize: made of" in capfd.readouterr().err
    build_corpus(replace(hard, stages=["filter", "dedup", "decontaminate"]))
    assert "\ntokenize: made of what has changed since" in capfd.readouterr().err
    assert json.loads((out / "summary.json").read_text())["documents"] == summary["urls"]["kept"]
    build_corpus(replace(config, stages=[*STAGES]))
    assert "made of what has changed" not in capfd.readouterr().err
    assert files_of(out) == whole


# ── nothing kept ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_corpus_without_a_document_tells_why(config: CorpusConfig, capfd: pytest.CaptureFixture[str]) -> None:
    out = Path(config.out)
    build_corpus(config)
    assert (out / "tokens").exists()
    hard = replace(config, quality=QualityConfig(min_words=1_000_000))
    for _ in range(2):  # the second time it is all there, and the answer is the same
        capfd.readouterr()
        with pytest.raises(InputError, match=r"6 of 6 rows dropped at filter for too_few_words; loosen") as error:
            build_corpus(hard)
        assert "\n" not in str(error.value)
        assert "dropped:too_few_words" in capfd.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["urls"] == {"in": 6, "kept": 0, "dropped": 6, "failed": 0}
    assert "tokens" not in summary
    assert not (out / "tokens").exists(), "tokens of documents that are no more in the corpus"
    assert why(WhyConfig("https://site0.test/0", config.out)) == 0
    assert "dropped at filter: too_few_words" in capfd.readouterr().out
    assert "too_few_words" in write_corpus_report(Corpus(out)).read_text()
    build_corpus(config)
    assert (out / "tokens/manifest.json").exists()


def test_rows_that_failed_in_the_fetch_are_to_be_tried_again() -> None:
    stages = [{"stage": "fetch", "reasons": {"failed:dns": 3, "dropped:robots": 1}}, {"stage": "filter", "reasons": {}}]
    said = why_nothing_is_left({"stages": stages, "urls": {"in": 4}, "source": "urls"})
    assert "3 of 4 rows failed at fetch for dns" in said
    assert "retry=[dns]" in said
    assert "retry" not in why_nothing_is_left({"stages": stages, "urls": {"in": 4}, "source": "warc"})
    assert "no row came in" in why_nothing_is_left({"stages": [], "urls": {"in": 0}, "source": "warc"})


def test_all_documents_may_be_taken_down(config: CorpusConfig, tmp_path: Path) -> None:
    build_corpus(config)
    (tmp_path / "all.txt").write_text("".join(f"site{i}.test\n" for i in range(len(PROSE))))
    assert build_corpus(replace(config, forget=str(tmp_path / "all.txt"))) == 0
    assert texts_of(Path(config.out)) == []
    assert not (Path(config.out) / "tokens").exists()


# ── input that is not there ─────────────────────────────────────────────────────────────────────────────────────────


def test_files_that_are_not_there_are_named_together_before_any_work(config: CorpusConfig, tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    later: dict[str, Any] = {
        "quality": QualityConfig(blocked_words_file=f"{none}.words"),
        "dedup": DedupConfig(against=[f"{none}.corpus"]),
        "decontaminate": DecontaminateConfig(paths=[f"{none}.txt", f"{none}.jsonl"]),
        "report": CorpusReportConfig(domains=f"{none}.domains"),
    }
    names = ["quality.blocked_words_file", "dedup.against", "decontaminate.paths", "decontaminate.paths"]
    crawl = CorpusConfig(urls=f"{none}.urls", out=config.out)
    crawl.url_list.blocked_domains_file = f"{none}.blocked"
    crawl.fetch.hosts_file, crawl.fetch.rescue, crawl.fetch.since = f"{none}.hosts", f"{none}.warc", f"{none}.since"
    of_crawl = ["urls", "url_list.blocked_domains_file", "fetch.hosts_file", "fetch.rescue", "fetch.since"]
    for given, expected in (
        (replace(config, **later), names),
        (replace(config, path=f"{none}.jsonl", **later), ["path", *names]),
        (replace(config, source=Source.warc, path=none, **later), ["path", *names]),
        (replace(crawl, **later), [*of_crawl, *names]),
    ):
        with pytest.raises(InputError) as error:
            build_corpus(given)
        lines = str(error.value).split("\n")
        assert [line.split("=")[0] for line in lines] == [*expected, "report.domains"]
        assert all("none" in line and ";" in line for line in lines)
        assert not Path(config.out).exists()
    build_corpus(replace(config, quality=later["quality"], stages=["extract"]))  # a stage that does not read it


@pytest.mark.parametrize("read_by", ["urls", "extract", "filter", "decontaminate"])
def test_an_input_that_changes_while_it_is_read_is_no_result(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_by: str
) -> None:
    """Its new content is in the file when the step ends, and its old one in what the step made."""
    file, stages = tmp_path / "list.txt", [read_by]
    file.write_text("https://a.test/1\nhttps://b.test/2\n" if read_by == "urls" else "one two three\n")
    changed = file
    if read_by == "urls":
        config = replace(config, source=Source.urls, urls=str(file))
        where: tuple[object, str] = (urls, "write_url_shards")
    elif read_by == "extract":
        changed, where = Path(config.path), (datasets, "write_document_shards")
    else:
        stages = [*STAGES[2 : STAGES.index(read_by) + 1]]
        config.quality.blocked_words_file = str(file) if read_by == "filter" else ""
        config.decontaminate.paths = [str(file)] if read_by == "decontaminate" else []
        where = (tasks, "filter_documents" if read_by == "filter" else "decontaminate")
    config.stages = stages
    with monkeypatch.context() as patch:
        work = getattr(*where)

        def change_after(*arguments: Any) -> Any:
            made = work(*arguments)
            changed.write_bytes(changed.read_bytes() + b"\n")
            return made

        patch.setattr(*where, change_after)
        with pytest.raises(InputError, match=f"{changed.name}: changed while it was read; leave it as it is"):
            build_corpus(config)
    assert not list((tmp_path / "out" / read_by).glob("*.done.json"))
    os.utime(changed)
    build_corpus(config)
    os.utime(changed, ns=(0, 0))  # the same bytes
    with monkeypatch.context() as patch:
        patch.setattr(*where, None)  # would raise
        build_corpus(config)


def test_a_take_down_looks_at_its_files_first(config: CorpusConfig, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("xyzzy\n")
    build_corpus(replace(config, quality=QualityConfig(blocked_words_file=str(words))))
    words.unlink()
    (tmp_path / "list.txt").write_text("site1.test\n")
    with pytest.raises(InputError, match=r"quality\.blocked_words_file=.*No such file"):
        build_corpus(replace(config, forget=str(tmp_path / "list.txt")))
    assert not (Path(config.out) / "forget.json").exists()


def test_languages_that_nobody_tells_apart_are_refused() -> None:
    assert {*LANGUAGES} == {*language._identifier().nb_classes, "und"}

    def faults(*codes: str) -> list[str]:
        return check(CorpusConfig(urls="x", language=LanguageConfig(keep=list(codes))))

    assert faults(*LANGUAGES) == []
    for code, near in (("eng", "en"), ("zh-cn", "zh"), ("DE", "de"), ("??", "en")):
        (fault,) = faults("fr", code)
        assert fault.startswith(f"language.keep={code}: ")
        assert f"give {near}" in fault


# ── the corpus folder ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_cannot_be_made_is_refused(config: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("example.org\n")
    for out in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", Path("/proc/z")):
        with pytest.raises(InputError, match="no folder can be made there"):
            build_corpus(replace(config, out=str(out)))
        for changes in ({"forget": str(tmp_path / "file")}, {"what_if": ["quality.min_words=3"]}):
            with pytest.raises(InputError, match=r"is no corpus folder|no stage `filter` was run there"):
                build_corpus(replace(config, out=str(out), **changes))


def test_a_damaged_result_is_named_to_who_reads_it(config: CorpusConfig) -> None:
    out = Path(config.out)
    build_corpus(config)
    asked = WhyConfig("https://site0.test/0", config.out)

    def report() -> Path:
        return write_corpus_report(Corpus(out))

    readers: dict[str, Callable[[], object]] = {
        "ledger/00001.parquet": lambda: why(asked),
        "tokens/documents.parquet": lambda: why(asked),
        "ledger/00002.parquet": report,
        "documents/00001.parquet": report,
        "dedup/duplicates.parquet": report,
    }
    for name, read in readers.items():
        whole = (out / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2 - 200 : len(whole) // 2] = bytes(200)
        for damaged in (whole[: len(whole) // 2], b"", *([bytes(flipped)] if name.startswith("documents") else [])):
            (out / name).write_bytes(damaged)
            with pytest.raises(CorruptionError, match=rf"{name}: is damaged; run `gpt2train corpus` again"):
                read()
        (out / name).write_bytes(whole[:-9])
        build_corpus(config)
        read()


@pytest.mark.parametrize("torn", [b'{"stages": [', b"[]", b'{"stages": []}'])
def test_records_that_are_torn_are_named(config: CorpusConfig, tmp_path: Path, torn: bytes) -> None:
    out = Path(config.out)
    build_corpus(config)
    (tmp_path / "list.txt").write_text("site1.test\n")
    whole = (out / "summary.json").read_bytes()
    (out / "summary.json").write_bytes(torn)
    with pytest.raises(CorruptionError, match=r"summary\.json: is damaged .*run `gpt2train corpus` again"):
        write_corpus_report(Corpus(out))
    build_corpus(config)
    assert (out / "summary.json").read_bytes() == whole
    build_corpus(replace(config, forget=str(tmp_path / "list.txt")))
    rules = (out / "forget.json").read_bytes()
    (out / "forget.json").write_bytes(torn)
    with pytest.raises(CorruptionError, match=r"forget\.json: is damaged .*give forget= all lists again"):
        build_corpus(config)
    (out / "forget.json").write_bytes(rules)
    build_corpus(config)
    assert PROSE[1] not in texts_of(out)


def test_settings_are_kept_letter_by_letter(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOBODYS_TOKEN", "hush-hush")
    words = tmp_path / "${oc.env:NOBODYS_TOKEN} \\${x} ${"
    words.write_text("xyzzy\n")
    build_corpus(replace(config, quality=QualityConfig(blocked_words_file=str(words))))
    stored = Path(config.out) / "config.yaml"
    assert "hush-hush" not in stored.read_text()
    assert read_config(Corpus(Path(config.out))).quality.blocked_words_file == str(words)


def test_a_hub_dataset_that_is_not_there_is_told_at_once(config: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    asked = []

    def dataset_info(self: object, name: str, *, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("no such host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    with pytest.raises(InputError, match=r"path=nobody/there: .*\(no such host\); check the name, the network, and"):
        build_corpus(replace(config, path="nobody/there"))
    assert asked == [("nobody/there", 10.0)]  # once, and with an end
    assert not Path(config.out).exists()


@pytest.mark.parametrize("settings", ["as they were", "of another version"])
def test_another_way_in_needs_another_folder(config: CorpusConfig, tmp_path: Path, settings: str) -> None:
    out = Path(config.out)
    (tmp_path / "urls.txt").write_text("https://a.example.com/1\n")
    crawl = replace(config, source=Source.urls, urls=str(tmp_path / "urls.txt"), stages=["urls"])
    build_corpus(crawl)
    if settings == "of another version":
        (out / "config.yaml").write_text("no_such_setting: 1\n")
    before = {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
    with pytest.raises(InputError, match=r"source=dataset: .* was begun with source=urls; give another out="):
        build_corpus(config)
    assert {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file() and p.name != ".lock"} == {
        p: content for p, content in before.items() if p.name != ".lock"
    }
    build_corpus(crawl)


def test_a_run_that_came_to_nothing_fixes_no_source(config: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no URL"):
        build_corpus(replace(config, source=Source.urls, urls=str(tmp_path / "urls.txt"), shards=0))
    (tmp_path / "urls.jsonl").write_text("no JSON\n")
    with pytest.raises(InputError, match="line 1"):
        build_corpus(replace(config, source=Source.urls, urls=str(tmp_path / "urls.jsonl")))
    build_corpus(config)


# ── take-down ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_entries_that_match_nothing_are_named(
    config: CorpusConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_corpus(config)
    entries = tmp_path / "list.txt"
    entries.write_text("site1.test\nsite2.tset\nhttps://site3.test/3\nhttps://site3.test/4\nite1.test\n")
    line = "forget: no row of this corpus has to do with site2.tset, https://site3.test/4, ite1.test; check"
    for texts in (2, 0):  # what is gone is no more, but was there
        capfd.readouterr()
        build_corpus(replace(config, forget=str(entries)))
        said = capfd.readouterr().err
        assert line in said
        assert f"forget: {texts} texts go" in said
    entries.write_text("SITE2.test\nHTTPS://site4.test:443/4\n")
    build_corpus(replace(config, forget=str(entries)))
    assert "no row of this corpus" not in capfd.readouterr().err


# ── SIGTERM ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sigterm_ends_a_run_with_one_line(config: CorpusConfig) -> None:
    out = Path(config.out)
    settings = [
        "source=dataset",
        f"path={config.path}",
        f"out={out}",
        "workers=2",
        "language.keep=[]",
        "progress=false",
    ]
    command = [sys.executable, "-m", "gpt2train", "corpus", *settings]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (out / "filter").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 143
    assert said[-1] == "gpt2train corpus: stopped; run the same command again to go on"
    assert not any("Traceback" in line or "leaked" in line for line in said)
    assert not list(out.rglob(".*.tmp"))
    build_corpus(config)
    assert sorted(texts_of(out)) == sorted(PROSE)


def test_the_handler_from_before_comes_back(config: CorpusConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError), stopped_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    thread = threading.Thread(target=build_corpus, args=(config,))
    thread.start()
    thread.join()
    assert sorted(texts_of(Path(config.out))) == sorted(PROSE)


# ── the token shards' manifest ────────────────────────────────────────────────────────────────────────────────────────


def test_the_manifest_tells_nothing_of_what_was_tried_before(config: CorpusConfig, tmp_path: Path) -> None:
    build_corpus(replace(config, quality=QualityConfig(c4_min_sentences=1)))  # drops none, but counts sentences
    build_corpus(config)
    build_corpus(replace(config, out=str(tmp_path / "fresh")))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_shards_that_are_packed_again_keep_the_fingerprint_of_the_version_before(config: CorpusConfig) -> None:
    build_corpus(config)
    tokens, marker = Path(config.out, "tokens"), Path(config.out, "tokenize/tokens.done.json")
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["made_from"] = "of the documents' files"
    manifest["fingerprint"] = token_shards.fingerprint(manifest)
    (tokens / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    done = read_signed(marker)
    assert done
    done["outputs"]["tokens/manifest.json"] = sha256_file(tokens / "manifest.json")
    write_signed(done, marker)
    before = files_of(tokens)
    build_corpus(config)
    assert files_of(tokens) == before
    (tokens / "train_00000.bin").write_bytes(b"damaged")
    build_corpus(config)
    assert files_of(tokens) == before
    build_corpus(replace(config, tokenize=TokenizeConfig(validation_fraction=0.2, seed=1)))
    assert json.loads((tokens / "manifest.json").read_text())["made_from"] != manifest["made_from"]


# ── the join in parts ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_join_in_parts_gives_the_same_bytes(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = PROSE[0].split(" ")
    near = [" ".join([*words[:n], "indeed", *words[n:]]) for n in (40, 120, 200)]
    texts = [*PROSE, *near, PROSE[2].upper(), PROSE[3], PROSE[3] + "!", "Three words only", "Three words only"]
    old, out = str(tmp_path / "old"), Path(config.out)
    build_corpus(replace(config, out=old))
    for number, rules in enumerate((DedupConfig(), DedupConfig(exact=False), DedupConfig(against=[old]))):
        whole = tmp_path / f"whole{number}"
        path = str(write_texts(tmp_path / "more.jsonl", texts))
        one = replace(config, path=path, dedup=rules, out=str(whole))
        build_corpus(one)
        expected = (whole / "dedup" / "duplicates.parquet").read_bytes()
        assert pq.read_table(whole / "dedup" / "duplicates.parquet").num_rows >= 4
        with monkeypatch.context() as patch:
            patch.setattr(stages, "JOIN_IN_PARTS_ROWS", 1)
            patch.setattr(tasks, "join_duplicates", None)  # would raise
            build_corpus(replace(one, out=str(out)))
        assert (out / "dedup" / "duplicates.parquet").read_bytes() == expected
        assert not list((out / "dedup").glob("links_*"))  # they are made again from the signatures
    # A part that is there when the run goes on is not made again.
    (out / "dedup" / "duplicates.done.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "JOIN_IN_PARTS_ROWS", 1)
        patch.setattr(tasks, "join_links", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_corpus(replace(one, out=str(out)))
        links = sorted((out / "dedup").glob("links_*.parquet"))
        assert len(links) == 15  # 14 bands, and equal texts
        links[3].unlink()
        patch.undo()
        patch.setattr(stages, "JOIN_IN_PARTS_ROWS", 1)
        work_inline(patch)
        capfd.readouterr()
        build_corpus(replace(one, out=str(out)))
    assert f"dedup links: 1 of 15 shards again: dedup/{links[3].name} is missing" in capfd.readouterr().err
    assert (out / "dedup" / "duplicates.parquet").read_bytes() == expected
