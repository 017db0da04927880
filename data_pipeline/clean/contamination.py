"""Documents and evaluation sets → what share of each set's n-grams the corpus holds, and which documents to leave out.

In: files of evaluation texts, and the documents shard by shard. Out: verdicts, the n-grams found, and one line for each
set. The normalization is the GPT-2 paper's (Radford et al., 2019, section 4): lower-cased alphanumeric words with a
single space between them; so is the measure, the share of a set's 8-grams that occur in the training data. Where the
paper has a Bloom filter of the corpus with false positives of at most 1e-8, here the sets' n-grams are looked for in
the corpus as exact 64-bit hashes: memory grows with the sets, not with the corpus, and a false hit has a probability of
(n-grams of all sets) / 2^64. What is shared may cost the whole document (`drop`) or only the shared words
(`remove_spans`); longer n-grams decide that (GPT-3's 13 words: Brown et al., 2020, appendix C).

Cost: 30 MB of text a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.clean.ngrams import hash_ngrams
from data_pipeline.clean.spans import ALPHANUMERIC, cut_spans
from data_pipeline.config import DecontaminateConfig
from data_pipeline.records import DROPPED, InputError, Verdict, verdict_table


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Texts of one evaluation set; no n-gram goes from one text into the next."""

    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NgramFinder:
    """A sorted uint64 set with a bit table before it, which turns most strangers away for one look each."""

    hashes: np.ndarray
    table: np.ndarray  # bool[power of two], by the hashes' low bits

    def find(self, candidates: np.ndarray) -> np.ndarray:
        """Those of `candidates` that are in the set, with repetitions."""
        likely = candidates[self.table[candidates & np.uint64(len(self.table) - 1)]]
        if not len(likely):
            return likely
        places = np.searchsorted(self.hashes, likely)
        return likely[self.hashes[np.minimum(places, len(self.hashes) - 1)] == likely]

    def places(self, candidates: np.ndarray) -> np.ndarray:
        """Where in `candidates` those lie that are in the set."""
        return np.flatnonzero(np.isin(candidates, np.unique(self.find(candidates))))


@dataclass(frozen=True, slots=True)
class ContaminationIndex:
    """The n-grams of all evaluation sets: `report` those of `ngram` words, `drop` those of `drop_ngram` words."""

    names: tuple[str, ...]
    report_hashes: tuple[np.ndarray, ...]  # for each set: sorted, unique
    drop_hashes: tuple[np.ndarray, ...]  # for each set: sorted, unique; empty arrays when nothing is to be removed
    report: NgramFinder
    drop: NgramFinder


def normalize(text: str) -> str:
    """Lower-cased alphanumeric words, single spaces."""
    return " ".join(ALPHANUMERIC.findall(text.lower()))


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """uint64[max(0, words - n + 1)]: hashes of the n-grams of `text` after normalization, in their order."""
    return hash_ngrams(normalize(text), n)


def read_evaluation_set(path: Path) -> EvaluationSet:
    """A .txt file is one text; of a .jsonl file every string value, however deep, is a text. The name is the file's.

    Raises:
        InputError: no such file, another ending, not UTF-8, not JSON, no text.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"evaluation set {path}: {e.strerror}; give the path of a .txt or .jsonl file") from None
    except UnicodeDecodeError as e:
        raise InputError(f"evaluation set {path}: not UTF-8 at byte {e.start}; convert it to UTF-8") from None
    if path.suffix == ".txt":
        texts = [content]
    elif path.suffix == ".jsonl":
        texts = []
        # Only "\n" ends a line of JSON Lines; str.splitlines would cut strings at U+2028.
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    texts += _strings(json.loads(line))
                except (json.JSONDecodeError, RecursionError) as e:
                    raise InputError(f"evaluation set {path}, line {number}: not JSON ({e}); mend the line") from None
    else:
        raise InputError(f"evaluation set {path}: ends in '{path.suffix}'; must be a .txt or .jsonl file")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"evaluation set {path}: holds no text; leave it out of decontaminate.paths")
    return EvaluationSet(path.stem, tuple(texts))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def build_index(sets: Sequence[EvaluationSet], config: DecontaminateConfig) -> ContaminationIndex:
    """The n-grams to look for, from all `sets`."""
    report = tuple(_unique_ngrams(s.texts, config.ngram) for s in sets)
    nothing = np.empty(0, np.uint64)
    wanted = config.drop or config.remove_spans
    drop = tuple(_unique_ngrams(s.texts, config.drop_ngram) if wanted else nothing for s in sets)
    return ContaminationIndex(tuple(s.name for s in sets), report, drop, ngram_finder(report), ngram_finder(drop))


def _unique_ngrams(texts: Iterable[str], n: int) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(ngram_hashes(text, n) for text in texts)]))


def ngram_finder(hashes: Sequence[np.ndarray]) -> NgramFinder:
    """One finder for several sets' n-grams."""
    union = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
    bits = max(10, int(16 * len(union)).bit_length())  # one entry in 16 to 32 is set; 16 bytes an n-gram
    table = np.zeros(1 << bits, bool)
    table[union & np.uint64(len(table) - 1)] = True
    return NgramFinder(union, table)


def scan_shard(
    documents: pa.Table, index: ContaminationIndex, config: DecontaminateConfig
) -> tuple[pa.Table, np.ndarray, dict[int, str]]:
    """Verdicts (one for each document in the order given), the evaluation sets' n-grams found, and changed texts.

    The n-grams of what is dropped or cut out are not among those found: they are not in the corpus any more. They are
    uint64, sorted, unique; `overlap_report` adds the shards' up. The texts are those of kept documents that lost spans,
    by index.
    """
    verdicts: list[Verdict] = []
    changed: dict[int, str] = {}
    found: list[np.ndarray] = [np.empty(0, np.uint64)]
    columns = (documents[name].to_pylist() for name in ("index", "url", "text"))
    for row, url, text in zip(*columns, strict=True):
        normalized = normalize(text)
        cut = 0
        if config.remove_spans:
            shorter, cut = cut_spans(text, index.drop.places, config.drop_ngram)
            if cut and not shorter:
                verdicts.append(
                    Verdict(row, url, DROPPED, "contaminated", "nothing else in it", {"removed_spans": cut})
                )
                continue
            if cut:
                changed[row] = shorter
                normalized = normalize(shorter)
        seen = np.unique(index.report.find(hash_ngrams(normalized, config.ngram)))
        numbers: dict[str, float | int | str] = {"evaluation_ngrams": len(seen)}
        if config.remove_spans:
            numbers |= {"removed_spans": cut, "removed_characters": len(text) - len(changed.get(row, text))}
        if config.drop:
            shared = np.unique(index.drop.find(hash_ngrams(normalized, config.drop_ngram)))
            numbers["evaluation_drop_ngrams"] = len(shared)
            if len(shared):
                names = zip(index.names, index.drop_hashes, strict=True)
                detail = next(name for name, hashes in names if np.isin(shared, hashes).any())
                verdicts.append(Verdict(row, url, DROPPED, "contaminated", detail, numbers))
                continue
        found.append(seen)
        verdicts.append(Verdict(row, url, numbers=numbers))
    return verdict_table(verdicts), np.unique(np.concatenate(found)), changed


def overlap_report(index: ContaminationIndex, found: Iterable[np.ndarray]) -> list[dict[str, str | int | float]]:
    """For each set its name, its distinct n-grams, how many of them any shard found, and their share (0 to 1)."""
    everything = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    rows: list[dict[str, str | int | float]] = []
    for name, hashes in zip(index.names, index.report_hashes, strict=True):
        hits = int(np.isin(hashes, everything).sum())
        rows.append(
            {"name": name, "ngrams": len(hashes), "found": hits, "share": hits / len(hashes) if len(hashes) else 0.0}
        )
    return rows
