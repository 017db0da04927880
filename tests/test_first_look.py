"""Pages left out for their language before extraction: only those that the rule about languages would have dropped."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from places import SHARED

from benchmarks.corpus import read_pages
from data_pipeline.clean.first_look import surely_other_language
from data_pipeline.clean.html_text import Extracted, Rejected, page_text
from data_pipeline.clean.language import identify
from data_pipeline.config import ExtractConfig

UDHR = SHARED / "nltk" / "udhr2.zip"
GERMAN = "Der Ausschuss traf sich im zweiten Stock des alten Rathauses, und niemand mochte die Farbe der Türen. "
ENGLISH = "The committee met on the second floor of the old town hall, and nobody could agree on the doors. "


def page(text: str, wanted: list[str]) -> Extracted | Rejected:
    body = f"<html><body><article><p>{text}</p></article></body></html>".encode()
    return page_text(body, "https://example.org/", "text/html; charset=utf-8", "", ExtractConfig(), wanted)


def test_a_page_surely_in_another_language_is_not_extracted() -> None:
    outcome = page(GERMAN * 8, ["en"])
    assert isinstance(outcome, Rejected)
    assert (outcome.state, outcome.reason) == ("dropped", "language")
    assert outcome.numbers["language"] == "de"
    assert float(outcome.numbers["language_score"]) >= 0.99
    assert "judge" not in outcome.numbers  # nobody was asked for its main text
    for wanted in ([], ["de"], ["en", "de"]):
        assert isinstance(page(GERMAN * 8, wanted), Extracted)


@pytest.mark.parametrize(
    "text",
    [GERMAN, ENGLISH * 8, GERMAN * 8 + ENGLISH * 20, ENGLISH * 20 + GERMAN * 8, "4711 " * 100, ""],
    ids=["short", "English", "German, then English", "English, then German", "digits", "empty"],
)
def test_a_doubt_leaves_the_page_to_the_rule(text: str) -> None:
    assert surely_other_language(text, ["en"]) is None


@pytest.mark.skipif(not UDHR.exists(), reason="needs nltk's udhr2 corpus")
def test_the_declaration_of_human_rights_in_hundreds_of_languages() -> None:
    with zipfile.ZipFile(UDHR) as archive:
        texts = {
            Path(name).stem: archive.read(name).decode("utf-8", errors="replace")
            for name in archive.namelist()
            if name.endswith(".txt")
        }
    assert len(texts) > 300
    named = {"eng", "deu_1901", "fra", "spa", "rus", "jpn", "arb"}
    texts = {name: text for i, (name, text) in enumerate(texts.items()) if i % 3 == 0 or name in named}
    left_out = {name for name, text in texts.items() if surely_other_language(text, ["en"])}
    assert named - left_out == {"eng"}
    # Whatever it leaves out, the rule drops; most of what the rule drops, it sees before.
    for name in left_out:
        code, score = identify(texts[name])
        assert code != "en" or score < 0.65, name
    dropped = {name for name, text in texts.items() if identify(text)[0] != "en"}
    assert len(left_out) > 0.5 * len(dropped)


@pytest.mark.skipif(not (SHARED / "pages").is_dir(), reason="needs the benchmark's pages")
def test_no_page_in_english_is_left_out() -> None:
    pages, gold = read_pages(SHARED / "pages", 100)
    config = ExtractConfig(respect_noai=False, metadata=False)
    for body, text in zip(pages, gold, strict=True):
        outcome = page_text(body, "", "text/html", "", config, ["en"])
        if isinstance(outcome, Rejected) and outcome.reason == "language":
            assert identify(text)[0] != "en", text[:200]
