"""Packing: every document lands once, in an order that depends on texts and seed alone, and a kill leaves no half."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline import pack
from data_pipeline.config import TokenizeConfig
from data_pipeline.pack import tokenize_shard, write_token_shards
from data_pipeline.records import DOCUMENT_SCHEMA, CorruptionError, InputError, StorageError
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import END_OF_TEXT, load

CONFIG = TokenizeConfig(validation_fraction=0.1, shard_tokens=2_000, seed=3)
Parts = list[tuple[Path, Path]]


def make_texts(count: int) -> list[str]:
    """Texts of very different length, a few of them equal, one empty, one with `<|endoftext|>` in it."""
    rng = np.random.default_rng(0)
    words = ["the", "of", "naïve", "你好", "\n\n", "forty-two", "😀", "<|endoftext|>", "a"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 400))) for _ in range(count - 4)]
    return [*texts, "", texts[0], texts[0], "word " * 5_000]


def make_parts(folder: Path, texts: list[str], shards: int) -> Parts:
    """The texts as `shards` Parquet files of documents, tokenized."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"index": 10 * i, "url": f"https://e.test/{i}", "text": t, "digest": hashlib.sha256(t.encode()).hexdigest()}
        for i, t in enumerate(texts)
    ]
    parts = []
    for k in range(shards):
        documents = folder / f"{k}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[k::shards], schema=DOCUMENT_SCHEMA), documents)
        parts.append((folder / f"{k}.tokens", folder / f"{k}.documents"))
        counts = tokenize_shard(documents, *parts[-1])
        assert counts["documents"] == len(rows[k::shards])
        assert counts["text_bytes"] == sum(len(r["text"].encode()) for r in rows[k::shards])
        assert counts["tokens"] * 2 == parts[-1][0].stat().st_size
    return parts


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(120)


@pytest.fixture(scope="module")
def parts(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"), texts, 3)


def test_a_part_is_the_documents_one_after_another(texts: list[str], tmp_path: Path) -> None:
    ((tokens, documents),) = make_parts(tmp_path, texts, 1)
    ids = [i for text in texts for i in [*load().encoding.encode_ordinary(text), END_OF_TEXT]]
    assert np.fromfile(tokens, "<u2").tolist() == ids
    table = pq.read_table(documents)
    assert table["index"].to_pylist() == [10 * i for i in range(len(texts))]
    assert sum(table["tokens"].to_pylist()) == len(ids)


def test_every_document_lands_once_and_is_traceable(texts: list[str], parts: Parts, tmp_path: Path) -> None:
    counts = write_token_shards(parts, tmp_path / "tokens", CONFIG, "f")
    shards = TokenShards.open(tmp_path / "tokens")
    found = []
    for name in ("train", "validation"):
        split = shards.split(name)
        spans = split.documents(0, split.tokens)
        assert (counts[f"{name}_documents"], counts[f"{name}_tokens"]) == (len(spans), split.tokens)
        for span in spans:
            ids = split.read(span.start, span.stop)
            assert ids[-1] == END_OF_TEXT
            text = load().decode(ids[:-1])
            assert hashlib.sha256(text.encode()).hexdigest() == span.digest
            found.append((span.url, text))
    assert sorted(found) == sorted((f"https://e.test/{i}", t) for i, t in enumerate(texts))
    assert [u for u, _ in found] != sorted(u for u, _ in found), "shuffled"
    assert counts["documents"] == len(texts)
    assert shards.manifest["made_from"] == "f"
    assert shards.tokenizer_sha256 == load().sha256


@pytest.mark.parametrize("shards", [1, 7, 120])
def test_the_bytes_do_not_depend_on_the_parts(texts: list[str], parts: Parts, tmp_path: Path, shards: int) -> None:
    write_token_shards(parts, tmp_path / "a", CONFIG, "f")
    others = make_parts(tmp_path / "parts", texts, shards)
    write_token_shards(others[::-1], tmp_path / "b", CONFIG, "f")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_more_parts_than_are_mapped_at_once(
    texts: list[str], parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "OPEN_PARTS", 2)
    write_token_shards(make_parts(tmp_path / "parts", texts, 40), tmp_path / "a", CONFIG, "f")
    monkeypatch.undo()
    write_token_shards(parts, tmp_path / "b", CONFIG, "f")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def urls_of(folder: Path, name: str) -> list[str]:
    split = TokenShards.open(folder).split(name)
    return [span.url for span in split.documents(0, split.tokens)]


def test_the_seed_changes_the_order_and_not_the_split(parts: Parts, tmp_path: Path) -> None:
    write_token_shards(parts, tmp_path / "a", CONFIG, "f")
    other = TokenizeConfig(validation_fraction=0.1, shard_tokens=2_000, seed=4)
    write_token_shards(parts, tmp_path / "b", other, "f")
    for name in ("train", "validation"):
        a, b = urls_of(tmp_path / "a", name), urls_of(tmp_path / "b", name)
        assert a != b
        assert sorted(a) == sorted(b)


def test_a_new_document_moves_no_other_and_equal_texts_stay_together(tmp_path: Path) -> None:
    texts = make_texts(200)
    write_token_shards(make_parts(tmp_path / "p", texts, 2), tmp_path / "a", CONFIG, "f")
    write_token_shards(make_parts(tmp_path / "q", [*texts, "one more"], 2), tmp_path / "b", CONFIG, "f")
    more = f"https://e.test/{len(texts)}"
    for name in ("train", "validation"):
        assert [u for u in urls_of(tmp_path / "b", name) if u != more] == urls_of(tmp_path / "a", name)
    equal = {f"https://e.test/{i}" for i in (0, 197, 198)}
    assert texts[0] == texts[197] == texts[198]
    assert any(equal <= set(urls_of(tmp_path / "a", name)) for name in ("train", "validation"))


def test_the_validation_share_is_the_one_asked_for(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, [f"document {i}" for i in range(4_000)], 2)
    for fraction in (0.5, 0.05, 0.0):
        counts = write_token_shards(parts, tmp_path / "tokens", TokenizeConfig(validation_fraction=fraction), "f")
        sigma = (4_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(counts["validation_documents"] - 4_000 * fraction) <= 4 * sigma
        assert counts["documents"] == 4_000


@pytest.mark.parametrize("fraction", [0.000001, 0.5, 0.999999])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_leave_neither_split_empty(tmp_path: Path, count: int, fraction: float) -> None:
    parts = make_parts(tmp_path, [f"text {i}" for i in range(count)], 1)
    counts = write_token_shards(parts, tmp_path / "tokens", TokenizeConfig(validation_fraction=fraction), "f")
    if count > 1:
        assert min(counts["train_documents"], counts["validation_documents"]) >= 1
    assert counts["train_documents"] >= 1
    assert counts["documents"] == count


@pytest.mark.parametrize("gone", [1, 2, 3, 4])
def test_documents_that_were_taken_down_are_not_the_validation_split(tmp_path: Path, gone: int) -> None:
    """The others are split as they would be without them, where the splits are small enough to be seen to."""
    texts = [f"Text {i}." for i in range(6)]
    config = replace(CONFIG, validation_fraction=1e-9)
    whole = make_parts(tmp_path / "whole", texts, 1)
    write_token_shards(whole, tmp_path / "tokens", config, "x")
    first = TokenShards.open(tmp_path / "tokens").split("validation").documents(0, 1)[0].url.rpartition("/")[2]
    left = [i for i in range(len(texts)) if i != int(first)][gone - 1 :]
    table = pq.read_table(whole[0][1])
    away = [10 * i for i in range(len(texts)) if i not in left]
    tombstones = tmp_path / "gone.parquet"
    pq.write_table(table.filter(pc.is_in(table["index"], pa.array(away))).drop_columns("url"), tombstones)
    kept = table.filter(pc.is_in(table["index"], pa.array([10 * i for i in left])))
    tokens = np.fromfile(whole[0][0], "<u2").reshape(len(texts), -1)[left]
    part = (tmp_path / "left.tokens", tmp_path / "left.documents")
    tokens.tofile(part[0])
    pq.write_table(kept, part[1])
    counts = [
        write_token_shards([part], tmp_path / name, config, "x", tombstones=places)
        for name, places in (("after", tombstones), ("never", None))
    ]
    assert counts[0]["validation_documents"] == counts[1]["validation_documents"] == 1
    assert content(tmp_path / "after") == content(tmp_path / "never")


def test_no_document_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no document is left"):
        write_token_shards(make_parts(tmp_path, [], 2), tmp_path / "tokens", CONFIG, "f")
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("size", [0, -1, -2, 2])
def test_a_torn_part_is_named(texts: list[str], tmp_path: Path, size: int) -> None:
    parts = make_parts(tmp_path, texts[:20], 2)
    whole = parts[1][0].read_bytes()
    parts[1][0].write_bytes((whole + b"\0\0")[: len(whole) + size] if size else b"")
    with pytest.raises(CorruptionError, match=r"1\.tokens: \d+ bytes, but 1\.documents counts \d+; remove both"):
        write_token_shards(parts, tmp_path / "tokens", CONFIG, "f")


def test_progress_adds_up(texts: list[str], parts: Parts, tmp_path: Path) -> None:
    steps: list[int] = []
    write_token_shards(parts, tmp_path / "tokens", CONFIG, "f", steps.append)
    assert sum(steps) == len(texts)


def test_a_folder_that_was_there_is_replaced_whole(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "train_00099.bin").write_bytes(b"old")
    write_token_shards(parts, tmp_path / "tokens", CONFIG, "f")
    assert not (tmp_path / "tokens" / "train_00099.bin").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]


PACK = """
import pathlib, sys
from data_pipeline.config import TokenizeConfig
from data_pipeline.pack import write_token_shards
parts, out = int(sys.argv[1]), pathlib.Path(sys.argv[2])
config = TokenizeConfig(validation_fraction=0.1, shard_tokens=2_000, seed=int(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
parts = [(out.parent / f"{k}.tokens", out.parent / f"{k}.documents") for k in range(parts)]
write_token_shards(parts, out, config, "f")
"""


def test_killed_at_any_moment_the_old_folder_or_the_new_one_stands(texts: list[str], tmp_path: Path) -> None:
    parts = make_parts(tmp_path, texts, 3)
    out = tmp_path / "tokens"
    began = time.monotonic()
    write_token_shards(parts, out, CONFIG, "f")
    took_s = time.monotonic() - began
    old = content(out)
    new_config = TokenizeConfig(validation_fraction=0.1, shard_tokens=2_000, seed=9)
    write_token_shards(parts, tmp_path / "undisturbed", new_config, "f")
    new = content(tmp_path / "undisturbed")
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", PACK, str(len(parts)), str(out), "9"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
        time.sleep(rng.uniform(0, 1.5 * took_s))
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
        # Absent only in the instant between the two renames; the next run makes it again in any case.
        state = "absent" if not out.exists() else {True: "old", False: "new"}[content(out) == old]
        assert state == "absent" or content(out) in (old, new)
        seen.add(state)
        if state == "new":
            write_token_shards(parts, out, CONFIG, "f")
    assert "old" in seen, "no kill came before the end: the test shows nothing"
    write_token_shards(parts, out, new_config, "f")
    assert content(out) == new
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "leftovers of killed runs"


@pytest.mark.parametrize("limit_bytes", [1_000, 6_000])
def test_no_room_keeps_what_was_there(texts: list[str], tmp_path: Path, limit_bytes: int) -> None:
    """A limit on file size, as a full disk: the write itself fails, in a process of its own."""
    parts = make_parts(tmp_path, texts, 1)
    out = tmp_path / "tokens"
    write_token_shards(parts, out, CONFIG, "f")
    before = content(out)
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
        "from data_pipeline.records import StorageError\n"
        f"try:\n    exec({PACK!r})\nexcept StorageError as e:\n    print(e); sys.exit(e.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "1", str(out), "9"], input="\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "run the same command again" in done.stdout
    assert content(out) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "the room is given back"
