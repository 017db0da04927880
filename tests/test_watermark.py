"""The watermark: green lists that need the key, a preference while sampling, a test with a p-value that holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tiny_models import TINY, lively, one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import VOCABULARY
from gpt2train.errors import ConfigError
from gpt2train.generation.decoding import Decoding
from gpt2train.generation.sampling import Sampling
from gpt2train.generation.watermark import Watermark, read_key

KEY = b"0123456789abcdef"


def written(watermark: Watermark | None, tokens: int = 120, seeds: range = range(3)) -> list[list[int]]:
    model = lively(TINY)
    with torch.no_grad():
        model.wte.weight.mul_(0.3)  # logits about as spread as those of a trained model
    rows = Decoding(model, [[1, 2]] * len(seeds), Sampling(watermark=watermark), seeds=seeds, max_new_tokens=tokens)
    texts: list[list[int]] = [[] for _ in seeds]
    for row, token in rows:
        texts[row].append(token)
    return texts


@pytest.fixture(scope="module")
def marked() -> list[list[int]]:
    return written(Watermark(KEY, bias=4.0))


def test_a_green_list_is_a_share_of_the_vocabulary_that_the_key_and_the_token_before_choose() -> None:
    watermark = Watermark(KEY)
    lists = torch.stack([watermark.green_V(t) for t in range(40)])
    assert lists.sum(1).tolist() == [watermark.green_tokens] * 40 == [round(VOCABULARY / 4)] * 40
    assert torch.equal(lists[7], Watermark(KEY).green_V(7))
    other = torch.stack([Watermark(KEY[::-1]).green_V(t) for t in range(40)])
    for a, b in ((lists[1:], lists[:-1]), (lists, other)):  # as two independent quarters have in common
        assert abs((a & b).float().mean().item() - 1 / 16) < 0.002
    # Each token is green after a quarter of the tokens, not always the same ones.
    assert lists.float().mean(0).std().item() == pytest.approx((0.25 * 0.75 / 40) ** 0.5, rel=0.05)


def test_green_lists_stay_what_they_are() -> None:
    """A text that is marked today has to be found in years: first green tokens after token 15,496 under a known key."""
    green = torch.nonzero(Watermark(KEY).green_V(15_496))[:, 0]
    assert green[:12].tolist() == [1, 10, 11, 20, 26, 27, 41, 54, 57, 58, 62, 63]


def test_a_marked_text_is_found_and_others_are_not(marked: list[list[int]]) -> None:
    watermark = Watermark(KEY, bias=4.0)
    for text in marked:
        found = watermark.find(text)
        assert found.z > 6
        assert found.p_value < 1e-9
        assert Watermark(b"another key, as long").find(text).p_value > 1e-4
    plain = written(None)
    assert all(abs(watermark.find(text).z) < 4 for text in plain)
    assert all(watermark.find(text).p_value > 1e-4 for text in plain)


def test_half_of_a_text_is_enough(marked: list[list[int]]) -> None:
    """Every second span of ten tokens replaced by others."""
    watermark, generator = Watermark(KEY, bias=4.0), np.random.default_rng(0)
    for text in marked:
        changed = [token if (i // 10) % 2 else int(generator.integers(VOCABULARY)) for i, token in enumerate(text)]
        assert watermark.find(changed).p_value < 1e-4


def test_the_p_value_is_that_of_the_binomial_test_and_holds_on_unmarked_texts() -> None:
    watermark, generator = Watermark(KEY), np.random.default_rng(1)
    p_values = []
    for _ in range(200):
        found = watermark.find(generator.integers(50, size=40).tolist())
        share = watermark.green_tokens / VOCABULARY
        assert found.p_value == pytest.approx(binomtest(found.green, found.scored, share, "greater").pvalue)
        p_values.append(found.p_value)
    # At most a share p of unmarked texts has a p-value below p; three standard deviations of leave.
    for p in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= p) <= p + 3 * (p * (1 - p) / 200) ** 0.5


def test_a_repeated_pair_counts_once() -> None:
    found = Watermark(KEY).find([5, 6] * 100)
    assert found.scored == 2
    assert Watermark(KEY).find([]) == Watermark(KEY).find([5])
    assert Watermark(KEY).find([5]).p_value == 1


def test_a_bias_of_nothing_changes_nothing() -> None:
    assert written(Watermark(KEY, bias=0.0), 20) == written(None, 20)


def test_a_key_comes_from_a_file_and_shows_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    assert read_key(str(path)) == KEY
    assert KEY.decode() not in repr(Watermark(read_key(str(path))))
    path.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match=r"has 5 bytes, 16 to 64 are needed"):
        read_key(str(path))
    with pytest.raises(ConfigError, match=r"nowhere: cannot be read .*make one with"):
        read_key(str(tmp_path / "nowhere"))
