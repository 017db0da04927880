"""Prompts → new tokens, many rows at once, with the keys and values of past tokens kept.

Flows in: a model and rows of token ids. Flows out: (row, token), as each is chosen. A token costs one position's
forward pass for all rows together; a row that is alone also has what follows guessed from its own text (`drafting`),
and takes several tokens from a pass where the guess was right.

Rows of unequal length need no padding and no mask: all rows stand at the same position. They enter with the tokens that
the shortest prompt has; a row whose prompt is longer is then fed its own next token instead of one that was chosen. So
a row's text is the text it would have alone.

The context is finite: once it is full, the window slides by half. The last context // 2 tokens are read again from
position 0 and decoding goes on behind them, so each token sees at least half a context and the reading again costs at
most two positions a token. A prompt longer than the context enters with its last `context` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY
from gpt2train.generation.drafting import Drafts
from gpt2train.generation.sampling import (
    NOT_FINITE,
    Sampling,
    chooses_rows_at_once,
    next_token,
    next_tokens,
    not_finite,
)
from gpt2train.model import GPT, KeyValueCache

STOP, LENGTH = "stop", "length"
"""Why a row ended: by `<|endoftext|>` or because nobody wanted more, or with as many tokens as were allowed."""

DRAFT_TOKENS = 8
"""Tokens guessed at once at the most; 0: none."""


class Decoding:
    """All rows of one batch.

        rows = Decoding(model, [[15496], [464, 3290]], Sampling(top_k=40), seeds=[0, 1], max_new_tokens=20)
        for row, token in rows:
            ...
            rows.finish(row)        # where no more of it is wanted

    Every prompt has at least one id. `reasons[row]` tells how an ended row ended. The same seed gives the same tokens
    on the same device, by numbers that the row's own generator draws on the CPU; ids that are no token (padding, or a
    vocabulary larger than GPT-2's) have probability 0. `<|endoftext|>` ends a row and is not given. `at_once`: tokens
    are chosen for all rows together on the model's device, where the sampling can be; None: on any but a CPU.
    """

    def __init__(
        self, model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int],
        max_new_tokens: int,
        draft_tokens: int = DRAFT_TOKENS, at_once: bool | None = None,
    ) -> None:  # fmt: skip
        assert all(prompts), "an empty prompt starts from END_OF_TEXT"
        assert len(seeds) == len(prompts)
        self.reasons: dict[int, str] = {}
        self._model, self._sampling, self._max_new_tokens = model, sampling, max_new_tokens
        self._draft_tokens = draft_tokens
        if at_once is None:
            at_once = model.wte.weight.device.type != "cpu"
        self._at_once = at_once and chooses_rows_at_once(sampling)
        self._context = model.config.context
        self._said = [list(p[-self._context :]) for p in prompts]
        """Each row's prompt, as far as the context takes it, and its new tokens."""
        self._prompt_tokens = [len(said) for said in self._said]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def finish(self, row: int) -> None:
        """No more tokens of this row."""
        self.reasons.setdefault(row, STOP)

    def new_tokens(self, row: int) -> int:
        """How many tokens the row has got so far."""
        return len(self._said[row]) - self._prompt_tokens[row]

    @torch.inference_mode()
    def __iter__(self) -> Iterator[tuple[int, int]]:
        config, parameter = self._model.config, self._model.wte.weight
        live = list(range(len(self._said)))
        room = min(self._context, max(self._prompt_tokens) + self._max_new_tokens)
        cache = KeyValueCache(
            replace(config, context=room), batch=len(live), device=parameter.device, dtype=parameter.dtype
        )
        at = min(self._prompt_tokens)  # tokens of each row that the model has seen after the next pass
        fresh = [self._said[row][:at] for row in live]
        drafts: Drafts | None = None
        guessed: list[int] = []
        while live:
            B, T, last = len(live), len(fresh[0]), 1 + len(guessed)
            tokens_BT = torch.tensor(fresh, device=parameter.device)
            # Of a prompt the logits of the last position alone are made; behind guesses, those of each guess count too.
            at_M = torch.arange(B * T, device=parameter.device).view(B, T)[:, -last:].flatten() if last < T else None
            logits = self._model(tokens_BT, cache=cache, at_M=at_M)[..., :VOCABULARY]
            logits_BTV = logits.float().view(B, last, -1)
            # Rows that have ended, or are still within their prompts, get no token.
            wanted = [row not in self.reasons and len(self._said[row]) <= at for row in live]
            chosen = self._choose(logits_BTV[:, 0], live, wanted) if self._at_once and last == 1 else None
            if chosen is None:
                logits_BTV = logits_BTV.cpu()  # host-device sync, once a pass
            right = 0
            for place, row in enumerate(live):
                if not wanted[place] or row in self.reasons:
                    continue
                for i, guess in enumerate([*guessed, -1]):
                    if chosen is not None:
                        token = chosen[place]
                        if token == NOT_FINITE:
                            raise not_finite()
                    else:
                        logits_V = logits_BTV[place, i]
                        token = next_token(logits_V, self._sampling, self._said[row], self._generators[row])
                    if token == END_OF_TEXT:
                        self.finish(row)
                        break
                    self._said[row].append(token)
                    if self.new_tokens(row) == self._max_new_tokens:
                        self.reasons[row] = LENGTH
                    yield row, token
                    if token != guess or row in self.reasons:
                        break
                    right += 1
            cache.length -= len(guessed) - right  # what was guessed wrong was never said
            at += 1 + right
            stay = [i for i, row in enumerate(live) if row not in self.reasons]
            if len(stay) < len(live):
                cache.keep(stay)
                live = [live[i] for i in stay]
            fresh = [self._said[row][at - 1 : at] for row in live]
            if drafts is not None and live:
                for token in self._said[live[0]][-1 - right :]:
                    drafts.add(token)
                drafts.learn(len(guessed), right)
            guessed = []
            if cache.length == self._context:
                fresh = [self._said[row][at - max(self._context // 2, 1) : at] for row in live]
                cache.clear()
            elif len(live) == 1 and self._draft_tokens and len(self._said[live[0]]) == at:
                if drafts is None:
                    drafts = Drafts(self._said[live[0]], self._draft_tokens)
                left = self._max_new_tokens - self.new_tokens(live[0])
                guessed = drafts.guess(min(room - cache.length, left) - 1)
                fresh = [[*fresh[0], *guessed]]

    def _choose(self, logits_BV: torch.Tensor, live: Sequence[int], wanted: Sequence[bool]) -> list[int]:
        """A token for each live row; those that want none draw no number."""
        uniforms = torch.zeros(len(live), dtype=torch.float64)
        if self._sampling.temperature:
            for place, row in enumerate(live):
                if wanted[place]:
                    uniforms[place] = torch.rand((), dtype=torch.float64, generator=self._generators[row])
        ids: list[int] = next_tokens(
            logits_BV, self._sampling, uniforms.to(logits_BV.device)
        ).tolist()  # host-device sync
        return ids


def sample(
    model: GPT, prompt: Sequence[int], *, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int,
    draft_tokens: int = DRAFT_TOKENS,
) -> Iterator[int]:  # fmt: skip
    """New ids after `prompt` (at least one id), until `<|endoftext|>`, which is not given, or `max_new_tokens`."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for _, token in Decoding(
        model, [prompt], sampling, seeds=[seed], max_new_tokens=max_new_tokens, draft_tokens=draft_tokens
    ):
        yield token
