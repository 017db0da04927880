"""Contamination: sentences planted in documents, and the n-grams of a plain reference in Python sets."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.clean.contamination import (
    ContaminationIndex,
    EvaluationSet,
    build_index,
    ngram_hashes,
    normalize,
    overlap_report,
    read_evaluation_set,
    scan_shard,
)
from data_pipeline.clean.ngrams import hash_ngrams
from data_pipeline.clean.spans import ALPHANUMERIC, cut_spans
from data_pipeline.config import DecontaminateConfig
from data_pipeline.records import VERDICT_SCHEMA, InputError

WORDS = [
    a + b for a in ("door", "lamp", "tree", "ship", "wolf", "gate", "moon") for b in ("s", "ed", "ing", "er", "let")
]
ITEM = "Three wolves walked out of the gate, and only the moon (which was full) saw where they went that night."
OTHER = "A ship of 40 guns lay in the harbor; its captain had not been seen since the feast of Saint Stephen's eve."


def random_text(r: random.Random, words: int) -> str:
    return " ".join(r.choice(WORDS) for _ in range(words))


def documents(texts: list[str]) -> pa.Table:
    return pa.table(
        {
            "index": list(range(100, 100 + len(texts))),
            "url": [f"https://example.org/{i}" for i in range(len(texts))],
            "text": pa.array(texts, pa.large_string()),
        }
    )


def reference_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """The paper's words by a plain loop, as sets of tuples."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_normalization_is_the_papers() -> None:
    assert normalize("  The “quick”, brown_FOX's\n3.5 naïve: 東京!") == "the quick brown fox s 3 5 naïve 東京"


def test_shares_equal_those_of_plain_sets() -> None:
    r = random.Random(0)
    sets = [
        EvaluationSet("one", tuple(random_text(r, 60) for _ in range(20))),
        EvaluationSet("two", (random_text(r, 500),)),
        EvaluationSet("short", ("seven words are too few for this",)),
    ]
    texts = [random_text(r, 80) for _ in range(50)]
    for i in range(0, 50, 5):  # pieces of the sets within other text, in other spelling
        piece = r.choice(r.choice(sets[:2]).texts).split()
        start = r.randrange(len(piece) - 12)
        texts[i] += ". " + ", ".join(piece[start : start + r.randint(6, 20)]).upper() + "! " + texts[i]
    config = DecontaminateConfig()
    index = build_index(sets, config)
    shards = [documents(texts[:20]), documents(texts[20:])]
    found = [scan_shard(shard, index, config)[1] for shard in shards]
    corpus = set().union(*(reference_ngrams(text, 8) for text in texts))
    for row, evaluation in zip(overlap_report(index, found), sets, strict=True):
        ngrams = set().union(*(reference_ngrams(text, 8) for text in evaluation.texts))
        assert row["name"] == evaluation.name
        assert row["ngrams"] == len(ngrams)
        assert row["found"] == len(ngrams & corpus)
        assert row["share"] == (len(ngrams & corpus) / len(ngrams) if ngrams else 0.0)
    assert 0 < overlap_report(index, found)[0]["share"] < 0.5  # type: ignore[operator]
    assert overlap_report(index, []) == [dict(row, found=0, share=0.0) for row in overlap_report(index, found)]


def test_ngrams_do_not_cross_from_one_text_into_the_next() -> None:
    config = DecontaminateConfig()
    halves = EvaluationSet("halves", (ITEM[:40], ITEM[40:]))
    joined = build_index([EvaluationSet("joined", (ITEM,))], config)
    apart = build_index([halves], config)
    assert len(apart.report_hashes[0]) == len(joined.report_hashes[0]) - 7
    assert len(ngram_hashes(ITEM, 8)) == len(normalize(ITEM).split()) - 7


def test_documents_that_share_a_long_ngram_are_dropped_if_asked() -> None:
    r = random.Random(1)
    words = re.findall(r"\w+", ITEM)
    texts = [
        random_text(r, 100),
        f"{random_text(r, 50)} {' '.join(words[2:15])} {random_text(r, 50)}",  # 13 words of ITEM
        f"{random_text(r, 50)} {' '.join(words[2:14])} {random_text(r, 50)}",  # 12
        f"{random_text(r, 50)}\n{OTHER.upper()}",
        "",
    ]
    sets = [EvaluationSet("items", (ITEM,)), EvaluationSet("others", (OTHER,))]
    keep, drop = DecontaminateConfig(), DecontaminateConfig(drop=True)
    verdicts, found, _ = scan_shard(documents(texts), build_index(sets, drop), drop)
    assert verdicts.schema == VERDICT_SCHEMA
    assert verdicts["index"].to_pylist() == [100, 101, 102, 103, 104]
    assert verdicts["reason"].to_pylist() == [None, "contaminated", None, "contaminated", None]
    assert verdicts["detail"].to_pylist() == [None, "items", None, "others", None]
    numbers = [json.loads(n) for n in verdicts["numbers"].to_pylist()]
    assert [n["evaluation_ngrams"] for n in numbers] == [0, 6, 5, len(reference_ngrams(OTHER, 8)), 0]
    assert [n["evaluation_drop_ngrams"] for n in numbers] == [0, 1, 0, len(reference_ngrams(OTHER, 13)), 0]
    # What was dropped is not in the corpus any more: only the twelve words count.
    rows = overlap_report(build_index(sets, drop), [found])
    assert [row["found"] for row in rows] == [5, 0]
    verdicts, found, _ = scan_shard(documents(texts), build_index(sets, keep), keep)
    assert set(verdicts["state"].to_pylist()) == {"kept"}
    assert [row["found"] for row in overlap_report(build_index(sets, keep), [found])] == [
        6,
        len(reference_ngrams(OTHER, 8)),
    ]


def test_found_ngrams_are_sorted_and_unique() -> None:
    config = DecontaminateConfig()
    index = build_index([EvaluationSet("items", (ITEM, OTHER))], config)
    _, found, _ = scan_shard(documents([ITEM, OTHER, ITEM]), index, config)
    assert found.dtype == np.uint64
    assert found.tolist() == sorted(set(index.report_hashes[0].tolist()))


def test_no_sets_and_no_documents() -> None:
    config = DecontaminateConfig(drop=True)
    index = build_index([], config)
    verdicts, found, _ = scan_shard(documents([ITEM]), index, config)
    assert verdicts["state"].to_pylist() == ["kept"]
    assert overlap_report(index, [found]) == []
    verdicts, found, _ = scan_shard(documents([]), build_index([EvaluationSet("items", (ITEM,))], config), config)
    assert (verdicts.num_rows, len(found)) == (0, 0)


def test_reads_txt_and_every_string_of_jsonl(tmp_path: Path) -> None:
    text = tmp_path / "novel.txt"
    text.write_bytes(b"\xef\xbb\xbf" + ITEM.encode())
    assert read_evaluation_set(text) == EvaluationSet("novel", (ITEM,))
    lines = tmp_path / "tasks.jsonl"
    items = [{"ctx": ITEM, "endings": ["a\u2028b", {"deep": OTHER}], "label": 3}, "alone", [], {"empty": " "}]
    lines.write_text("\r\n".join(json.dumps(i, ensure_ascii=False) for i in items) + "\n\n", encoding="utf-8")
    assert read_evaluation_set(lines) == EvaluationSet("tasks", (ITEM, "a\u2028b", OTHER, "alone"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt: No such file"),
        ("a.csv", b"x", r"ends in '\.csv'; must be a \.txt or \.jsonl file"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: not JSON"),
        ("b.jsonl", b"[" * 100_000, r"b\.jsonl, line 1: not JSON"),
        ("a.txt", b"ab\xff", r"not UTF-8 at byte 2"),
        ("b.txt", b" \n", r"holds no text"),
    ],
)
def test_unusable_sets_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_evaluation_set(tmp_path / name)
    assert caught.value.exit_code == 2


def cut_again_and_again(text: str, index: ContaminationIndex, n: int) -> tuple[str, int, int]:
    """`cut_spans` by its definition: the whole text is looked through after each round of cuts; and their number."""
    total = rounds = 0
    while True:
        words: list[tuple[str, int, int]] = []
        for match in ALPHANUMERIC.finditer(text):
            words += [(part, *match.span()) for part in ALPHANUMERIC.findall(match[0].lower())]
        starts = index.drop.places(hash_ngrams(" ".join(word for word, _, _ in words), n)).tolist()
        if not starts:
            return text, total, rounds
        spans: list[list[int]] = []
        for first in starts:
            begin, end = words[first][1], words[first + n - 1][2]
            if spans and begin <= spans[-1][1]:
                spans[-1][1] = end
            else:
                spans.append([begin, end])
        total, rounds = total + len(spans), rounds + 1
        for begin, end in reversed(spans):
            before, after = text[:begin].rstrip(" \t"), text[end:].lstrip(" \t.,;:!?'\"”’)")
            parted = not before or not after or before.endswith("\n") or after.startswith("\n")
            text = before + ("" if parted else " ") + after
        text = text.strip()


def test_spans_are_cut_as_if_the_text_was_looked_through_again_and_again() -> None:
    r = random.Random(5)
    words = ["a", "b", "İx", "ßİİ", "foo_bar", "c-d", "x\u0301", "I", "Σς"]
    gaps = [" ", "\n", "  ", ". ", "_", "—", "\t", " \n ", "\u00a0", ".\u00a0. ", "” "]

    def mixed(count: int, vocabulary: int) -> str:
        some = words[:vocabulary]
        return "".join(r.choice(some) + r.choice(gaps) for _ in range(count))

    several = nested = 0
    for _ in range(3000):
        n, vocabulary = r.choice([1, 2, 3, 5]), r.choice([2, 3, 9])
        sets = [EvaluationSet("set", tuple(mixed(r.randint(1, n + 2), vocabulary) for _ in range(r.randint(1, 3))))]
        text = r.choice(["", *gaps]) + mixed(r.randint(0, 40), vocabulary) + r.choice(["", "”", " . "])
        for _ in range(r.randint(0, 3)):  # an item put into itself
            place, item = r.randint(0, len(text)), sets[0].texts[0]
            half = len(item) // 2
            text = text[:place] + item[:half] + r.choice(sets[0].texts) + item[half:] + text[place:]
        index = build_index(sets, DecontaminateConfig(paths=[], remove_spans=True, drop_ngram=n))
        *expected, rounds = cut_again_and_again(text, index, n)
        assert list(cut_spans(text, index.drop.places, n)) == expected, (text, sets)
        several += expected[1] > 1
        nested += rounds > 1
    assert several > 500
    assert nested > 200


def test_a_page_of_nested_items_costs_no_more_than_its_length() -> None:
    """An item of 13 words halved around itself 8,000 times over, 700 kB: with a look at the whole page for each, an
    hour. Here it takes a second."""
    item = [f"w{i}x" for i in range(13)]
    index = build_index(
        [EvaluationSet("set", (" ".join(item),))], DecontaminateConfig(paths=[], remove_spans=True, drop_ngram=13)
    )
    depth = 8_000
    text = "— " + (" ".join(item[:6]) + " — ") * depth + (" ".join(item[6:]) + " — ") * depth + "the rest of it"
    began = time.process_time()
    rest, spans = cut_spans(text, index.drop.places, 13)
    assert time.process_time() - began < 60
    assert spans == depth
    assert rest.endswith("the rest of it")
    assert "w0x" not in rest
