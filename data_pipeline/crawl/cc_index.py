"""Lines of Common Crawl's URL index as rows of a URL list: what they say of a page spares requests that end nowhere.

Two forms carry the same JSON object (url, status, mime, mime-detected, filename, offset, ...): CDXJ as in the files
`cdx-00000.gz`, where a sort key and a time stamp stand before it (iipc.github.io/warc-specifications, CDXJ 1.0), and
the plain JSON lines of the index server (pywb's `output=json`). A row flows in; a reason not to ask for it, or none,
flows out.
"""

from __future__ import annotations

from collections.abc import Mapping

HTML_TYPES = frozenset(("text/html", "application/xhtml+xml"))


def json_of(line: bytes) -> bytes:
    """The JSON object of a CDXJ line; a line that starts with one comes back as it is."""
    start = line.find(b"{")
    return line[start:] if start > 0 else line


def is_index_row(value: Mapping[str, object]) -> bool:
    """Whether a JSON object is such a line: it says where in which WARC file the page lies."""
    return {"url", "filename", "offset"} <= value.keys()


def refusal(value: Mapping[str, object]) -> tuple[str, str] | None:
    """(reason, detail) when the crawl that made the index found no page there.

    >>> refusal({"url": "http://a.example/", "filename": "x.warc.gz", "offset": "7", "status": "404"})
    ('index_status', 'status 404 in the index')
    """
    status = str(value.get("status", ""))
    if status not in ("", "-", "200"):
        return "index_status", f"status {status[:20]} in the index"
    mime = str(value.get("mime-detected") or value.get("mime") or "").partition(";")[0].strip().lower()
    if mime not in ("", "-", "unk", "warc/revisit") and mime not in HTML_TYPES:
        return "index_mime", f"{mime[:100]} in the index"
    return None
