"""What a text might go on with, guessed from the text itself.

Flows in: tokens as they come. Flows out: a few tokens that followed the last time that its ending occurred. At batch 1
a pass is bound by the reading of the weights, so checking some guesses costs little more than making one token, and
each that proves right saves a pass. Names, quotations and lists repeat; so the guess is often right.

The text does not change by it. Each token is still chosen from the model's own distribution behind those before it, by
the same draws; a guess that is not what was chosen is thrown away with all behind it. This is speculative decoding
(Leviathan et al. 2023, arXiv:2211.17192) with a draft that needs no second model (prompt lookup: Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

ENDING_TOKENS = 3
"""Tokens of the ending that must have occurred before."""
MIN_RIGHT = 3
"""Guesses that must prove right for the next to be worth it, as they save three passes: on a CPU a pass over nine
tokens costs about as much as three or four over one (docs/performance.md)."""
FIRST_PAUSE_TOKENS, LONGEST_PAUSE_TOKENS = 8, 64
"""Tokens without guesses after some that were wrong; doubled each time, forgotten once guesses are right."""


class Drafts:
    """Guesses for one text, of up to `most` tokens; none for a while after some that proved wrong."""

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Where the text went on after each ending, the last time."""
        self._before: dict[tuple[int, ...], int] = {}
        """The same without the ending that the text has now."""
        self._most, self._pause, self._waiting = most, 0, 0
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        self._tokens.append(token)
        self._waiting = max(self._waiting - 1, 0)
        if len(self._tokens) >= ENDING_TOKENS:
            ending = tuple(self._tokens[-ENDING_TOKENS:])
            if ending in self._after:
                self._before[ending] = self._after[ending]
            self._after[ending] = len(self._tokens)

    def guess(self, room: int) -> list[int]:
        """Up to `room` tokens, none where the ending is new."""
        at = self._before.get(tuple(self._tokens[-ENDING_TOKENS:]))
        return [] if at is None or self._waiting else self._tokens[at : at + min(self._most, room)]

    def learn(self, guessed: int, right: int) -> None:
        """`right` of `guessed` tokens were what was chosen."""
        if right >= min(MIN_RIGHT, guessed):
            self._pause = 0 if guessed else self._pause
        else:
            self._pause = min(max(2 * self._pause, FIRST_PAUSE_TOKENS), LONGEST_PAUSE_TOKENS)
            self._waiting = self._pause
