"""Thirteen novels → token shards of a small vocabulary, for ladders of models that a CPU trains.

With 50,257 tokens, a model that a CPU can train is nearly all embedding, and size says little about it. GPT-2's first
merges are a byte-pair encoding of their own: 256 bytes, the 3,839 merges that GPT-2 learned first, and the end of text.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

VOCABULARY = 4096
END_OF_TEXT = VOCABULARY - 1
PIECE_CHARACTERS = 8000
"""A document is a run of paragraphs of a book of about this length, so that each split has pages of every book."""
VALIDATION_EVERY = 32
"""Every 32nd document is for validation."""


def write_books(books: Path, folder: Path) -> dict[str, int]:
    """Token shards in the new `folder` from the .txt files in `books`; gives the tokens of each split."""
    import tiktoken

    from data_pipeline.token_writer import TokenShardWriter
    from data_pipeline.tokenizer import PATTERN, load

    gpt2 = load().encoding
    ranks = {gpt2.decode_single_token_bytes(i): i for i in range(END_OF_TEXT)}
    encoding = tiktoken.Encoding(
        "gpt2-4096",
        explicit_n_vocab=VOCABULARY,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )
    identity = hashlib.sha256(b"".join(ranks)).hexdigest()
    pieces = [(book.stem, piece) for book in sorted(books.glob("*.txt")) for piece in _pieces(book)]
    order = np.random.default_rng(0).permutation(len(pieces))
    folder.mkdir(parents=True)
    with TokenShardWriter(
        folder, shard_tokens=100_000_000, tokenizer_sha256=identity, vocabulary=VOCABULARY, end_of_text=END_OF_TEXT
    ) as writer:
        for split in ("train", "validation"):
            for place, index in enumerate(order.tolist()):
                if (place % VALIDATION_EVERY == 0) == (split == "validation"):
                    book, text = pieces[index]
                    ids = np.append(encoding.encode_to_numpy(text, disallowed_special=()), END_OF_TEXT)
                    digest = hashlib.sha256(text.encode()).hexdigest()
                    url = f"https://example.org/{book}/{index}"
                    writer.append(split, ids.astype(np.uint16), index=index, url=url, digest=digest)
        manifest = writer.finish(made_from=identity, settings={"vocabulary": VOCABULARY})
    return {split: manifest["splits"][split]["tokens"] for split in ("train", "validation")}


def _pieces(book: Path) -> list[str]:
    """The book's paragraphs in runs of about PIECE_CHARACTERS."""
    found: list[str] = []
    run: list[str] = []
    for paragraph in re.split(r"\n\s*\n", book.read_text(encoding="utf-8", errors="replace")):
        run.append(paragraph.strip())
        if sum(map(len, run)) > PIECE_CHARACTERS:
            found.append("\n\n".join(run))
            run = []
    return [*found, "\n\n".join(run)] if run else found
