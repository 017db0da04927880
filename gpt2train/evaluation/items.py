"""The four things a test set may ask of a language model; what every task's data become before a model is near.

In: nothing. Out: small frozen records of text, without ids, torch or files.

    Completions   which of several (context, continuation) pairs is likeliest
    LastWord      how likely, and how nearly the first choice, is the word that ends a passage
    Stretch       how likely is a long text
    Question      what does the model write after a prompt

    TaskDataError   exit code 2   a test set that is missing, or is not what its task reads
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class TaskDataError(Exception):
    """Says which file, what was looked for, and what to give."""

    exit_code = 2


@dataclass(frozen=True)
class Completions:
    """`pairs[gold]` is the right one. Contexts may differ while the continuation stays: partial scoring."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class LastWord:
    """`word` starts with the space that parts it from `context`."""

    context: str
    word: str


@dataclass(frozen=True)
class Stretch:
    """A text as the model reads it; `units` of the original (words and line ends, bytes or characters) share its
    probability."""

    text: str
    units: int
    restored_lines: float = 1.0
    """Share of the original's lines that the de-tokenizer's inverse gives back; 1 where there is none."""


@dataclass(frozen=True)
class Question:
    """The model reads `prompt` and then `cue`; of a prompt that is too long its end goes, or its start."""

    prompt: str
    cue: str
    answers: tuple[str, ...]
    cut_end: bool = False


Item = Completions | LastWord | Stretch | Question


def texts_of(item: Item) -> Iterator[str]:
    """The item's texts, for counting what of them the training data hold. Answers of a question belong to it."""
    if isinstance(item, Completions):
        for context, continuation in item.pairs:
            yield context + continuation
    elif isinstance(item, LastWord):
        yield item.context + item.word
    elif isinstance(item, Stretch):
        yield item.text
    else:
        yield item.prompt
        yield from item.answers
