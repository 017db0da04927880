"""What is asked of a corpus that exists, what if and its report; and on top: masking, lists, old corpora.

One corpus of real prose is built once; what its stored numbers foretell is held against corpora that are built for
real.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import corpora
import lxml.html
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from corpora import documents, ledger, rows, settings, tree, warc_pages, write_lines
from inline import inline_module  # noqa: F401 (a fixture that every test here uses)

from data_pipeline import old_corpus, tasks
from data_pipeline.account import what_if
from data_pipeline.account.report import compare_domains, measure_lines, write_corpus_report
from data_pipeline.account.why import WhyConfig, why
from data_pipeline.bounds import check
from data_pipeline.clean import planting
from data_pipeline.clean.dedup import find_duplicates, sign_shard
from data_pipeline.config import (
    CorpusConfig,
    DecontaminateConfig,
    DedupConfig,
    DocumentsConfig,
    Keep,
    LanguageConfig,
    QualityConfig,
    Source,
)
from data_pipeline.layout import Corpus, read_config
from data_pipeline.lists import read_list
from data_pipeline.pipeline import build_corpus
from data_pipeline.records import AccountingError, CorruptionError, InputError, LockedError
from data_pipeline.store import Hashes, lock, lock_shared
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.cli import main

PROSE = corpora.PROSE[:40]
GERMAN = "Dies ist ein deutscher Text über das Wetter, die Landschaft und die Menschen in den Bergen. " * 20
PERSONAL = "Write to joe.doe@example.net or ann@example.net, call (415) 555-2671, or look at 8.8.8.8 and 10.0.0.1."


pytestmark = pytest.mark.usefixtures("inline_module")


def plain_words(text: str, count: int) -> str:
    """The first so many words in a row, far enough in, that have letters and ordinary punctuation alone."""
    words = text.split()
    first = next(i for i in range(30, len(words)) if all(w.strip(".,:;()").isalpha() for w in words[i : i + count]))
    return " ".join(words[first : first + count])


ITEM = plain_words(PROSE[3], 15)
"""An item of an evaluation set that a text holds, too."""


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
        "quality.min_wrods=3": "did you mean quality.min_words?",
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


def test_a_corpus_is_not_held_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second run would drop what the run before it kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    for out, spellings in {
        "out": ("out", "out/", "./link", str(tmp_path / "out"), f"file://{tmp_path}/link/../out"),
        "s3://bucket/a/out": ("s3://bucket/a/out", "s3://bucket/a//out/"),
    }.items():
        for against in spellings:
            config = CorpusConfig(urls="list.txt", out=out, dedup=DedupConfig(against=["other", against]))
            (fault,) = check(config)
            assert fault.startswith(f"dedup.against={against}: must be another corpus than out"), fault
    for out, against in {"out": "out2", "s3://bucket/a": "s3://bucket/a/b", "s3://bucket/b": "gs://bucket/b"}.items():
        assert check(CorpusConfig(urls="list.txt", out=out, dedup=DedupConfig(against=[against]))) == []


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


def test_a_password_in_a_datasets_url_goes_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = "https://me:opensesame@secret.test/x"
    items = [{"url": url, "domain": "me:opensesame@secret.test", "text": PROSE[0]}, *rows(PROSE[1:3], "site")]
    config = settings(tmp_path / "out", write_lines(tmp_path / "texts.jsonl", items))
    build_corpus(config)
    tables = [pq.read_table(f).to_pylist() for f in (tmp_path / "out").rglob("*.parquet")]
    assert "https://secret.test/x" in str(tables)
    assert "opensesame" not in str(tables)
    assert not any(b"opensesame" in f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert {d["domain"] for d in documents(tmp_path / "out").values()} == {"secret.test", None}
    capfd.readouterr()
    assert why(WhyConfig(url, config.out)) == 0
    assert why(WhyConfig(url.replace("secret", "never"), config.out)) == 1
    assert "opensesame" not in "".join(capfd.readouterr())


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


def held_against(out: Path, old: Path, **changes: object) -> CorpusConfig:
    """A corpus of a text that `old` keeps, longer; of one that it does not; and of one that is held twice."""
    folder = out.parent
    items = [
        {"url": "https://new.test/near", "text": " ".join([*PROSE[6].split(" "), "and", "so", "on"])},
        {"url": "https://new.test/twin", "text": PROSE[10][::-1]},
        {"url": "https://new.test/longer-twin", "text": PROSE[10][::-1] + " etc"},
        *rows([text[::-1] for text in PROSE[11:14]], "backwards"),
    ]
    path = write_lines(folder / "new.jsonl", items)
    open_to_all: dict[str, object] = {"language": LanguageConfig(keep=[]), "quality": QualityConfig()}
    return settings(out, path, **{**open_to_all, "dedup": DedupConfig(against=[str(old)]), **changes})


def test_a_damaged_old_corpus_is_named_and_nothing_is_made_of_it(
    built: tuple[CorpusConfig, Path], tmp_path: Path
) -> None:
    """Every flipped bit, not only those that Arrow trips over: others would find other duplicates."""
    old = tmp_path / "old"
    shutil.copytree(built[1], old)
    new = held_against(tmp_path / "out", old)
    build_corpus(new)
    before = tree(tmp_path / "out")
    files = sorted([*old.glob("dedup/*.signatures.parquet"), *old.glob("decontaminate/*.verdicts.parquet")])
    assert len(files) == 6
    r = random.Random(0)
    for n in range(60):
        path = files[n % len(files)]
        whole = path.read_bytes()
        bytes_ = bytearray(whole)
        bytes_[r.randrange(len(whole))] ^= 1 << r.randrange(8)
        path.write_bytes(bytes_)
        with pytest.raises(CorruptionError, match=rf"{path.parent.name}/{path.name} is damaged .*there again"):
            old_corpus.require_whole(old, Hashes())
        if n < len(files):
            with pytest.raises(CorruptionError, match=rf"dedup\.against={old}: .* is damaged"):
                build_corpus(new)
            assert {k: v for k, v in tree(tmp_path / "out").items() if k in before} == before
        path.write_bytes(whole)
    # Damaged after it was looked at, a file that cannot be read is named all the same.
    files[-1].write_bytes(files[-1].read_bytes()[:-9])
    with pytest.raises(CorruptionError, match="is damaged; run `gpt2train corpus` there again"):
        old_corpus.signatures(old, built[0].dedup)
    files[-1].unlink()
    with pytest.raises(CorruptionError, match="is missing; run `gpt2train corpus` there again"):
        build_corpus(new)
    for marker in ("dedup/00001.signatures", "dedup/00001", "decontaminate/00001", "dedup/duplicates"):
        shutil.rmtree(old)
        shutil.copytree(built[1], old)
        path = old / f"{marker}.done.json"
        path.write_text(path.read_text().replace("0", "1", 1))
        with pytest.raises(InputError, match="finish it first"):
            build_corpus(new)


def test_an_old_corpus_that_did_not_get_to_its_end_is_refused(built: tuple[CorpusConfig, Path], tmp_path: Path) -> None:
    """Its last verdicts belong to other signatures than lie there now."""
    old = tmp_path / "old"
    shutil.copytree(built[1], old)
    stricter = replace(built[0], out=str(old), quality=QualityConfig(min_words=500))
    new = held_against(tmp_path / "out", old)
    for stages in (["filter"], ["dedup"]):
        with contextlib.suppress(AccountingError):  # the stages after these are of other rows
            build_corpus(replace(stricter, stages=stages))
        if "dedup" in stages:
            with pytest.raises(InputError, match="of other results than lie there; run `gpt2train corpus` there"):
                build_corpus(new)
    build_corpus(stricter)
    build_corpus(new)


def test_an_old_corpus_is_left_alone_while_it_is_read(
    built: tuple[CorpusConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    shutil.copytree(built[1], old)
    new = held_against(tmp_path / "out", old)
    with lock(old), pytest.raises(LockedError, match=rf"dedup\.against={old}: in use by process {os.getpid()} on"):
        build_corpus(new)
    join, seen = tasks.join_duplicates, []

    def join_and_look(*arguments: object) -> dict[str, object]:
        with pytest.raises(LockedError, match=r"in use by another process, maybe one that reads it"), lock(old):
            pass
        with lock_shared(old):
            seen.append(True)
        return join(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks, "join_duplicates", join_and_look)
    build_corpus(new)
    assert seen
    with lock(old):
        pass


def test_what_if_knows_of_old_corpora(
    built: tuple[CorpusConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is foretold is what a run does, with the old corpus and, by another setting, without it."""
    out = tmp_path / "out"
    new = held_against(out, built[1])
    build_corpus(new)
    for n, (override, dedup) in enumerate(
        {
            "dedup.keep=first": replace(new.dedup, keep=Keep.first),
            "dedup.against=[]": DedupConfig(),
            f"dedup.against=[{built[1]}]": new.dedup,
        }.items()
    ):
        assert main(["corpus", f"what_if=['{override}']", f"out={out}"]) == 0
        said = capsys.readouterr().out
        then = what_if.parse([override], read_config(Corpus(out)))
        foretold = {i: end[1] for i, end in what_if.replay(Corpus(out), then).items()}
        build_corpus(replace(new, out=str(tmp_path / str(n)), dedup=dedup))
        ended = {int(str(r["index"])): r["reason"] or "kept" for r in ledger(tmp_path / str(n)).values()}
        assert foretold == ended
        assert ("old_near_duplicate" in ended.values()) == (dedup != DedupConfig())
        kept = sum(reason == "kept" for reason in ended.values())
        assert f"kept by filter and dedup: 4 now, {kept} then" in said
    assert main(["corpus", f"what_if=['dedup.against=[{out}]']", f"out={out}"]) == 2
    assert "must be another corpus than out" in capsys.readouterr().err


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


def test_domains_beside_a_list(tmp_path: Path) -> None:
    sites = ("www.bad.test", "bad.test", "site3.test", "site4.test", "site5.test")
    pages = tmp_path / "pages.warc.gz"
    warc_pages(pages, {f"https://{site}/": text for site, text in zip(sites, PROSE, strict=False)})
    config = settings(tmp_path / "out", pages, source=Source.warc, quality=QualityConfig(), shards=1)
    build_corpus(config)
    path = tmp_path / "domains.txt"
    path.write_text("900 google\n500 bad\n400 site3\n 300 site4.test\n")
    beside = compare_domains(Corpus(Path(config.out)), str(path))
    assert sorted(beside.pop("top"), key=lambda row: row["rank"]) == [
        {"domain": "bad", "rank": 2, "documents": 1},  # www.bad.test is a name of its own: test is no public suffix
        {"domain": "site3", "rank": 3, "documents": 1},
        {"domain": "site4.test", "rank": 4, "documents": 1},
    ]
    assert len(documents(Path(config.out))) == 5
    assert beside == {"listed": 4, "found": 3, "documents": 3, "share": round(3 / 5, 6)}
