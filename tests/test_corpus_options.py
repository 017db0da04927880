"""What a user asks of a corpus that exists: what if, forget; and what is asked for on top: masking, lists, old corpora.

One corpus of real prose is built once; what its stored numbers foretell, and what a take-down leaves, is held against
corpora that are built for real.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from pydoc_data.topics import topics

import lxml.html
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from inline import Inline
from omegaconf import OmegaConf
from warcio.archiveiterator import ArchiveIterator

from data_pipeline import forget, pipeline
from data_pipeline.account import what_if
from data_pipeline.account.report import compare_domains, measure_lines, write_corpus_report
from data_pipeline.bounds import check
from data_pipeline.clean import personal, planting
from data_pipeline.clean.dedup import find_duplicates, sign_shard
from data_pipeline.config import (
    CorpusConfig,
    DecontaminateConfig,
    DedupConfig,
    DocumentsConfig,
    LanguageConfig,
    QualityConfig,
    Source,
    TokenizeConfig,
)
from data_pipeline.layout import Corpus, read_config
from data_pipeline.lists import read_list
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import ConfigError, InputError
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.cli import main
from gpt2train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig

PROSE = [text for _, text in sorted(topics.items()) if len(text) > 1_500][:40]
GERMAN = "Dies ist ein deutscher Text über das Wetter, die Landschaft und die Menschen in den Bergen. " * 20
PERSONAL = "Write to joe.doe@example.net or ann@example.net, call (415) 555-2671, or look at 8.8.8.8 and 10.0.0.1."


def plain_words(text: str, count: int) -> str:
    """The first so many words in a row, far enough in, that have letters and ordinary punctuation alone."""
    words = text.split()
    first = next(i for i in range(30, len(words)) if all(w.strip(".,:;()").isalpha() for w in words[i : i + count]))
    return " ".join(words[first : first + count])


ITEM = plain_words(PROSE[3], 15)
"""An item of an evaluation set that a text holds, too."""


@pytest.fixture(scope="module", autouse=True)
def _inline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_executor", lambda config, out: Inline())
        yield


def rows(texts: Sequence[str], site: str) -> list[dict[str, str]]:
    return [{"url": f"https://{site}{i % 4}.test/{i}", "text": text} for i, text in enumerate(texts)]


def write_lines(path: Path, items: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def settings(out: Path, path: Path, **changes: object) -> CorpusConfig:
    config = CorpusConfig(
        out=str(out),
        source=Source.dataset,
        path=str(path),
        shards=3,
        workers=1,
        progress=False,
        language=LanguageConfig(min_score=0.5),
        # Both groups of rules are measured, and nearly nothing is dropped.
        quality=QualityConfig(min_words=60, max_newline_word_ratio=0.9),
        tokenize=TokenizeConfig(shard_tokens=4_096, validation_fraction=0.1),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def ledger(out: Path) -> dict[str, dict[str, object]]:
    """URL → its row."""
    return {r["url"]: r for f in sorted((out / "ledger").glob("*.parquet")) for r in pq.read_table(f).to_pylist()}


def documents(out: Path) -> dict[str, dict[str, object]]:
    return {r["url"]: r for f in sorted((out / "documents").glob("*.parquet")) for r in pq.read_table(f).to_pylist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusConfig, Path]:
    """Prose of four sites, a copy, personal data, and a text that holds an evaluation item."""
    folder = tmp_path_factory.mktemp("options")
    items = rows(PROSE, "site")
    items.append({"url": "https://copy.test/1", "text": PROSE[1].upper()})
    items.append({"url": "https://people.test/1", "text": f"{PROSE[5][:1400]}\n\n{PERSONAL}"})
    items.append({"url": "https://german.test/", "text": GERMAN})
    hostile = {"url": "javascript:alert(1)//<script>", "title": "</pre><script>document.title='owned'</script>"}
    items.insert(0, {**hostile, "text": f"<img src=x onerror=alert(1)> {PROSE[39]}", "domain": "evil.test"})
    items.append({"url": "https://short.test/", "text": "The sun was warm and the sky was blue over the hills. " * 3})
    (folder / "item.txt").write_text(ITEM)
    config = settings(
        folder / "out",
        write_lines(folder / "texts.jsonl", items),
        dedup=DedupConfig(plant=20),
        documents=DocumentsConfig(mask_personal_data=True),
        decontaminate=DecontaminateConfig(paths=[str(folder / "item.txt")], remove_spans=True),
    )
    assert build_corpus(config) == 0
    return config, folder / "out"


# ── what if ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_if_foretells_what_a_run_does(
    built: tuple[CorpusConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = built
    before = tree(out)
    overrides = "quality.min_words=500,language.min_score=0.999,quality.max_newline_word_ratio=0.14,dedup.keep=first"
    assert main(["corpus", f"what_if=[{overrides}]", f"out={out}"]) == 0
    assert tree(out) == before
    said = capsys.readouterr().out
    then = what_if.parse(overrides.split(","), read_config(Corpus(out)))
    foretold = what_if.replay(Corpus(out), then)
    now = {i: end[1] for i, end in what_if.replay(Corpus(out), read_config(Corpus(out))).items()}
    assert now == {i: end[1] for i, end in what_if.stored_ends(Corpus(out)).items()}

    shutil.copytree(out, tmp_path / "out")
    build_corpus(
        replace(config, out=str(tmp_path / "out"), **{n: getattr(then, n) for n in ("language", "quality", "dedup")})
    )
    ended = {
        int(str(r["index"])): (r["stage"], r["reason"]) if r["state"] == "dropped" else ("", "kept")
        for r in ledger(tmp_path / "out").values()
    }
    foretold = {
        index: ("", "kept") if reason == "kept" else (stage, reason) for index, (stage, reason) in foretold.items()
    }
    assert foretold == ended
    counts = Counter(reason for _, reason in ended.values())
    assert {"kept", "language", "too_few_words", "too_many_newlines", "near_duplicate"} <= set(counts), counts
    for reason, n in counts.items():
        assert any(
            line.split()[-2:-1] == [str(n)] or str(n) in line.split() for line in said.split("\n") if reason in line
        )


def test_what_cannot_be_foretold_is_said(built: tuple[CorpusConfig, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = built
    for override, fault in {
        "quality.c4_lines=true": "must be key=value of language",
        "fetch.retries=3": "must be key=value of language",
        "quality.min_word=3": "Key 'min_word' not in",
        "quality.min_words=-3": "must be 0 or more",
        "quality.c4_min_sentences=3": "needs c4_sentences, which this corpus did not measure",
    }.items():
        assert main(["corpus", f"what_if=[{override}]", f"out={out}"]) == 2, override
        error = capsys.readouterr().err
        assert fault in error, error
        assert "Traceback" not in error
    # German that was dropped for its language was never measured; what the filter dropped was never compared.
    open_to_all = replace(read_config(Corpus(out)), quality=QualityConfig(), language=LanguageConfig(keep=[]))
    indexes = {url: int(str(row["index"])) for url, row in ledger(out).items()}
    hidden = what_if.replay(Corpus(out), open_to_all)
    assert hidden[indexes["https://german.test/"]] == ("filter", what_if.NOT_MEASURED)
    assert hidden[indexes["https://short.test/"]] == ("dedup", what_if.NOT_COMPARED)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with_urls = CorpusConfig(urls="list.txt")
    assert any("cannot go with what_if" in f for f in check(replace(with_urls, what_if=["a=b"], forget="x")))
    assert any("belongs to forget" in f for f in check(replace(with_urls, runs=["runs/a"])))
    both = DecontaminateConfig(drop=True, remove_spans=True)
    assert any("cannot go with decontaminate.drop" in f for f in check(replace(with_urls, decontaminate=both)))
    assert any("measures dedup.near" in f for f in check(replace(with_urls, dedup=DedupConfig(near=False, plant=3))))
    assert check(CorpusConfig(what_if=["quality.min_words=3"])) == []


# ── personal data and decontamination ───────────────────────────────────────────────────────────────────────────────


def test_masked_texts_are_the_same_everywhere(built: tuple[CorpusConfig, Path]) -> None:
    _, out = built
    found = documents(out)
    text = str(found["https://people.test/1"]["text"])
    assert "joe.doe" not in text
    assert text.endswith(
        "Write to email@example.com or firstname.lastname@example.org, call +1 202-555-0100, "
        "or look at 22.214.171.124 and 10.0.0.1."
    )
    numbers = json.loads(str(ledger(out)["https://people.test/1"]["numbers"]))
    assert (numbers["masked_emails"], numbers["masked_ips"], numbers["masked_phones"]) == (2, 1, 1)
    shards = TokenShards.open(out / "tokens")
    seen = 0
    for name in ("train", "validation"):
        split = shards.split(name)
        for span in split.documents(0, split.tokens):
            row = found[span.url]
            assert row["digest"] == span.digest == hashlib.sha256(str(row["text"]).encode()).hexdigest()
            assert load_tokenizer().decode(split.read(span.start, span.stop - 1)) == row["text"]
            seen += 1
    assert seen == len(found)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("<a.b+c@mail.example.co.uk>", "<email@example.com>"),
        ("a@b", "a@b"),
        ("user@host.example.", "email@example.com."),
        ("1.2.3.4.5 and v1.1.1.1 and 1.1.1.999 and 127.0.0.1", "1.2.3.4.5 and v1.1.1.1 and 1.1.1.999 and 127.0.0.1"),
        ("from 1.1.1.1.", "from 22.214.171.124."),
        ("+49 (0) 30 1234567", "+1 202-555-0100"),
        ("1-800-555-1234; 2024-11-23; 123-456-7890", "+1 202-555-0100; 2024-11-23; 123-456-7890"),
        ("in 1969 415 people, 12345678901 stars, 3.14159 2653", "in 1969 415 people, 12345678901 stars, 3.14159 2653"),
    ],
)  # fmt: skip
def test_what_is_personal_and_what_is_not(text: str, masked: str) -> None:
    assert personal.mask(text)[0] == masked
    assert personal.mask(masked)[0] == personal.mask(personal.mask(masked)[0])[0]


def test_masking_takes_linear_time() -> None:
    for piece in ("a@", "a.", "1.", "1.1.1.", "+1 22", "(415) ", "!." * 3, "a-@b."):
        small, large = piece * 5_000, piece * 40_000
        started = time.process_time()
        personal.mask(small)
        once = time.process_time() - started
        started = time.process_time()
        personal.mask(large)
        assert time.process_time() - started < 40 * max(once, 0.01), piece


def test_evaluation_items_are_cut_out_and_counted(built: tuple[CorpusConfig, Path]) -> None:
    _, out = built
    row = ledger(out)["https://site3.test/3"]
    text = str(documents(out)["https://site3.test/3"]["text"])
    before = str(
        next(
            r
            for r in (json.loads(line) for line in Path(built[0].path).read_text().split("\n"))
            if r["url"] == row["url"]
        )["text"]
    )
    assert ITEM in " ".join(before.split())
    assert ITEM not in " ".join(text.split())
    numbers = json.loads(str(row["numbers"]))
    assert numbers["removed_spans"] == 1
    assert numbers["removed_characters"] == pytest.approx(len(ITEM), abs=20)
    table = json.loads((out / "summary.json").read_text())["contamination"]
    assert table[0]["name"] == "item"
    assert table[0]["found"] < table[0]["ngrams"], "the item's own 8-grams are no more in the corpus"
    assert "evaluation set" in (from_report := "\n".join(measure_lines(json.loads((out / "summary.json").read_text()))))
    assert "recall" in from_report


# ── lists by file ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_changed_list_redoes_its_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "urls.txt").write_text("https://a.example.com/1\nhttps://b.example.org/2\nhttps://c.example.net/3\n")
    blocked = tmp_path / "blocked.txt"
    blocked.write_text("# a list\nexample.com\n")
    config = CorpusConfig(
        urls=str(tmp_path / "urls.txt"), out=str(tmp_path / "out"), stages=["urls"], shards=1, workers=1
    )
    config.progress = False
    config.url_list.blocked_domains_file = str(blocked)
    build_corpus(config)

    def reasons() -> list[object]:
        return pq.read_table(tmp_path / "out/urls/00000.verdicts.parquet")["reason"].to_pylist()

    assert reasons() == ["blocked_domain", None, None]
    capfd.readouterr()
    build_corpus(config)
    assert "nothing to do" in capfd.readouterr().err
    blocked.write_text("b.example.org\nexample.com\n")
    build_corpus(config)
    assert "input changed: 1:blocked.txt" in capfd.readouterr().err
    assert reasons() == ["blocked_domain", "blocked_domain", None]
    blocked.write_text("\n# nothing\n")
    with pytest.raises(InputError, match="holds no entry"):
        build_corpus(config)
    blocked.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 at byte 0"):
        read_list(str(blocked), "url_list.blocked_domains_file")


# ── deduplication beyond one run ────────────────────────────────────────────────────────────────────────────────────


def test_documents_of_another_corpus_are_not_kept_again(built: tuple[CorpusConfig, Path], tmp_path: Path) -> None:
    words = PROSE[6].split(" ")
    items = [
        {"url": "https://new.test/same", "text": PROSE[7].lower()},
        # Longer than its twin, which stays all the same: it is in the other corpus.
        {"url": "https://new.test/near", "text": " ".join([*words, "and", "so", "on"])},
        {"url": "https://new.test/dropped-there", "text": PROSE[9][:300]},
        *rows([text[::-1] for text in PROSE[10:16]], "backwards"),
    ]
    config = settings(
        tmp_path / "out",
        write_lines(tmp_path / "new.jsonl", items),
        language=LanguageConfig(keep=[]),
        quality=QualityConfig(),
        dedup=DedupConfig(against=[str(built[1])]),
        stages=["extract", "filter", "dedup", "decontaminate"],
    )
    build_corpus(config)
    found = ledger(tmp_path / "out")
    assert found["https://new.test/same"]["reason"] == "old_exact_duplicate"
    assert found["https://new.test/same"]["detail"] == "https://site3.test/7"
    assert found["https://new.test/near"]["reason"] == "old_near_duplicate"
    assert found["https://new.test/near"]["detail"] == "https://site2.test/6"
    assert {r["state"] for url, r in found.items() if "backwards" in url or "dropped-there" in url} == {"kept"}
    with pytest.raises(InputError, match="give the dedup"):
        build_corpus(replace(config, dedup=DedupConfig(against=[str(built[1])], bands=7)))
    with pytest.raises(InputError, match="finish it first"):
        build_corpus(replace(config, dedup=DedupConfig(against=[str(tmp_path)])))


def test_an_old_document_stays_whatever_is_to_be_kept() -> None:
    def table(texts: list[str], dates: list[str | None]) -> pa.Table:
        columns = {
            "index": list(range(len(texts))),
            "url": [f"u{i}" for i in range(len(texts))],
            "text": texts,
            "date": dates,
        }
        return pa.table(
            columns,
            schema=pa.schema(
                [("index", pa.int64()), ("url", pa.string()), ("text", pa.string()), ("date", pa.string())]
            ),
        )

    for keep in ("longest", "earliest", "first"):
        config = DedupConfig(keep=type(DedupConfig().keep)[keep])
        old = sign_shard(table(["one two", "four five six"], ["2020", None]), config)
        new = sign_shard(table(["One   two!", "seven", "four, five, six", "seven!"], ["1999"] * 4), config)
        going = find_duplicates(new, config, old).to_pylist()
        assert {g["index"]: g["kind"] for g in going if g["kind"].startswith("old")} == {0: "old_exact", 2: "old_exact"}
        assert [g["kind"] for g in going if g["index"] in (1, 3)] == ["exact"]


def test_planted_duplicates_tell_a_good_join_from_a_bad_one(built: tuple[CorpusConfig, Path]) -> None:
    measured = json.loads((built[1] / "summary.json").read_text())["planted"]
    # 20 copies of similarity 0.8 to 0.98; 14 bands of 8 rows find one of 0.8 with a probability of 0.92.
    assert measured["planted"] == measured["alike"] == 20
    assert measured["recall"] >= 0.85
    assert measured["precision"] == 1.0
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("url", pa.string()),
            ("text", pa.string()),
            ("date", pa.string()),
            ("digest", pa.string()),
        ]
    )
    texts = [
        {"index": i, "url": str(i), "text": t, "digest": hashlib.sha256(t.encode()).hexdigest()}
        for i, t in enumerate(PROSE)
    ]
    table = pa.Table.from_pylist(texts, schema=schema)

    def measure(config: DedupConfig) -> dict[str, float | int]:
        planted = planting.plant_shard(table, config, 30)
        by_index = dict(zip(table["index"].to_pylist(), PROSE, strict=True))
        assert all(j < 0.5 or j >= 0.78 for j in planted["jaccard"].to_pylist())
        assert set(planted["source"].to_pylist()) <= set(by_index)
        return planting.measure_planted(sign_shard(table, config), [planted], config)

    strict, loose = measure(DedupConfig(bands=2, rows=40)), measure(DedupConfig(bands=60, rows=1))
    assert strict["recall"] < 0.3
    assert loose["recall"] == 1.0
    assert loose["precision"] < 0.7


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_in_a_browser(built: tuple[CorpusConfig, Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; Debian's package is called chromium")
    result = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (built[1] / "report.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    dom = lxml.html.fromstring(result.stdout)
    assert dom.findtext(".//title") == "Corpus report"
    # What pages say is text: no script ran or stands there, no link leads anywhere but to http(s).
    assert not dom.xpath("//script | //img | //iframe | //link | //*[@src]")
    links = {a.get("href") for a in dom.xpath("//a")}
    assert links
    assert all(link.startswith(("http://", "https://")) for link in links)
    assert "</pre><script>" in dom.xpath("string(//div[@class='pair']//b)")
    # Every reason of the funnel unfolds to rows that ended so.
    found = ledger(built[1])
    summary = json.loads((built[1] / "summary.json").read_text())
    reasons = {
        d.xpath("string(summary)"): d.xpath(".//div[@class='sample']//a/@href") for d in dom.xpath("//td/details")
    }
    assert set(reasons) == {reason for stage in summary["stages"] for reason in stage["reasons"]}
    for reason, urls in reasons.items():
        assert urls
        assert {f"{found[u]['state']}:{found[u]['reason']}" for u in urls} == {reason}
    clusters = dom.xpath("//h2[.='Duplicates']/following-sibling::div[1]//details")
    assert {c.xpath("string(.//div/a)") for c in clusters} == {
        u for u, r in found.items() if r["stage"] == "dedup" and r["state"] == "dropped"
    }
    # Each text stands beside its page's title and URL.
    by_url = documents(built[1])
    for pair in dom.xpath("//div[@class='pair']"):
        address = pair.xpath("string(div/a)") or "javascript:alert(1)//<script>"
        assert str(by_url[address]["text"]).startswith(pair.xpath("string(pre[2])").strip()[:400])
        assert pair.xpath("string(pre[1])").strip() == "This text entered without a page."


def test_the_card_holds_the_funnel_and_what_the_hub_reads(built: tuple[CorpusConfig, Path]) -> None:
    _, front, text = (built[1] / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [{"split": "train", "path": "documents/*.parquet"}]
    summary = json.loads((built[1] / "summary.json").read_text())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    for stage in summary["stages"]:
        counts = [f"{stage[name]:,}" for name in ("in", "kept", "dropped", "failed")]
        assert [stage["stage"], *counts] in rows
        assert all([stage["stage"], reason, f"{n:,}"] in rows for reason, n in stage["reasons"].items())


@pytest.mark.parametrize("masked", [False, True])
def test_samples_stand_beside_their_pages(tmp_path: Path, masked: bool) -> None:
    texts = {f"https://site{i}.test/": PROSE[i] for i in range(3)}
    warc_pages(tmp_path / "pages.warc.gz", texts, "<nav>Home and contact: me@secret.example</nav>")
    config = settings(
        tmp_path / "out", tmp_path / "pages.warc.gz", source=Source.warc, quality=QualityConfig(), shards=1
    )
    config.documents.mask_personal_data = masked
    build_corpus(config)
    kept = documents(Path(config.out))

    def pairs() -> list[lxml.html.HtmlElement]:
        report = lxml.html.fromstring(Corpus(Path(config.out)).report.read_text())
        found: list[lxml.html.HtmlElement] = report.xpath("//div[@class='pair']")
        return found

    assert pairs()
    for pair in pairs():
        page, text = pair.xpath("pre")
        assert kept[pair.xpath("string(div/a)")]["text"].startswith(text.text_content().strip()[:400])
        (faint,) = page.xpath("s")  # what was left out is faint, the rest is in the text
        assert "Home and contact" in faint.text_content()
        assert ("me@secret.example" in faint.text_content()) != masked
        words = [re.findall(r"\w+", part) for part in (page.text_content(), text.text_content())]
        assert set(words[1][:200]) <= set(words[0])
    (tmp_path / "pages.warc.gz").unlink()
    write_corpus_report(Corpus(Path(config.out)))
    assert "The page is not at hand" in pairs()[0].xpath("string(pre[1])")


def test_domains_beside_a_list(crawl: CorpusConfig, tmp_path: Path) -> None:
    path = tmp_path / "domains.txt"
    path.write_text("900 google\n500 bad\n400 site3\n 300 site4.test\n")
    beside = compare_domains(Corpus(Path(crawl.out)), str(path))
    assert sorted(beside.pop("top"), key=lambda row: row["rank"]) == [
        {"domain": "bad", "rank": 2, "documents": 1},  # www.bad.test is a name of its own: test is no public suffix
        {"domain": "site3", "rank": 3, "documents": 1},
        {"domain": "site4.test", "rank": 4, "documents": 1},
    ]
    kept = len(documents(Path(crawl.out)))
    assert beside == {"listed": 4, "found": 3, "documents": 3, "share": round(3 / kept, 6)}


# ── take-down ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
    with pytest.raises(InputError, match="forget: exa mple"):
        forget.parse_entries(["exa mple"])


def warc_pages(path: Path, texts: dict[str, str], menu: str = "") -> dict[str, int]:
    """A WARC file of pages, each with `menu` (HTML) above its text; URL → offset of its response."""
    offsets = {}
    with open(path, "wb") as f:
        for i, (url, text) in enumerate(texts.items()):
            body = "".join(f"<p>{escape(p)}</p>" for p in text.split("\n\n"))
            page = f"<html><head><title>A page</title></head><body>{menu}<article>{body}</article></body></html>"
            html = page.encode()
            content = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html
            head = (
                f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Target-URI: {url}\r\n"
                f"WARC-Date: 2026-11-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
                f"Content-Length: {len(content)}\r\n\r\n"
            )
            offsets[url] = f.tell()
            f.write(gzip.compress(head.encode() + content + b"\r\n\r\n"))
    return offsets


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
