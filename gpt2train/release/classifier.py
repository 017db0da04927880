"""Texts of two kinds → what tells them apart: words and pairs of words, and a model's scores, by logistic regression.

Flows in: texts and their scores by a model. Flows out: a probability for each text. Features are the words and pairs of
words, hashed into 2¹⁵ places, weighted by tf-idf and brought to one length, as in the baseline that OpenAI published
with GPT-2's samples (openai/gpt-2-output-dataset, detection.md), and beside them the scores, standardized. The file is
an .npz of arrays alone: nothing in it is unpickled.
"""

from __future__ import annotations

import itertools
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags

from gpt2train.errors import ConfigError, write_error

PLACES = 1 << 15
WORDS_LENGTH = 12.0
"""Length of a text's words beside scores of spread 1, so that the penalty does not leave all to the scores: with 100
texts and two scores without meaning the area under the curve was .58 at length 1, .84 at 6, .92 at 12."""
PENALTY = 1.0
"""Of the squared weights, beside the sum of the texts' losses."""
VERSION = 1
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Classifier:
    """`places` + `scores` weights and what standardizes the scores."""

    rarity: np.ndarray
    """Inverse document frequency of each place."""
    weights: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    bias: float

    def probabilities(self, texts: Sequence[str], scores: np.ndarray) -> np.ndarray:
        """float64 [texts]: how probably each was generated. `scores` is [texts, scores]."""
        words = _counts(texts) @ diags(self.rarity)
        standard = (scores - self.mean) / self.spread
        logits = _scaled(words) @ self.weights[:PLACES] + standard @ self.weights[PLACES:] + self.bias
        return 1 / (1 + np.exp(-logits))

    def save(self, path: str) -> None:
        """Raises StorageError where there is no room, GPT2TrainError where it cannot be written."""
        try:
            with open(path, "wb") as file:
                np.savez_compressed(
                    file, version=VERSION, rarity=self.rarity, weights=self.weights, mean=self.mean,
                    spread=self.spread, bias=self.bias,
                )  # fmt: skip
        except OSError as error:
            raise write_error(f"classifier={path}", error) from error


def load(path: str) -> Classifier:
    """Raises ConfigError for a file that is no classifier of this version."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        fits = int(found["version"]) == VERSION and found["rarity"].shape == (PLACES,)
        fits = fits and found["weights"].shape == (PLACES + len(found["mean"]),)
        if not fits or found["mean"].shape != found["spread"].shape:
            raise ValueError("another version or shape")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise ConfigError(
            [f"classifier={path}: is no classifier of this version ({error}); make it anew with pairs=…"]
        ) from None
    return Classifier(found["rarity"], found["weights"], found["mean"], found["spread"], float(found["bias"]))


def train(texts: Sequence[str], scores: np.ndarray, generated: Sequence[bool]) -> Classifier:
    """The classifier of least logistic loss and penalty; the same texts give the same one."""
    counts = _counts(texts)
    rarity = np.log((1 + len(texts)) / (1 + np.bincount(counts.indices, minlength=PLACES))) + 1
    words = _scaled(counts @ diags(rarity))
    mean, spread = scores.mean(0), np.maximum(scores.std(0), 1e-9)
    standard = (scores - mean) / spread
    sign = np.where(np.asarray(generated, bool), 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (words @ w[:PLACES] + standard @ w[PLACES:-1] + w[-1])
        pull = -sign / (1 + np.exp(np.clip(margin, -500, 500)))
        gradient = np.concatenate([words.T @ pull, standard.T @ pull, [pull.sum()]])
        value = np.logaddexp(0, -margin).sum() + PENALTY / 2 * (w[:-1] @ w[:-1])
        gradient[:-1] += PENALTY * w[:-1]
        return float(value), gradient

    found = minimize(loss, np.zeros(PLACES + scores.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return Classifier(rarity, found[:-1], mean, spread, float(found[-1]))


def held_out(texts: Sequence[str], scores: np.ndarray, generated: Sequence[bool], groups: Sequence[int], folds: int,
             seed: int) -> np.ndarray:  # fmt: skip
    """Each text's probability by a classifier that saw none of its group: `folds` parts are held out in turn."""
    labels, of_group = np.asarray(generated, bool), np.asarray(groups)
    shuffled = np.random.default_rng(seed).permutation(np.unique(of_group))
    probabilities = np.empty(len(texts))
    for part in np.array_split(shuffled, folds):
        out = np.isin(of_group, part)
        known = train([t for t, o in zip(texts, out, strict=True) if not o], scores[~out], labels[~out].tolist())
        probabilities[out] = known.probabilities([t for t, o in zip(texts, out, strict=True) if o], scores[out])
    return probabilities


def _counts(texts: Sequence[str]) -> csr_matrix:
    """[texts, PLACES]: one plus the logarithm of how often each word and pair of words stands in each text."""
    rows, places = [], []
    for row, text in enumerate(texts):
        words = _WORD.findall(text.lower())
        for term in (*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))):
            rows.append(row)
            places.append(zlib.crc32(term.encode("utf-8", "replace")) % PLACES)
    counts = csr_matrix((np.ones(len(rows)), (rows, places)), shape=(len(texts), PLACES))
    counts.sum_duplicates()
    counts.data = 1 + np.log(counts.data)
    return counts


def _scaled(rows: csr_matrix) -> csr_matrix:
    """Each text's words brought to `WORDS_LENGTH`."""
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    return diags(WORDS_LENGTH / np.maximum(norms, 1e-12)) @ rows
