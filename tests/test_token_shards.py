"""Token shards: what was written is read, others' readers read it too, and no defect goes unnamed."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import token_shards
from data_pipeline.token_shards import (
    CorruptTokenShardsError,
    DocumentSpan,
    NotTokenShardsError,
    TokenShardError,
    TokenShards,
    TokenSplit,
    fingerprint,
    read_index,
)
from data_pipeline.token_writer import TokenShardWriter
from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY

SHARD_TOKENS = 5_000


def make_documents(count: int, seed: int, longest: int = 900) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        np.append(rng.integers(0, END_OF_TEXT, n), END_OF_TEXT).astype("<u2") for n in rng.integers(0, longest, count)
    ]


TRAIN = [
    *make_documents(60, 1),
    *make_documents(1, 2, 2).copy(),
    np.append(np.arange(12_000), END_OF_TEXT).astype("<u2"),
]
VALIDATION = make_documents(9, 3)


def write(folder: Path, train: list[np.ndarray] = TRAIN, validation: list[np.ndarray] = VALIDATION) -> dict:
    folder.mkdir()
    with TokenShardWriter(folder, shard_tokens=SHARD_TOKENS, tokenizer_sha256="0" * 64) as writer:
        for split, documents in (("train", train), ("validation", validation)):
            for i, tokens in enumerate(documents):
                writer.append(split, tokens, index=i, url=f"https://{split}.test/{i}?ü", digest=f"{i:064x}")
        return writer.finish(made_from="f" * 64, settings={"seed": 7})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "tokens"
    write(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "tokens"))


def test_every_range_reads_what_was_written(written: Path) -> None:
    shards = TokenShards.open(written)
    rng = np.random.default_rng(0)
    for name, documents in (("train", TRAIN), ("validation", VALIDATION)):
        split, stream = shards.split(name), np.concatenate(documents)
        assert (split.tokens, len(split)) == (len(stream), len(stream))
        np.testing.assert_array_equal(split.read(0, split.tokens), stream)
        for start, stop in np.sort(rng.integers(0, split.tokens + 1, (300, 2))).tolist():
            got = split.read(start, stop)
            assert got.dtype == np.uint16
            np.testing.assert_array_equal(got, stream[start:stop])
    assert len(shards.manifest["splits"]["train"]["files"]) > 5, "the ranges above cross borders of files"
    assert (shards.vocabulary, shards.tokenizer_sha256) == (VOCABULARY, "0" * 64)


def test_what_is_read_may_be_written_to(written: Path) -> None:
    split = TokenShards.open(written).split("train")
    split.read(0, 10)[:] = 0
    np.testing.assert_array_equal(split.read(0, 10), np.concatenate(TRAIN)[:10])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 10**9)])
def test_a_range_outside_the_stream_is_refused(written: Path, start: int, stop: int) -> None:
    split = TokenShards.open(written).split("validation")
    with pytest.raises(IndexError, match="not within the"):
        split.read(start, stop)
    with pytest.raises(IndexError, match="not within the"):
        split.documents(start, stop)


def test_documents_of_a_range(written: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("data_pipeline.token_writer.ROW_GROUP_ROWS", 7)  # so that ranges cross row groups
    write(tmp_path / "small groups")
    rng = np.random.default_rng(1)
    for place in (written, tmp_path / "small groups"):
        for name, documents in (("train", TRAIN), ("validation", VALIDATION)):
            split = TokenShards.open(place).split(name)
            ends = np.cumsum([len(d) for d in documents]).tolist()
            spans = [
                DocumentSpan(end - len(d), end, f"https://{name}.test/{i}?ü", f"{i:064x}")
                for i, (d, end) in enumerate(zip(documents, ends, strict=True))
            ]
            assert split.documents(0, split.tokens) == spans
            for start, stop in np.sort(rng.integers(0, split.tokens + 1, (200, 2))).tolist():
                expected = [s for s in spans if s.start < stop and s.stop > start and start < stop]
                assert split.documents(start, stop) == expected
            for span in spans:
                assert split.documents(span.start, span.start + 1) == [span]
                assert split.documents(span.stop - 1, span.stop) == [span]


def test_documents_stay_whole_and_files_small(written: Path) -> None:
    manifest = TokenShards.open(written).manifest
    longer = []
    for name in ("train", "validation"):
        for f in manifest["splits"][name]["files"]:
            tokens = np.fromfile(written / f["file"], "<u2")
            assert tokens[-1] == END_OF_TEXT
            if len(tokens) > SHARD_TOKENS:
                longer.append(f["documents"])
    assert longer == [1], "only a document that is longer than a file by itself makes one longer"


def megatron_layout(path: Path) -> tuple[list[int], list[int], list[int]]:
    """A .idx file by Megatron-LM's description (megatron/core/datasets/indexed_dataset.py, _IndexReader), field by
    field: written here from that description, not from ours."""
    content = path.read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<Q", content[9:17]) == (1,)
    assert content[17] == 8  # DType.uint16
    sequences, documents = struct.unpack("<QQ", content[18:34])
    lengths = struct.unpack(f"<{sequences}i", content[34 : 34 + 4 * sequences])
    at = 34 + 4 * sequences
    pointers = struct.unpack(f"<{sequences}q", content[at : at + 8 * sequences])
    at += 8 * sequences
    borders = struct.unpack(f"<{documents}q", content[at : at + 8 * documents])
    assert at + 8 * documents == len(content)
    return list(lengths), list(pointers), list(borders)


def test_the_index_is_megatrons(written: Path) -> None:
    found = []
    for f in TokenShards.open(written).manifest["splits"]["train"]["files"]:
        lengths, pointers, borders = megatron_layout(written / f["index"]["file"])
        assert borders == list(range(f["documents"] + 1))
        content = (written / f["file"]).read_bytes()
        found += [np.frombuffer(content, "<u2", n, p) for n, p in zip(lengths, pointers, strict=True)]
    assert len(found) == len(TRAIN)
    for got, expected in zip(found, TRAIN, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_nanogpt_reads_a_file_with_memmap_alone(written: Path) -> None:
    data = np.memmap(written / "train_00000.bin", dtype=np.uint16, mode="r")  # nanoGPT, train.py, get_batch
    np.testing.assert_array_equal(data, np.concatenate(TRAIN)[: len(data)])


def _sum_in_child(split: TokenSplit, queue: multiprocessing.Queue[int]) -> None:  # type: ignore[type-arg]
    queue.put(int(split.read(0, split.tokens).sum(dtype=np.int64)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_split_works_in_other_processes(written: Path, method: str) -> None:
    split = TokenShards.open(written).split("train")
    split.read(0, 10), split.documents(0, 10)
    assert len(pickle.dumps(split)) < 2_000, "paths travel, not tokens"
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(split, queue))
    child.start()
    assert queue.get(timeout=60) == int(np.concatenate(TRAIN).sum(dtype=np.int64))
    child.join(60)
    assert child.exitcode == 0


def test_the_same_documents_give_the_same_bytes_and_fingerprint(written: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    names = sorted(p.name for p in written.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    other = write(tmp_path / "other", TRAIN[:-1])
    assert other["fingerprint"] != TokenShards.open(written).fingerprint


def test_an_empty_validation_split(tmp_path: Path) -> None:
    write(tmp_path / "t", validation=[])
    split = TokenShards.open(tmp_path / "t").split("validation")
    assert split.tokens == 0
    assert split.read(0, 0).tolist() == []
    assert split.documents(0, 0) == []


# ---------------------------------------------------------------------------------------------------------- defects


def refused(folder: Path) -> list[str]:
    with pytest.raises(CorruptTokenShardsError) as caught:
        TokenShards.open(folder)
    assert caught.value.exit_code == 5
    assert "gpt2train corpus" in str(caught.value), "the remedy"
    return caught.value.defects


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "odd", "longer"])
def test_every_file_of_a_wrong_size_is_named_without_reading_it(folder: Path, damage: str) -> None:
    for path in sorted(p for p in folder.iterdir() if p.name != "manifest.json"):
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(
                {"empty": b"", "truncated": content[:-2], "odd": content[:-1], "longer": content + b"\0\0"}[damage]
            )
        word = {"odd": "odd number" if path.suffix == ".bin" else "truncated", "longer": "too long"}.get(damage, damage)
        (defect,) = refused(folder)
        assert defect.startswith(f"{path.name}: ")
        assert word in defect
        with pytest.raises(CorruptTokenShardsError):
            TokenShards.open(folder, verify=False)
        path.write_bytes(content)
    TokenShards.open(folder)


def test_200_flipped_bits_are_found_and_named(folder: Path) -> None:
    rng = np.random.default_rng(0)
    files = sorted(folder.iterdir())
    for _ in range(200):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            with pytest.raises(TokenShardError, match=path.name):
                TokenShards.open(folder)
        finally:
            path.write_bytes(content)
    TokenShards.open(folder)


def test_files_swapped_for_others_are_found(folder: Path) -> None:
    a, b = folder / "train_00000.idx", folder / "train_00001.idx"
    a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)
    assert {d.split(":")[0] for d in refused(folder)} <= {"train_00000.idx", "train_00001.idx"}


def test_all_defects_are_named_together(folder: Path) -> None:
    (folder / "train_00000.bin").unlink()
    (folder / "train_00002.idx").unlink()
    (folder / "documents.parquet").write_bytes(b"")
    assert [d.split(":")[0] for d in refused(folder)] == ["train_00000.bin", "train_00002.idx", "documents.parquet"]


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest and give it the fingerprint and hashes that go with the files: a wrong writer, not rot."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for split in manifest["splits"].values():
        for f in split["files"]:
            f |= {k: v for k, v in token_shards.describe(folder / f["file"]).items() if k != "file"}
            f["index"] = token_shards.describe(folder / f["index"]["file"])
    manifest["documents"] = token_shards.describe(folder / "documents.parquet")
    change(manifest)
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_token_beyond_the_vocabulary_is_refused_though_the_hashes_fit(folder: Path) -> None:
    tokens = np.fromfile(folder / "train_00001.bin", "<u2")
    tokens[17] = VOCABULARY
    tokens.tofile(folder / "train_00001.bin")
    forge(folder, lambda m: None)
    assert refused(folder) == ["train_00001.bin: token 50257 at 17 is not below the vocabulary of 50257"]


def test_an_index_that_disagrees_is_refused_though_the_hashes_fit(folder: Path) -> None:
    lengths = read_index(folder / "train_00000.idx").astype(np.int64)
    lengths[0] += 1
    lengths[1] -= 1
    token_shards.write_index(folder / "train_00000.idx", lengths)
    forge(folder, lambda m: None)
    assert any("train_00000.idx: disagrees with train_00000.bin" in d for d in refused(folder))


def test_a_document_table_that_disagrees_is_refused_though_the_hashes_fit(folder: Path) -> None:
    table = pq.read_table(folder / "documents.parquet")
    tokens = table["tokens"].to_pylist()
    tokens[0], tokens[1] = tokens[0] + 1, tokens[1] - 1
    pq.write_table(table.set_column(2, "tokens", pa.array(tokens)), folder / "documents.parquet")
    forge(folder, lambda m: None)
    assert any("documents.parquet: disagrees" in d for d in refused(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["splits"]["train"].update(tokens=1), "disagrees"),
        (lambda m: m["splits"]["train"]["files"][0].update(file="../tokens/train_00000.bin"), "outside the folder"),
        (lambda m: m["splits"].pop("validation"), "lacks or garbles"),
        (lambda m: m["splits"]["train"]["files"][0].update(tokens=0), "0 tokens in"),
        (lambda m: m["splits"]["train"]["files"].pop(), "disagrees"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_refused(folder: Path, change: Callable, words: str) -> None:
    forge(folder, change)
    assert any(words in d for d in refused(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": "other"}'])
def test_a_torn_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    (defect,) = refused(folder)
    assert defect.startswith("manifest.json: ")


def test_a_missing_manifest_beside_tokens_is_corruption(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert refused(folder) == ["manifest.json: missing beside train_00000.bin"]


def test_what_is_no_token_folder_is_told_apart(tmp_path: Path, folder: Path) -> None:
    for place, words in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "holds no token shards"),
        (folder / "train_00000.bin", "not a folder"),
    ):
        with pytest.raises(NotTokenShardsError, match=words) as caught:
            TokenShards.open(place)
        assert caught.value.exit_code == 2
    forge(folder, lambda m: m.update(version=2))
    with pytest.raises(NotTokenShardsError, match="version 2 of the format, this program reads 1"):
        TokenShards.open(folder)


def test_the_writer_refuses_what_would_be_corrupt(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path, shard_tokens=SHARD_TOKENS, tokenizer_sha256="") as writer:
        with pytest.raises(AssertionError, match="ends with END_OF_TEXT"):
            writer.append("train", np.array([1, 2], "<u2"), index=0, url="", digest="")
        with pytest.raises(AssertionError, match="not uint16"):
            writer.append("train", np.array([1, END_OF_TEXT]), index=0, url="", digest="")
        writer.append("train", np.array([VOCABULARY, END_OF_TEXT], "<u2"), index=0, url="", digest="")
        with pytest.raises(AssertionError, match="not below the vocabulary"):
            writer.finish(made_from="", settings={})
