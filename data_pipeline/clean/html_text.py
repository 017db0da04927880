"""The bytes of one page → its text: what the killable process of `extract.py` runs for each page.

In: a decoded response body (no Content-Encoding left), its Content-Type header, its URL and the day it was fetched.
Out: `Extracted` (text and metadata) or `Rejected` (state, reason, detail). Nothing here depends on what pages came
before, on the clock or on the machine: the same arguments give the same answer.

The text is NFC (composed characters, so that one word has one spelling; not NFKC, which would rewrite ½ and ²). It has
no control characters but newline and tab, no soft hyphens or zero-width spaces, no lone surrogates, and encodes to
UTF-8. Cost: 3 ms for a page whose main text resiliparse finds (`main_content.py`), 25 ms more for one that trafilatura
judges; pages with next to no visible text, or surely in another language, are told in 2 ms and reach neither.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data_pipeline.clean.first_look import surely_other_language
from data_pipeline.clean.main_content import main_text
from data_pipeline.clean.metadata import Metadata, page_metadata
from data_pipeline.config import ExtractConfig
from data_pipeline.records import DROPPED, FAILED

if TYPE_CHECKING:
    from resiliparse.parse.html import HTMLTree

Numbers = Mapping[str, float | int | str]

HTML_TYPES = frozenset({"", "text/html", "application/xhtml+xml", "application/xml", "text/xml"})

# First bytes of formats that servers call text/html (file(1)'s magic numbers).
_BINARY_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"%PDF-", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"RIFF", "RIFF"),
    (b"OggS", "Ogg"),
    (b"ID3", "MP3"),
    (b"\x7fELF", "ELF"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf", "7z"),
    (b"\xd0\xcf\x11\xe0", "OLE"),
    (b"wOFF", "WOFF"),
    (b"wOF2", "WOFF2"),
)

# Python's codec for an encoding of the WHATWG Encoding Standard (section 4.2) where the plain name is a subset of it.
_CODECS = {
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "windows-874": "cp874",
    "macintosh": "mac_roman",
    "x-mac-cyrillic": "mac_cyrillic",
    "iso-8859-8-i": "iso-8859-8",
}

# Control characters but tab and newline, lone surrogates, non-characters, and what is never seen: soft hyphen,
# zero-width space, word joiner, byte-order mark. (The zero-width joiners stay: they change how a word or emoji looks.)
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2060\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]")
_META_CHARSET = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.+-]{2,40})", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9_:.+-]{2,40})")
_HTML_START = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extracted:
    """A page's text. `title`, `author` and `date` (YYYY-MM-DD) are empty when unknown or not asked for."""

    text: str
    title: str = ""
    author: str = ""
    date: str = ""
    numbers: Numbers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a page gives no document.

    dropped: html_too_large, not_html, not_text, bad_charset, noindex, no_text, language.
    failed: extract_error, extract_timeout, extract_memory, extract_crash, warc_damaged.
    """

    state: str
    reason: str
    detail: str | None = None
    numbers: Numbers = field(default_factory=dict)


def page_text(
    body: bytes,
    url: str,
    content_type: str,
    fetched_at: str,
    config: ExtractConfig,
    languages: Sequence[str] = (),
) -> Extracted | Rejected:
    """The text of a page.

    Args:
        body: the payload, Content-Encoding undone.
        content_type: the header's value, or "".
        fetched_at: RFC 3339 time or date of the fetch, or ""; dates later than that day are not believed.
        languages: ISO 639-1 codes; pages surely in none of them are left out. Empty: all are taken.

    Raises:
        MemoryError: the process is at its limit, and its state not to be trusted any more.
    """
    numbers: dict[str, float | int | str] = {"html_bytes": len(body)}
    if len(body) > config.max_html_bytes:
        detail = f"{len(body)} bytes of HTML; at most {config.max_html_bytes} are extracted (extract.max_html_bytes)"
        return Rejected(DROPPED, "html_too_large", detail, numbers)
    mime = content_type.partition(";")[0].strip().lower()
    if mime not in HTML_TYPES and not _HTML_START.search(body[:1024]):
        return Rejected(DROPPED, "not_html", mime, numbers)
    if (binary := _binary_kind(body)) is not None:
        return Rejected(DROPPED, "not_text", binary, numbers)
    html, charset = decode(body, content_type)
    numbers["charset"] = charset

    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLParserException, HTMLTree

    try:
        tree = HTMLTree.parse(html)
        if config.respect_noai and (directive := meta_robots(tree)) is not None:
            return Rejected(DROPPED, "noindex", f"a <meta> says {directive}", numbers)
        visible = extract_plain_text(tree, preserve_formatting=False, alt_texts=False)
        numbers["visible_characters"] = len(visible)
        # Pages drawn by scripts may carry their text in JSON-LD alone, which trafilatura reads.
        if len(visible) < config.min_characters and "articleBody" not in html:
            return Rejected(DROPPED, "no_text", None, {**numbers, "characters": 0})
        if languages and (other := surely_other_language(visible, languages)) is not None:
            code, score = other
            numbers |= {"language": code, "language_score": score}
            return Rejected(DROPPED, "language", f"{code} {score:.2f}, before extraction", numbers)
        main = main_text(tree, len(visible), config.tables) if config.fast and not config.favor_recall else None
        del tree, visible
        numbers["judge"] = "trafilatura" if main is None else "resiliparse"
        found = _trafilatura(html, url, fetched_at, config, main)
    except MemoryError:
        raise
    except HTMLParserException as e:
        raise MemoryError from e  # every string is HTML: its parser fails for want of memory alone
    except Exception as e:
        # Only the type's name: messages may hold addresses of objects, and the ledger's bytes must not vary.
        return Rejected(FAILED, "extract_error", type(e).__name__, numbers)

    text = clean_text(found.text)
    numbers["characters"] = len(text)
    if text.count("\ufffd") > len(text) // 100:
        return Rejected(DROPPED, "bad_charset", f"decoded as {charset}", numbers)
    if len(text) < max(1, config.min_characters):
        return Rejected(DROPPED, "no_text", None, numbers)
    return Extracted(text, found.title, found.author, found.date, numbers)


def _trafilatura(html: str, url: str, fetched_at: str, config: ExtractConfig, main: str | None) -> Extracted:
    """Main content by trafilatura (Barbaresi, ACL 2021), comments left out; text "" when it finds none.

    With a `main` text at hand it looks for the metadata alone, if they are wanted.
    """
    if main is not None and not config.metadata:
        return Extracted(main)
    import trafilatura

    tree = trafilatura.load_html(html)
    if tree is None:
        return Extracted(main or "")
    known = page_metadata(tree, html, url, fetched_at) if config.metadata else Metadata()
    if main is None:
        found = trafilatura.bare_extraction(
            tree,
            url=url or None,
            favor_recall=config.favor_recall,
            include_comments=False,
            include_tables=config.tables,
        )
        main = "" if found is None else found.text or ""
    title, author, date = map(one_line, known)
    return Extracted(main, title, author, date)


def visible_lines(body: bytes, content_type: str) -> list[str]:
    """All that a page shows, a paragraph a line: what its main text is a part of."""
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(decode(body, content_type)[0], preserve_formatting=True, alt_texts=False)
    return [line.strip() for line in clean_text(text).split("\n") if line.strip()]


def clean_text(text: str) -> str:
    """NFC; newline as the only line end; no unseen characters or surrogates; no blanks at the end of a line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", _UNSEEN.sub("", text))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def one_line(text: str) -> str:
    """`text` cleaned, with every run of white space as one space."""
    return " ".join(clean_text(text).split())


def meta_robots(html: str | HTMLTree) -> str | None:
    """The first directive of <meta name=robots> that asks to leave the page out: noindex, none or noai; or
    tdm-reservation, where a <meta> of that name says 1 (TDMRep 1.0, 3.3); else None.

    `none` stands for `noindex, nofollow`. Names and values are compared without regard to case, as search engines do.
    """
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(html) if isinstance(html, str) else html
    if tree.document is None:
        return None
    for meta in tree.document.query_selector_all("meta[name][content]"):
        name = (meta.getattr("name") or "").strip().lower()
        if name == "tdm-reservation" and (meta.getattr("content") or "").strip() == "1":
            return name
        if name == "robots":
            for directive in re.split(r"[\s,;]+", (meta.getattr("content") or "").lower()):
                if directive in ("noindex", "none", "noai"):
                    return directive
    return None


def decode(body: bytes, content_type: str) -> tuple[str, str]:
    """`body` as text, and the name of the encoding used.

    Order: byte-order mark; UTF-16 without one, told by its zero bytes; what is valid UTF-8 with non-ASCII characters is
    UTF-8, whatever was declared (text in another encoding is practically never valid UTF-8); the header's charset, then
    the page's own (HTML Standard, 13.2.3.2); detection. A declared encoding that fits badly (more than one tenth of
    the non-ASCII text undecodable) is not believed. What still cannot be decoded becomes U+FFFD.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if body.startswith(mark):
            return body[len(mark) :].decode(name, errors="replace"), name
    if (wide := _utf16_by_zeros(body)) is not None:
        return body.decode(wide, errors="replace"), wide
    if not body.isascii():
        try:
            return body.decode("utf-8"), "utf-8"
        except UnicodeDecodeError:
            pass
    for label in _declared_charsets(body, content_type):
        codec = _codec(label)
        if codec is None:
            continue
        text = body.decode(codec, errors="replace")
        beyond_ascii = sum(not c.isascii() for c in text) if not text.isascii() else 0
        if text.count("\ufffd") <= beyond_ascii // 10:
            return text, codec
    if body.isascii():
        return body.decode("ascii"), "ascii"

    from resiliparse.parse.encoding import detect_encoding

    detected = _codec(detect_encoding(body) or "") or "cp1252"
    return body.decode(detected, errors="replace"), detected


def _declared_charsets(body: bytes, content_type: str) -> list[str]:
    """Charset labels in order of authority: Content-Type header, XML declaration, first <meta> in the first 4 KiB."""
    labels = [m.group(1) for m in [re.search(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", content_type, re.I)] if m]
    for pattern in (_XML_ENCODING, _META_CHARSET):
        if m := pattern.search(body[:4096]):
            labels.append(m.group(1).decode("ascii"))
    return labels


def _codec(label: str) -> str | None:
    """Python's name of the codec for a label of the WHATWG Encoding Standard; None for unknown ones (UTF-7 is one)."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label, fallback_utf8=False) if label else None
    # A page whose <meta> could be read as ASCII is not UTF-16 (HTML Standard, 13.2.3.2, says: take UTF-8).
    if not name or name in ("replacement", "x-user-defined") or name.startswith("utf-16"):
        return None
    name = _CODECS.get(name, name)
    try:
        return codecs.lookup(name).name
    except LookupError:
        return None


def _utf16_by_zeros(body: bytes) -> str | None:
    """UTF-16 that lacks its mark: markup is ASCII, so every other byte of its beginning is zero."""
    head = body[:1024]
    if len(head) < 8:
        return None
    even, odd = head[0::2].count(0) / len(head[0::2]), head[1::2].count(0) / len(head[1::2])
    if odd > 0.5 and even < 0.05:
        return "utf-16-le"
    if even > 0.5 and odd < 0.05:
        return "utf-16-be"
    return None


def _binary_kind(body: bytes) -> str | None:
    """What `body` is if it is no text at all, else None."""
    start = body[:512].lstrip()
    for magic, name in _BINARY_MAGIC:
        if start.startswith(magic):
            return f"{name} data"
    if start[4:8] == b"ftyp":
        return "MP4 data"
    if _utf16_by_zeros(body) is not None or body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    head = body[:65536]
    # Text has tab, newline, form feed, return and (ISO-2022-JP) escape among the 32 control bytes; random bytes have
    # the other 27 at 27/256 = 10.5 %.
    control = len(head) - len(head.translate(None, _CONTROL_BYTES))
    if control > len(head) // 20:
        return f"{control} control bytes in the first {len(head)}"
    return None


_CONTROL_BYTES = bytes(b for b in range(32) if b not in b"\t\n\f\r\x1b")
