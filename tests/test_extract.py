"""Extraction against hand-made gold texts, against bytes that are no text, and against pages that try to break it."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from pages import ARTICLE, PATHOLOGICAL, SENTENCE, SHARED, URL, needs_pages, one_page

from benchmarks import corpus
from data_pipeline.clean import main_content
from data_pipeline.clean.extract import Extractor, extract_shard, text_digest
from data_pipeline.clean.html_text import Extracted, Rejected, clean_text, decode, meta_robots, page_text
from data_pipeline.config import ExtractConfig
from data_pipeline.records import DOCUMENT_SCHEMA, DROPPED, PAGE_SCHEMA, VERDICT_SCHEMA

# --- Accuracy -------------------------------------------------------------------------------------------------------


def word_f1(found: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the multisets of lower-cased words."""
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (found, gold))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else float(not a and not b)


@needs_pages
def test_word_f1_against_gold_texts() -> None:
    gold = {p.stem: json.loads(p.read_text()) for p in sorted((SHARED / "pages" / "gold").iterdir())}
    articles = [name for name, g in gold.items() if g["page_type"] == "article" and g["main_content"]][::8]
    scores = []
    for name in articles:
        body = (SHARED / "pages" / "html" / f"{name}.html").read_bytes()
        outcome = one_page(body, respect_noai=False, min_characters=0)
        scores.append(word_f1(outcome.text if isinstance(outcome, Extracted) else "", gold[name]["main_content"]))
    assert len(scores) > 50
    assert sum(scores) / len(scores) > 0.90


def _held_out(name: str) -> bool:
    """Whether a page is of the half that no bound of `main_content` was chosen by."""
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % 2 == 1


# The difference on one page has a standard deviation of 0.15, so the mean of 84 pages tells no more than 0.04 for sure;
# over all 500 it was measured: F1 .859 against .852.
@needs_pages
@pytest.mark.parametrize(("every", "least"), [(6, -0.04), pytest.param(1, -0.003, marks=pytest.mark.soak)])
def test_the_fast_way_is_no_worse_than_trafilatura_on_pages_that_taught_it_nothing(every: int, least: float) -> None:
    gold = {p.stem: json.loads(p.read_text())["main_content"] for p in sorted((SHARED / "pages" / "gold").iterdir())}
    chosen = [name for name, text in gold.items() if text and _held_out(name)][::every]
    scores: dict[bool, list[float]] = {True: [], False: []}
    judges = Counter[str]()
    for name in chosen:
        body = (SHARED / "pages" / "html" / f"{name}.html").read_bytes()
        for fast in (True, False):
            outcome = one_page(body, respect_noai=False, min_characters=0, metadata=False, fast=fast)
            assert isinstance(outcome, Extracted) or outcome.reason == "no_text"
            scores[fast].append(corpus.f1(outcome.text if isinstance(outcome, Extracted) else "", gold[name]))
            if fast:
                judges[str(outcome.numbers["judge"])] += 1
            else:
                assert outcome.numbers["judge"] == "trafilatura"
    assert len(chosen) > 80
    assert sum(scores[True]) >= sum(scores[False]) + least * len(chosen)
    assert judges["resiliparse"] > 0.65 * len(chosen)  # or it is not fast


def test_the_fast_way_writes_texts_as_the_other_does() -> None:
    items = "".join(f"<li>{SENTENCE}</li>" for _ in range(3))
    table = "<table><tr><th>Door</th><th>Color</th></tr><tr><td>first</td><td>vermilion</td></tr></table>"
    body = (
        f"<html><body><article><h1>Doors</h1><p>{SENTENCE * 6}</p><h2>More</h2><p>Two\u00a0words  apart.</p>"
        f"<ol>{items}</ol><pre>def door():\n    return 1</pre>{table}<p>The end of it, at last.</p></article>"
        '<div id="comments"><p>Firstposter was here.</p><div class="comment-list">Me, too.</div></div>'
        '<div role="dialog">Accept all cookies?</div></body></html>'
    ).encode()
    found = one_page(body)
    assert isinstance(found, Extracted)
    assert found.numbers["judge"] == "resiliparse"
    assert found.text.split("\n") == [
        "Doors",
        (SENTENCE * 6).strip(),
        "More",
        "Two words apart.",
        *(f"{i}. {SENTENCE.strip()}" for i in (1, 2, 3)),
        "def door():",
        "    return 1",
        "Door | Color",
        "first | vermilion",
        "The end of it, at last.",
    ]


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("  • one\n\n    • nested\n\n  • \n\n  • two", "- one\n  - nested\n- two"),
        ("  10. ten\n\n1984. A year.", "10. ten\n1984. A year."),
        ("a\n\n\n\nb\n |\n--\nc", "a\nb\nc"),
        ("a\t\tb\n\t\tindented", "a | b\n\t\tindented"),
        ("", ""),
    ],
)
def test_tidy(text: str, tidied: str) -> None:
    assert main_content.tidy(text) == tidied


def test_title_author_and_date_and_none_later_than_the_fetch() -> None:
    head = (
        '<head><title>Doors</title><meta name="author" content="Ada  Byron">'
        '<meta property="article:published_time" content="2026-10-05T10:00:00Z"></head>'
    )
    body = f"<html>{head}<body><article><h1>Doors</h1><p>{SENTENCE * 6}</p></article></body></html>".encode()
    seen = one_page(body)
    assert isinstance(seen, Extracted)
    assert (seen.title, seen.author, seen.date) == ("Doors", "Ada Byron", "2026-10-05")
    before = page_text(body, URL, "text/html", "2026-09-15T00:00:00Z", ExtractConfig())
    assert isinstance(before, Extracted)
    assert before.date == ""  # a page cannot have been published after it was fetched
    assert before.text == seen.text
    without = one_page(body, metadata=False)
    assert isinstance(without, Extracted)
    assert (without.title, without.author, without.date, without.text) == ("", "", "", seen.text)


def test_comments_and_tables() -> None:
    table = "<table><tr><th>Door</th><td>Vermilion</td></tr><tr><th>Window</th><td>Ultramarine</td></tr></table>"
    comments = f'<div id="comments" class="comments"><p>Firstposter was here. {SENTENCE}</p></div>'
    body = ARTICLE.replace(b"</article>", f"{table}</article>{comments}".encode())
    with_tables, without = one_page(body), one_page(body, tables=False)
    assert isinstance(with_tables, Extracted)
    assert isinstance(without, Extracted)
    assert "Ultramarine" in with_tables.text
    assert "Ultramarine" not in without.text
    assert "Firstposter" not in with_tables.text


# --- Bytes ----------------------------------------------------------------------------------------------------------

WORDS = "Пожалуйста, закройте за собой дверь. " * 8
GERMAN = "Über den Dächern hört man süße Töne und große Glocken. " * 8
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 8


@pytest.mark.parametrize(
    ("text", "encoding", "content_type", "meta", "expected"),
    [
        (WORDS, "utf-8", "text/html; charset=utf-8", "", "utf-8"),
        (WORDS, "utf-8", "text/html; charset=iso-8859-1", "", "utf-8"),  # wrong header, valid UTF-8
        (WORDS, "windows-1251", 'text/html; charset="windows-1251"', "", "cp1251"),
        (WORDS, "koi8-r", "text/html", '<meta charset="koi8-r">', "koi8-r"),
        (WORDS, "windows-1251", "text/html", "", None),  # detected
        (WORDS, "windows-1251", "text/html; charset=utf-8", "", None),  # a header that cannot be true
        (GERMAN, "iso-8859-1", "text/html; charset=ISO-8859-1", "", "cp1252"),
        (GERMAN, "cp1252", "text/html", "", None),
        (
            JAPANESE,
            "shift_jis",
            "text/html",
            '<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS">',
            "cp932",
        ),
        (JAPANESE, "euc-jp", "text/html; charset=euc-jp", "", "euc_jp"),
        (JAPANESE, "iso-2022-jp", "text/html; charset=iso-2022-jp", "", "iso2022_jp"),
        (JAPANESE, "utf-16", "text/html", "", "utf-16-le"),  # with a mark
        (GERMAN, "utf-16-le", "text/html", "", "utf-16-le"),  # without one
        (GERMAN, "utf-16-be", "text/html; charset=utf-8", "", "utf-16-be"),
        ("你好世界，今天天气很好。" * 20, "gb18030", "text/html; charset=gb2312", "", "gb18030"),
    ],
)
def test_charsets(text: str, encoding: str, content_type: str, meta: str, expected: str | None) -> None:
    page = f"<html><head>{meta}<title>x</title></head><body><article><p>{text}</p></article></body></html>"
    decoded, name = decode(page.encode(encoding), content_type)
    assert decoded == page
    if expected is not None:
        assert name == expected
    outcome = one_page(page.encode(encoding), content_type)
    assert isinstance(outcome, Extracted)
    assert text.strip() in outcome.text


def test_a_few_broken_bytes_do_not_change_the_charset() -> None:
    page = f"<html><body><p>{WORDS}</p></body></html>".encode()
    decoded, name = decode(page[:200] + b"\xff" + page[200:], "text/html; charset=utf-8")
    assert name == "utf-8"
    assert decoded.count("\ufffd") <= 3
    assert WORDS[-100:] in decoded


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (gzip.compress(ARTICLE, mtime=0), "text/html", "not_text"),
        (b"%PDF-1.7\n" + ARTICLE, "text/html", "not_text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "text/html", "not_text"),
        (random.Random(0).randbytes(20_000), "text/html", "not_text"),
        (ARTICLE.replace(b"o", b"\0"), "text/html", "not_text"),
        (SENTENCE.encode() * 6, "text/plain; charset=utf-8", "not_html"),
        (b'{"a": 1}' * 100, "application/json", "not_html"),
        (b"", "text/html", "no_text"),
        (b"<html><body><p>Too short.</p></body></html>", "text/html", "no_text"),
        (f"<html><body><p>{'Caf' + chr(0xFFFD) + ' '}{SENTENCE}".encode() + "\ufffd".encode() * 60, "", "bad_charset"),
        (ARTICLE.replace(b"<head>", b"<head><meta name=ROBOTS content='follow, NoIndex'>"), "text/html", "noindex"),
        (b"<html>" + b" " * 3_000_000, "text/html", "html_too_large"),
    ],
)
def test_typed_rejections(body: bytes, content_type: str, reason: str) -> None:
    outcome = one_page(body, content_type)
    assert isinstance(outcome, Rejected)
    assert (outcome.state, outcome.reason) == (DROPPED, reason)
    assert outcome.numbers["html_bytes"] == len(body)


def test_html_under_another_name_is_still_html() -> None:
    assert isinstance(one_page(b"<!DOCTYPE html>" + ARTICLE, "text/plain"), Extracted)


@pytest.mark.parametrize(
    "head",
    ["&#xD800;&#55296;", "\x00", "+ADw-script+AD4-", "\ufeff\ufffe", "a\u0308o\u0308", "Build\u00ading"],
    ids=["surrogate entities", "NUL", "UTF-7", "marks", "decomposed", "soft hyphen"],
)
def test_text_is_always_clean_utf8(head: str) -> None:
    body = f"<html><body><article><p>{head} {SENTENCE * 6}</p></article></body></html>".encode()
    outcome = one_page(body, "text/html; charset=utf-8")
    assert isinstance(outcome, Extracted)
    assert outcome.text.encode().decode() == outcome.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\ufeff\ufffe]", outcome.text)
    assert "a\u0308" not in outcome.text  # NFC
    assert SENTENCE.strip() in outcome.text


def test_clean_text_leaves_what_carries_meaning() -> None:
    assert clean_text("a\r\nb \t\n½² 👩\u200d🔬 e\u0301\u00ad\ud800") == "a\nb\n½² 👩\u200d🔬 é"


@pytest.mark.parametrize(
    ("html", "directive"),
    [
        ('<meta name="robots" content="noindex">', "noindex"),
        ('<META NAME="Robots" CONTENT="NOARCHIVE,NOAI, noimageai">', "noai"),
        ("<meta name=robots content='none'>", "none"),
        ("<meta name=TDM-Reservation content=' 1 '>", "tdm-reservation"),
        ('<meta name="tdm-reservation" content="0">', None),
        ('<meta name="robots" content="index, follow, max-snippet:-1, nofollow">', None),
        ('<meta name="description" content="noindex">', None),
        ('<!-- <meta name="robots" content="noindex"> -->', None),
        ('<script>"<meta name=robots content=noindex>"</script>', None),
    ],
)
def test_meta_robots(html: str, directive: str | None) -> None:
    page = f"<html><head>{html}</head><body>{SENTENCE}</body></html>"
    assert meta_robots(page) == directive
    outcome = one_page(ARTICLE.replace(b"<head>", b"<head>" + html.encode()))
    assert isinstance(outcome, Rejected if directive else Extracted)
    assert isinstance(one_page(ARTICLE.replace(b"<head>", b"<head>" + html.encode()), respect_noai=False), Extracted)


# --- A shard --------------------------------------------------------------------------------------------------------


def _pages(rows: list[tuple[int, str]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "index": index,
                "url": f"https://example.org/{name}",
                "final_url": f"https://example.org/final/{name}",
                "domain": "example.org",
                "status": 200,
                "content_type": "text/html",
                "fetched_at": "2026-11-01T00:00:00Z",
                "warc_file": name,
                "warc_offset": index * 10,
                "payload_digest": name,
            }
            for index, name in rows
        ],
        schema=PAGE_SCHEMA,
    )


def test_shard_accounts_for_every_page_in_index_order() -> None:
    bodies = {"good": ARTICLE, "pdf": b"%PDF-1.4", "empty": b"", "slow": PATHOLOGICAL["attributes"], "last": ARTICLE}
    asked = []

    def read_body(page: dict[str, Any]) -> tuple[bytes, str] | Rejected:
        asked.append((page["warc_file"], page["warc_offset"]))
        if page["warc_file"] == "torn":
            return Rejected("failed", "warc_damaged", "the record ends early")
        return bodies[page["warc_file"]], "text/html"

    pages = _pages([(9, "last"), (4, "slow"), (1, "good"), (2, "pdf"), (3, "empty"), (5, "torn")])
    documents, verdicts = extract_shard(pages, ExtractConfig(timeout_s=0.5), read_body)
    assert documents.schema == DOCUMENT_SCHEMA
    assert verdicts.schema == VERDICT_SCHEMA
    assert asked == [("good", 10), ("pdf", 20), ("empty", 30), ("slow", 40), ("torn", 50), ("last", 90)]
    assert verdicts["index"].to_pylist() == [1, 2, 3, 4, 5, 9]
    assert verdicts["state"].to_pylist() == ["kept", "dropped", "dropped", "failed", "failed", "kept"]
    assert verdicts["reason"].to_pylist() == [None, "not_text", "no_text", "extract_timeout", "warc_damaged", None]
    assert documents["index"].to_pylist() == [1, 9]
    first = documents.to_pylist()[0]
    assert first["url"] == "https://example.org/good"
    assert first["digest"] == text_digest(first["text"])
    assert (first["warc_file"], first["warc_offset"], first["domain"]) == ("good", 10, "example.org")


def test_the_same_bytes_are_extracted_once_and_give_what_each_would() -> None:
    head = "<html><head><title>Doors</title></head>"
    body = f"{head}<body><article><h1>Doors</h1><p>{SENTENCE * 6}</p></article></body></html>".encode()
    # A date in the URL is the page's date: those are other outcomes.
    names = ["a", "b", "2024/05/17/c", "2024/05/17/c", "2023/01/02/e", "f"]
    pages = _pages(list(enumerate(names)))
    digest = pages.schema.get_field_index("payload_digest")
    repeated = pages.set_column(digest, "payload_digest", pa.array(["same"] * 5 + ["other"], pa.string()))
    single = pages.set_column(digest, "payload_digest", pa.array([f"digest {i}" for i in range(6)], pa.string()))
    asked: list[str] = []
    extract = Extractor.extract

    def counted(self: Extractor, body: bytes, url: str, *rest: str) -> Extracted | Rejected:
        asked.append(url)
        return extract(self, body, url, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "extract", counted)
        found = extract_shard(repeated, ExtractConfig(), lambda page: (body, "text/html"))
    assert [url.removeprefix("https://example.org/final/") for url in asked] == [names[i] for i in (0, 2, 4, 5)]
    assert found == extract_shard(single, ExtractConfig(), lambda page: (body, "text/html"))
    assert found[0]["date"].to_pylist() == [None, None, "2024-05-17", "2024-05-17", "2023-01-02", None]


def test_empty_shard() -> None:
    documents, verdicts = extract_shard(_pages([]), ExtractConfig(), lambda page: (b"", ""))
    assert (documents.num_rows, verdicts.num_rows) == (0, 0)
    assert documents.schema == DOCUMENT_SCHEMA


def test_favor_recall_keeps_reference_pages() -> None:
    items = "".join(f"<dt>option-{i}</dt><dd>Sets the value number {i} of the machine.</dd>" for i in range(80))
    page = f"<html><body><div><h1>Options</h1><p>Short.</p><dl>{items}</dl></div></body></html>".encode()
    lengths = {}
    for favor_recall in (False, True):
        with Extractor(ExtractConfig(favor_recall=favor_recall)) as extractor:
            outcome = extractor.extract(page, "https://example.org/options")
            lengths[favor_recall] = len(outcome.text) if isinstance(outcome, Extracted) else 0
    assert lengths[True] >= lengths[False]
    assert lengths[True] > 2_000
