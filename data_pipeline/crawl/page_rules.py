"""Which responses are pages: the rules that a response's head and body must pass to be kept.

A `Reply` flows in; the decoded body of an HTML page, the target of a redirect, or a FetchError with its reason flows
out. Nothing here waits or remembers.
"""

from __future__ import annotations

from data_pipeline.config import FetchConfig, UrlListConfig
from data_pipeline.crawl.http.body import BodyError, content_codings, decode_body, is_html, media_type
from data_pipeline.crawl.http.get import FetchError, Reply
from data_pipeline.crawl.robots import refusal_in_headers, refusal_in_html
from data_pipeline.crawl.url_syntax import InvalidUrl, normalize, without_credentials

REDIRECTS = frozenset((301, 302, 303, 307, 308))
_REDIRECT_URLS = UrlListConfig(strip_tracking=False)  # a server may insist on its tracking parameters


def wants_body(head: Reply, config: FetchConfig) -> bool:
    """Whether the body is worth reading, by the head alone."""
    kind = media_type(head.header("content-type"))
    return head.status == 200 and (not kind or is_html(kind, b"")) and header_refusal(head, config) is None


def page_body(reply: Reply, config: FetchConfig) -> bytes:
    """The decoded body of an HTML page that may be kept.

    Raises FetchError: http_status, noindex, wrong_type, bad_encoding, too_large, truncated.
    """
    if reply.status != 200:
        raise FetchError("http_status", str(reply.status))
    refusal = header_refusal(reply, config)
    if refusal:
        raise FetchError("noindex", refusal)
    content_type = reply.header("content-type")
    if reply.body is None:
        raise FetchError("wrong_type", media_type(content_type)[:200])
    try:
        codings = content_codings(reply.header_values("content-encoding"))
        body = decode_body(reply.body, codings, config.max_page_bytes)
    except BodyError as e:
        raise FetchError(e.reason, str(e), passing=e.reason == "truncated") from e
    if not is_html(content_type, body):
        raise FetchError("wrong_type", "no Content-Type, and it does not look like HTML")
    refusal = refusal_in_html(body, config.user_agent) if config.respect_noai else None
    if refusal:
        raise FetchError("noindex", refusal)
    return body


def header_refusal(head: Reply, config: FetchConfig) -> str | None:
    """The header that keeps a page out, if `config` heeds it."""
    if not config.respect_noai:
        return None
    return refusal_in_headers(head.header_values, config.user_agent)


def redirect_target(reply: Reply) -> str:
    """Where a redirect leads, in normal form. Raises FetchError: bad_scheme, protocol, http_status."""
    location = reply.header("location")
    if not location:
        raise FetchError("http_status", f"{reply.status} without Location")
    # Bytes that are not ASCII are escaped as they are: nothing says in which charset they were meant.
    raw = location.encode("utf-8", "surrogateescape")
    text = "".join(chr(b) if b < 0x80 else f"%{b:02X}" for b in raw)
    try:
        return normalize(text, _REDIRECT_URLS, base=reply.url)
    except InvalidUrl as e:
        reason = "bad_scheme" if e.reason == "scheme_not_allowed" else "protocol"
        raise FetchError(reason, f"redirect to {without_credentials(location)[:200]!r}: {e}") from e
