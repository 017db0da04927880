"""Pages for tests of extraction: a plain one, and those that take an extractor long."""

from __future__ import annotations

import pytest
from places import SHARED

from data_pipeline.clean.html_text import Extracted, Rejected, page_text
from data_pipeline.config import ExtractConfig

needs_pages = pytest.mark.skipif(not (SHARED / "pages").is_dir(), reason="needs the benchmark's pages")

SENTENCE = (
    "The committee met on the second floor of the old town hall, and nobody could agree on the color of the door. "
)
ARTICLE = (
    f"<html><head><title>Doors</title></head><body><article><p>{SENTENCE * 6}</p></article></body></html>".encode()
)
URL = "https://example.org/doors"


def one_page(body: bytes, content_type: str = "text/html", **settings: object) -> Extracted | Rejected:
    return page_text(body, URL, content_type, "2026-11-01T00:00:00Z", ExtractConfig(**settings))


PATHOLOGICAL = {
    "nested divs": b"<html><body>" + b"<div>" * 200_000 + SENTENCE.encode(),
    "attributes": b"<html><body><p " + b" ".join(b"a%d=1" % i for i in range(50_000)) + b">" + SENTENCE.encode() * 6,
    "br": b"<html><body>" + b"x<br>" * 390_000,
    "p": b"<html><body>" + b"<p>A paragraph." * 100_000,
    "links": b"<html><body><ul>" + b"<li><a href=x>y" * 120_000,
    "tables": b"<html><body>" + b"<table><tr><td>" * 50_000 + SENTENCE.encode(),
    "colspan": b"<html><body><table><tr><td colspan=9007199254740992>" + SENTENCE.encode() * 3 + b"</table>",
    "50 MB": b"<html><body>" + b"<p>A paragraph." * 3_500_000,
}
