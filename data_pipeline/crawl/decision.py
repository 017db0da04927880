"""One URL's end, as it goes into the journal, and its page, as it goes into the WARC file.

A job, a state and, for a page that is kept, its response flow in; a line of the journal and an `Exchange` flow out.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.crawl.earlier import validator
from data_pipeline.crawl.fetch_queue import Job
from data_pipeline.crawl.http.get import Reply, now_text
from data_pipeline.crawl.warc import Exchange
from data_pipeline.records import KEPT


def journal_line(
    job: Job,
    state: str,
    reason: str | None,
    detail: str | None,
    reply: Reply | None,
    body: bytes,
    revisit_of: tuple[str, str] | None,
) -> tuple[dict[str, Any], Exchange | None]:
    """(the line, what is archived with it). `revisit_of`: (URL, date) of the archived response whose `body` still
    holds, as the 304 in `reply` says."""
    line: dict[str, Any] = {"url": job.original, "state": state}
    if state != KEPT:
        line |= {"reason": reason, "detail": detail}
    if job.requests:
        line["requests"] = job.requests
    if job.url != job.original:
        line["final_url"] = job.url
    if reply is None:
        return line, None
    at = f"{now_text()[:19]}Z"
    line |= {"status": reply.status, "content_type": reply.header("content-type"), "fetched_at": at}
    line |= {"bytes": len(body), "wire_bytes": len(reply.body or b"")}
    validators = {"etag": validator(reply.header("etag")), "last_modified": validator(reply.header("last-modified"))}
    if revisit_of is not None:
        old = job.earlier
        assert old is not None
        line |= {"status": old.status, "content_type": old.content_type}
        line["unchanged"] = {"warc_file": old.warc_file, "warc_offset": old.warc_offset}
        validators = {name: value or getattr(old, name) for name, value in validators.items()}
    line |= {name: value for name, value in validators.items() if value}
    exchange = Exchange(
        job.url,
        reply.request,
        reply.status,
        reply.http_version,
        reply.reason_phrase,
        reply.headers,
        body,
        reply.ip,
        at,
        revisit_of,
    )
    return line, exchange
