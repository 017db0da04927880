"""A page's visible text → whether it is surely in a language that nobody asked for, before any extraction.

The rule about languages (`language.py`) judges main texts, after extraction. Most pages that it drops can be told from
all their visible text, for a tenth of what extraction costs; this look takes those alone that leave no doubt, so that
what it drops is what the rule would have dropped. Two identifiers of different kind have to agree that a page is in
none of the wanted languages: resiliparse's (0.05 ms; its word is enough for a wanted one), then the rule's own (2 ms).
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.clean.language import identify

# Menus and footers are in the page's language, but short texts are often names and numbers.
MIN_CHARACTERS = 200
# py3langid's probabilities crowd at both ends: whole texts get .99 and more, mixtures less.
MIN_SCORE = 0.99
# Beyond this distance resiliparse's own identifier takes nothing for certain (its documentation: 1200).
MAX_DISTANCE = 1_200


def surely_other_language(visible: str, wanted: Sequence[str]) -> tuple[str, float] | None:
    """(ISO 639-1 code, probability) of a visible text that is surely in none of the `wanted` languages; else None."""
    from resiliparse.parse.lang import detect_fast

    if len(visible) < MIN_CHARACTERS:
        return None
    code, distance = detect_fast(visible)
    if code in wanted and distance <= MAX_DISTANCE:
        return None
    # The end as well as the beginning and the middle: a page in two languages is not surely in one.
    for part in (visible, visible[-1_500:]):
        code, score = identify(part)
        if code in wanted or score < MIN_SCORE:
            return None
    return code, round(score, 6)


def load() -> None:
    """Load the models, so that no page pays for it."""
    identify("words")
    surely_other_language("words " * MIN_CHARACTERS, ())
