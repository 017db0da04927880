"""A sweep: trials in order, each resumable; a failing one stops nobody, a signal stops all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.config import REQUEUE_EXIT_CODE, ConfigError, Gpus, LaunchConfig
from launch.sweep import Trial, TrialResult, exit_code, sweep

CONFIG = LaunchConfig(processes=1, gpus=Gpus.none)

# A trial of three steps that remembers how far it came; the second argument is what happens at its second step.
TRIAL = """
import os, pathlib, signal, sys, time
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(exist_ok=True)
told = []
signal.signal(signal.SIGTERM, lambda *a: told.append(1))
steps = folder / "steps"
for step in range(int(steps.read_text()) if steps.exists() else 0, 3):
    if step == 1 and what == "fail" and not (folder / "mended").exists():
        sys.exit(9)
    while step == 1 and what == "wait" and not (folder / "mended").exists():
        (folder / "waiting").touch()
        if told:
            sys.exit(85)
        time.sleep(0.02)
    with open(folder / "done", "a") as f:
        f.write(f"{step}\\n")
    steps.write_text(str(step + 1))
"""


def make_trials(folder: Path, **what: str) -> list[Trial]:
    (folder / "trial.py").write_text(TRIAL)
    return [
        Trial(name, [sys.executable, str(folder / "trial.py"), str(folder / name), kind], folder / name)
        for name, kind in what.items()
    ]


def steps(folder: Path) -> list[str]:
    return (folder / "done").read_text().split()


def test_a_failing_trial_stops_nobody_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trials = make_trials(tmp_path, a="run", b="fail", c="run")
    results = sweep(trials, CONFIG)
    assert [(r.name, r.exit_code) for r in results] == [("a", 0), ("b", 9), ("c", 0)]
    assert all(r.seconds > 0 for r in results)
    assert exit_code(results) == 9
    assert steps(tmp_path / "c") == ["0", "1", "2"]
    assert capfd.readouterr().err.endswith("sweep: b: failed (9)\n")
    # Started again: what is finished does nothing more, what failed goes on where it was.
    (tmp_path / "b" / "mended").touch()
    results = sweep(trials, CONFIG)
    assert exit_code(results) == 0
    for name in "abc":
        assert steps(tmp_path / name) == ["0", "1", "2"]


SWEEP = """
import pathlib, sys
from launch.config import Gpus, LaunchConfig
from launch.sweep import Trial, exit_code, sweep
folder = pathlib.Path(sys.argv[1])
trials = [
    Trial(name, [sys.executable, str(folder / "trial.py"), str(folder / name), kind], folder / name)
    for name, kind in (("a", "run"), ("b", "wait"), ("c", "run"))
]
results = sweep(trials, LaunchConfig(processes=1, gpus=Gpus.none))
print([(r.name, r.exit_code) for r in results], flush=True)
sys.exit(exit_code(results))
"""


def test_a_signal_stops_the_sweep_and_it_goes_on_later(tmp_path: Path) -> None:
    make_trials(tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "b" / "waiting").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == REQUEUE_EXIT_CODE, err
    assert "[('a', 0), ('b', 85), ('c', 85)]" in out
    assert not (tmp_path / "c").exists(), "not begun"
    assert err.endswith("sweep: stopped with 1 of 3 trials ended; the same command goes on\n")
    (tmp_path / "b" / "mended").touch()
    again = subprocess.run([sys.executable, "-c", SWEEP, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "c" / "done").exists()


def test_a_signal_between_two_trials_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a launch, whose own handlers are put back by then."""

    for code, told in ((0, 0), (130, REQUEUE_EXIT_CODE)):  # 130: of a trial that the signal killed

        def launch(config: LaunchConfig, command: list[str], run_dir: Path, *, code: int = code) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return code

        monkeypatch.setattr("launch.sweep.launch", launch)
        before = signal.getsignal(signal.SIGTERM)
        results = sweep(make_trials(tmp_path, a="run", b="run"), CONFIG)
        assert [r.exit_code for r in results] == [told, REQUEUE_EXIT_CODE]
        assert signal.getsignal(signal.SIGTERM) is before


def test_trials_that_would_share_a_folder_or_a_name(tmp_path: Path) -> None:
    a, b = make_trials(tmp_path, a="run", b="run")
    with pytest.raises(ConfigError) as caught:
        sweep([a, b, Trial("b", ["x"], a.run_dir)], CONFIG)
    assert [f.split(" occurs")[0] for f in caught.value.faults] == ["trials: name b", f"trials: run_dir {a.run_dir}"]
    assert not a.run_dir.exists()


def test_a_dry_run_prints_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LaunchConfig(processes=1, gpus=Gpus.none, dry_run=True)
    results = sweep(make_trials(tmp_path, a="run", b="run"), config)
    assert exit_code(results) == 0
    assert capsys.readouterr().out.count("trial.py") == 2
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("codes", "whole"), [([0, 0], 0), ([0, 3, 9], 3), ([3, 85], 85), ([], 0)])
def test_the_exit_code_of_a_sweep(codes: list[int], whole: int) -> None:
    assert exit_code([TrialResult(str(i), c, 1.0) for i, c in enumerate(codes)]) == whole
