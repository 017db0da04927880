"""Loss over size: the numbers of each run, laws that are found where there are some, and a page that shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from omegaconf import OmegaConf

from gpt2train.charts import thinned
from gpt2train.config import ModelConfig, TrainConfig
from gpt2train.errors import ConfigError
from gpt2train.model import GPT
from gpt2train.planning.law import HUBER_DELTA, Point, fit, hold_out, rate_rule
from gpt2train.planning.runs import body_parameter_count, summary
from gpt2train.planning.sweep import summarize
from gpt2train.planning.trials import at_rates, grid, size_axis, specs

SIZES = {"a": (2, 64), "b": (4, 128), "c": (6, 256), "d": (8, 384), "e": (12, 768)}


def make_run(
    folder: Path, layers: int, channels: int, loss: float, *, steps: int = 100, done: int = 100, lr: float = 6e-4
) -> Path:
    """A run whose step losses scatter by ±0.5 around `loss` and whose validation loss is `loss`."""
    folder.mkdir(parents=True)
    model = ModelConfig(folder.name, layers=layers, channels=channels, heads=4)
    run = TrainConfig(model=model, steps=steps, run_dir=str(folder))
    run.optimizer.lr = lr
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(run)))
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(1, done + 1):
            noise = 0.5 if step % 2 else -0.5
            line = {"step": step, "loss": loss + noise, "tokens": step * 1000, "tokens_per_s": 500.0 + step}
            f.write(json.dumps(line) + "\n")
            if step % 50 == 0:
                f.write(json.dumps({"step": step, "validation_loss": loss}) + "\n")
        f.write('{"step": 9999, "lo')  # a kill cut the last line short
    return folder


def test_a_run_in_numbers(tmp_path: Path) -> None:
    run = summary(make_run(tmp_path / "a", 2, 64, 4.0, steps=200, done=100), "a")
    model = GPT(ModelConfig(layers=2, channels=64, heads=4, pad_vocabulary_to=1))
    assert run.parameters == sum(p.numel() for p in model.parameters())
    embeddings = model.wte.weight.numel() + model.wpe.weight.numel()
    assert run.body_parameters == run.parameters - embeddings == body_parameter_count(model.config)
    assert (run.steps_done, run.steps, run.finished, run.tokens) == (100, 200, False, 100_000)
    assert run.flops == (6 * run.parameters + 12 * 2 * 64 * 1024) * 100_000
    assert run.validation_loss == 4.0
    assert run.train_loss == pytest.approx(3.9), "steps 96 to 100: two above, three below"
    assert run.tokens_per_s == 550.5
    assert run.curve[0] == (1000.0, 4.5)


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 2, 64, 4.0, done=0)
    (folder / "metrics.jsonl").unlink()
    run = summary(folder, "a")
    assert (run.steps_done, run.tokens, run.train_loss, run.validation_loss) == (0, 0, None, None)
    assert not run.finished


TRUE = {"E": 1.7, "A": 60.0, "alpha": 0.3, "B": 400.0, "beta": 0.35}


def loss_of(n: float, d: float) -> float:
    return TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]


def points(sizes: tuple[float, ...], tokens: tuple[float, ...], noise: float = 0.0) -> list[Point]:
    generator = np.random.default_rng(0)
    return [
        Point(f"{n:g}-{d:g}", n, d, loss_of(n, d) * math.exp(noise * generator.standard_normal()))
        for n in sizes
        for d in tokens
    ]


SMALL, TOKENS = (1e5, 3e5, 1e6, 3e6, 1e7), (1e7, 3e7, 1e8)


def test_a_law_of_size_and_tokens_is_found_again() -> None:
    found = fit(points(SMALL, TOKENS), resamples=0)
    assert found is not None
    for name, value in TRUE.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02), name
    assert found.loss(1.5e9, 3e10) == pytest.approx(loss_of(1.5e9, 3e10), rel=2e-3)


def test_one_run_far_off_does_not_bend_the_law() -> None:
    """What Huber's loss is for: least squares would follow it."""
    seen = points(SMALL, TOKENS)
    spoilt = [*seen[:4], Point("bad", seen[4].parameters, seen[4].tokens, seen[4].loss * 1.2), *seen[5:]]
    found = fit(spoilt, resamples=0)
    assert found is not None
    others = [abs(found.loss(p.parameters, p.tokens) / p.loss - 1) for p in seen]
    assert max(others) < 20 * HUBER_DELTA


def test_a_law_of_size_alone() -> None:
    seen = [Point(str(n), n, 1e8, 1.7 + 60 / n**0.3) for n in SMALL]
    found = fit(seen, resamples=0)
    assert found is not None
    assert (found.B, found.E, found.alpha) == (0.0, pytest.approx(1.7, rel=0.02), pytest.approx(0.3, rel=0.02))


def test_the_interval_holds_what_comes_and_narrows_with_the_noise() -> None:
    widths = []
    for noise in (0.002, 0.02):
        found = fit(points(SMALL, TOKENS, noise), resamples=24)
        assert found is not None
        interval = found.interval(1e8, 1e9)
        assert interval is not None
        widths.append(interval[1] - interval[0])
        low, high = interval
        assert low - 0.05 < loss_of(1e8, 1e9) < high + 0.05
        assert set(found.intervals()) == set(TRUE)
    assert widths[0] < widths[1]


def test_no_law_is_made_up() -> None:
    assert fit(points(SMALL[:2], TOKENS)) is None, "two sizes"
    assert fit(points(SMALL, TOKENS[:2])) is None, "two amounts of tokens say nothing of how tokens count"
    assert fit([Point(str(n), n, 1e8, 3 + n / 1e7) for n in SMALL], resamples=0) is None, "the loss grows"
    assert fit([*points(SMALL[:2], TOKENS[:1]), Point("no", 1e6, TOKENS[0], math.nan)]) is None, "the third diverged"


def test_the_largest_size_is_held_out() -> None:
    law, held = hold_out(points((*SMALL, 4e7), TOKENS))
    assert law is not None
    assert {h.name.split("-")[0] for h in held} == {"4e+07"}
    assert len(held) == 3
    assert max(abs(h.miss) for h in held) < 0.002
    spoilt = [*points(SMALL, TOKENS), Point("largest", 4e7, 1e8, 1.1 * loss_of(4e7, 1e8))]
    assert hold_out(spoilt)[1][0].miss == pytest.approx(1 / 1.1 - 1, abs=2e-3), "forecast ÷ measured - 1"


def test_the_learning_rate_rule() -> None:
    """Losses are parabolas over log lr with their lowest point at 3 / sqrt(N)."""
    sizes, rates = (1e4, 1e5, 1e6), (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
    trials = [(n, r, 3 + math.log(r / (3 / math.sqrt(n))) ** 2) for n in sizes for r in rates]
    found = rate_rule(trials)
    assert found is not None
    assert (found.c, found.p) == (pytest.approx(3.0, rel=1e-3), pytest.approx(-0.5, abs=1e-4))
    assert found.at_edge == []
    assert found.rate(1e8) == 0.0003
    narrow = rate_rule([t for t in trials if t[1] > 0.003])
    assert narrow is not None
    assert narrow.at_edge == [1e6], "its best, 0.003, lies outside"
    assert rate_rule([(1e4, 0.001, 3.0), (1e5, 0.001, 2.9)]) is None, "one rate each: nothing was tried"
    diverged = rate_rule([(1e4, 0.001, 3.0), (1e4, 0.002, 2.9), (1e4, 0.004, math.nan)])
    assert diverged is not None
    assert diverged.best == {1e4: 0.002}


def test_one_rate_for_all_widths() -> None:
    """What µP promises: the geometric mean of the best rates, whatever a slope through them would say."""
    trials = [
        (n, r, abs(math.log(r / best))) for n, best in ((1e4, 0.002), (1e6, 0.008)) for r in (0.002, 0.004, 0.008)
    ]
    found = rate_rule(trials, constant=True)
    assert found is not None
    assert (found.rate(1e4), found.rate(1e9), found.p) == (0.004, 0.004, 0.0)
    sloped = rate_rule(trials)
    assert sloped is not None
    assert sloped.rate(1e4) == 0.002


def test_runs_of_another_parametrization_are_of_another_kind(tmp_path: Path) -> None:
    runs = []
    for base in (0, 64):
        folder = make_run(tmp_path / str(base), 2, 64, 4.0)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("mup_base: 0", f"mup_base: {base}"))
        runs.append(summary(folder, str(base)))
    assert [run.mup for run in runs] == [False, True]
    assert [run.kind for run in runs] == ["gpt2, data", "gpt2, data, µP from 64 channels"]


def test_trials_of_a_ladder() -> None:
    axis, faults = size_axis(["2x32x2", "4x128"])
    assert not faults
    assert axis[1] == ("4x128", ["model.name=4x128", "model.layers=4", "model.channels=128", "model.heads=2"])
    axes = [axis, [("steps=20", ["steps=20"]), ("steps=10", ["steps=10"])], [("seed=1", ["seed=1"])]]
    assert [s.name for s in specs(axes)] == ["2x32x2_steps=20", "2x32x2_steps=10", "4x128_steps=20", "4x128_steps=10"]
    tried = grid(axes, [0.001, 0.002], ["2x32x2"])
    assert [s.name for s in tried] == ["2x32x2_steps=10_optimizer.lr=0.001", "2x32x2_steps=10_optimizer.lr=0.002"]
    last = at_rates(axes, [0.002, 0.002, 0.001, 0.001])
    assert last[1].name == tried[1].name, "a rate that comes up again is not trained twice"
    assert last[1].overrides == tried[1].overrides
    assert size_axis(["4x", "0x64", "4x64x2x2"])[1] == [
        f"sizes=[{s}]: must be LAYERSxCHANNELS or LAYERSxCHANNELSxHEADS; give sizes=[4x128,6x192]"
        for s in ("4x", "0x64", "4x64x2x2")
    ]


def test_the_table_the_file_the_page_and_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2train.planning.law.RESAMPLES", 20)
    folders = []
    for name, (layers, channels) in SIZES.items():
        n = body_parameter_count(ModelConfig(layers=layers, channels=channels))
        for steps in (50, 100, 200):
            done = 60 if (name, steps) == ("e", 100) else steps
            loss = loss_of(n, steps * 1000)
            folders.append(make_run(tmp_path / f"{name}{steps}", layers, channels, loss, steps=steps, done=done))
        for lr in (3e-4, 1.2e-3):
            worse = loss_of(n, 50_000) + 1
            folders.append(make_run(tmp_path / f"{name}-{lr}", layers, channels, worse, steps=50, done=50, lr=lr))
    out = tmp_path / "out <b>"
    assert summarize(folders[::-1], out, models={"full": ModelConfig("full", 48, 1600, 25)}) == 0
    content = json.loads((out / "scaling.json").read_text())
    (law,) = content["laws"].values()
    assert len(content["runs"]) == 25
    assert sum(not run["finished"] for run in content["runs"]) == 1
    assert len(law["points"]) == 14, "the best learning rate of each size and amount; e100 is unfinished"
    assert law["largest_miss"] < 0.03
    assert {h["name"] for h in law["held_out"]} == {"e50", "e200"}
    assert law["learning_rate"]["best"].values()
    assert law["forecasts"][0]["parameters"] == 1_557_611_200
    told = capsys.readouterr().out
    assert "held out e200: forecast" in told
    assert "unfinished" in told
    assert "N: parameters without embeddings; best of N = " in told
    page = (out / "sweep.html").read_text()
    assert page.count("<svg") == 5
    assert "<b>" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    picture = matplotlib.image.imread(out / "scaling.png")
    assert picture.shape[1] > 1000


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / x / "run", 2, 64, 4.0, done=done) for x, done in (("x", 100), ("y", 10))]
    summarize(folders, tmp_path)
    names = [run["name"] for run in json.loads((tmp_path / "scaling.json").read_text())["runs"]]
    assert sorted(names) == sorted(str(folder) for folder in folders)
    (law,) = json.loads((tmp_path / "scaling.json").read_text())["laws"].values()
    assert law["law"] is None


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must name at least one run folder"):
        summarize([], tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        summarize([tmp_path], tmp_path)


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    thin = thinned([*points, (5.0, math.nan), (6.0, math.inf)], 100)
    assert len(thin) == 100
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]))
    assert thinned(points[:50], 100) == points[:50]
