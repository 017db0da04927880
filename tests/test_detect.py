"""Detection: scores against transformers and plain formulas, ROC curves, a classifier, the watermark, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from places import SHARED
from safetensors.torch import save_file
from scipy.stats import mannwhitneyu
from tiny_models import TINY, lively, one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import END_OF_TEXT
from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.errors import ConfigError
from gpt2train.generation.decoding import Decoding
from gpt2train.generation.sampling import Sampling
from gpt2train.generation.watermark import Watermark
from gpt2train.release import classifier
from gpt2train.release.config import DetectConfig
from gpt2train.release.detect import detect, read_pairs
from gpt2train.release.export import _write_json
from gpt2train.release.hf import hf_config, to_hf_state
from gpt2train.release.scores import SCORES, read_tokens, roc

transformers = pytest.importorskip("transformers", reason="transformers is the reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    _write_json(path / "config.json", hf_config(TINY))
    save_file(to_hf_state(lively(TINY).state_dict(), TINY), path / "model.safetensors")
    return path


def sampled(texts: int, tokens: int = 60) -> list[list[int]]:
    prompts = [[END_OF_TEXT]] * texts
    rows = Decoding(lively(TINY), prompts, Sampling(), seeds=range(texts), max_new_tokens=tokens)
    found: list[list[int]] = [[] for _ in prompts]
    for row, token in rows:
        found[row].append(token)
    return found


def test_scores_are_those_of_plain_formulas_over_transformers_logits(folder: Path) -> None:
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.randint(50_000, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        log_p = theirs(torch.tensor([[END_OF_TEXT, *ids]])).logits[0, :-1].double().log_softmax(-1)
    chosen = log_p[range(50), ids]
    ranks = (log_p > chosen[:, None]).sum(1) + 1
    mean = (log_p.exp() * log_p).sum(1)
    variance = (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(1)
    got = read_tokens(lively(TINY), ids)
    assert np.allclose(got.log_probability, chosen, atol=1e-4)
    assert (np.abs(got.rank - ranks.numpy()) <= 2).all()  # ties of neighbors in another rounding
    assert np.allclose(got.expected, mean, atol=1e-4)
    assert np.allclose(got.variance, variance, rtol=1e-3, atol=1e-4)
    expected = {
        "log_likelihood": chosen.mean().item(),
        "log_rank": -ranks.double().log().mean().item(),
        "curvature": ((chosen - mean).sum() / variance.sum().sqrt()).item(),
    }
    assert got.scores() == pytest.approx(expected, rel=1e-3)
    assert sum(got.bins()) == pytest.approx(1)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_every_token_of_a_long_text_is_read_once_with_half_a_context_at_least(length: int) -> None:
    model = lively(TINY)
    ids = torch.randint(50_000, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    got = read_tokens(model, ids)
    assert len(got.rank) == len(got.variance) == length
    stream = [END_OF_TEXT, *ids]
    for i in {*range(min(length, 5)), *(i for i in (62, 63, 64, 65, 100, 199) if i < length)}:
        # Against the windows that end with the token.
        choices = []
        for start in range(max(0, i + 1 - 64), max(i + 1 - 31, 1)):
            with torch.no_grad():
                log_p = model(torch.tensor([stream[start : i + 1]]))[0, -1].log_softmax(-1)
            choices.append(log_p[ids[i]].item())
        assert any(got.log_probability[i] == pytest.approx(c, abs=1e-3) for c in choices), i


def test_curvature_tells_a_models_own_text() -> None:
    """Drawn from the model itself the score is standard normal: that is what it was made for."""
    model = lively(TINY)
    own = [read_tokens(model, ids).scores()["curvature"] for ids in sampled(24)]
    generator = torch.Generator().manual_seed(5)
    other = [
        read_tokens(model, torch.randint(50_000, (60,), generator=generator).tolist()).scores()["curvature"]
        for _ in range(24)
    ]
    assert abs(np.mean(own)) < 3 / 24**0.5
    assert roc([*own, *other], [True] * 24 + [False] * 24)["auc"] == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_mann_whitneys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    positive, negative = generator.integers(0, 8, 40) + seed / 2, generator.integers(0, 8, 60)
    expected = mannwhitneyu(positive, negative).statistic / 40 / 60
    got = roc([*positive, *negative], [True] * 40 + [False] * 60)
    assert got["auc"] == pytest.approx(expected)


def test_the_rate_at_one_percent_is_a_plain_count() -> None:
    negative = list(range(200))  # two of them may lie above
    got = roc([196.5, 197.5, 198.5, 500, *negative], [True] * 4 + [False] * 200)
    assert got["found_at_1_percent"] == 0.75
    few = roc([49, 49.5, *range(50)], [True, True] + [False] * 50)  # none of fifty may
    assert few["found_at_1_percent"] == 0.5


# ── the classifier ──────────────────────────────────────────────────────────────────────────────────────────────────


def corpus(seed: int, texts: int = 60) -> tuple[list[str], np.ndarray, list[bool]]:
    """Texts whose kinds differ in how often some words come; scores that tell nothing."""
    generator = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(300)]
    tilt = np.ones(300)
    tilt[:30] = 3.0
    kinds = [i % 2 == 0 for i in range(texts)]
    made = [
        " ".join(
            generator.choice(words, 80, p=(tilt if kind else np.ones(300)) / (tilt if kind else np.ones(300)).sum())
        )
        for kind in kinds
    ]
    return made, generator.normal(size=(texts, 2)), kinds


def test_the_classifier_learns_what_differs_and_says_so_of_new_texts() -> None:
    texts, scores, kinds = corpus(0, 100)
    known = classifier.train(texts, scores, kinds)
    new, new_scores, new_kinds = corpus(1)
    assert roc(known.probabilities(new, new_scores).tolist(), new_kinds)["auc"] > 0.9


def test_held_out_texts_are_judged_by_strangers() -> None:
    """Labels without a meaning: a classifier that saw the texts would know them all by heart."""
    texts, scores, _ = corpus(2, 80)
    generator = np.random.default_rng(0)
    labels = [bool(x) for x in generator.permutation([True, False] * 40)]
    groups = list(range(80))
    held = classifier.held_out(texts, scores, labels, groups, 5, 0)
    assert 0.2 < roc(held.tolist(), labels)["auc"] < 0.8
    assert roc(classifier.train(texts, scores, labels).probabilities(texts, scores).tolist(), labels)["auc"] > 0.99


def test_a_classifier_is_kept_in_a_file_without_pickle(tmp_path: Path) -> None:
    texts, scores, kinds = corpus(0)
    known = classifier.train(texts, scores, kinds)
    known.save(str(tmp_path / "c.npz"))
    again = classifier.load(str(tmp_path / "c.npz"))
    assert np.array_equal(again.probabilities(texts, scores), known.probabilities(texts, scores))
    content = (tmp_path / "c.npz").read_bytes()
    for broken in (b"", content[: len(content) // 2], b"\x80\x04N.", json.dumps({"a": 1}).encode()):
        (tmp_path / "b.npz").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"is no classifier of this version .*; make it anew with pairs="):
            classifier.load(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "o.npz", version=1, rarity=np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match="is no classifier"):
        classifier.load(str(tmp_path / "o.npz"))


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_alone_are_told_to_be_no_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect(DetectConfig(run=str(folder), text="The rain in Spain.")) == 0
    said = capsys.readouterr().err
    assert "alone they are no verdict" in said
    assert "pairs=known.json classifier=detector.npz" in said


def test_known_texts_are_measured_and_a_new_one_judged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer()
    generated = [tokenizer.decode(ids) for ids in sampled(12)]
    people = [
        f"The {i}th of many quite ordinary sentences about the weather in town number {i * 7}." for i in range(12)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps({"original": people, "sampled": generated}))
    kept = tmp_path / "c.npz"
    assert detect(DetectConfig(run=str(folder), pairs=str(tmp_path / "pairs.json"), classifier=str(kept), folds=3)) == 0
    said = capsys.readouterr()
    rows = {line.split("  ")[1].strip(): re.findall(r"[\d.]+", line) for line in said.out.split("\n") if "%" in line}
    assert set(rows) >= {*SCORES, "classifier, held out"}
    assert float(rows["curvature"][0]) > 0.7  # read again, a text may have other tokens than it was drawn with
    assert "12 texts by people, 12 generated" in said.out
    marked = Watermark(b"0123456789abcdef", bias=5.0)
    (tmp_path / "key").write_bytes(marked.key)
    rows_of = Decoding(lively(TINY), [[END_OF_TEXT]], Sampling(watermark=marked), seeds=[0], max_new_tokens=120)
    text = tokenizer.decode([token for _, token in rows_of])
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in (text, people[0], "a <b>tag</b> 日本"))
    )
    config = DetectConfig(
        run=str(folder), texts=str(tmp_path / "t.jsonl"), classifier=str(kept), html=str(tmp_path / "p" / "page.html")
    )
    config.watermark.key_file = str(tmp_path / "key")
    assert detect(config) == 0
    said = capsys.readouterr()
    assert "no verdict" not in said.err
    lines = [line for line in said.out.split("\n") if "%" in line]
    assert len(lines) == 3
    p_values = [float(line.split()[-2]) for line in lines]
    assert p_values[0] < 1e-6 < p_values[1]
    assert float(lines[0].split()[-1].rstrip("%")) > 50 > float(lines[1].split()[-1].rstrip("%"))
    page = (tmp_path / "p" / "page.html").read_text()
    assert "&lt;" in page
    assert "<b>" not in page
    shown = re.sub(r"<[^>]*>", "", page[page.rindex('<p class="text">') : page.rindex("</p>")])
    assert shown == "a &lt;b&gt;tag&lt;/b&gt; 日本"
    assert len(re.findall(r'title="rank [\d,]+, probability', page)) > 50


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "text, texts, pairs: none given; give one of them"),
        ({"text": "a", "texts": "b"}, "text, texts given; give one of them\n.*texts=b: there is no such file"),
        ({"text": "a", "classifier": "no.npz"}, "classifier=no.npz: there is no such file; make it with pairs="),
        ({"text": "a", "folds": 1}, "folds=1: must be at least 2"),
    ],
)
def test_wrong_settings_are_named(folder: Path, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        detect(DetectConfig(run=str(folder), **options))  # type: ignore[arg-type]


def test_a_file_of_another_form_is_refused(folder: Path, tmp_path: Path) -> None:
    for content in ('{"original": ["a"], "sampled": []}', "[]", "x", '{"original": [1, 2], "sampled": ["a", "b"]}'):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(ConfigError, match=r"expected .*original.*sampled"):
            detect(DetectConfig(run=str(folder), pairs=str(tmp_path / "p.json")))
    (tmp_path / "t.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(ConfigError, match=r"expected .*text"):
        detect(DetectConfig(run=str(folder), texts=str(tmp_path / "t.jsonl")))


def test_texts_of_gpt2_xl_are_told_from_those_of_people() -> None:
    """300 pairs of real texts: words alone, each judged by classifiers that saw neither text of its pair."""
    path = SHARED / "detect" / "squad_gpt2-xl.raw_data.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    people, generated = read_pairs(path)
    none = np.zeros((600, 1))
    held = classifier.held_out(people + generated, none, [False] * 300 + [True] * 300, [*range(300)] * 2, 5, 0)
    measured = roc(held.tolist(), [False] * 300 + [True] * 300)
    assert measured["auc"] > 0.70, measured  # .749 when it was written
