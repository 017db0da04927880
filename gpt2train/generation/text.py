"""Tokens → text as it comes: whole characters, up to a stop string.

A piece is given out as soon as nothing that follows can take it back: bytes of a character that is not finished yet are
held, and so is an ending that might be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from data_pipeline.tokenizer import Tokenizer


class TextStream:
    """One row's text.

        stream = TextStream(tokenizer, stop=["\\n\\n"])
        for token in tokens:
            show(stream.add(token))
            if stream.stopped:
                break
        show(stream.end())

    Joined, the pieces are `tokenizer.decode(tokens)` up to the first stop string, which is not given. Bytes that can be
    no UTF-8 become U+FFFD, as an unfinished character at the end does.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string would end every text at once"
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> str:
        """What is certain now; nothing more once `stopped`."""
        return self._certain(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        piece = self._certain(self._decoder.decode(b"", final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return piece + rest

    def _certain(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins; less than all of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def utf8_stream(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The tokens' text in pieces of whole characters; joined, they are `tokenizer.decode(tokens)`."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.add(token):
            yield piece
    if rest := stream.end():
        yield rest
