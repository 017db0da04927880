"""A parsed page → its main text by resiliparse, where the page's shape says that this is as good as trafilatura.

In: a parse tree, which is changed, and the length of the page's whole visible text. Out: the main text, or None where
trafilatura has to judge. Cost: 2 ms a page beside trafilatura's 25, for the four pages in five that need no more.

Which pages those are was learned on one half of 1,028 pages of seven kinds with gold texts (Foley's web content
extraction benchmark; halves by the MD5 of a page's number), and holds on the other, which had been looked at when
coverage was found to matter, but chose no bound: docs/benchmarks-corpus.md has the figures. What decides is coverage,
the share of the visible text that the main content has. Where it is small, resiliparse has taken a teaser, a cookie
notice or a footer for the article, and loses half of F1; above `MIN_COVERAGE` it is even with trafilatura on articles
and better on service pages and forums. Rules with more features of the page (counts of tags, length of lines,
punctuation) gave no more that held on the other half and could be explained.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resiliparse.parse.html import HTMLTree

# By the learning half: F1 .8449 at .45, .8436 at .40 and .8439 at .50, against .8363 for trafilatura's default.
MIN_COVERAGE = 0.45
# trafilatura's own bound for "too short to be believed" (MIN_EXTRACTED_SIZE in its settings).
MIN_CHARACTERS = 250

# What readers wrote below an article, the form to write more, and what is shown on a click or never. On a page whose
# comments are most of its text, as forums have it, the coverage of what is left is small, and trafilatura judges.
NOT_MAIN = (
    "#comments, .comments, .comments-area, #respond, .comment-respond, #disqus_thread, .comment-list, .commentlist, "
    '[role="dialog"], [hidden]'
)

_LIST_MARK = re.compile(r"^(?:  )?( *)(?:•|(?=\d+\. ))[ \t]*", re.MULTILINE)
_EMPTY_LINE = re.compile(r"\n[\s|•-]*(?=\n|$)")
_BLANKS = re.compile("(?<=\\S)[ \xa0]{2,}(?=\\S)|\xa0")
_CELL_BORDER = re.compile(r"(?<=\S)\t\t+(?=\S)")


def main_text(tree: HTMLTree, visible_characters: int, tables: bool = True) -> str | None:
    """The main text of a page, a paragraph a line as trafilatura writes it; None where trafilatura should judge."""
    from resiliparse.extract.html2text import extract_plain_text

    if tree.body is not None:
        for node in tree.body.query_selector_all(NOT_MAIN):
            # A node within one that has gone already has gone with it; the body itself is the page.
            if node.parent is not None and node != tree.body:
                node.decompose()
    text = extract_plain_text(
        tree,
        main_content=True,
        preserve_formatting=True,
        alt_texts=False,
        comments=True,  # its own rule for comments takes forums apart
        skip_elements=None if tables else ["table"],
    )
    if len(text) < MIN_CHARACTERS or len(text) < MIN_COVERAGE * visible_characters:
        return None
    return tidy(text)


def tidy(text: str) -> str:
    """resiliparse's layout → trafilatura's: no blank lines, `- ` before items, ` | ` between cells, single spaces."""
    text = _CELL_BORDER.sub(" | ", _BLANKS.sub(" ", text))
    text = _LIST_MARK.sub(lambda m: m.group(1) + ("- " if "•" in m.group() else ""), text)
    return _EMPTY_LINE.sub("", "\n" + text).strip("\n")
