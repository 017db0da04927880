"""Slurm: the script, what it does with signals and exit codes, and a real cluster on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from launching import HARMLESS, RANK, freeze, nobody_left, processes_in
from training import TINY, read_metrics, write_tokens, written_steps

from gpt2train.cli import main
from launch import slurm
from launch.config import ConfigError, Gpus, LaunchConfig, Launcher, Over, SlurmConfig, Starter, check
from launch.run import launch, rank_count
from launch.slurm import Job, render
from launch.words import from_words

CPU = LaunchConfig(launcher=Launcher.slurm, gpus=Gpus.none, processes=1)


def script(config: LaunchConfig, *jobs: Job, folder: Path = Path("/srv/a run")) -> str:
    return render(config, jobs, name="a run", output=folder / "slurm-%j.out", directory=Path("/work"))


def headers(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def check_shell(text: str, folder: Path) -> None:
    path = folder / "checked.sbatch"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--severity=style", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


NASTY = [
    "a b",
    "$(touch bad)",
    "`touch bad`",
    "it's",
    'say "so"',
    "back\\slash",
    "*",
    "--log",
    "ü",
    "",
    "a\nb",
    "!x",
    "$HOME",
]


@pytest.mark.parametrize("count", [1, 3])
def test_every_word_reaches_the_launch_as_it_is(tmp_path: Path, count: int) -> None:
    jobs = [
        Job(f"trial {n} $(touch bad)\nx", [*NASTY, str(n)], tmp_path / "it's $(touch bad)" / str(n))
        for n in range(count)
    ]
    config = LaunchConfig(
        launcher=Launcher.slurm, gpus=Gpus.none, processes=2, prefix=["x y"], restarts=7, starter=Starter.torchrun
    )
    text = script(config, *jobs)
    check_shell(text, tmp_path)
    # As bash sees it, up to where the launch would start.
    for number in range(count):
        shown = text.partition('"${launch[@]}" &')[0] + 'printf "%s\\0" "${launch[@]}"\n'
        done = subprocess.run(
            ["bash", "-c", shown],
            capture_output=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
        )
        words = done.stdout.decode().split("\0")[:-1]
        end = words.index("--")
        assert words[end + 1 :] == [*NASTY, str(number)]
        assert words[:4] == [
            sys.executable,
            "-I",
            str(Path(slurm.__file__).with_name("__main__.py")),
            str(jobs[number].run_dir),
        ]
        inside = from_words(words[4:end])
        assert (inside.launcher, inside.hosts.over, inside.processes) == (Launcher.hosts, Over.srun, 2)
        assert (inside.restarts, inside.starter, inside.prefix) == (7, Starter.torchrun, ["x y"])
        assert inside.slurm == SlurmConfig()
    assert not list(tmp_path.rglob("bad"))


def test_options_of_the_job(tmp_path: Path) -> None:
    config = LaunchConfig(
        launcher=Launcher.slurm,
        processes=8,
        slurm=SlurmConfig(
            nodes=4,
            partition="gpu",
            account="lab-1",
            qos="long",
            time="2-12:00:00",
            memory="0",
            exclusive=True,
            constraint="h100&ib",
            warning_s=600,
            options=["--mail-type=END,FAIL", "--reservation=night"],
            setup=["module load cuda/12.6", '. "$HOME/venv/bin/activate"'],
        ),
    )
    assert check(config) == []
    assert rank_count(config) == 32
    text = script(config, Job("r", ["x"], tmp_path))
    check_shell(text.replace('. "$HOME', '# shellcheck source=/dev/null\n. "$HOME'), tmp_path)
    found = headers(text)
    assert found == {
        "job-name": "a_run",
        "chdir": "/work",
        "output": '"/srv/a run/slurm-%j.out"',
        "open-mode": "append",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "mem": "0",
        "time": "2-12:00:00",
        "partition": "gpu",
        "account": "lab-1",
        "qos": "long",
        "constraint": "h100&ib",
        "signal": "B:USR1@600",
        "exclusive": "",
        "requeue": "",
        "mail-type": "END,FAIL",
        "reservation": "night",
    }
    assert text.index("module load cuda/12.6\n") < text.index("launch=(")
    alone = headers(script(CPU, Job("r", ["x"], tmp_path)))
    assert alone["cpus-per-task"] == "1"
    assert not {"gpus-per-node", "mem", "time", "partition", "exclusive", "array"} & set(alone)
    config.slurm.requeue = False
    text = script(config, Job("r", ["x"], tmp_path))
    assert "no-requeue" in headers(text)
    assert "signal" not in headers(text)
    assert "scontrol" not in text
    config.slurm.array_limit = 4
    assert headers(script(config, *[Job(str(n), ["x"], tmp_path) for n in range(12)]))["array"] == "0-11%4"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"nodes": 0}, "slurm.nodes=0: must be 1 or more"),
        ({"time": "tomorrow"}, "slurm.time=tomorrow: not of Slurm's form"),
        ({"memory": "lots"}, "slurm.memory=lots: not of Slurm's form"),
        ({"cpus_per_node": -1}, "slurm.cpus_per_node=-1: must be 0 or more"),
        ({"array_limit": -1}, "slurm.array_limit=-1: must be 0"),
        ({"warning_s": 70_000}, "slurm.warning_s=70000: must lie in 0..65535"),
        ({"time": "4", "warning_s": 300}, "slurm.time=4: ends before slurm.warning_s=300"),
        ({"partition": "a b"}, "slurm.partition=a b: holds a character"),
        ({"account": "x\n#SBATCH --uid=0"}, "slurm.account=x"),
        ({"options": ["night"]}, "slurm.options=night: must be one option"),
        ({"options": ["--a=1\nrm -rf x"]}, "slurm.options=--a=1"),
        ({"setup": ["a\nb"]}, "slurm.setup='a\\nb': one line each"),
    ],
)
def test_settings_of_a_job_that_cannot_be(given: dict[str, Any], fault: str) -> None:
    faults = check(LaunchConfig(launcher=Launcher.slurm, gpus=Gpus.none, slurm=SlurmConfig(**given)))
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_gpus_of_a_node_have_to_be_said() -> None:
    (fault,) = check(LaunchConfig(launcher=Launcher.slurm))
    assert fault == "processes=0: this machine cannot count a node's GPUs; give the number, such as processes=8"


def test_a_path_that_slurm_cannot_take_is_told(tmp_path: Path) -> None:
    for name in ('a "b"', "a\\b", "a\nb"):
        with pytest.raises(ConfigError, match="Slurm takes no"):
            launch(CPU, ["x"], tmp_path / name)
        assert not (tmp_path / name).exists()


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not here; submit where it is, or give dry_run=true"):
        launch(CPU, ["x"], tmp_path / "run")
    assert launch(LaunchConfig(launcher=Launcher.slurm, gpus=Gpus.none, dry_run=True), ["x"], tmp_path / "run") == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=run\n")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_an_array_job_and_a_summary_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "it's $(touch bad)"
    given = ["launcher=slurm", "dry_run=true", "slurm.partition=p", "slurm.array_limit=2", f"out={out}", "steps=10"]
    assert main(["sweep", *given, "device=cpu", "data=tokens", "model=nano,micro", "optimizer.lr=1e-3,2e-3"]) == 0
    first, second = capsys.readouterr().out.split(
        "# ------ and a second script, summary.sbatch, which waits for that job:\n"
    )
    for text in (first, second):
        check_shell(text, tmp_path)
    assert headers(first)["array"] == "0-3%2"
    assert headers(second)["partition"] == headers(first)["partition"] == "p"
    printed = (
        "case $SLURM_ARRAY_TASK_ID in" + first.partition("case $SLURM_ARRAY_TASK_ID in")[2].partition("launch=(")[0]
    )
    folders = set()
    for number in range(4):
        done = subprocess.run(
            ["bash", "-c", printed + 'printf "%s\\0" "${trial[@]}"'],
            env={"SLURM_ARRAY_TASK_ID": str(number)},
            capture_output=True,
            check=True,
        )
        words = done.stdout.decode().split("\0")
        folders.add(Path(words[0]))
        assert words[words.index("--") + 1 :][:4] == [sys.executable, "-m", "gpt2train", "train"]
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {out}
    last = second.partition("command=(")[2]
    assert "summary_only=true" in last
    assert "launcher" not in last, "it runs where it is"
    assert "dry_run" not in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checked.sbatch"]


def test_what_is_wrong_with_job_and_training_is_told_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["launcher=slurm", "processes=2", "slurm.nodes=2", "slurm.time=soon", "slurm.partitoin=p", "device=cpu"]
    assert main(["launch", *given, "data=none", f"run_dir={tmp_path / 'run'}", "steps=1", "batch.sequences=6"]) == 2
    err = capsys.readouterr().err
    assert "slurm.time=soon: not of Slurm's form" in err
    assert "slurm.partitoin=p: there is no such setting; did you mean slurm.partition?" in err
    given = ["launcher=hosts", f"hosts.file={tmp_path / 'none'}", "device=cpu"]
    assert main(["launch", *given, f"run_dir={tmp_path / 'run'}", "steps=0"]) == 2
    err = capsys.readouterr().err
    assert "none: No such file or directory; give a file with one host a line" in err
    assert "steps=0" in err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ the script, without a Slurm

STAND_IN = """#!/bin/bash
case "$(basename "$0")" in
  srun) while [ "${1#-}" != "$1" ]; do shift; done; exec "$@";;
  squeue) cat state;;
  scontrol) if [ "$1" = requeue ]; then echo "$2" >>requeued; elif [ "$2" = hostnames ]; then echo n1; echo n2; fi;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with stand-ins for Slurm's programs; when the test is over no process may be left that stands in it."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "squeue", "scontrol"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    yield tmp_path
    left = processes_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"


def start_script(place: Path, what: str, *, tasks: int = 1) -> subprocess.Popen[str]:
    """The job, or the last task of an array, which has the number of the whole array."""
    config = LaunchConfig(launcher=Launcher.slurm, gpus=Gpus.none, processes=1, restarts=0)
    command = [sys.executable, str(place / "rank.py"), what, str(place / "notes"), *HARMLESS]
    jobs = [Job("r", command, place / "run")] * tasks
    text = render(config, jobs, name="r", output=place / "out", directory=place)
    (place / "job.sbatch").write_text(text)
    environment = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-2]"}
    if tasks > 1:
        environment |= {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": str(tasks - 1)}
    return subprocess.Popen(
        ["bash", "job.sbatch"], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ranks_seen(place: Path, job: subprocess.Popen[str]) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + 60
    while len(found := sorted((place / "notes").glob("rank ?"))) < 2:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline_s, "the ranks did not start"
        time.sleep(0.02)
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.parametrize(
    ("state", "number", "requeued"),
    [("RUNNING", signal.SIGUSR1, True), ("RUNNING", signal.SIGTERM, True), ("COMPLETING", signal.SIGTERM, False)],
)
def test_what_is_told_to_stop_goes_back_into_the_queue(
    place: Path, state: str, number: signal.Signals, requeued: bool
) -> None:
    """The time limit comes near; and a job that was canceled, or that Slurm requeues itself, is left alone."""
    (place / "state").write_text(state)
    job = start_script(place, "wait")
    seen = ranks_seen(place, job)
    assert [(s["RANK"], s["WORLD_SIZE"], s["MASTER_ADDR"]) for s in seen] == [("0", "2", "n1"), ("1", "2", "n1")]
    assert all(s["arguments"] == HARMLESS for s in seen)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 85, err
    assert (place / "requeued").exists() is requeued
    if requeued:
        assert (place / "requeued").read_text() == "42\n"
    for rank in (0, 1):
        assert (place / "run" / "logs" / f"rank_{rank}.log").read_text().endswith(f"saved after {number.name}\n")
    assert nobody_left(place, 5)


def test_a_task_of_an_array_goes_back_alone(place: Path) -> None:
    (place / "state").write_text("RUNNING")
    job = start_script(place, "wait", tasks=3)
    ranks_seen(place, job)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 85, err
    assert (place / "requeued").read_text() == "42_2\n"


@pytest.mark.parametrize(("what", "code"), [("quick", 0), ("all:2", 2)])
def test_a_job_that_ends_by_itself_stays_ended(place: Path, what: str, code: int) -> None:
    (place / "state").write_text("RUNNING")
    job = start_script(place, what)
    _, err = job.communicate(timeout=60)
    assert job.returncode == code, err
    assert not (place / "requeued").exists()
    assert ("the cause of it" in err) is (code == 2)


# ------------------------------------------------------------------------------------------------------- a real cluster

# A trial that counts to four, a step at a time, and saves when it is told to; the first time it waits to be told.
TRIAL = """
import json, os, pathlib, signal, sys, time
folder, waits = pathlib.Path(sys.argv[1]), sys.argv[2] == "wait"
told = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, f: told.append(signal.Signals(n).name))
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
for step in range(done + 1, 5):
    while waits and step == 3 and done == 0:
        if told:
            (folder / "told").write_text(told[0])
            sys.exit(85)
        time.sleep(0.05)
    with open(metrics, "a") as f:
        f.write(json.dumps({"step": step, "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}) + "\\n")
print("counted to four", flush=True)
"""

# What a sweep's last job does, in short: look at what all trials have reached.
COUNT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "count").write_text(str([len(p.read_text().splitlines()) for p in folder.glob("t */metrics.jsonl")]))
"""

STEPS = 60
SETTINGS = {**TINY, "checkpoint.every_steps": 10, "evaluate.every_steps": 0, "distributed.timeout_s": 120}
SUBMIT = """
import json, pathlib, sys
from launch import slurm
from launch.config import Gpus, LaunchConfig, Launcher, SlurmConfig
what = json.loads(sys.argv[1])
config = LaunchConfig(launcher=Launcher.slurm, gpus=Gpus.none, processes=1, slurm=SlurmConfig(**what["slurm"]))
folder = pathlib.Path(what["folder"])
jobs = [
    slurm.Job(name, [sys.executable, what["program"], str(folder / name), *more], folder / name)
    for name, *more in what["trials"]
]
for job in jobs:
    job.run_dir.mkdir(parents=True)
sys.exit(slurm.submit(config, jobs, name=folder.name, folder=folder / "logs", afterward=what["afterward"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_slurm(tmp_path: Path) -> None:
    """One cluster session: training on two nodes, preempted, requeued and resumed to the losses of an undisturbed run;
    beside it, on a third node, a job at its time limit, an array of trials and a job that is canceled."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    place = tmp_path / "it's $(touch bad) 100%"
    place.mkdir()
    tokens = write_tokens(place / "tokens")
    (tmp_path / "trial.py").write_text(TRIAL)
    run_dir, undisturbed = place / "a run", place / "undisturbed"

    def words(launcher: str, folder: Path, *more: str) -> list[str]:
        settings = [f"{k}={v}" for k, v in SETTINGS.items()]
        given = [f"launcher={launcher}", "restarts=0", f"data={tokens}", f"run_dir={folder}", f"steps={STEPS}"]
        return [sys.executable, "-m", "gpt2train", "launch", *given, *more, *settings]

    with slurm_cluster.cluster(tmp_path / "slurm") as cluster:

        def submit(name: str, trials: list[list[str]], **options: Any) -> str:
            what = {
                "slurm": {"partition": "quiet", **options},
                "folder": str(place / name),
                "trials": trials,
                "program": str(tmp_path / "trial.py"),
                "afterward": [sys.executable, "-c", COUNT, str(place / name)] if len(trials) > 1 else [],
            }
            done = cluster.run([sys.executable, "-c", SUBMIT, json.dumps(what)], cwd=place)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        done = cluster.run(words("slurm", run_dir, "slurm.nodes=2", "processes=1"), cwd=place)
        assert done.returncode == 0, done.stderr
        training = done.stdout.strip()
        # Slurm looks at time limits every half minute: a warning of 55 s before the end of one minute comes soon.
        limited = submit("limited", [["t", "wait"]], time="1", warning_s=55)
        canceled = submit("canceled", [["t", "wait"]])
        until(cluster, lambda: (place / "canceled" / "t" / "metrics.jsonl").exists(), "the job that is to be canceled")
        cluster.run(["scancel", canceled])
        array = submit("array", [["t 0", "go"], ["t 1", "go"], ["t 2", "wait"]], array_limit=1)

        # Training is under way on both nodes: something more urgent comes.
        until(cluster, lambda: written_steps(run_dir) >= 13, "13 steps of training")
        freeze(run_dir, 2)  # until Slurm sends SIGCONT and SIGTERM (slurm.conf(5), GraceTime)
        assert written_steps(run_dir) < STEPS
        urgent = cluster.run(
            ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"]
        )
        assert urgent.returncode == 0, urgent.stderr
        until(cluster, lambda: cluster.state(urgent.stdout.strip()).startswith("COMPLETED"), "the urgent job")
        local = subprocess.Popen(
            words("local", undisturbed, "processes=2"),
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as on the cluster: sums depend on the number of threads
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            assert cluster.wait(training, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED 0", output(run_dir)
        finally:
            printed = local.communicate(timeout=300)[0]
        assert local.returncode == 0, printed
        said = output(run_dir)
        assert "saved and stopped; the job is RUNNING" in said
        assert "goes on from" in said
        assert "got SIGTERM: the ranks of all hosts are told to save and stop" in said
        losses = read_metrics(run_dir)[0]
        assert losses == read_metrics(undisturbed)[0]
        assert len(losses) == STEPS

        # The time limit: told by SIGUSR1, requeued, and gone on where it was.
        assert cluster.wait(limited, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED 0"
        assert (place / "limited" / "t" / "told").read_text() == "SIGUSR1"
        lines = [json.loads(line) for line in (place / "limited" / "t" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["restart"] for line in lines] == ["0", "0", "1", "1"]

        # The array: every trial is done, in a folder and with a log of its own. Its last task, whose number is that of
        # the whole array, is told to stop and comes back alone.
        last = place / "array" / "t 2"
        until(cluster, lambda: (last / "metrics.jsonl").exists(), "the last task of the array")
        cluster.run(["scancel", "--signal=USR1", "--batch", f"{array}_2"])
        for number in range(3):
            cluster.wait(f"{array}_{number}", "COMPLETED", "GONE")
            folder = place / "array" / f"t {number}"
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [line["restart"] for line in lines] == (["0", "0", "1", "1"] if number == 2 else ["0"] * 4)
            assert "counted to four" in (folder / "logs" / "rank_0.log").read_text()
        assert len(list((place / "array" / "logs").glob(f"slurm-{array}_?.out"))) == 3
        until(cluster, lambda: (place / "array" / "count").exists(), "the job behind the array")
        assert (place / "array" / "count").read_text() == "[4, 4, 4]", "it waits for all trials"

        # What was canceled has saved, and does not come back.
        assert cluster.wait(canceled, "CANCELLED", "GONE", "COMPLETED", "PENDING") in ("CANCELLED", "GONE")
        assert (place / "canceled" / "t" / "told").read_text() == "SIGTERM"
        assert "the job is RUNNING" not in output(place / "canceled" / "t", place / "canceled" / "logs")
    assert not list(tmp_path.rglob("bad"))


def output(run_dir: Path, folder: Path | None = None) -> str:
    """All that a job has said."""
    return "\n".join(
        path.read_text(errors="replace") for path in sorted((folder or run_dir / "logs").glob("slurm-*.out"))
    )


def until(cluster: slurm_cluster.Cluster, done: Any, what: str, timeout_s: float = 240) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline_s, f"{what} did not come:\n{cluster.logs()}"
        time.sleep(0.1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_sweep_of_real_runs_by_slurm(tmp_path: Path) -> None:
    """Four runs as an array job, two at a time on two nodes; everything is preempted again and again. The curves are
    those of the same sweep on this machine, and the table is there."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    tokens = write_tokens(tmp_path / "tokens")
    settings = [f"{key}={value}" for key, value in {**SETTINGS, "checkpoint.every_steps": 7}.items()]
    settings = [s for s in settings if not s.startswith(("model.channels", "optimizer.lr="))]
    axes = ["model.channels=16,32", "optimizer.lr=1e-3,2e-3"]

    def words(out: Path, *more: str) -> list[str]:
        given = [f"data={tokens}", f"out={out}", "steps=60", "processes=1", *more, *axes, *settings]
        return [sys.executable, "-m", "gpt2train", "sweep", *given]

    def curves(out: Path) -> dict[str, dict[int, float]]:
        return {path.parent.name: read_metrics(path.parent)[0] for path in sorted(out.glob("*/metrics.jsonl"))}

    preempted = 0
    with slurm_cluster.cluster(tmp_path / "slurm") as cluster:
        out = tmp_path / "swept by slurm"
        given = ["launcher=slurm", "slurm.partition=normal", "slurm.time=2", "slurm.warning_s=30"]
        done = cluster.run(words(out, *given), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        array = done.stdout.strip()
        deadline_s = time.monotonic() + 1800
        while not (out / "scaling.json").exists():
            assert time.monotonic() < deadline_s, cluster.run(["squeue"]).stdout + cluster.logs()
            before = sum(map(len, curves(out).values())) if out.exists() else 0
            time.sleep(1.0)
            if preempted < 4 and before > 30 * (preempted + 1):
                urgent = [
                    "sbatch",
                    "--parsable",
                    "--partition=urgent",
                    "--nodes=2",
                    "--output=/dev/null",
                    "--wrap=sleep 1",
                ]
                number = cluster.run(urgent).stdout.strip()
                until(cluster, lambda n=number: cluster.state(n).startswith("COMPLETED"), "the urgent job", 400)
                preempted += 1
        states = cluster.run(["scontrol", "show", "job", array, "--oneliner"]).stdout
        until(cluster, lambda: not cluster.run(["squeue", "--noheader"]).stdout.strip(), "the end of all jobs")
    said = "".join(path.read_text() for path in (out / "logs").glob(f"slurm-{array}_*.out"))
    requeued = said.count("saved and stopped; the job is RUNNING")
    alone = tmp_path / "swept here"
    done = subprocess.run(
        words(alone),
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert curves(out) == curves(alone), states
    assert [len(curve) for curve in curves(out).values()] == [60] * 4
    assert preempted >= 2
    assert requeued >= preempted
    print(f"{preempted} preemptions, {requeued} tasks saved and were requeued, {len(curves(out))} equal curves")
