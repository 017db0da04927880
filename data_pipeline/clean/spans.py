"""Known n-grams → cut out of a text, and those again that come about where its rests meet.

In: a text, and which n-grams are known. Out: the text without any of them. It is looked through once; after that only
the joints are, n - 1 words on either side, since an n-gram that is in none of them was there before and went. So the
cost grows with the text and with nothing else, whatever is nested in it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data_pipeline.clean.ngrams import hash_runs, hash_words

ALPHANUMERIC = re.compile(r"[^\W_]+")

_BLANKS, _AFTER_SPAN = " \t", " \t.,;:!?'\"”’)"

Gap = deque[str]
"""What stands between two words, in pieces none of which is empty, so that joining two costs nothing."""


def cut_spans(text: str, places: Callable[[np.ndarray], np.ndarray], n: int) -> tuple[str, int]:
    """`text` without the n-grams whose hashes `places` finds (uint64[k] → int[], ascending), and how many spans went.

    A span goes from the first letter of its first word to the last of its last, across case and punctuation, n-grams
    that overlap being one; what is left on its sides is joined by a single space, or by a line break where the span was
    a whole line. Repeated until nothing is found: what comes to stand side by side may be an n-gram, too.
    """
    parts: list[str] = []
    word_of: list[int] = []
    edges: list[tuple[int, int]] = []
    for match in ALPHANUMERIC.finditer(text):
        # Lower-casing may part a word (İ becomes i and a combining dot), as it does in `contamination.normalize`.
        if lowered := ALPHANUMERIC.findall(match[0].lower()):
            parts += lowered
            word_of += [len(edges)] * len(lowered)
            edges.append(match.span())
    hashes = hash_words(" ".join(parts))
    starts = places(hash_runs(hashes, n)).tolist()
    if not starts:
        return text, 0
    rest = _Rest(text, edges)
    first_part = [*np.searchsorted(word_of, range(len(edges))).tolist(), len(parts)]
    found = [(word_of[start], word_of[start + n - 1]) for start in starts]
    total = 0
    while found:
        spans: list[tuple[int, int]] = []
        for first, last in found:
            if spans and first <= spans[-1][1]:
                spans[-1] = (spans[-1][0], last)
            else:
                spans.append((first, last))
        total += len(spans)
        runs = set()
        for left in rest.cut(spans):
            around = rest.parts_around(left, first_part, n - 1)
            for start in places(hash_runs(hashes[around], n)).tolist():
                runs.add((around[start], around[start + n - 1]))
        found = [(word_of[first], word_of[last]) for first, last in sorted(runs)]
    return rest.text(), total


class _Rest:
    """What is left of a text: its words in a linked list, by their numbers, and the gap before each.

    The end, numbered as a word after the last one, links both ends; the gap before it is the text's last.
    """

    def __init__(self, text: str, edges: Sequence[tuple[int, int]]) -> None:
        """`edges`: where each word begins and ends in `text`."""
        self._words = [text[begin:end] for begin, end in edges]
        self._end = len(edges)
        self._next = [*range(1, self._end + 1), 0]
        self._before = [self._end, *range(self._end)]
        self._here = [True] * (self._end + 1)
        begins, ends = [begin for begin, _ in edges], [end for _, end in edges]
        self._gaps: list[Gap] = [
            deque([text[end:begin]] if begin > end else [])
            for end, begin in zip([0, *ends], [*begins, len(text)], strict=True)
        ]

    def cut(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Take the words from first to last of each span out; return the words before the joints, ascending."""
        left_of = []
        for first, last in reversed(spans):
            word = first
            while word != self._next[last]:
                self._here[word] = False
                word = self._next[word]
            left_of.append(self._join(self._before[first], first, self._next[last]))
        first = self._next[self._end]
        _strip_left(self._gaps[first])
        _strip_right(self._gaps[self._end])
        return [left for left in reversed(left_of) if self._here[left] and left != self._end]

    def _join(self, left: int, first: int, right: int) -> int:
        """Link `left` to `right`; of the gaps before the word `first` and before `right` one is made. Return `left`."""
        before, after = self._gaps[first], self._gaps[right]
        _strip_right(before, _BLANKS)
        _strip_left(after, _AFTER_SPAN)
        at_edge = (left == self._end and not before) or (right == self._end and not after)
        at_line = (bool(before) and before[-1].endswith("\n")) or (bool(after) and after[0].startswith("\n"))
        if not at_edge and not at_line:
            before.append(" ")
        if len(before) > len(after):
            before.extend(after)
            self._gaps[right] = before
        else:
            after.extendleft(reversed(before))
        self._next[left], self._before[right] = right, left
        return left

    def parts_around(self, left: int, first_part: Sequence[int], count: int) -> list[int]:
        """`count` parts of words up to the word `left`, and `count` from the next one on; fewer at the text's ends.

        The parts of word w are numbered from first_part[w] to first_part[w + 1].
        """
        sides: tuple[list[int], list[int]] = ([], [])
        word = left
        while word != self._end and len(sides[0]) < count:
            sides[0].extend(range(first_part[word + 1] - 1, first_part[word] - 1, -1))
            word = self._before[word]
        word = self._next[left]
        while word != self._end and len(sides[1]) < count:
            sides[1].extend(range(first_part[word], first_part[word + 1]))
            word = self._next[word]
        return [*reversed(sides[0][:count]), *sides[1][:count]]

    def text(self) -> str:
        return "".join(self._pieces())

    def _pieces(self) -> Iterable[str]:
        word = self._next[self._end]
        while word != self._end:
            yield from self._gaps[word]
            yield self._words[word]
            word = self._next[word]
        yield from self._gaps[self._end]


def _strip_left(gap: Gap, signs: str | None = None) -> None:
    while gap and not (stripped := gap[0].lstrip(signs)):
        gap.popleft()
    if gap:
        gap[0] = stripped


def _strip_right(gap: Gap, signs: str | None = None) -> None:
    while gap and not (stripped := gap[-1].rstrip(signs)):
        gap.pop()
    if gap:
        gap[-1] = stripped
