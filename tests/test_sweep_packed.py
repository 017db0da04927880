"""Several trials at a time: each with its share of the machine, none left behind, stopped and gone on with together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from launching import alive

from launch import packed
from launch.config import REQUEUE_EXIT_CODE, ConfigError, Gpus, LaunchConfig, Launcher
from launch.packed import Share, run_packed, share_faults, shares
from launch.sweep import Trial, exit_code, sweep

CORES = len(os.sched_getaffinity(0))
two_cores = pytest.mark.skipif(CORES < 2, reason="trials at a time need a core each, and this machine has one")

# A trial that tells where it runs, waits until `together` of them are there, and does what its name says.
TRIAL = """
import json, os, pathlib, signal, sys, time
folder, what, together = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
told = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, f: told.append(n))
seen = {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}
seen |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
folder.mkdir(exist_ok=True)
(folder / "part").write_text(json.dumps(seen))
(folder / "part").rename(folder / "seen")
print("here I am", flush=True)
while len(list(folder.parent.glob("*/seen"))) < together:
    time.sleep(0.01)
if what == "fail":
    sys.exit(9)
while what == "wait" and not (folder / "mended").exists():
    if told:
        (folder / "saved").touch()
        sys.exit(85)
    time.sleep(0.02)
(folder / "done").touch()
"""


def make_trials(folder: Path, together: int, **what: str) -> list[Trial]:
    (folder / "trial.py").write_text(TRIAL)
    return [
        Trial(name, [sys.executable, str(folder / "trial.py"), str(folder / name), kind, str(together)], folder / name)
        for name, kind in what.items()
    ]


def seen(folder: Path) -> dict[str, object]:
    return json.loads((folder / "seen").read_text())


@two_cores
def test_two_at_a_time_each_on_its_cores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """None of the first two ends before both are there: they run at once; what fails stops nobody."""
    trials = make_trials(tmp_path, 2, a="run", b="fail", c="run")
    config = LaunchConfig(processes=1, gpus=Gpus.none)
    results = sweep(trials, config, parallel=2)
    assert [(r.name, r.exit_code) for r in results] == [("a", 0), ("b", 9), ("c", 0)]
    assert exit_code(results) == 9
    one, other = (set(seen(tmp_path / name)["cores"]) for name in "ab")  # type: ignore[call-overload]
    assert one.isdisjoint(other)
    assert one | other == os.sched_getaffinity(0)
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(one))
    assert seen(tmp_path / "a")["OMP_NUM_THREADS"] == threads
    out, err = capfd.readouterr()
    assert sorted(line for line in out.splitlines() if line.endswith("here I am")) == [f"{n}: here I am" for n in "abc"]
    assert "sweep: 3 of 3: c\n" in err
    assert err.endswith("sweep: b: failed (9)\n")


SWEEP = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from test_sweep_packed import make_trials
from launch.config import Gpus, LaunchConfig
from launch.sweep import exit_code, sweep
trials = make_trials(pathlib.Path(sys.argv[1]), 2, a="wait", b="wait", c="run")
sys.exit(exit_code(sweep(trials, LaunchConfig(processes=1, gpus=Gpus.none), parallel=2)))
"""


@two_cores
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_sweep_leaves_nobody_and_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    words = [sys.executable, "-c", SWEEP, str(tmp_path), str(Path(__file__).parent)]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + 60
    while not all((tmp_path / name / "seen").exists() for name in "ab"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    first.send_signal(how)
    first.communicate(timeout=60)
    assert first.returncode == (REQUEUE_EXIT_CODE if how is signal.SIGTERM else -how)
    for name in "ab":
        pid = seen(tmp_path / name)["pid"]
        assert isinstance(pid, int)
        while alive(pid):
            assert time.monotonic() < deadline_s, "left behind"
            time.sleep(0.02)
        assert (tmp_path / name / "saved").exists() == (how is signal.SIGTERM)
        (tmp_path / name / "mended").touch()
    assert not (tmp_path / "c").exists(), "not begun"
    again = subprocess.run(words, capture_output=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert all((tmp_path / name / "done").exists() for name in "abc")


def test_gpus_and_cores_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 8, 9, 10})
    assert shares(2, 0, {}) == [Share(frozenset({0, 1, 2}), None), Share(frozenset({3, 8, 9, 10}), None)]
    assert [s.gpus for s in shares(3, 8, {})] == [("0", "1"), ("2", "3"), ("4", "5")]
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a, 5,3,-1,2"}
    assert [s.gpus for s in shares(3, 3, visible)] == [("GPU-a",), ("5",), ("3",)]


def test_what_cannot_be_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packed, "count_cores", lambda: 4)
    assert share_faults(LaunchConfig(launcher=Launcher.slurm), 1, 0) == []
    assert share_faults(LaunchConfig(), 4, 4) == []
    for config, parallel, gpus, beginning in (
        (LaunchConfig(), 0, 0, "parallel=0: must be at least 1"),
        (LaunchConfig(), 5, 0, "parallel=5: each trial needs a core and 4 may be used; give parallel=4"),
        (LaunchConfig(processes=3), 3, 8, "parallel=3: 3 GPUs each are more than the 8 here; give parallel=2"),
        (LaunchConfig(launcher=Launcher.slurm), 2, 0, "parallel=2: packs trials on this machine"),
        (LaunchConfig(port=29500), 2, 0, "port=29500: trials at once"),
        (LaunchConfig(log_dir="x"), 2, 0, "log_dir=x: trials at once"),
    ):
        (fault,) = share_faults(config, parallel, gpus)
        assert fault.startswith(beginning)
    with pytest.raises(ConfigError, match="parallel=5"):
        sweep(make_trials(tmp_path, 1, a="run"), LaunchConfig(gpus=Gpus.none), parallel=5)
    assert not (tmp_path / "a").exists()


@two_cores
def test_a_dry_run_tells_of_the_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LaunchConfig(processes=1, gpus=Gpus.none, dry_run=True)
    assert exit_code(sweep(make_trials(tmp_path, 1, a="run", b="run"), config, parallel=2)) == 0
    out = capsys.readouterr().out
    assert out.count("trial.py") == out.count(f"# 2 at a time, on {CORES // 2} cores") == 2
    assert out.count(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS') or CORES // 2} ") == 2
    assert not (tmp_path / "a").exists()


def test_a_command_that_a_signal_killed() -> None:
    part = Share(frozenset(os.sched_getaffinity(0)), None)
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    asks = [sys.executable, "-c", "raise SystemExit(85)"]
    told: list[str] = []
    ends = run_packed([("a", kill), ("b", asks), ("c", kill)], [part], deque(), say=told.append)
    assert [code for code, _ in ends] == [137, REQUEUE_EXIT_CODE, REQUEUE_EXIT_CODE]
    assert told == ["1 of 3: a", "2 of 3: b"], "one that saved because it was told to: nothing more is begun"
