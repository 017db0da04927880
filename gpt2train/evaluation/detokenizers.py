"""The spaces and signs that old tokenizers put into test sets ↔ the text as people write it.

In: a line of a test set. Out: the line without the artifacts, and back. The paper (Radford et al. 2019, section 3.1)
undoes such tokenization by "invertible de-tokenizers" and gains 2.5 to 5 perplexity; its code was never released, so
these are written from the test sets' own conventions:

    wikitext    Merity et al. 2016: Moses' spaces, ` @-@ `, ` @,@ `, ` @.@ ` within words and numbers
    ptb         Mikolov's Penn Treebank: lower case without punctuation, `do n't`, `$ N`, `N %`
    books       Penn Treebank style in full (Children's Book Test, LAMBADA's plain text): quotes as `` and '', -LRB-
    news        1 Billion Word: Moses' spaces, plain quotes

`undo` only moves spaces and replaces signs; every letter stays, in its order. `redo` is its inverse where the
convention can be told from the text alone; what share of a test set's lines comes back exactly is told with the score,
since a perplexity is of the test set only as far as nothing was lost. Cost: about 1.5 MB a second for both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_CLITIC = re.compile(r"'(?:s|re|ve|ll|d|m|t)", re.IGNORECASE)
_CLOSING = frozenset(", . ; : ! ? ) ] } % ... …".split())
_OPENING = frozenset("( [ {".split())
_CURRENCY = frozenset("$ £ € ₤ US$ A$ C$".split())
_WORDS_WITH_DOT = frozenset(
    "mr mrs ms dr st jr sr vs no vol lt col gen sgt capt maj rev prof hon gov sen rep adm cmdr messrs mt ft etc inc "
    "corp ltd co bros cf ca approx fig pp ed eds op al dept univ assn jan feb mar apr jun jul aug sep sept oct nov "
    "dec".split()
)
"""Abbreviations that keep their dot within a line."""
_DOTTED = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, U.S, a.m: initials and dotted abbreviations


@dataclass(frozen=True)
class Style:
    """How a tokenizer wrote text; `undo` and `redo` read it."""

    name: str
    negation: str
    """How `don't` is parted: "n't" as `do n't`, "'t" as `don 't`."""
    quotes: tuple[str, str] = ('"', '"')
    """What stands for an opening and a closing quotation mark."""
    escapes: bool = False
    """` @-@ ` and its like within words and numbers."""
    brackets: bool = False
    """-LRB- and its like for brackets."""
    punctuation: bool = True
    """Are punctuation marks parted from words?"""
    margin: str = ""
    """What stands before and after each line."""
    currency: frozenset[str] = _CURRENCY


WIKITEXT = Style("wikitext", negation="'t", escapes=True, margin=" ")
PTB = Style("ptb", negation="n't", punctuation=False, margin=" ", currency=frozenset("$ #".split()))
BOOKS = Style("books", negation="n't", quotes=("``", "''"), brackets=True)
NEWS = Style("news", negation="'t")
STYLES = {style.name: style for style in (WIKITEXT, PTB, BOOKS, NEWS)}

_ESCAPES = {"@-@": "-", "@,@": ",", "@.@": "."}
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_BRACKETS_BACK = {sign: token for token, sign in _BRACKETS.items()}
_HEADING = re.compile(r"((?:= )*=) (.+) \1")  # "= = History = =": WikiText's form of "== History =="
_ESCAPED = re.compile(r"(?<=[^\W_]|>)-(?=[^\W_]|<)|(?<=[\d>])[,.](?=[\d<])")  # <unk> may be a word or a number


def undo(line: str, style: Style) -> str:
    """One line without its newline, as people write it.

    >>> undo(" The 1 @,@ 200 @-@ ton ship was n't lost . ", WIKITEXT)   # "The 1,200-ton ship wasn't lost."
    """
    line = _without_margin(line, style)
    if style.escapes and (heading := _HEADING.fullmatch(line)):
        signs = heading[1].replace(" ", "")
        return f"{signs} {_undo(heading[2], style)} {signs}"
    return _undo(line, style)


def _undo(line: str, style: Style) -> str:
    pieces: list[str] = []
    glued = True  # no space before the next token
    in_quotation = False
    for token in line.split(" "):
        sign, left, right = token, False, False  # what is written; does it lean on its left, its right neighbor?
        if style.escapes and token in _ESCAPES:
            sign, left, right = _ESCAPES[token], True, True
        elif _parted_clitic(token, style) or (token == "'" and pieces and pieces[-1].endswith("s")):
            left = True
        elif token in style.currency:
            right = True
        elif token == "%":
            left = True
        elif style.punctuation:
            if style.brackets and token in _BRACKETS:
                sign = _BRACKETS[token]
            if token in style.quotes:
                opens = not in_quotation if style.quotes[0] == style.quotes[1] else token == style.quotes[0]
                in_quotation, sign = opens, '"'
                left, right = not opens, opens
            elif sign in _CLOSING:
                left = True
            elif sign in _OPENING:
                right = True
        if not (glued or left):
            pieces.append(" ")
        pieces.append(sign)
        glued = right
    return "".join(pieces)


def redo(line: str, style: Style) -> str:
    """`undo`'s inverse: natural text as the test set's tokenizer would have written it."""
    if style.escapes and (heading := re.fullmatch(r"(=+) (.+) \1", line)):
        signs = " ".join(heading[1])
        return f"{style.margin}{signs} {_redo(heading[2], style)} {signs}{style.margin}"
    tokens = _redo(line, style)
    return f"{style.margin}{tokens}{style.margin}" if tokens else style.margin


def _redo(line: str, style: Style) -> str:
    tokens: list[str] = []
    words = line.split(" ") if line else []
    for place, word in enumerate(words):
        last = place == len(words) - 1
        tokens += _tokens(word, style, last=last, next_word="" if last else words[place + 1])
    return " ".join(tokens)


def undo_text(text: str, style: Style) -> tuple[str, float]:
    """A test set's whole text line by line; and the share of its lines with text that `redo` gives back exactly."""
    lines = text.split("\n")
    undone = [undo(line, style) for line in lines]
    said = [(before, after) for before, after in zip(lines, undone, strict=True) if before.strip()]
    kept = sum(redo(after, style) == before for before, after in said)
    return "\n".join(undone), kept / len(said) if said else 1.0


def _without_margin(line: str, style: Style) -> str:
    return line.removeprefix(style.margin).removesuffix(style.margin)


def _parted_clitic(token: str, style: Style) -> bool:
    """Is the token one that was cut off the word before it?"""
    return token.lower() == "n't" or bool(_CLITIC.fullmatch(token))


def _tokens(word: str, style: Style, *, last: bool, next_word: str) -> Iterator[str]:
    """The tokens of what stands between two spaces."""
    after: list[str] = []  # what is cut off the end, the last one first
    while word and style.punctuation and (sign := _opening_of(word, style)):
        yield _written(sign, style, opens=True)
        word = word[len(sign) :]
    for currency in sorted(style.currency, key=len, reverse=True):
        if word.startswith(currency) and word != currency:
            yield currency
            word = word[len(currency) :]
            break
    while word and (cut := _closing_of(word, style, last=last and not after, next_word=next_word, after=after)):
        word = word[: len(word) - len(cut)]
        after.append(_written(cut, style, opens=False))
    yield from _inner(word, style)
    yield from reversed(after)


def _opening_of(word: str, style: Style) -> str:
    return word[0] if word[0] in _OPENING or word[0] == '"' else ""


def _closing_of(word: str, style: Style, *, last: bool, next_word: str, after: list[str]) -> str:
    """What the tokenizer cuts off the end of `word`; "" when nothing more."""
    if len(word) > 1 and word.endswith("%"):
        return "%"
    clitic = re.search(r"(?:'(?:s|re|ve|ll|d|m)|n't|'t)$", word, re.IGNORECASE)
    if clitic and clitic.start() > 0:
        cut = clitic[0]
        if cut.lower() in ("n't", "'t"):
            negated = word[: -len("'t")].lower().endswith("n")
            cut = word[-3:] if style.negation == "n't" and negated else word[-2:]
            if style.negation == "n't" and not negated:
                return ""
        return cut if len(cut) < len(word) else ""
    if len(word) > 1 and word.endswith("s'"):
        return "'"
    if not style.punctuation:
        return ""
    if word.endswith("..."):
        return "..." if len(word) > 3 else ""
    sign = word[-1]
    if sign == '"':
        return sign
    if sign == ".":
        return sign if _ends_sentence(word[:-1], last=last, next_word=next_word, after=after) else ""
    return sign if sign in _CLOSING else ""


def _ends_sentence(stem: str, *, last: bool, next_word: str, after: list[str]) -> bool:
    """Is the dot behind `stem` the end of a sentence, or part of an abbreviation?"""
    if not stem:
        return True
    bare = re.split(r"[-–/(\"]", stem)[-1]
    if last:
        return True
    if _DOTTED.fullmatch(bare) and not (after and after[-1] in ('"', "''")):
        return False
    if bare.lower() in _WORDS_WITH_DOT:
        return False
    return bool(after) or not next_word[:1].islower()


def _written(sign: str, style: Style, *, opens: bool) -> str:
    if sign == '"':
        return style.quotes[0] if opens else style.quotes[1]
    return _BRACKETS_BACK.get(sign, sign) if style.brackets else sign


def _inner(word: str, style: Style) -> Iterator[str]:
    """A bare word; with escapes, its parts and the signs that joined them."""
    if not word:
        return
    if not style.escapes:
        yield word
        return
    begin = 0
    for match in _ESCAPED.finditer(word):
        yield word[begin : match.start()]
        yield f"@{match[0]}@"
        begin = match.end()
    yield word[begin:]
