"""A keyed preference for some tokens while sampling, and the test that finds it again.

The scheme of Kirchenbauer et al. 2023, "A Watermark for Large Language Models" (arXiv:2301.10226), algorithm 2: the
token before seeds a pseudorandom choice of a share γ of the vocabulary, the green list, whose logits get δ added. Who
has the key counts green tokens: without the watermark a share γ of them is green by chance.

The green list comes from Philox, a counter-based generator with a documented output for a seed (Salmon et al. 2011),
seeded by BLAKE2b keyed with the secret: without the key the lists cannot be told from chance.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.tokenizer import VOCABULARY
from gpt2train.errors import ConfigError

MIN_KEY_BYTES = 16
"""Shorter keys could be tried out one after another."""


@dataclass(frozen=True)
class Found:
    """What the test says of a text."""

    scored: int
    """Distinct (token before, token) pairs; a repeated pair tells nothing new (section 4 of the paper)."""
    green: int
    z: float
    p_value: float
    """Chance that a text without the watermark has so many green tokens, by the binomial distribution."""


@dataclass(frozen=True)
class Watermark:
    """`green_fraction` is the paper's γ, `bias` its δ, in nats of logit; `key` is the secret."""

    key: bytes = field(repr=False)
    green_fraction: float = 0.25
    bias: float = 2.0

    @property
    def green_tokens(self) -> int:
        """Tokens in each green list: γ of the vocabulary."""
        return round(self.green_fraction * VOCABULARY)

    @functools.lru_cache(maxsize=256)  # noqa: B019 (a watermark lives as long as its process)
    def green_V(self, before: int) -> Tensor:
        """Which tokens are green after the token `before`: bool [V], exactly `green_tokens` of them true."""
        digest = hashlib.blake2b(before.to_bytes(4, "little"), key=self.key, digest_size=16).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(VOCABULARY)
        green = np.zeros(VOCABULARY, dtype=bool)
        green[np.argsort(draw, kind="stable")[: self.green_tokens]] = True
        return torch.from_numpy(green)

    def prefer(self, logits_V: Tensor, before: int) -> Tensor:
        """The logits with `bias` added to the green ones."""
        return logits_V + self.bias * self.green_V(before).to(logits_V.dtype)

    def find(self, tokens: Sequence[int]) -> Found:
        """The one-sided test over a text's tokens; the paper's z of equation 3, and an exact p-value."""
        from scipy.stats import binom

        pairs = set(itertools.pairwise(tokens))
        green = sum(bool(self.green_V(before)[token]) for before, token in pairs)
        n, share = len(pairs), self.green_tokens / VOCABULARY
        if n == 0:
            return Found(0, 0, 0.0, 1.0)
        z = (green - share * n) / math.sqrt(n * share * (1 - share))
        return Found(n, green, z, float(binom.sf(green - 1, n, share)))


def read_key(path: str) -> bytes:
    """The secret in a file, without line ends. Raises ConfigError where it is missing or too short."""
    try:
        key = Path(path).read_bytes().strip(b"\r\n")
    except OSError as error:
        raise ConfigError(
            [
                f"watermark.key_file={path}: cannot be read ({error.strerror}); "
                "make one with `head -c 32 /dev/urandom | base64 > key`"
            ]
        ) from None
    if not MIN_KEY_BYTES <= len(key) <= 64:
        raise ConfigError(
            [
                f"watermark.key_file={path}: has {len(key)} bytes, {MIN_KEY_BYTES} to 64 are needed; "
                "make one with `head -c 32 /dev/urandom | base64 > key`"
            ]
        )
    return key
