"""Small corpora of real prose: the texts, settings to build them by, and what lies in a corpus folder."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow.parquet as pq

from data_pipeline.config import (
    CorpusConfig,
    LanguageConfig,
    QualityConfig,
    Source,
    TokenizeConfig,
)

PROSE = [text for _, text in sorted(topics.items()) if len(text) > 1_500]


def rows(texts: Sequence[str], site: str) -> list[dict[str, str]]:
    return [{"url": f"https://{site}{i % 4}.test/{i}", "text": text} for i, text in enumerate(texts)]


def write_lines(path: Path, items: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    """A dataset of texts, each of a site of its own."""
    return write_lines(path, [{"url": f"https://site{i}.test/{i}", "text": text} for i, text in enumerate(texts)])


def settings(out: Path, path: Path, **changes: object) -> CorpusConfig:
    config = CorpusConfig(
        out=str(out),
        source=Source.dataset,
        path=str(path),
        shards=3,
        workers=1,
        progress=False,
        language=LanguageConfig(min_score=0.5),
        # Both groups of rules are measured, and nearly nothing is dropped.
        quality=QualityConfig(min_words=60, max_newline_word_ratio=0.9),
        tokenize=TokenizeConfig(shard_tokens=4_096, validation_fraction=0.1),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def ledger(out: Path) -> dict[str, dict[str, object]]:
    """URL → its row."""
    return {r["url"]: r for f in sorted((out / "ledger").glob("*.parquet")) for r in pq.read_table(f).to_pylist()}


def documents(out: Path) -> dict[str, dict[str, object]]:
    return {r["url"]: r for f in sorted((out / "documents").glob("*.parquet")) for r in pq.read_table(f).to_pylist()}


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a corpus folder, without what is the run's own or names the folder."""
    names = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in names.items() if "/." not in f"/{name}" and name != "config.yaml"}


def warc_pages(path: Path, texts: dict[str, str], menu: str = "") -> dict[str, int]:
    """A WARC file of pages, each with `menu` (HTML) above its text; URL → offset of its response."""
    offsets = {}
    with open(path, "wb") as f:
        for i, (url, text) in enumerate(texts.items()):
            body = "".join(f"<p>{escape(p)}</p>" for p in text.split("\n\n"))
            page = f"<html><head><title>A page</title></head><body>{menu}<article>{body}</article></body></html>"
            html = page.encode()
            content = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html
            head = (
                f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Target-URI: {url}\r\n"
                f"WARC-Date: 2026-11-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
                f"Content-Length: {len(content)}\r\n\r\n"
            )
            offsets[url] = f.tell()
            f.write(gzip.compress(head.encode() + content + b"\r\n\r\n"))
    return offsets
