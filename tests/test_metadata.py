"""Title, author and date: the same as trafilatura's own, whichever of its searches are left out."""

from __future__ import annotations

import re

import pytest
import trafilatura
from lxml import etree
from pages import SHARED, needs_pages
from trafilatura.xpaths import AUTHOR_XPATHS

from data_pipeline.clean.html_text import decode
from data_pipeline.clean.metadata import AUTHOR_WORDS, Metadata, page_metadata

URL = "https://example.org/2024/05/17/doors"
BODY = "<article><h1>Doors</h1><p>A door is a movable barrier.</p></article>"
PAGES = {
    "nothing": "<html><body><p>text</p></body></html>",
    "meta tags": '<head><meta property="og:title" content="Doors &amp;amp; gates">'
    '<meta name="author" content="Ann Lee">'
    f'<meta property="article:published_time" content="2023-02-03T10:00:00Z"></head><body>{BODY}</body>',
    "an account is no name": f'<head><meta name="author" content="admin"></head><body>{BODY}</body>',
    "JSON-LD": '<head><script type="application/ld+json">{"@context": "https://schema.org", "@type": "NewsArticle", '
    '"headline": "Of doors", "datePublished": "2022-01-02", "author": {"@type": "Person", "name": "Bo Ek"}}'
    f"</script></head><body>{BODY}</body>",
    "JSON-LD of no shape": f'<head><script type="application/ld+json">[{{"@type": [1]}}, 3</script></head>{BODY}',
    "a class": f'<body><span class="post-author">By Cy Poe</span>{BODY}</body>',
    "a class in capitals": f'<body><div class="BBL">Di Ray</div>{BODY}</body>',
    "a class in character references": f'<body><span class="post-&#97;uthor">By Cy Poe</span>{BODY}</body>',
    "a class with a zero in it": f'<body><span class="post-au\0thor">By Cy Poe</span>{BODY}</body>',
    "an element": f"<body><AUTHOR>Ed Fox</AUTHOR>{BODY}</body>",
    "in the comments": f'<body><div class="comments"><b class="author">Flo Gee</b></div>{BODY}</body>',
    "no author's class": f'<body><span class="name">Gil Ham</span>{BODY}</body>',
    "canonical": f'<head><link rel="canonical" href="https://example.org/2020/11/30/x"></head><body>{BODY}</body>',
    "a later date": f'<head><meta name="date" content="2025-12-01"></head><body>{BODY}</body>',
    "a time": f'<body><time datetime="2021-04-05">April</time>{BODY}</body>',
}


def by_trafilatura(html: str, url: str, max_date: str) -> Metadata:
    dates = {"original_date": True, "extensive_search": False, "max_date": max_date}
    found = trafilatura.extract_metadata(html, default_url=url, date_config=dates, extensive=False)
    return Metadata(found.title or "", found.author or "", found.date or "")


def ours(html: str, url: str, fetched_at: str) -> Metadata:
    tree = trafilatura.load_html(html)
    before = etree.tostring(tree)
    found = page_metadata(tree, html, url, fetched_at)
    assert etree.tostring(tree) == before
    return found


@pytest.mark.parametrize("url", [URL, "https://example.org/"])
@pytest.mark.parametrize("name", PAGES)
def test_the_three_are_what_trafilatura_finds(name: str, url: str) -> None:
    html = PAGES[name]
    assert ours(html, url, "2025-01-01T12:00:00Z") == by_trafilatura(html, url, "2025-01-01")
    assert ours(html, url, "") == by_trafilatura(html, url, "2099-12-31")


def test_what_some_of_them_say() -> None:
    assert ours(PAGES["meta tags"], "", "2025-01-01") == ("Doors & gates", "Ann Lee", "2023-02-03")
    assert ours(PAGES["JSON-LD"], "", "2025-01-01") == ("Of doors", "Bo Ek", "2022-01-02")
    assert ours(PAGES["a class in capitals"], "", "").author == "Di Ray"
    assert ours(PAGES["an element"], "", "").author == "Ed Fox"
    assert ours(PAGES["a class in character references"], "", "").author == "Cy Poe"
    assert ours(PAGES["nothing"], URL, "") == ("", "", "2024-05-17")
    assert ours(PAGES["a later date"], "", "2025-01-01").date == ""


def test_every_expression_for_an_author_has_one_of_the_words() -> None:
    for expression in AUTHOR_XPATHS:
        # rel='me' asks for a child <rel>, which HTML does not have.
        literals = set(re.findall(r"'([^']*)'", expression.path)) - {"me", "BBL"}
        literals |= set(re.findall(r"//(\w+)", expression.path))
        alternatives = {part for literal in literals for part in re.sub(r"\[(\w)\w*\]", r"\1", literal).split("|")}
        assert alternatives
        assert not [a for a in alternatives if not any(word in a.lower() for word in AUTHOR_WORDS)]


@needs_pages
def test_real_pages() -> None:
    pages = sorted((SHARED / "pages" / "html").iterdir())[::8]
    found = []
    for page in pages:
        html = decode(page.read_bytes(), "text/html")[0]
        url = f"https://example.org/{page.stem}"
        found.append(ours(html, url, "2026-11-01"))
        assert found[-1] == by_trafilatura(html, url, "2026-11-01"), page
    assert all(sum(bool(value) for value in values) > len(pages) // 5 for values in zip(*found, strict=True))
