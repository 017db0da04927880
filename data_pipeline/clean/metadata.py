"""A parsed page → its title, author and date, as trafilatura and htmldate tell them.

`trafilatura.extract_metadata` looks for the site's name, categories, tags and a license as well, which no document has
a column for; this asks its functions for the three alone, in its order, with the same answers. A page costs 9 ms more
with them, 16 by the whole function; most of it is the search for an author by class names, which only those pages need
that have one of its words anywhere.
"""

from __future__ import annotations

import contextlib
import re
from html import unescape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lxml.html import HtmlElement

# A date in a page that lies after the fetch is no publication date. Without a known day of fetch this far bound
# stands in: htmldate's own default is the clock's today, which would give another corpus each day.
UNKNOWN_FETCH_DAY = "2099-12-31"

AUTHOR_WORDS = (
    "author",
    "byl",
    "username",
    "zuozhe",
    "bianji",
    "xiaobian",
    "channel-name",
    "submitted-by",
    "posted-by",
    "journalist-name",
    "screenname",
    "writer",
)
"""What the names and values of trafilatura's AUTHOR_XPATHS have in common, in lower case; and the class BBL."""


class Metadata(NamedTuple):
    """Each is empty where the page does not say."""

    title: str = ""
    author: str = ""
    date: str = ""
    """YYYY-MM-DD"""


def page_metadata(tree: HtmlElement, html: str, url: str, fetched_at: str) -> Metadata:
    """Title, author and date of a page.

    Args:
        tree: trafilatura's parse of `html`; it is left as it was.
        url: of the page, where it names none itself; it may date the page.
        fetched_at: RFC 3339 time or date of the fetch, or ""; dates later than that day are not believed.
    """
    from htmldate import find_date
    from trafilatura import metadata

    found = metadata.examine_meta(tree)
    if found.author and " " not in found.author:  # rather an account than a name
        found.author = None
    with contextlib.suppress(Exception):  # as trafilatura does: JSON-LD has every shape
        found = metadata.extract_meta_json(tree, found)
    if not found.title:
        found.title = metadata.extract_title(tree)
    if not found.author and _may_name_an_author(html):
        found.author = metadata.extract_author(tree)
    found.date = find_date(
        tree,
        extensive_search=False,
        original_date=True,
        url=found.url or metadata.extract_url(tree, url or None),
        max_date=fetched_at[:10] if re.match(r"\d{4}-\d\d-\d\d", fetched_at) else UNKNOWN_FETCH_DAY,
    )
    found.clean_and_trim()
    return Metadata(found.title or "", found.author or "", found.date or "")


def _may_name_an_author(html: str) -> bool:
    """False: none of trafilatura's expressions for an author's element can match."""
    if "&#" in html:
        html = unescape(html)
    html = html.replace("\0", "")  # as lxml reads it
    lowered = html.lower()
    return any(word in lowered for word in AUTHOR_WORDS) or "BBL" in html
