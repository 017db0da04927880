"""Loss over size: the numbers of each run, and a law that is found where there is one and not made up where not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.optimize
from omegaconf import OmegaConf

from gpt2train.charts import thinned
from gpt2train.config import ConfigError, ModelConfig, TrainConfig
from gpt2train.model import GPT
from gpt2train.scaling import RunSummary, body_parameter_count, fit, summarize, summary

SIZES = {"a": (2, 64), "b": (4, 128), "c": (6, 256), "d": (8, 384), "e": (12, 768)}


def make_run(folder: Path, layers: int, channels: int, loss: float, *, steps: int = 100, done: int = 100) -> Path:
    """A run whose step losses scatter by ±0.5 around `loss` and whose validation loss is `loss`."""
    folder.mkdir(parents=True)
    model = ModelConfig(folder.name, layers=layers, channels=channels, heads=4)
    run = TrainConfig(model=model, steps=steps, run_dir=str(folder))
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


def law(E: float, A: float, a: float, n: float) -> float:
    return E + A / n**a


def run_of(name: str, n: int, loss: float | None, *, done: int = 10) -> RunSummary:
    return RunSummary(name, 2 * n, n, done, 10, 1000, 1e9, loss, loss, 10.0, [])


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


@pytest.mark.parametrize(("E", "A", "a"), [(1.7, 400.0, 0.34), (0.0, 20.0, 0.076), (2.5, 3e4, 1.0)])
def test_a_law_is_found_again(E: float, A: float, a: float) -> None:
    runs = [run_of(f"r{n}", n, law(E, A, a, n)) for n in (10**5, 10**6, 10**7, 10**8)]
    found = fit(runs)
    assert found is not None
    assert found.a == pytest.approx(a, rel=1e-3)
    assert found.loss(1e9) == pytest.approx(law(E, A, a, 1e9), abs=1e-4)
    assert max(map(abs, found.residuals.values())) < 1e-5
    assert max(map(abs, found.left_out_errors.values())) < 1e-3


def test_the_fit_is_the_least_squares_of_scipy() -> None:
    sizes = np.array([1e5, 5e5, 2e6, 1e7, 6e7])
    losses = law(1.9, 60, 0.3, sizes) + np.array([0.02, -0.015, 0.01, -0.02, 0.012])
    found = fit([run_of(f"{n:g}", int(n), float(loss)) for n, loss in zip(sizes, losses, strict=True)])
    (E, A, a), _ = scipy.optimize.curve_fit(
        lambda n, E, A, a: E + A / n**a, sizes, losses, p0=(2, 50, 0.3), maxfev=20_000, xtol=1e-12, ftol=1e-12
    )
    assert found is not None
    assert (found.E, found.A, found.a) == pytest.approx((E, A, a), rel=1e-4)
    residuals = losses - (E + A / sizes**a)
    assert list(found.residuals.values()) == pytest.approx(residuals.tolist(), abs=1e-6)
    assert found.left_out_errors.keys() == found.residuals.keys()
    assert all(abs(found.left_out_errors[name]) > abs(found.residuals[name]) for name in found.residuals)


def test_a_poor_fit_shows_in_its_residuals() -> None:
    """A straight fall over log N, which would pass through 0, is no such law."""
    found = fit([run_of(f"r{i}", 10**i, 9.0 - i) for i in (5, 6, 7, 8)])
    assert found is not None
    assert found.E == 0
    assert max(map(abs, found.residuals.values())) > 0.1


def test_no_law_is_made_up() -> None:
    three = [run_of(f"r{n}", n, law(1, 9, 0.2, n)) for n in (10**5, 10**6, 10**7)]
    assert fit(three) is not None
    assert fit(three[:2]) is None, "two sizes"
    assert fit([*three[:2], run_of("same", 10**6, 2.0)]) is None, "three runs of two sizes"
    assert fit([*three[:2], replace(three[2], steps_done=9)]) is None, "the third is unfinished"
    assert fit([*three[:2], run_of("no", 10**7, None)]) is None, "the third was never evaluated"
    assert fit([*three[:2], run_of("no", 10**7, math.nan)]) is None, "the third diverged"
    assert fit([run_of(f"r{n}", n, 3 + n / 1e7) for n in (10**5, 10**6, 10**7)]) is None, "the loss grows"


def test_the_table_the_file_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, (layers, channels) in SIZES.items():
        n = body_parameter_count(ModelConfig(layers=layers, channels=channels))
        done = 60 if name == "e" else 100
        folders.append(make_run(tmp_path / name, layers, channels, law(2.0, 60.0, 0.3, n), done=done))
    assert summarize(folders[::-1], tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [run["name"] for run in content["runs"]] == list(SIZES), "by size"
    assert [run["finished"] for run in content["runs"]] == [True] * 4 + [False]
    assert content["law"]["points"] == 4
    assert content["law"]["a"] == pytest.approx(0.3, rel=1e-3)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "124,439,808" in lines["e"]
    assert "60 of 100" in lines["e"]
    assert lines["e"].rstrip().endswith("unfinished")
    assert "unfinished" not in lines["a"]
    assert lines["L(N)"].startswith("L(N) = 2.0000 + 60 / N^0.3000 over 4 runs")
    picture = matplotlib.image.imread(tmp_path / "out" / "scaling.png")
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50


def test_three_runs_leave_nothing_to_judge_the_law_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / n, *SIZES[n], loss) for n, loss in (("a", 4.0), ("b", 3.2), ("c", 2.9))]
    summarize(folders, tmp_path)
    assert "nothing left to tell how well it holds" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / x / "run", 2, 64, 4.0, done=done) for x, done in (("x", 100), ("y", 10))]
    summarize(folders, tmp_path)
    names = [run["name"] for run in json.loads((tmp_path / "scaling.json").read_text())["runs"]]
    assert names == [str(folder) for folder in folders]


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
