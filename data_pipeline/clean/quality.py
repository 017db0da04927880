"""Documents → the numbers of the published quality rules, and which documents break one.

In: documents and the bounds of `QualityConfig`. Out: verdicts that carry every number that was measured, for kept rows,
too, so that other bounds can be tried on the verdicts alone; and the texts that C4's line rules made shorter.

    Gopher        Rae et al., arXiv:2112.11446, appendix A.1.1: quality, and repetition (table A1)
    C4            Raffel et al., JMLR 21 (2020), section 2.2
    FineWeb       Penedo et al., arXiv:2406.17557, section 3.6
    OpenWebText   Gokaslan and Cohen (2019): at least 128 GPT-2 tokens

Where a paper leaves the counting open, it is done as in datatrove 0.10, FineWeb's code: a punctuation mark is a word of
its own, except where words are counted and their mean length is taken; a top n-gram counts even if it occurs once;
duplicate n-grams are counted from left to right, without overlap; ratios of repetition are of all characters. Words and
sentences are told by regular expressions instead of spaCy, six times as fast over all rules; of the texts of 1,028
pages 99 % got the same verdict. The order is FineWeb's: repetition, Gopher's quality, C4 (which takes lines away), and
FineWeb's own rules on what is left.

Cost, for texts of 10,000 characters: Gopher's rules 400 to 600 documents/s, C4's 2,400 to 4,000. A group of rules is
measured only if one of them is on.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from data_pipeline.config import QualityConfig
from data_pipeline.lists import read_list
from data_pipeline.records import DROPPED, InputError, Verdict, verdict_table

# Gopher, A.1.1.
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
# C4's own code (tensorflow_datasets, c4_utils.py), as its paper names them: "terms of use", "cookies", ...
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
C4_LINE_ENDS = (".", "?", "!", '"', "'")
C4_MIN_LINE_WORDS = 3
C4_MAX_WORD_CHARACTERS = 1_000
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
# FineWeb's short line.
SHORT_LINE_CHARACTERS = 30
# The property Sentence_Terminal of the Unicode Character Database 17.0 (PropList.txt).
_SENTENCE_TERMINAL_RANGES = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d5 "
    "1803 1809 1944-1945 1aa8-1aab 1b4e-1b4f 1b5a-1b5b 1b5e-1b5f 1b7d-1b7f 1c3b-1c3c 1c7e-1c7f 2024 203c-203d "
    "2047-2049 2cf9-2cfb 2e2e 2e3c 2e53-2e54 2e60-2e61 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f "
    "a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe12 fe15-fe16 fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 "
    "10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 "
    "113d4-113d5 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c "
    "11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16d6e-16d6f 16e98 1bc9f 1da88"
)


def _code_points(ranges: str) -> frozenset[str]:
    bounds = (r.partition("-") for r in ranges.split())
    return frozenset(chr(c) for low, _, high in bounds for c in range(int(low, 16), int(high or low, 16) + 1))


SENTENCE_TERMINAL = _code_points(_SENTENCE_TERMINAL_RANGES)

# A word, as spaCy's English tokenizer parts it. Marks between blanks stand alone at a word's edges, and inside it they
# part it only where spaCy's infix rules say so (a hyphen between letters, a slash before a letter, ...).
_WORD = re.compile(
    r"""
    n['’]t\b | ['’](?:s|m|d|re|ve|ll)\b  # a contraction's second half
  | https?://\S*[\w/] | and/or\b
  | (?:Mrs?|Ms|Dr|St|Jr|Sr|Prof|Co|Corp|Inc|Ltd|Gov|Sen|Rep|Gen|Mt|vs|[^\W\d_](?:\.[^\W\d_])*)\.(?!\w)
  | \d+(?:[.,]\d+)*(?=(?:[kdcmµn]?m|ha|yd|in|ft|[km]?g|t|lb|oz|mph|[kKmMgGtT][bB]|[TGMK])\b)
  | \w+?(?=n['’]t\b) | [Cc]an(?=not\b)
  | (?:(?<!\S)[/@\\~])?\w+
    (?: (?: [@&(){}\[\]$%\#;!?\\|`^~\"“”]+ | :: | (?<![a-z])\.(?=\w) | \.(?![A-Z])
          | ['’](?!(?:s|m|d|re|ve|ll)\b)
          | (?<=\d)[,:=<>/](?=\d) | [,:=<>/+](?=\d)
          | (?<=[^\W\d_])-(?=\d) | [–—](?=\d)
        ) \w+ )*
  | \.{2,} | -{2,} | /{2,} | [^\w\s]
""",
    re.VERBOSE,
)
# The look-behind keeps a long row of dots from being tried from each of its dots.
_SENTENCE_END = re.compile(r"(?<![.!?…])(?!\.\.|…)[.!?…]+[\"'”’)\]]*(?=\s|$)")
_PARAGRAPH_BREAK = re.compile(r"\n{2,}")
_LINE_BREAK = re.compile(r"\n+")

Numbers = dict[str, float]


# What short runs without blanks consist of: nearly all that a text has were met before, and `_WORD` costs 1 µs each.
# Some 20 MB of English ones, 60 of ones that are not Latin.
_runs: dict[str, list[str]] = {}
_MOST_RUNS, _LONGEST_RUN, _MOST_PARTS = 100_000, 24, 4


def split_words(text: str) -> list[str]:
    """Words and punctuation marks in their order, much as spaCy's English tokenizer parts them."""
    words: list[str] = []
    for run in text.split():  # no alternative of `_WORD` goes over a blank, or looks beyond one
        parts = _runs.get(run)
        if parts is None:
            parts = _WORD.findall(run)
            if len(run) <= _LONGEST_RUN and len(parts) <= _MOST_PARTS:
                if len(_runs) >= _MOST_RUNS:
                    _runs.clear()
                _runs[run] = parts
        words += parts
    return words


def count_sentences(line: str) -> int:
    """Sentences of a line: ends with . ! or ? before a blank, and one more if text follows the last end.

    An ellipsis ends no sentence.
    """
    ends = [m.end() for m in _SENTENCE_END.finditer(line)]
    return len(ends) + bool(line[ends[-1] if ends else 0 :].strip())


def measure(text: str, config: QualityConfig) -> Numbers:
    """The numbers of all rule groups that are on, rounded to six digits as the ledger holds them."""
    return _measure_and_clean(text, config)[0]


def clean(text: str, config: QualityConfig) -> str:
    """What C4's line rules leave of `text`; `text` itself if they are off."""
    return _c4(text, config)[1] if _c4_edits(config) else text


def _measure_and_clean(text: str, config: QualityConfig) -> tuple[Numbers, str]:
    c = config
    numbers: Numbers = {"characters": len(text)}
    need_repetition = (
        min(
            c.max_duplicate_line_ratio,
            c.max_duplicate_line_character_ratio,
            c.max_duplicate_paragraph_ratio,
            c.max_duplicate_paragraph_character_ratio,
        )
        < 1
        or bool(c.max_top_ngram_character_ratios)
        or bool(c.max_duplicate_ngram_character_ratios)
    )
    need_gopher = (
        any(
            (
                c.min_words,
                c.max_words,
                c.min_mean_word_characters,
                c.max_mean_word_characters,
                c.min_alphabetic_word_ratio,
                c.min_stop_words,
            )
        )
        or min(c.max_symbol_word_ratio, c.max_bullet_line_ratio, c.max_ellipsis_line_ratio) < 1
    )
    need_c4 = _c4_edits(c) or c.c4_min_sentences > 0 or c.c4_drop_curly_bracket or c.c4_drop_lorem_ipsum
    need_fineweb = (
        c.min_punctuated_line_ratio > 0
        or min(c.max_short_line_ratio, c.max_repeated_line_character_ratio) < 1
        or c.max_newline_word_ratio > 0
    )
    words = split_words(text) if need_repetition or need_gopher else []
    if need_repetition:
        numbers |= _repetition(text, words, c)
    if need_gopher:
        numbers |= _gopher(text, words)
    if c.min_tokens:
        from data_pipeline.tokenizer import load

        numbers["tokens"] = len(load().encode(text))
    if c.blocked_words_file:
        numbers["blocked_words"] = count_blocked(text, blocked_phrases(c.blocked_words_file))
    if need_c4:
        c4_numbers, text = _c4(text, c)
        numbers |= c4_numbers
    if need_fineweb:
        numbers |= _fineweb(text)
    return {name: round(number, 6) for name, number in numbers.items()}, text


Phrases = Mapping[int, frozenset[tuple[str, ...]]]
"""Blocked phrases by their number of words, case folded."""
_BLOCKED_WORD = re.compile(r"\w+")


@functools.lru_cache(4)
def blocked_phrases(path: str) -> Phrases:
    """The entries of a list of blocked words. Raises InputError, also for an entry without any word."""
    phrases: dict[int, set[tuple[str, ...]]] = {}
    for entry in read_list(path, "quality.blocked_words_file"):
        words = tuple(_BLOCKED_WORD.findall(entry.casefold()))
        if not words:
            raise InputError(f"quality.blocked_words_file={path}: {entry!r} has no letter or digit; take it out")
        phrases.setdefault(len(words), set()).add(words)
    return {n: frozenset(of_length) for n, of_length in phrases.items()}


def count_blocked(text: str, phrases: Phrases) -> int:
    """How often whole words of `text`, in their order, are a blocked phrase. One pass for each length of phrase."""
    words = _BLOCKED_WORD.findall(text.casefold())
    count = 0
    for n, of_length in phrases.items():
        count += sum(gram in of_length for gram in zip(*(words[i:] for i in range(n)), strict=False))
    return count


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _gopher(text: str, words: Sequence[str]) -> Numbers:
    times = Counter(words)
    counted = [(len(w), n) for w, n in times.items() if w[0].isalnum() or any(c.isalnum() for c in w)]
    count = sum(n for _, n in counted)
    alphabetic = sum(n for w, n in times.items() if w.isalpha() or any(c.isalpha() for c in w))
    lines = text.splitlines()
    starts = [line.lstrip()[:1] for line in lines]
    return {
        "words": count,
        "mean_word_characters": _ratio(sum(length * n for length, n in counted), count),
        "hash_word_ratio": _ratio(text.count("#"), len(words)),
        "ellipsis_word_ratio": _ratio(text.count("...") + text.count("…"), len(words)),
        "bullet_line_ratio": _ratio(sum(s in ("•", "-") for s in starts), len(lines)),
        "ellipsis_line_ratio": _ratio(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)),
        "alphabetic_word_ratio": _ratio(alphabetic, len(words)),
        "stop_words": len(STOP_WORDS & times.keys()),
    }


def _duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many of `parts` occurred before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        else:
            seen.add(part)
    return count, characters


def _repetition(text: str, words: Sequence[str], config: QualityConfig) -> Numbers:
    paragraphs, lines = _PARAGRAPH_BREAK.split(text.strip()), _LINE_BREAK.split(text)
    numbers: Numbers = {}
    for name, parts in (("paragraph", paragraphs), ("line", lines)):
        count, characters = _duplicates(parts)
        numbers[f"duplicate_{name}_ratio"] = _ratio(count, len(parts))
        numbers[f"duplicate_{name}_character_ratio"] = _ratio(characters, len(text))
    if not config.max_top_ngram_character_ratios and not config.max_duplicate_ngram_character_ratios:
        return numbers

    ids: dict[str, int] = {}
    word_ids = np.fromiter((ids.setdefault(w, len(ids)) for w in words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.append(0, np.cumsum(lengths))  # characters of the words before each place
    # Only where an n-gram occurs again can one that is longer by a word: `places` are those, `grams` its number there.
    places, grams = np.arange(len(words)), word_ids
    for n in range(2, 11):
        count = len(words) - n + 1
        most, at = 1, 0  # times and first place of the most frequent n-gram; of equally frequent ones the first
        if count > 0:
            places, grams = places[places < count], grams[: np.searchsorted(places, count)]
            # An n-gram is an (n-1)-gram and a word: numbered exactly, without hashing.
            pairs = grams * max(1, len(ids)) + word_ids[places + n - 1]
            _, first, grams, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
            if len(counts) and counts.max() > 1:
                most = int(counts.max())
                at = int(places[first[counts == most].min()])
            again = counts[grams] > 1
            places, grams = places[again], grams[again]
        if n <= 4:
            top = most * (int(ends[at + n] - ends[at]) + n - 1) if count > 0 else 0
            numbers[f"top_{n}gram_character_ratio"] = _ratio(top, len(text))
        else:
            repeated = _repeated_characters(places.tolist(), grams.tolist(), ends, n) if count > 0 else 0
            numbers[f"duplicate_{n}gram_character_ratio"] = _ratio(repeated, len(text))
    return numbers


def _repeated_characters(places: Sequence[int], grams: Sequence[int], ends: np.ndarray, n: int) -> int:
    """Characters of the n-grams that occurred before, from left to right; a repeated one is passed over as a whole.

    Args:
        places: where the n-grams stand that occur more than once; `grams`: their numbers.
        ends: characters of the words before each place.
    """
    seen: set[int] = set()
    characters = free = 0
    for place, gram in zip(places, grams, strict=True):
        if place < free:
            continue
        if gram in seen:
            characters += int(ends[place + n] - ends[place])
            free = place + n
        else:
            seen.add(gram)
    return characters


def _c4_edits(config: QualityConfig) -> bool:
    return config.c4_lines or config.c4_terminal_punctuation


def _c4(text: str, config: QualityConfig) -> tuple[Numbers, str]:
    """C4's numbers, and what its line rules leave. A line is judged by one rule after the other, as in C4's code."""
    kept: list[str] = []
    sentences = curly = lorem = 0
    lines = text.splitlines()
    for line in map(str.strip, lines):
        words = line.split()
        if config.c4_lines:
            if len(line) > C4_MAX_WORD_CHARACTERS and max(map(len, words)) > C4_MAX_WORD_CHARACTERS:
                continue
            line = _CITATION.sub("", line) if "[" in line else line
        if config.c4_terminal_punctuation and (not line.endswith(C4_LINE_ENDS) or line.endswith("...")):
            continue
        if config.c4_lines and len(words) < C4_MIN_LINE_WORDS:
            continue
        lowered = line.lower()
        lorem += "lorem ipsum" in lowered
        if config.c4_lines and "javascript" in lowered:
            continue
        curly += "{" in line
        if config.c4_lines and any(phrase in lowered for phrase in POLICY_PHRASES):
            continue
        sentences += count_sentences(line)
        kept.append(line)
    numbers: Numbers = {
        "c4_sentences": sentences,
        "c4_curly_bracket_lines": curly,
        "c4_lorem_ipsum_lines": lorem,
        "c4_lines_removed": len(lines) - len(kept),
    }
    return numbers, "\n".join(kept).strip() if _c4_edits(config) else text


def _fineweb(text: str) -> Numbers:
    lines = [line for line in text.split("\n") if line.strip()]
    newlines = text.count("\n")
    return {
        "punctuated_line_ratio": _ratio(sum(line[-1] in SENTENCE_TERMINAL for line in lines), len(lines)),
        "short_line_ratio": _ratio(sum(len(line) <= SHORT_LINE_CHARACTERS for line in lines), len(lines)),
        "repeated_line_character_ratio": _ratio(_duplicates(lines)[1], len(text) - newlines),
        "newline_word_ratio": _ratio(newlines, len(split_words(text))) if newlines else 0.0,
    }


def judge(numbers: Mapping[str, float], config: QualityConfig) -> str | None:
    """The reason of the first rule that `numbers` break, in FineWeb's order of rules; None if they break none."""
    c = config

    def over(name: str, bound: float) -> bool:
        return bound < 1 and numbers[name] > bound

    def above(name: str, bound: float) -> bool:
        return bound > 0 and numbers[name] > bound

    def below(name: str, bound: float) -> bool:
        return bound > 0 and numbers[name] < bound

    tops = zip((2, 3, 4), c.max_top_ngram_character_ratios, strict=False)
    duplicates = zip(range(5, 11), c.max_duplicate_ngram_character_ratios, strict=False)
    rules = (
        ("empty_text", numbers["characters"] == 0),
        ("blocked_word", bool(c.blocked_words_file) and numbers["blocked_words"] > 0),
        ("duplicate_paragraphs", over("duplicate_paragraph_ratio", c.max_duplicate_paragraph_ratio)),
        (
            "duplicate_paragraph_characters",
            over("duplicate_paragraph_character_ratio", c.max_duplicate_paragraph_character_ratio),
        ),
        ("duplicate_lines", over("duplicate_line_ratio", c.max_duplicate_line_ratio)),
        ("duplicate_line_characters", over("duplicate_line_character_ratio", c.max_duplicate_line_character_ratio)),
        *((f"top_{n}gram", over(f"top_{n}gram_character_ratio", bound)) for n, bound in tops),
        *((f"duplicate_{n}grams", over(f"duplicate_{n}gram_character_ratio", bound)) for n, bound in duplicates),
        ("too_few_words", below("words", c.min_words)),
        ("too_many_words", above("words", c.max_words)),
        ("words_too_short", below("mean_word_characters", c.min_mean_word_characters)),
        ("words_too_long", above("mean_word_characters", c.max_mean_word_characters)),
        ("too_many_hashes", over("hash_word_ratio", c.max_symbol_word_ratio)),
        ("too_many_ellipses", over("ellipsis_word_ratio", c.max_symbol_word_ratio)),
        ("too_many_bullet_lines", over("bullet_line_ratio", c.max_bullet_line_ratio)),
        ("too_many_ellipsis_lines", over("ellipsis_line_ratio", c.max_ellipsis_line_ratio)),
        ("too_few_alphabetic_words", below("alphabetic_word_ratio", c.min_alphabetic_word_ratio)),
        ("too_few_stop_words", below("stop_words", c.min_stop_words)),
        ("too_few_tokens", below("tokens", c.min_tokens)),
        ("lorem_ipsum", c.c4_drop_lorem_ipsum and numbers["c4_lorem_ipsum_lines"] > 0),
        ("curly_bracket", c.c4_drop_curly_bracket and numbers["c4_curly_bracket_lines"] > 0),
        ("too_few_sentences", below("c4_sentences", c.c4_min_sentences)),
        ("too_few_punctuated_lines", below("punctuated_line_ratio", c.min_punctuated_line_ratio)),
        ("too_many_short_lines", over("short_line_ratio", c.max_short_line_ratio)),
        (
            "repeated_line_characters",
            over("repeated_line_character_ratio", c.max_repeated_line_character_ratio),
        ),
        ("too_many_newlines", above("newline_word_ratio", c.max_newline_word_ratio)),
    )
    return next((reason for reason, broken in rules if broken), None)


def filter_quality(documents: pa.Table, config: QualityConfig) -> tuple[pa.Table, dict[int, str]]:
    """Verdicts (VERDICT_SCHEMA, one for each document in the order given), and by index the kept texts that changed."""
    verdicts: list[Verdict] = []
    changed: dict[int, str] = {}
    columns = (documents[name].to_pylist() for name in ("index", "url", "text"))
    for index, url, text in zip(*columns, strict=True):
        numbers, cleaned = _measure_and_clean(text, config)
        reason = judge(numbers, config) or (None if cleaned else "empty_text")
        if reason is not None:
            verdicts.append(Verdict(index, url, DROPPED, reason, None, numbers))
            continue
        verdicts.append(Verdict(index, url, numbers=numbers))
        if cleaned != text:
            changed[index] = cleaned
    return verdict_table(verdicts), changed
