"""Sampling: a prompt → the text that goes on from it.

Flows in: a run, a checkpoint or a Hugging Face folder, and a prompt. Flows out: text on standard output as it comes,
always valid UTF-8; everything else on standard error. Keys and values of past tokens are kept, so a token costs one
position's forward pass.

The context is finite: once it is full, the window slides by half. The last context // 2 tokens are read again from
position 0 and decoding goes on behind them, so each token sees at least half a context and the reading again costs at
most two positions a token. A prompt longer than the context enters with its last `context` tokens.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import torch

from data_pipeline.tokenizer import END_OF_TEXT, VOCABULARY, Tokenizer
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.bounds import check_generate
from gpt2train.config import ConfigError, GenerateConfig, NonFiniteError
from gpt2train.model import GPT, KeyValueCache
from gpt2train.release.hf import choose_device, load_model


def keep_top_k(logits_V: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` largest logits, the others -inf; 0: all. Logits equal to the k-th stay too."""
    if k <= 0 or k >= logits_V.shape[-1]:
        return logits_V
    least = torch.topk(logits_V, k).values[..., -1:]
    return logits_V.masked_fill(logits_V < least, -torch.inf)


def keep_top_p(logits_V: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest likeliest tokens that together reach probability `p`, the others -inf; always at least one.

    Nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    if p >= 1:
        return logits_V
    ascending, order = torch.sort(logits_V, descending=False)
    # A token goes when it and all less likely ones together have at most 1 - p.
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits_V.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def next_token(
    logits_V: torch.Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token id from fp32 logits: the likeliest at temperature 0, else drawn after temperature, top-k and top-p.

    Raises NonFiniteError when a logit is not finite, as in a model whose training diverged.
    """
    if not bool(logits_V.isfinite().all()):
        raise NonFiniteError("the model's logits are not finite; choose an earlier checkpoint")
    if temperature == 0:
        return int(logits_V.argmax())
    # Less the largest, no logit overflows at a small temperature, and the probabilities stay the same.
    kept = keep_top_p(keep_top_k((logits_V - logits_V.max()) / temperature, top_k), top_p)
    return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))


@torch.no_grad()
def sample(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """New token ids after `prompt` (at least one id), until `<|endoftext|>`, which is not given, or `max_new_tokens`.

    The same seed gives the same tokens: they are drawn on the CPU by a generator of their own. Ids that are no token
    (padding, or a vocabulary larger than GPT-2's) have probability 0.
    """
    assert prompt, "an empty prompt starts from END_OF_TEXT"
    generator = torch.Generator().manual_seed(seed)
    context = model.config.context
    parameter = model.wte.weight
    cache = KeyValueCache(model.config, device=parameter.device, dtype=parameter.dtype)
    window = list(prompt[-context:])
    fresh = window
    for _ in range(max_new_tokens):
        tokens_BT = torch.tensor([fresh], device=parameter.device)
        logits_V = model(tokens_BT, cache=cache)[0, -1, :VOCABULARY].float().cpu()  # host-device sync, once a token
        token = next_token(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if token == END_OF_TEXT:
            return
        yield token
        window.append(token)
        fresh = [token]
        if len(window) > context:
            window = fresh = window[-max(context // 2, 1) :]
            cache.clear()


def utf8_stream(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The tokens' text in pieces, each whole characters: bytes of a character that is not finished yet are held back.

    Bytes that can be no UTF-8 become U+FFFD, as an unfinished character at the end does; joined, the pieces are
    `tokenizer.decode(tokens)`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def generate(config: GenerateConfig) -> int:
    """Writes the samples to standard output, one after another; sample i has the seed `seed` + i."""
    faults = check_generate(config)
    if faults:
        raise ConfigError(faults)
    model = load_model(config.run, choose_device(config.device))
    if model.config.vocabulary < VOCABULARY:
        raise ConfigError(
            [f"run={config.run}: its {model.config.vocabulary} tokens are fewer than GPT-2's {VOCABULARY}; train anew"]
        )
    tokenizer = load_tokenizer()
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if config.prompt == "-" else config.prompt
    prompt = tokenizer.encode(text).tolist() or [END_OF_TEXT]
    if len(prompt) > model.config.context:
        _say(f"the prompt has {len(prompt)} tokens; the last {model.config.context} (model.context) are used")
    out = sys.stdout.buffer
    for i in range(config.samples):
        if config.samples > 1:
            _say(f"sample {i + 1} of {config.samples}, seed {config.seed + i}")
        tokens = sample(
            model,
            prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed + i,
        )
        if config.echo:
            _write(out, text)
        for piece in utf8_stream(tokens, tokenizer):
            _write(out, piece)
        _write(out, "\n")
    return 0


def _write(out: BinaryIO, text: str) -> None:
    out.write(text.encode("utf-8", "replace"))
    out.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
