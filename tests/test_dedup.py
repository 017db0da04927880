"""Duplicates against brute force: planted at known similarity, compared pair by pair, in any order."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.clean.dedup import (
    DUPLICATE_SCHEMA,
    dedup_verdicts,
    find_duplicates,
    minhash,
    normalize_for_exact,
    read_signatures,
    sign_shard,
)
from data_pipeline.clean.ngrams import hash_ngrams, hash_words, random_uint64
from data_pipeline.config import DedupConfig, Keep
from data_pipeline.records import VERDICT_SCHEMA, CorruptionError

WORDS = [f"{a}{b}{c}" for a in "bdfghklmnprst" for b in "aeiou" for c in ("", "n", "r", "st", "l")]


def random_text(r: random.Random, words: int) -> str:
    return " ".join(r.choice(WORDS) for _ in range(words))


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = normalize_for_exact(text).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a: str, b: str) -> float:
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y) if x | y else 0.0


def documents(texts: list[str], dates: list[str | None] | None = None, start: int = 0) -> pa.Table:
    n = len(texts)
    return pa.table(
        {
            "index": pa.array(range(start, start + n), pa.int64()),
            "url": [f"https://example.org/{i}" for i in range(start, start + n)],
            "text": pa.array(texts, pa.large_string()),
            "date": pa.array(dates or [None] * n, pa.string()),
        }
    )


def run(tmp_path: Path, shards: list[pa.Table], config: DedupConfig) -> pa.Table:
    paths = []
    for i, shard in enumerate(shards):
        paths.append(tmp_path / f"{len(list(tmp_path.iterdir()))}_{i}.parquet")
        pq.write_table(sign_shard(shard, config), paths[-1])
    return find_duplicates(read_signatures(paths, config), config)


def clusters(duplicates: pa.Table) -> dict[int, set[int]]:
    """twin → those that go."""
    found: dict[int, set[int]] = {}
    for row in duplicates.to_pylist():
        found.setdefault(row["twin"], set()).add(row["index"])
    return found


# --- Hashes ---------------------------------------------------------------------------------------------------------

MASK = (1 << 64) - 1


def reference_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference_word(word: str) -> int:
    total = 0
    for place, byte in enumerate(word.encode()):
        total += (byte + 1) * pow(0xD1342543DE82EF95, place, 1 << 64)
    return reference_mix(total & MASK)


def test_splitmix_gives_the_published_sequence() -> None:
    # First outputs for seed 1234567, as in the Rosetta Code task "Pseudo-random numbers/Splitmix64".
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_uint64(5, seed=1234567).tolist() == expected


def test_word_hashes_are_those_of_plain_integer_arithmetic_also_over_64_kib() -> None:
    r = random.Random(1)
    words = ["".join(r.choice("aeknßé東🚪") for _ in range(r.randint(1, 12))) for _ in range(9_000)]
    words[4000] = "x" * 70_000  # over a chunk's edge
    hashes = hash_words(" ".join(words))
    assert len(hashes) == len(words)
    for place in [0, 1, 2, 3999, 4000, 4001, 8998, 8999, *r.sample(range(9_000), 300)]:
        if place == 4000:
            continue
        assert int(hashes[place]) == reference_word(words[place])
    assert int(hashes[4000]) == int(hash_words("x" * 70_000)[0])
    assert len(set(hashes.tolist())) == len(set(words))


def test_ngram_hashes_tell_order_and_length_apart() -> None:
    assert len(hash_ngrams("a b c d", 5)) == 0
    assert len(hash_ngrams("", 5)) == 0
    one, two = hash_ngrams("a b c d e x a b c d e", 5)[[0, 6]]
    assert one == two
    assert hash_ngrams("b a c d e", 5)[0] != one
    assert hash_ngrams("ab c d e f", 5)[0] != hash_ngrams("a bc d e f", 5)[0]
    assert hash_ngrams("a a a a a a", 5)[0] != hash_ngrams("a a a a a a", 6)[0]


def test_the_hash_function_never_changes_without_a_new_version() -> None:
    # If this fails, HASH_VERSION must go up: signatures on disk would be joined with others that do not fit.
    assert hash_ngrams("the quick brown fox jumps over", 5).tolist() == GOLDEN_NGRAMS
    bands = sign_shard(documents(["the quick brown fox jumps over the lazy dog"]), DedupConfig())["bands"]
    assert bands[0].as_py()[:2] == GOLDEN_BANDS


GOLDEN_NGRAMS = [5518581208558648208, 12447082884185425738]
GOLDEN_BANDS = [5532265882940122580, 7364327807289374131]


def test_minhash_estimates_jaccard_without_bias() -> None:
    r = random.Random(2)
    universe = random_uint64(4_000, seed=77)
    errors = []
    for _ in range(60):
        shared, own = r.randint(50, 400), r.randint(20, 400)
        picks = np.array(r.sample(range(4_000), shared + 2 * own))
        a, b = universe[picks[: shared + own]], universe[np.r_[picks[:shared], picks[shared + own :]]]
        x, y = minhash([a, b], 112)
        errors.append(float((x == y).mean()) - shared / (shared + 2 * own))
    # Each estimate has a standard deviation of at most sqrt(.25/112) = .047, their mean of .0061.
    assert abs(np.mean(errors)) < 0.02
    assert 0.025 < np.std(errors) < 0.06


# --- Duplicates -----------------------------------------------------------------------------------------------------


def edited(r: random.Random, text: str, changes: int) -> str:
    words = text.split()
    for place in r.sample(range(len(words)), changes):
        words[place] = r.choice(WORDS) + "x"
    return " ".join(words)


def test_planted_near_duplicates_are_found_as_often_as_theory_says(tmp_path: Path) -> None:
    r = random.Random(3)
    texts, truth = [], []
    for changes in (1, 3, 5, 8, 12, 20, 40, 80):
        for _ in range(60):
            base = random_text(r, 300)
            texts += [base, edited(r, base, changes)]
            truth.append(jaccard(texts[-2], texts[-1]))
    config = DedupConfig()
    found = clusters(run(tmp_path, [documents(texts)], config))
    hits = np.array([bool(found.get(2 * i) or found.get(2 * i + 1)) for i in range(len(truth))])
    assert all({twin, *others} == {twin & ~1, twin | 1} for twin, others in found.items())  # never two pairs together
    similarity = np.array(truth)
    expected = 1 - (1 - similarity**config.rows) ** config.bands
    for low, high in ((0.85, 1.0), (0.6, 0.85), (0.3, 0.6), (0.0, 0.3)):
        group = (similarity >= low) & (similarity < high)
        assert group.sum() >= 40
        spread = np.sqrt((expected[group] * (1 - expected[group])).sum())
        assert abs(hits[group].sum() - expected[group].sum()) <= 4 * spread + 1
    assert hits[similarity >= 0.85].mean() > 0.95


def test_clusters_equal_brute_force_where_similarity_is_clear(tmp_path: Path) -> None:
    r = random.Random(4)
    texts: list[str] = []
    for size in (1, 1, 1, 2, 2, 3, 5, 8) * 4:
        base = random_text(r, r.randint(150, 400))
        texts += [base, *(base + " " + random_text(r, r.randint(1, 4)) for _ in range(size - 1))]
    r.shuffle(texts)
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(len(texts)):
        for j in range(i):
            similarity = jaccard(texts[i], texts[j])
            assert similarity > 0.9 or similarity < 0.2
            if similarity > 0.9:
                parent[root(i)] = root(j)
    expected: dict[int, set[int]] = {}
    for i in range(len(texts)):
        expected.setdefault(root(i), set()).add(i)
    found = {
        twin: {twin, *others} for twin, others in clusters(run(tmp_path, [documents(texts)], DedupConfig())).items()
    }
    assert sorted(map(sorted, found.values())) == sorted(sorted(c) for c in expected.values() if len(c) > 1)
    for twin, members in found.items():
        longest = max(len(texts[m]) for m in members)
        assert twin == min(m for m in members if len(texts[m]) == longest)


def test_the_order_of_shards_and_rows_does_not_matter(tmp_path: Path) -> None:
    r = random.Random(5)
    texts = [random_text(r, 120) for _ in range(60)]
    texts += [edited(r, r.choice(texts), 1) for _ in range(60)]
    whole = documents(texts)
    expected = run(tmp_path, [whole], DedupConfig())
    assert expected.num_rows > 30
    for _ in range(3):
        order = list(range(len(texts)))
        r.shuffle(order)
        shuffled = whole.take(order)
        cuts = sorted(r.sample(range(1, len(texts)), 4))
        shards = [shuffled.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
        assert run(tmp_path, shards, DedupConfig()).equals(expected)


def test_exact_duplicates_differ_only_in_case_spacing_and_punctuation(tmp_path: Path) -> None:
    texts = ["Hello, World!", "hello   world", "HELLO WORLD...", "hello world two", "ﬁne", "FINE", "!!!", "???", "!!!"]
    assert normalize_for_exact("  Straße, ＡＢＣ! ") == "strasse abc"
    found = run(tmp_path, [documents(texts)], DedupConfig())
    assert found.schema == DUPLICATE_SCHEMA
    # The longest of each cluster stays; texts without words are compared by their signs.
    assert clusters(found) == {2: {0, 1}, 5: {4}, 6: {8}}
    assert set(found["kind"].to_pylist()) == {"exact"}
    near_only = run(tmp_path, [documents(texts)], DedupConfig(exact=False))
    assert near_only.num_rows == 0  # fewer words than a shingle: exact comparison only
    off = run(tmp_path, [documents(texts)], DedupConfig(exact=False, near=False))
    assert off.num_rows == 0


@pytest.mark.parametrize(("keep", "stays"), [(Keep.longest, 2), (Keep.earliest, 3), (Keep.first, 0)])
def test_the_best_of_a_cluster_stays(tmp_path: Path, keep: Keep, stays: int) -> None:
    base = random_text(random.Random(6), 200)
    texts = [base, base + " end", base + " the very end of it", base + " fin", base]
    dates = [None, "2020-01-02", "2020-01-02", "2019-12-31", ""]
    found = run(tmp_path, [documents(texts, dates)], DedupConfig(keep=keep))
    assert clusters(found) == {stays: {0, 1, 2, 3, 4} - {stays}}
    assert set(found["cluster_size"].to_pylist()) == {5}
    kinds = dict(zip(found["index"].to_pylist(), found["kind"].to_pylist(), strict=True))
    assert kinds[4] == ("exact" if stays == 0 else "near")


def test_ties_go_to_the_lowest_index(tmp_path: Path) -> None:
    text = random_text(random.Random(7), 50)
    for keep in Keep:
        found = run(tmp_path, [documents([text] * 2, start=5), documents([text] * 2, start=3)], DedupConfig(keep=keep))
        assert clusters(found) == {3: {4, 5, 6}}


def test_verdicts_account_for_every_row(tmp_path: Path) -> None:
    r = random.Random(8)
    base = random_text(r, 200)
    table = documents([base, random_text(r, 200), base.upper(), base + " more"], start=10)
    duplicates = run(tmp_path, [table], DedupConfig())
    verdicts = dedup_verdicts(table, duplicates)
    assert verdicts.schema == VERDICT_SCHEMA
    assert verdicts["index"].to_pylist() == [10, 11, 12, 13]
    assert verdicts["reason"].to_pylist() == ["near_duplicate", None, "near_duplicate", None]
    assert verdicts["detail"].to_pylist() == ["https://example.org/13", None, "https://example.org/13", None]
    sizes = ['{"cluster_size": 3}', '{"cluster_size": 1}', '{"cluster_size": 3}', '{"cluster_size": 3}']
    assert verdicts["numbers"].to_pylist() == sizes
    # A shard that holds none of them, and a shard that holds only the one that stays.
    assert dedup_verdicts(table.slice(1, 1), duplicates)["state"].to_pylist() == ["kept"]
    assert dedup_verdicts(table.slice(3, 1), duplicates)["numbers"].to_pylist() == sizes[:1]


@pytest.mark.parametrize("other", [DedupConfig(bands=7), DedupConfig(ngram=6), DedupConfig(near=False)])
def test_signatures_of_other_settings_are_refused(tmp_path: Path, other: DedupConfig) -> None:
    path = tmp_path / "signatures.parquet"
    pq.write_table(sign_shard(documents(["a b c d e f"]), other), path)
    with pytest.raises(CorruptionError, match=r"signatures\.parquet: signatures of kind 'version .* remove the file"):
        read_signatures([path], DedupConfig())


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert find_duplicates(read_signatures([], DedupConfig()), DedupConfig()).num_rows == 0
    empty = documents([])
    duplicates = run(tmp_path, [empty], DedupConfig())
    assert duplicates.num_rows == 0
    assert dedup_verdicts(empty, duplicates).num_rows == 0
