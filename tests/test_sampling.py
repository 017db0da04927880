"""Which token comes next: top-k, top-p, temperature and the penalty of repetition, and draws by their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_models import TINY, lively, one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import VOCABULARY
from gpt2train.errors import NonFiniteError
from gpt2train.generation.sampling import GREEDY as GREEDILY
from gpt2train.generation.sampling import Sampling, _drawn, kept_tokens, next_token, next_tokens, penalize_repetition

transformers = pytest.importorskip("transformers", reason="transformers is the reference")


def logit_rows() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 8.0):
        yield torch.randn(4, 1000, generator=generator) * spread
    yield torch.randint(0, 5, (4, 50), generator=generator).float()  # many ties
    yield torch.tensor([[0.0, -torch.inf, 3.0, -torch.inf]])


def theirs_keep(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """The logits as transformers' two filters leave them."""
    if k:
        logits = transformers.TopKLogitsWarper(k)(None, logits.clone())
    return transformers.TopPLogitsWarper(p)(None, logits.clone()) if p < 1 else logits


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("k", [0, 1, 2, 40, 999, 1000, 5000])
def test_top_k_and_top_p_are_those_of_transformers(k: int, p: float) -> None:
    for logits in logit_rows():
        for row, expected in zip(logits, theirs_keep(logits, k, p).isfinite(), strict=True):
            ids = kept_tokens(row.numpy(), k, p)
            kept = torch.ones(row.numel(), dtype=torch.bool)
            if ids is not None:
                assert (np.diff(ids) > 0).all()
                kept = torch.zeros_like(kept).index_fill(0, torch.from_numpy(ids), True)
            kept &= row.isfinite()  # a logit of -inf has no probability, kept or not
            # Among logits equal to the last kept, theirs is a matter of the sort; here all stay.
            least = row[expected].min()
            assert torch.equal(kept, row >= least)
            assert torch.equal(kept & (row > least), expected & (row > least))


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 20.0])
def test_the_nucleus_of_a_whole_vocabulary(spread: float) -> None:
    """From one token to most of them: the first look at the largest suffices, or does not, or all are sorted."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * spread
    descending, order = logits.double().sort(descending=True)
    sums = descending.softmax(-1).cumsum(-1)
    for p in (0.05, 0.5, 0.9, 0.95, 0.999):
        expected = order[: int((sums < p).sum()) + 1].sort().values
        ids = kept_tokens(logits.numpy(), 0, p)
        assert ids is not None
        # Two sums in another order may differ on the one token with which p is reached.
        assert len(set(ids.tolist()) ^ set(expected.tolist())) <= 1
        assert set(ids.tolist()) == set(expected.tolist()) or (sums - p).abs().min() < 1e-6


def plainly(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities that tokens are to be drawn with: transformers' filters and a softmax, in float64."""
    kept = theirs_keep(logits[None] / sampling.temperature, sampling.top_k, sampling.top_p)
    return kept[0].double().softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7, top_k=4, top_p=0.97),
        Sampling(temperature=1.7, top_k=12),
        Sampling(temperature=0.8, top_p=0.8),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5
    expected, draws = plainly(logits, sampling).numpy(), 20_000
    generator = torch.Generator().manual_seed(5)
    found = np.bincount([next_token(logits, sampling, [], generator) for _ in range(draws)], minlength=30)
    assert (found[expected == 0] == 0).all()
    often = expected * draws >= 5
    rare = ~often & (expected > 0)
    observed, wanted = [*found[often], found[rare].sum()], [*expected[often] * draws, expected[rare].sum() * draws]
    if not rare.any():
        observed, wanted = observed[:-1], wanted[:-1]
    # The seed is fixed, so this passes always or never; a draw that favors a token by a tenth fails it.
    assert chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=40), Sampling(top_p=0.9)])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(sampling: Sampling) -> None:
    """Over GPT-2's vocabulary: the token at which the plain distribution's sum passes the generator's number."""
    ours, same = torch.Generator().manual_seed(11), torch.Generator().manual_seed(11)
    for seed in range(20):
        logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
        sums = plainly(logits, sampling).cumsum(-1)
        uniform = torch.rand((), dtype=torch.float64, generator=same)
        token = next_token(logits, sampling, [], ours)
        before = sums[token - 1] if token else torch.tensor(0.0)
        assert before - 1e-6 <= uniform <= sums[token] + 1e-6
        assert sums[token] > before


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDILY,
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(top_k=1),
        Sampling(temperature=0.8, top_k=40),
        Sampling(temperature=1.2, top_p=0.9),
        Sampling(temperature=0.7, top_k=60, top_p=0.95),
        Sampling(top_k=10**6, top_p=1e-9),
    ],
)
def test_all_rows_at_once_get_what_each_gets_alone(sampling: Sampling) -> None:
    draw = torch.Generator().manual_seed(17)
    for spread, V in ((3.0, 700), (0.01, 3_000), (8.0, 500)):
        logits = torch.randn(64, V, generator=draw) * spread
        logits[1] = logits[1].round()  # many equal ones, at the edge of what is kept as well
        logits[2, 5:] = -1e30
        logits[3] = 0.0
        generators = [torch.Generator().manual_seed(row) for row in range(64)]
        uniforms = torch.tensor([torch.rand((), dtype=torch.float64, generator=g) for g in generators])
        alone = [next_token(row, sampling, [], torch.Generator().manual_seed(seed)) for seed, row in enumerate(logits)]
        assert next_tokens(logits, sampling, uniforms).tolist() == alone
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    edge = torch.tensor([[-3e38, 0.0, -3e38, 1.0, -3e38]] * 2)
    chosen = next_tokens(edge, sampling, ends).tolist()
    assert chosen == ([3, 3] if sampling.top_k == 1 or sampling.top_p < 0.5 or not sampling.temperature else [1, 3])
    wrong = torch.tensor([[0.0, math.nan], [math.inf, 0.0], [1.0, 2.0]])
    assert next_tokens(wrong, sampling, torch.full((3,), 0.9, dtype=torch.float64)).tolist() == [-1, -1, 1]


def test_a_draw_takes_no_token_without_probability() -> None:
    """At both ends of the interval, with tokens there whose probability is 0."""
    logits = np.array([-np.inf, 0.0, -1e30, 1.0, -np.inf], dtype=np.float32)
    assert _drawn(logits, 0.0) == 1
    assert _drawn(logits, math.nextafter(1.0, 0.0)) == 3


def test_a_small_temperature_does_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([3.0, 3.5, -80.0])
    for temperature in (1e-38, 1e-300):
        assert {next_token(logits, Sampling(temperature=temperature), [], generator) for _ in range(9)} == {1}


def test_a_diverged_model_is_named() -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteError, match="logits are not finite; choose an earlier checkpoint"):
            next_token(torch.tensor([0.0, wrong, -wrong, 1.0]), GREEDILY, [], torch.Generator())
    assert next_token(torch.tensor([3e38, 3.1e38, -1.0]), GREEDILY, [], torch.Generator()) == 1  # large is not wrong


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    for logits in logit_rows():
        said = torch.randint(0, logits.shape[1], (1, 30), generator=torch.Generator().manual_seed(2))
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(said, logits[:1].clone())
        assert torch.equal(penalize_repetition(logits[0], said[0].tolist(), penalty), expected[0])
