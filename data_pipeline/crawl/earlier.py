"""The pages of an earlier corpus, by which a second crawl asks whether they changed (RFC 9110, 13).

A page table of the earlier corpus flows in; for each URL flow out the validators to ask with (ETag, Last-Modified) and,
once the server has answered 304, the archived response, checked by its digest. What cannot be read is asked for anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.crawl.warc import WarcError, WarcResponse, read_response

_COLUMNS = (
    *("url", "final_url", "status", "content_type", "warc_file", "warc_offset"),
    *("payload_digest", "etag", "last_modified"),
)


@dataclass(frozen=True, slots=True)
class EarlierPage:
    """`warc_file` is absolute; the page's own address is `final_url`, and the validators are meant for that alone."""

    final_url: str
    status: int
    content_type: str
    warc_file: str
    warc_offset: int
    payload_digest: str
    etag: str | None
    last_modified: str | None

    def conditions(self) -> dict[str, str]:
        """Request headers that make the server send the page only if it changed."""
        headers = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in headers.items() if value}

    def read(self, max_bytes: int) -> WarcResponse | None:
        """The archived response; None when it is not there any more as it was."""
        try:
            response = read_response(Path(self.warc_file), self.warc_offset, max_bytes)
        except (WarcError, OSError):
            return None
        return response if hashlib.sha256(response.body).hexdigest() == self.payload_digest else None


def earlier_pages(table: Path, corpus: Path) -> dict[str, EarlierPage]:
    """URL → page of `table` (PAGE_SCHEMA, of the folder `corpus`), as far as the server gave something to ask by."""
    if "etag" not in pq.read_schema(table).names:
        return {}  # written before validators were kept
    pages = {}
    for row in pq.read_table(table, columns=list(_COLUMNS)).to_pylist():
        if row["etag"] or row["last_modified"]:
            url = row.pop("url")
            row["warc_file"] = str((corpus / row["warc_file"]).resolve())
            pages[url] = EarlierPage(**row)
    return pages


def validator(value: str) -> str | None:
    """An ETag or Last-Modified that can be sent back as it came: short, printable ASCII; else None."""
    return value if 0 < len(value) <= 512 and value.isascii() and value.isprintable() else None
