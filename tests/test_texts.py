"""Datasets of texts: what cannot be read of them."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import documents, ledger, settings
from inline import inline  # noqa: F401 (a fixture)

from data_pipeline.config import DedupConfig, LanguageConfig, QualityConfig
from data_pipeline.pipeline import build_corpus


@pytest.mark.usefixtures("inline")
def test_what_cannot_be_read_of_a_row_costs_that_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    text = "a text of some words "
    lines = [{"text": f"{text}{i}", "url": f"https://a.test/{i}"} for i in range(3)]
    for name in ("title", "url", "date", "text"):
        lines.append({"text": text, "url": f"https://{name}.test/", name: f"https://{name}.test/{text}\ud800"})
    (folder / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + "".join(json.dumps(line) + "\n" for line in lines).encode()
        + b'{"url": "https://deep.test/", "text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
        + '{"url": "https://latin.test/", "text": "caf\u00e9 cr\u00e8me"}\n'.encode("latin-1")
    )  # fmt: skip
    (folder / "b.jsonl").write_text(json.dumps({"text": text, "url": "https://wide.test/"}), encoding="utf-16")
    (folder / "le.txt").write_text(text, encoding="utf-16")
    (folder / "be.txt").write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    (folder / "no_mark.txt").write_bytes("abc".encode("utf-16-le"))
    good = pa.array([text, text])
    bytes_ = b"good" + b"b\xffd"
    offsets = pa.array([0, 4, 7], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(bytes_)])
    far = pa.array([0, 9_000_000_000_000_000_00], pa.timestamp("us"))
    pq.write_table(pa.table({"text": bad, "title": good}), folder / "bytes.parquet")
    pq.write_table(pa.table({"text": good, "title": bad, "date": far}), folder / "dates.parquet")

    config = settings(
        tmp_path / "out",
        folder,
        language=LanguageConfig(keep=[]),
        quality=QualityConfig(),
        dedup=DedupConfig(exact=False, near=False),
        stages=["extract", "filter", "dedup", "decontaminate"],
    )
    assert build_corpus(config) == 0
    found = ledger(tmp_path / "out")
    assert len(found) == 8 + 1 + 1 + 1 + 1 + 1 + 2 + 2
    failed = {url: row for url, row in found.items() if row["state"] == "failed"}
    assert list(failed) == ["dataset:a.jsonl#7"]
    assert failed["dataset:a.jsonl#7"]["reason"] == "unreadable_row"
    assert failed["dataset:a.jsonl#7"]["detail"] == "line 8: nested too deep"
    assert {row["state"] for url, row in found.items() if url not in failed} == {"kept"}
    kept = documents(tmp_path / "out")
    assert kept["https://title.test/"]["title"] == f"https://title.test/{text}?"
    assert f"https://url.test/{text}?" in kept
    assert {kept[f"dataset:{name}.txt#0"]["text"] for name in ("le", "be")} == {text}
    assert kept["https://wide.test/"]["text"] == text
    assert kept["dataset:bytes.parquet#1"]["text"] == "b\ufffdd"
    assert kept["dataset:dates.parquet#1"]["title"] == "b\ufffdd"
    assert [kept[f"dataset:dates.parquet#{i}"]["date"] for i in range(2)] == ["1970-01-01 00:00:00", None]
    counted = {url: n for url, d in kept.items() if (n := json.loads(str(d["numbers"])).get("unreadable_characters"))}
    assert counted == {
        "https://text.test/": 1,
        "https://latin.test/": 2,
        "dataset:no_mark.txt#0": 3,
        "dataset:bytes.parquet#1": 1,
    }
    assert "extract: 4 documents hold characters that could not be read" in capfd.readouterr().err
