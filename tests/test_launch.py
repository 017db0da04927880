"""Launching, with real processes and signals: what reaches a rank, what comes back, and that nobody stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import HARMLESS, RANK, Terminal, alive, nobody_left, processes_in

from gpt2train import errors as training
from launch import local, machine, ranks
from launch.config import REQUEUE_EXIT_CODE, ConfigError, Gpus, InUseError, LaunchConfig, LaunchError, Starter, check
from launch.dry import dry_run_lines
from launch.machine import machine_faults
from launch.place import Place, plan
from launch.run import launch, rank_count

DEEPSPEED = pytest.param(Starter.deepspeed, marks=pytest.mark.slow)
STARTERS = [Starter.plain, Starter.torchrun, DEEPSPEED]
LAUNCH = """
import json, pathlib, sys
from launch.config import LaunchConfig, Starter
from launch.run import launch
from launch import ranks
options = json.loads(sys.argv[1])
ranks.PEER_GRACE_S = options.pop("peer_grace_s", 1.0)
config = LaunchConfig(**{**options, "starter": Starter(options["starter"])})
sys.exit(launch(config, [sys.executable, *sys.argv[3:]], pathlib.Path(sys.argv[2])))
"""


class Launched:
    """A launcher in a process of its own with a terminal of its own, in a folder whose name no shell should see."""

    def __init__(self, folder: Path, starter: Starter, what: str, **options: object) -> None:
        self.notes = folder / "notes $(touch bad)"
        self.notes.mkdir()
        (folder / "rank.py").write_text(RANK)
        self.run_dir = folder / 'a run\'s $(touch bad) "folder"'
        self.ranks = int(options.get("processes", 2))  # type: ignore[call-overload]
        self.terminal = Terminal()
        self.process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-c",
                    LAUNCH,
                    json.dumps({"processes": 2, "starter": starter.value, "restarts": 0, **options}),
                ),
                *(str(self.run_dir), str(folder / "rank.py"), what, str(self.notes), *HARMLESS),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            **self.terminal.options,
        )

    def stop(self, number: signal.Signals) -> None:
        """Send it to the launcher alone; SIGINT as the terminal does."""
        if number is signal.SIGINT:
            self.terminal.ctrl_c()
        else:
            self.process.send_signal(number)

    def seen(self) -> list[dict]:
        """What each rank wrote down, once all have."""
        deadline_s = time.monotonic() + 60
        while len(files := sorted(self.notes.glob("rank ?"))) < self.ranks:
            assert time.monotonic() < deadline_s, "the ranks did not start"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        return [json.loads(f.read_text()) for f in files]

    def end(self, timeout_s: float = 60) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank_{rank}.log").read_text()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder; when the test is over no process may be left that stands in it."""
    yield tmp_path
    left = processes_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"


@pytest.mark.parametrize("starter", STARTERS)
def test_every_rank_gets_its_place_and_its_arguments(place: Path, starter: Starter) -> None:
    launched = Launched(place, starter, "quick")
    code, out, err = launched.end()
    assert code == 0, err
    seen = launched.seen()
    assert [s["RANK"] for s in seen] == [s["LOCAL_RANK"] for s in seen] == ["0", "1"]
    for s in seen:
        assert (s["WORLD_SIZE"], s["MASTER_ADDR"]) == ("2", "127.0.0.1")
        assert s["MASTER_PORT"] == seen[0]["MASTER_PORT"]
        assert s["arguments"] == HARMLESS
        assert s["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", str(max(1, machine.count_cores() // 2)))
    assert not list(place.rglob("bad"))
    assert "hello from rank 0 ü" in out
    assert "rank 1" not in out
    for rank in (0, 1):
        assert f"hello from rank {rank} ü" in launched.log(rank)
    assert nobody_left(place, 5), "a rank's helper was left behind"


@pytest.mark.parametrize(
    ("starter", "number"),
    [
        (Starter.plain, signal.SIGTERM),
        (Starter.plain, signal.SIGINT),
        (Starter.plain, signal.SIGUSR1),
        (Starter.torchrun, signal.SIGINT),
        pytest.param(Starter.deepspeed, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_all_ranks_save(place: Path, starter: Starter, number: signal.Signals) -> None:
    launched = Launched(place, starter, "wait")
    launched.seen()
    launched.stop(number)
    code, _, err = launched.end()
    assert code == REQUEUE_EXIT_CODE == training.REQUEUE_EXIT_CODE, err
    got = signal.SIGTERM if number is signal.SIGINT else number
    for rank in (0, 1):
        assert launched.log(rank).endswith(f"hello from rank {rank} ü\nsaved after {got.name}\n")
    assert f"{number.name}: the ranks are told to save and stop" in err
    assert nobody_left(place, 5)


def test_told_before_a_rank_can_listen(place: Path) -> None:
    """A signal in the first instant: nothing was begun, so the run goes on when it is started again."""
    launched = Launched(place, Starter.plain, "wait")
    logs = launched.run_dir / "logs"
    deadline_s = time.monotonic() + 30
    while not (logs / "starter.log").exists() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    launched.process.send_signal(signal.SIGTERM)
    code, _, err = launched.end()
    assert code == REQUEUE_EXIT_CODE, err
    assert nobody_left(place, 5)


def test_told_while_one_rank_cannot_listen_yet(place: Path) -> None:
    """It dies of the signal; those that wait for it cannot save, and have done nothing wrong."""
    launched = Launched(place, Starter.plain, "unprepared", peer_grace_s=0.3)
    launched.seen()
    launched.stop(signal.SIGINT)
    code, _, err = launched.end()
    assert code == REQUEUE_EXIT_CODE, err
    assert err.endswith("launch: stopped as told; the same command goes on from the newest checkpoint\n")
    assert nobody_left(place, 5)


@pytest.mark.parametrize("starter", [Starter.plain, Starter.torchrun])
def test_the_first_failure_is_shown_with_its_last_lines(place: Path, starter: Starter) -> None:
    launched = Launched(place, starter, "fail:7")
    code, _, err = launched.end()
    assert code == 7
    assert re.search(r"rank 1 of 2 ended with exit code 7 after [\d.]+ s; from \S", err)
    assert str(launched.run_dir / "logs" / "rank_1.log") in err
    assert "    the cause of it\n" in err
    assert "rank 0 had not ended and was killed by the launcher" in err
    assert nobody_left(place, 5)


def test_a_rank_killed_from_outside_is_named(place: Path) -> None:
    launched = Launched(place, Starter.plain, "wait")
    os.kill(launched.seen()[1]["pids"][0], signal.SIGKILL)
    code, _, err = launched.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 of 2 was killed by SIGKILL" in err
    assert nobody_left(place, 5)


def test_a_stopped_and_deaf_rank_is_killed_after_the_time_limit(place: Path) -> None:
    launched = Launched(place, Starter.plain, "deaf", stop_timeout_s=1.0)
    os.kill(launched.seen()[1]["pids"][0], signal.SIGSTOP)
    began_s = time.monotonic()
    launched.process.send_signal(signal.SIGTERM)
    code, _, err = launched.end()
    assert code == 128 + signal.SIGKILL
    assert 1 <= time.monotonic() - began_s < 15
    assert "had not ended and was killed by the launcher" in err
    assert nobody_left(place, 5)


def test_a_second_signal_kills_at_once(place: Path) -> None:
    launched = Launched(place, Starter.plain, "deaf", stop_timeout_s=600.0)
    launched.seen()
    launched.stop(signal.SIGINT)
    time.sleep(0.5)
    assert launched.process.poll() is None
    launched.stop(signal.SIGINT)
    code, _, err = launched.end(15)
    assert code == 128 + signal.SIGKILL
    assert "SIGINT again: killing the ranks" in err


@pytest.mark.parametrize(
    ("starter", "what"),
    [
        (Starter.plain, "wait"),
        (Starter.plain, "deaf"),
        (Starter.torchrun, "deaf"),
        pytest.param(Starter.deepspeed, "deaf", marks=pytest.mark.slow),
    ],
)
def test_kill_9_of_the_launcher_leaves_nobody(place: Path, starter: Starter, what: str) -> None:
    launched = Launched(place, starter, what)
    pids = [pid for s in launched.seen() for pid in s["pids"]]
    assert all(alive(pid) for pid in pids)
    launched.process.kill()
    launched.process.communicate(timeout=30)
    assert nobody_left(place, 10), f"{processes_in(place)} are left"
    assert not any(alive(pid) for pid in pids)


def test_kill_9_of_the_process_around_a_rank_ends_all(place: Path) -> None:
    launched = Launched(place, Starter.plain, "wait")
    launched.seen()
    around = json.loads((launched.run_dir / "logs" / "rank_0.started").read_text())["pid"]
    os.kill(around, signal.SIGKILL)
    code, _, err = launched.end()
    assert code == 128 + signal.SIGKILL, err
    assert "rank 0 of 2 was killed by SIGKILL" in err
    assert nobody_left(place, 5)


def test_kill_9_of_torchrun_ends_all(place: Path) -> None:
    launched = Launched(place, Starter.torchrun, "deaf", processes=1)
    launched.seen()
    (torchrun,) = [p for p in processes_in(place) if "torch.distributed.run" in Path(f"/proc/{p}/cmdline").read_text()]
    os.kill(torchrun, signal.SIGKILL)
    code, _, err = launched.end()
    assert code != 0
    assert "the starter is gone" in err
    assert nobody_left(place, 5)


def test_a_command_that_does_not_exist_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LaunchConfig(processes=1, gpus=Gpus.none)
    assert launch(config, ["/no/such program"], tmp_path) == 127
    assert "/no/such program: cannot be started: No such file or directory" in capfd.readouterr().err


def test_a_starter_that_fails_is_quoted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = ranks.Start([sys.executable, "-c", "print('broken starter'); raise SystemExit(2)"], {})
    assert local.run_ranks([start], processes=2, log_dir=tmp_path, stop_timeout_s=5).code == 1
    err = capfd.readouterr().err
    assert "rank 0 of 2 was not started" in err
    assert "    broken starter" in err


def test_logs_are_kept_and_only_this_launchs_lines_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LaunchConfig(processes=1, gpus=Gpus.none, log_dir=str(tmp_path / "elsewhere"))
    for word in ("first", "second"):
        assert launch(config, [sys.executable, "-c", f"print('{word}'); raise SystemExit(3)"], tmp_path / "run") == 3
    assert not (tmp_path / "run").exists()
    for log, word in (("attempt_0001/rank_0.log", "first"), ("rank_0.log", "second")):
        lines = (tmp_path / "elsewhere" / log).read_text().splitlines()
        assert [line for line in lines if not line.startswith("──")] == [word]
    out, err = capfd.readouterr()
    assert out.count("first") == out.count("second") == 1
    assert err.count("first") == err.count("second") == 1


def test_nobody_reading_the_output_does_not_end_the_run(place: Path) -> None:
    launched = Launched(place, Starter.plain, "quick")
    assert launched.process.stdout is not None
    assert launched.process.stderr is not None
    launched.process.stdout.close()
    with launched.process.stderr as err:
        assert launched.process.wait(60) == 0, err.read()
    assert "hello from rank 0 ü" in launched.log(0)


def test_a_file_named_launch_in_the_working_folder_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("launch.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert launch(LaunchConfig(processes=1, gpus=Gpus.none), ["true"], tmp_path / "run") == 0


def test_two_launches_in_one_folder(place: Path) -> None:
    launched = Launched(place, Starter.plain, "wait")
    launched.seen()
    owner = rf"another launch is running there, process {launched.process.pid} on \S+; wait for it"
    with pytest.raises(InUseError, match=owner) as refused:
        launch(LaunchConfig(processes=1, gpus=Gpus.none), [sys.executable, "-c", ""], launched.run_dir)
    assert refused.value.exit_code == training.RunInUseError.exit_code == 3
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end()[0] == REQUEUE_EXIT_CODE
    assert launch(LaunchConfig(processes=1, gpus=Gpus.none), [sys.executable, "-c", ""], launched.run_dir) == 0
    assert nobody_left(place, 5)


def test_a_log_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(LaunchError, match=r"log_dir=.*File exists; give a folder"):
        launch(LaunchConfig(processes=1, gpus=Gpus.none), [sys.executable, "-c", ""], tmp_path)


# ------------------------------------------------------------------------------------------- before anything starts


@pytest.mark.parametrize("starter", list(Starter))
def test_a_dry_run_is_what_a_shell_can_run(place: Path, starter: Starter, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "rank.py").write_text(RANK)
    notes = place / "it's $(touch bad)"
    command = [sys.executable, str(place / "rank.py"), "quick", str(notes), "a  b", "$HOME `x`", "--log"]
    config = LaunchConfig(processes=2, starter=starter, dry_run=True, gpus=Gpus.none)
    assert launch(config, command, place / 'a "run"') == 0
    printed = capsys.readouterr().out
    assert list(place.iterdir()) == [place / "rank.py"], "a dry run touches nothing"
    if starter is Starter.deepspeed:
        return  # some seconds more, for a line of the same making
    notes.mkdir()
    done = subprocess.run(["sh", "-c", printed], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((notes / f"rank {rank}").read_text())["arguments"] == ["a  b", "$HOME `x`", "--log"]
    assert not list(place.rglob("bad"))
    assert nobody_left(place, 5)


def test_one_start_is_one_line() -> None:
    assert dry_run_lines([ranks.Start(["a b"], {"K": "v w"})]) == ["env 'K=v w' 'a b'"]


def test_a_busy_port_is_told_beforehand(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port={port}: in use at 127\.0\.0\.1; give another"):
            launch(LaunchConfig(processes=1, port=port, gpus=Gpus.none), ["true"], tmp_path)
    assert machine.port_is_free(port)
    assert list(tmp_path.iterdir()) == []
    assert machine.port_is_free(machine.free_port())


def test_the_port_that_was_given_is_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = machine.free_port()
    code = "import os; print('port', os.environ['MASTER_PORT'])"
    assert launch(LaunchConfig(processes=1, port=port, gpus=Gpus.none), [sys.executable, "-c", code], tmp_path) == 0
    assert f"port {port}\n" in capfd.readouterr().out


def test_missing_gpus_are_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"gpus=required: no GPU is visible here \(CUDA_VISIBLE_DEVICES hides them\)"):
        launch(LaunchConfig(gpus=Gpus.required), ["true"], tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"processes=3: each needs a GPU and 2 are visible; give processes=2"):
        launch(LaunchConfig(processes=3), ["true"], tmp_path)
    assert machine_faults(LaunchConfig(processes=3, gpus=Gpus.none), 0) == []
    assert list(tmp_path.iterdir()) == []


def test_one_process_per_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for visible, processes in (("0,1,2", 3), ("", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch(LaunchConfig(dry_run=True), ["true"], tmp_path) == 0
        assert capsys.readouterr().out.count(" RANK=") == processes == rank_count(LaunchConfig())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert rank_count(LaunchConfig(gpus=Gpus.none)) == 1
    assert rank_count(LaunchConfig(processes=2)) == 2


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0", 1), ("0,1", 2), ("GPU-8932f937,MIG-1", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), (" 2 , 3", 2)],
)
def test_cuda_visible_devices_decides(visible: str, count: int) -> None:
    assert machine.count_gpus({"CUDA_VISIBLE_DEVICES": visible, "PATH": ""}) == count


def test_gpus_are_counted_by_nvidia_smi_or_the_driver(tmp_path: Path) -> None:
    driver = tmp_path / "gpus"
    assert machine.count_gpus({"PATH": ""}, driver) == 0
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (driver / address).mkdir(parents=True)
    assert machine.count_gpus({"PATH": ""}, driver) == 2
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    program.chmod(0o755)
    assert machine.count_gpus({"PATH": str(tmp_path)}, driver) == 3
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert machine.count_gpus({"PATH": str(tmp_path)}, driver) == 2


def test_threads_are_shared_unless_set() -> None:
    def threads(environment: dict[str, str], processes: int) -> set[str]:
        starts = plan(Starter.plain, ["x"], place=Place((processes,)), log_dir=Path("l"), environment=environment)
        return {s.environment["OMP_NUM_THREADS"] for s in starts}

    cores = machine.count_cores()
    assert threads({}, 1) == {str(cores)}
    assert threads({}, 10 * cores) == {"1"}
    assert threads({"OMP_NUM_THREADS": "5"}, 2) == {"5"}


def test_all_faults_of_the_settings_together() -> None:
    faults = check(LaunchConfig(processes=-1, port=70_000, stop_timeout_s=0))
    assert [f.split("=")[0] for f in faults] == ["processes", "port", "stop_timeout_s"]
    assert check(LaunchConfig()) == []
