"""`make soak`: verdicts of the published rules beside datatrove's, FineWeb's own code, on a thousand real texts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.corpus import NotInstallable, ask_peer, read_pages, recipe
from data_pipeline.clean.html_text import clean_text
from data_pipeline.clean.quality import judge, measure
from data_pipeline.config import QualityConfig

LEAST_SAME = 0.985
"""Share of texts that both keep or both drop."""


def rules(config: QualityConfig) -> dict[str, tuple[str, float, float]]:
    """Our reason and datatrove's → (the number behind them, its bound, how far from it counting may differ).

    The counting differs where spaCy's tokenizer and sentence splitter stand on their side and regular expressions on
    ours: on words by some percent, on sentences by some in a text, hence on all ratios to words.
    """
    c = config
    found: dict[str, tuple[str, float, float]] = {}

    def rule(ours: str, theirs: str, number: str, bound: float, tolerance: float) -> None:
        found[ours] = found[theirs] = (number, bound, tolerance)

    rule("too_few_words", "gopher_short_doc", "words", c.min_words, 0.1 * c.min_words)
    rule("too_many_words", "gopher_long_doc", "words", c.max_words, 0.1 * c.max_words)
    mean = "mean_word_characters"
    rule("words_too_short", "gopher_below_avg_threshold", mean, c.min_mean_word_characters, 0.3)
    rule("words_too_long", "gopher_above_avg_threshold", mean, c.max_mean_word_characters, 0.5)
    rule("too_many_hashes", "gopher_too_many_hashes", "hash_word_ratio", c.max_symbol_word_ratio, 0.02)
    rule("too_many_ellipses", "gopher_too_many_ellipsis", "ellipsis_word_ratio", c.max_symbol_word_ratio, 0.02)
    alphabetic = "alphabetic_word_ratio"
    rule("too_few_alphabetic_words", "gopher_below_alpha_threshold", alphabetic, c.min_alphabetic_word_ratio, 0.03)
    rule("too_few_sentences", "too_few_sentences", "c4_sentences", c.c4_min_sentences, 2)
    rule("too_many_newlines", "list_ratio", "newline_word_ratio", c.max_newline_word_ratio, 0.03)
    for n, bound in zip((2, 3, 4), c.max_top_ngram_character_ratios, strict=False):
        rule(f"top_{n}gram", f"top_{n}_gram", f"top_{n}gram_character_ratio", bound, 0.02)
    for n, bound in zip(range(5, 11), c.max_duplicate_ngram_character_ratios, strict=False):
        number = f"duplicate_{n}gram_character_ratio"
        rule(f"duplicate_{n}grams", f"duplicated_{n}_n_grams", number, bound, 0.02)
    return found


@pytest.mark.soak
def test_verdicts_are_those_of_datatrove_but_near_a_bound(shared: Path, tmp_path: Path) -> None:
    _, gold = read_pages(shared / "pages", 0)
    # As extraction hands texts on: soft hyphens, which one page has in most of its words, are no marks to count.
    texts = [clean_text(text) for text in gold]
    assert len(texts) >= 1_000
    try:
        answers = ask_peer("datatrove", texts, tmp_path)
    except NotInstallable as e:
        pytest.skip(f"datatrove cannot be installed here: {e}")
    for name in ("gopher", "c4", "fineweb"):
        config = recipe(name)
        known = rules(config)
        differing: Counter[str] = Counter()
        for text, theirs in zip(texts, answers["verdicts"][name], strict=True):
            numbers = measure(text, config)
            ours = judge(numbers, config)
            if (ours is None) == (theirs is None):
                continue
            reason = ours or theirs
            assert reason in known, (
                f"{name}: {reason} rests on no counting that may differ: ours {ours}, theirs {theirs}"
            )
            number, bound, tolerance = known[reason]
            assert abs(numbers[number] - bound) <= tolerance, f"{name}: {reason}: {number} {numbers[number]} of {bound}"
            differing[reason] += 1
        print(f"{name}: {len(texts) - differing.total()} of {len(texts)} verdicts are the same; {dict(differing)}")
        assert differing.total() <= (1 - LEAST_SAME) * len(texts)
