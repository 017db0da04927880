"""A launch over several hosts: real connections, real processes, real cuts.

Most tests reach a "host" through an `ssh` of their own that runs its command on this machine, so that they need neither
root nor a network; the last ones have two network namespaces with an sshd each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import HARMLESS, RANK, Terminal, alive, freeze, nobody_left, processes_in
from ssh_hosts import ADDRESSES, Hosts, missing, two_hosts
from training import TINY, read_metrics, write_tokens, written_steps

from launch.config import HANDED_OVER, REQUEUE_EXIT_CODE, ConfigError, Gpus, HostsConfig, LaunchConfig, Launcher, check
from launch.connection import Host, handed_over
from launch.hosts import read_hosts, slots_of
from launch.run import launch, rank_count
from launch.words import from_words, to_words

# As ssh: the host, then a command line for its shell. A login shell prints its greeting first.
SSH = """#!/bin/bash
case " $* " in *" -G "*) echo "hostname 127.0.0.1"; exit 0;; esac
while [ "$1" != -- ]; do shift; done
if [ "$2" = gone ]; then echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255; fi
echo "Welcome to $2"
exec sh -c "$3"
"""

ALONE = Path(__file__).parents[1] / "launch" / "__main__.py"

# The launch itself, but for the time that ranks have to notice a dead peer.
QUICK = """
import sys
sys.path.append(sys.argv.pop(1))
from launch import __main__, ranks
ranks.PEER_GRACE_S = 1.0
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an `ssh` that is found first; when the test is over no process may be left that stands in it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    left = processes_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"


class Launched:
    """A launcher in a process of its own, over hosts a (one rank) and b (two ranks)."""

    def __init__(self, folder: Path, what: str, *settings: str, **options: Any) -> None:
        self.notes = folder / "notes $(touch bad)"
        self.notes.mkdir()
        (folder / "hosts").write_text("# the first is where all meet\na slots=1\nme@b slots=2\n")
        self.run_dir = folder / 'a run\'s $(touch bad) "folder"'
        words = ["launcher=hosts", f"hosts.file={folder / 'hosts'}", "gpus=none", "restarts=0", *settings]
        rank = [sys.executable, str(folder / "rank.py"), what, str(self.notes), *HARMLESS]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", QUICK, str(ALONE.parents[1]), str(self.run_dir), *words, "--", *rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            **options,
        )

    def seen(self) -> list[dict[str, Any]]:
        """What each rank wrote down, once all have."""
        deadline_s = time.monotonic() + 60
        while len(files := sorted(self.notes.glob("rank ?"))) < 3:
            assert time.monotonic() < deadline_s, "the ranks did not start"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        return [json.loads(f.read_text()) for f in files]

    def node(self, number: int) -> int:
        """The process that watches the ranks of host `number`."""
        found = []
        for pid in processes_in(self.run_dir.parent):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if any("launch.node" in word for word in words) and words[0] == sys.executable:
                found.append(pid)
        assert len(found) == 2
        around = json.loads((self.run_dir / "logs" / f"rank_{number}.started").read_text())["pid"]
        parent = int(Path(f"/proc/{around}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent in found
        return parent

    def end(self, timeout_s: float = 90) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank_{rank}.log").read_text()


@pytest.mark.parametrize(
    "starter",
    ["plain", pytest.param("torchrun", marks=pytest.mark.slow), pytest.param("deepspeed", marks=pytest.mark.soak)],
)
def test_every_rank_of_every_host_gets_its_place(place: Path, starter: str) -> None:
    launched = Launched(place, "quick", f"starter={starter}")
    code, out, err = launched.end(200)
    assert code == 0, err
    seen = launched.seen()
    assert [s["RANK"] for s in seen] == ["0", "1", "2"]
    # deepspeed counts local ranks modulo a host's own number: all there, in another order where hosts differ.
    assert [s["LOCAL_RANK"] for s in seen] in (["0", "0", "1"], *[["0", "1", "0"]] * (starter == "deepspeed"))
    for s in seen:
        assert (s["WORLD_SIZE"], s["MASTER_ADDR"]) == ("3", "127.0.0.1")
        assert s["MASTER_PORT"] == seen[0]["MASTER_PORT"]
        assert s["arguments"] == HARMLESS
    assert not list(place.rglob("bad"))
    assert "hello from rank 0 ü" in out
    assert "hello from rank 1" not in out
    assert "Welcome" not in out + err, "a login shell's own words stay in the host's log"
    assert "Welcome to me@b" in (launched.run_dir / "logs" / "host_me_b.log").read_text()
    assert "hello from rank 2 ü" in launched.log(2)
    assert nobody_left(place, 5), "a rank's helper was left behind"


def test_told_to_stop_by_ctrl_c_the_ranks_of_all_hosts_save(place: Path) -> None:
    terminal = Terminal()
    launched = Launched(place, "wait", **terminal.options)
    launched.seen()
    terminal.ctrl_c()
    code, _, err = launched.end()
    assert code == REQUEUE_EXIT_CODE, err
    for rank in range(3):
        assert launched.log(rank).endswith(f"hello from rank {rank} ü\nsaved after SIGTERM\n")
    assert "SIGINT: the ranks are told to save and stop" in err
    assert nobody_left(place, 5)


def test_a_batch_system_may_tell_one_host_alone(place: Path) -> None:
    """As Slurm does at a preemption: the signal comes to the far end, and all hosts hear of it."""
    launched = Launched(place, "wait")
    launched.seen()
    for _ in range(2):  # twice, since it may; the second one is no order to kill
        os.kill(launched.node(2), signal.SIGTERM)
    code, _, err = launched.end()
    assert code == REQUEUE_EXIT_CODE, err
    assert "me@b got SIGTERM: the ranks of all hosts are told to save and stop" in err
    for rank in range(3):
        assert launched.log(rank).endswith("saved after SIGTERM\n")


def test_a_second_signal_kills_on_all_hosts(place: Path) -> None:
    launched = Launched(place, "deaf")
    launched.seen()
    launched.process.send_signal(signal.SIGINT)
    launched.process.send_signal(signal.SIGTERM)
    code, _, err = launched.end()
    assert code == 128 + signal.SIGKILL, err
    assert nobody_left(place, 5)


def test_the_first_failure_is_shown_with_its_host_and_its_last_lines(place: Path) -> None:
    launched = Launched(place, "fail:9")
    code, _, err = launched.end()
    assert code == 9
    assert re.search(r"rank 1 of 3 on me@b ended with exit code 9 after [\d.]+ s; from \S", err)
    assert "    the cause of it\n" in err
    assert "then rank 0 on a had not ended and was killed by the launcher" in err
    assert nobody_left(place, 5)


@pytest.mark.parametrize("what", ["wait", "deaf"])
def test_kill_9_of_the_launcher_leaves_nobody_on_any_host(place: Path, what: str) -> None:
    launched = Launched(place, what)
    pids = [pid for s in launched.seen() for pid in s["pids"]]
    assert all(alive(pid) for pid in pids)
    launched.process.kill()
    launched.process.communicate(timeout=30)
    assert nobody_left(place, 20), f"{processes_in(place)} are left"
    assert not any(alive(pid) for pid in pids)


def test_a_host_that_dies_ends_all(place: Path) -> None:
    launched = Launched(place, "wait")
    launched.seen()
    os.kill(launched.node(1), signal.SIGKILL)
    code, _, err = launched.end()
    assert code == 7, err
    assert "host me@b is gone: its connection ended" in err
    assert "then rank 0 on a had not ended and was killed by the launcher" in err
    assert nobody_left(place, 5)


def test_a_host_that_falls_silent_ends_all(place: Path) -> None:
    launched = Launched(place, "wait", "hosts.silence_timeout_s=6")
    launched.seen()
    node = launched.node(1)
    os.kill(node, signal.SIGSTOP)
    code, _, err = launched.end()
    assert code == 7, err
    assert "host me@b is gone: nothing was heard of it for 6 s" in err
    with contextlib.suppress(ProcessLookupError):  # behind a real ssh it would go on, and find that its line is closed
        os.kill(node, signal.SIGCONT)
    assert nobody_left(place, 20)


def test_a_launcher_that_falls_silent_loses_its_ranks(place: Path) -> None:
    launched = Launched(place, "wait", "hosts.silence_timeout_s=3")
    launched.seen()
    launched.process.send_signal(signal.SIGSTOP)
    deadline_s = time.monotonic() + 60
    while set(processes_in(place)) - {launched.process.pid} and time.monotonic() < deadline_s:
        time.sleep(0.1)
    # A Ctrl-Z does not do that: it is not heard.
    running = set(processes_in(place)) - {launched.process.pid}
    ranks = [p for p in running if "rank.py" in Path(f"/proc/{p}/cmdline").read_text()]
    assert not ranks
    launched.process.send_signal(signal.SIGCONT)
    assert launched.end()[0] == 7


def test_ctrl_z_is_not_heard(place: Path) -> None:
    launched = Launched(place, "wait")
    launched.seen()
    launched.process.send_signal(signal.SIGTSTP)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end()[0] == REQUEUE_EXIT_CODE


def test_hosts_that_cannot_be_reached_are_all_named_and_nothing_starts(place: Path) -> None:
    (place / "hosts").write_text("a\ngone\n")
    config = LaunchConfig(launcher=Launcher.hosts, gpus=Gpus.none, hosts=HostsConfig(file="hosts"))
    with pytest.raises(Exception, match=r"host gone cannot be reached or used: ssh: .*No route to host"):
        launch(config, [sys.executable, "rank.py", "quick", "."], place / "run")
    assert not (place / "run" / "logs" / "rank_0.log").exists()
    assert nobody_left(place, 10)


def test_what_hosts_cannot_give_is_told_together(place: Path) -> None:
    config = LaunchConfig(
        launcher=Launcher.hosts, gpus=Gpus.required, processes=2, hosts=HostsConfig(names=["a"], python=sys.executable)
    )
    with pytest.raises(ConfigError) as caught:
        launch(config, ["/no/such/python", "rank.py"], place / "run")
    assert [f.split(";")[0] for f in caught.value.faults] == [
        "host a: /no/such/python: is not there",
        "host a: gpus=required: no GPU is visible here",
    ]


def node(*orders: dict[str, Any]) -> list[dict[str, Any]]:
    """What the far end answers to these orders."""
    code = f"import sys; sys.path.append({str(ALONE.parents[1])!r}); from launch.node import main; main()"
    given = "".join(json.dumps(order) + "\n" for order in orders)
    with subprocess.Popen(
        [sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(given)
        process.stdin.flush()
        answers = [process.stdout.readline() for _ in range(1 + len(orders))]
    assert process.returncode == 70, "it ends when its line does"
    return [json.loads(line.removeprefix("gpt2train-node ")) for line in answers]


def test_a_run_folder_that_hosts_do_not_share_is_told(tmp_path: Path) -> None:
    order = {
        "do": "check",
        "directory": str(tmp_path),
        "run_dir": str(tmp_path / "run"),
        "environment": {},
        "log_dir": str(tmp_path / "logs"),
        "command": [sys.executable],
        "processes": 1,
        "gpus": "none",
        "port": 0,
    }
    _, first = node({**order, "first": True, "word": "", "probe_wait_s": 0})
    assert first["faults"] == []
    _, other = node({**order, "first": False, "word": first["word"], "probe_wait_s": 0})
    assert other["faults"] == []
    _, apart = node({**order, "first": False, "word": "of another folder", "probe_wait_s": 0})
    assert len(apart["faults"]) == 1
    assert f"run_dir={tmp_path / 'run'}: is not the first host's folder" in apart["faults"][0]
    _, nowhere = node({**order, "first": True, "word": "", "probe_wait_s": 0, "directory": str(tmp_path / "none")})
    assert nowhere["faults"] == [
        f"working folder {tmp_path / 'none'}: No such file or directory; it must be the same on all hosts"
    ]


def test_the_environment_goes_through_the_line_and_on_no_command_line(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "rank.py").write_text(
        RANK.replace('names = "', 'names = "WANDB_API_KEY NCCL_DEBUG EXTRA CUDA_VISIBLE_DEVICES ')
    )
    environment = {**os.environ, "WANDB_API_KEY": "s3cret", "NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": ""}
    # Started from a bare shell on the host, as sshd's would be.
    (place / "bin" / "ssh").write_text(SSH.replace("exec sh", 'exec env -i PATH="$PATH" sh'))
    launched = Launched(place, "wait", 'hosts.environment=["EXTRA=a b"]', env=environment)
    for seen in launched.seen():
        assert (seen["WANDB_API_KEY"], seen["NCCL_DEBUG"], seen["EXTRA"]) == ("s3cret", "WARN", "a b")
        assert seen["CUDA_VISIBLE_DEVICES"] is None, "it numbers one machine's GPUs"
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes_in(place)]
    assert len(lines) >= 6
    assert not any("s3cret" in line for line in lines)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end()[0] == REQUEUE_EXIT_CODE
    assert not any("s3cret" in path.read_text() for path in (launched.run_dir / "logs").rglob("*") if path.is_file())
    assert handed_over(HANDED_OVER, {"AWS_SECRET_ACCESS_KEY": "x", "HOME": "y"}) == {}


# A run of six steps that is cut short in the middle of its first two attempts; each step is a line of metrics.jsonl.
STEPS = """
import json, os, pathlib, sys, time
folder, rank, restart = pathlib.Path(sys.argv[1]), os.environ["RANK"], os.environ.get("GPT2TRAIN_RESTART_COUNT", "0")
(folder / f"attempt {restart} rank {rank}").write_text(os.environ["MASTER_PORT"])
if rank != "0":
    if restart == "0":
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        sys.exit(11)
    sys.exit(0)
for step in range(1, 4) if restart == "0" else range(4, 6) if restart == "1" else range(6, 7):
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": step}) + "\\n")
if restart == "0":
    time.sleep(60)
if restart == "1":
    os.kill(os.getpid(), 9)
print("done in attempt", restart)
"""


@pytest.mark.parametrize("launcher", ["hosts", "local"])
def test_failed_ranks_are_started_again_together(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    monkeypatch.setattr("launch.ranks.PEER_GRACE_S", 1.0)
    (place / "steps.py").write_text(STEPS)
    run_dir = place / "run"
    config = LaunchConfig(
        launcher=Launcher[launcher],
        processes=1 if launcher == "hosts" else 2,
        gpus=Gpus.none,
        restart_pause_s=0.01,
        hosts=HostsConfig(names=["a", "b"] if launcher == "hosts" else []),
    )
    assert launch(config, [sys.executable, str(place / "steps.py"), str(run_dir)], run_dir) == 0
    out, err = capfd.readouterr()
    assert "done in attempt 2" in out
    assert err.count("started again in 0.01 s, from the newest checkpoint") == 2
    assert [len(list(run_dir.glob(f"attempt {n} rank ?"))) for n in range(4)] == [2, 2, 2, 0]
    ports = [(run_dir / f"attempt {n} rank 0").read_text() for n in range(3)]
    assert len(set(ports)) == 3, "each attempt meets at a port of its own"
    assert "done in attempt 2" in (run_dir / "logs" / "rank_0.log").read_text()
    assert sorted(p.name for p in (run_dir / "logs").glob("attempt_*")) == ["attempt_0001", "attempt_0002"]
    assert (run_dir / "logs" / "attempt_0001" / "rank_1.log").exists()
    journal = (run_dir / "logs" / "launch.log").read_text()
    assert journal.count("started again in") == 2
    assert "launch of 2 processes" in journal
    assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ rank 1 of 2 .*ended with exit code 11", journal, re.MULTILINE)


# ------------------------------------------------------------------------------------------- before anything starts


def test_a_dry_run_is_what_a_shell_can_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("NCCL_DEBUG", "it's $HOME")
    notes = place / "it's $(touch bad)"
    command = [sys.executable, str(place / "rank.py"), "quick", str(notes), "a  b", "$HOME `x`", "--log"]
    how = HostsConfig(names=["a", "b"], setup=["export SITE=1"])
    config = LaunchConfig(launcher=Launcher.hosts, processes=1, gpus=Gpus.none, dry_run=True, hosts=how)
    before = sorted(place.rglob("*"))
    assert launch(config, command, place / 'a "run"') == 0
    printed = capsys.readouterr().out
    assert sorted(place.rglob("*")) == before, "a dry run touches nothing"
    assert "s3cret" not in printed
    assert "# Not shown, handed over through the connection: HF_TOKEN" in printed
    assert "2 hosts, 2 ranks, which meet at 127.0.0.1" in printed
    notes.mkdir()
    # The stand-in for ssh takes its script from its arguments, as the launch gives it; here it comes on standard input.
    done = subprocess.run(["sh", "-c", printed], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        seen = json.loads((notes / f"rank {rank}").read_text())
        assert seen["arguments"] == ["a  b", "$HOME `x`", "--log"]
        assert (seen["RANK"], seen["WORLD_SIZE"]) == (str(rank), "2")
    assert not list(place.rglob("bad"))
    assert nobody_left(place, 5)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a\nb\n", [Host("a"), Host("b")]),
        (
            "# all\n\nuser@n1.example.org slots=8  # eight\n10.0.0.2 slots=4",
            [Host("user@n1.example.org", 8), Host("10.0.0.2", 4)],
        ),
    ],
)
def test_a_host_file(tmp_path: Path, text: str, hosts: list[Host]) -> None:
    (tmp_path / "hosts").write_text(text)
    config = LaunchConfig(launcher=Launcher.hosts, hosts=HostsConfig(file=str(tmp_path / "hosts")))
    assert read_hosts(config) == hosts
    expected = None if not hosts[0].slots else (8, 4)
    assert slots_of(config, hosts) == expected


def test_all_that_is_wrong_with_a_host_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=0\n-oProxyCommand=evil\na gpus=8\nb\nb slots=2\nc slots=2 more\n")
    with pytest.raises(ConfigError) as caught:
        read_hosts(LaunchConfig(launcher=Launcher.hosts, hosts=HostsConfig(file=str(path))))
    assert [re.sub(r".*, line (\d): ", r"\1 ", f)[:28] for f in caught.value.faults] == [
        "1 slots=0: must be 1 or more",
        "2 '-oProxyCommand=evil' is n",
        "3 'a gpus=8' is not of the f",
        "5 b is there twice; give eac",
        "6 'c slots=2 more' is not of",
    ]
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="names no host"):
        rank_count(LaunchConfig(launcher=Launcher.hosts, hosts=HostsConfig(file=str(path))))
    with pytest.raises(ConfigError, match="No such file or directory; give a file with one host a line"):
        read_hosts(LaunchConfig(launcher=Launcher.hosts, hosts=HostsConfig(file=str(tmp_path / "none"))))


@pytest.mark.parametrize(
    ("hosts", "fault"),
    [
        (HostsConfig(), "hosts.file='': launcher=hosts needs hosts; give hosts.file=FILE or hosts.names=[a,b]"),
        (HostsConfig(names=["-v"]), "hosts.names=-v: not a host's name"),
        (HostsConfig(names=["a b"]), "hosts.names=a b: not a host's name"),
        (HostsConfig(names=["a", "a"]), "hosts.names=a: is there twice"),
        (HostsConfig(names=["a"], file="f"), "hosts.names=['a']: hosts.file=f is given too"),
        (HostsConfig(names=["a"], environment=["A B"]), "hosts.environment=A B: must be NAME"),
        (HostsConfig(names=["a"], environment=["A_*=1"]), "hosts.environment=A_*: must be NAME"),
        (HostsConfig(names=["a"], silence_timeout_s=0), "hosts.silence_timeout_s=0: must be above 0 s"),
    ],
)
def test_settings_of_hosts_that_cannot_be(hosts: HostsConfig, fault: str) -> None:
    faults = check(LaunchConfig(launcher=Launcher.hosts, hosts=hosts))
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_settings_as_words_there_and_back() -> None:
    config = LaunchConfig(
        launcher=Launcher.hosts,
        processes=3,
        dry_run=True,
        restart_pause_s=0.5,
        log_dir="a 'b' $(c)",
        prefix=["apptainer", "exec", "a b.sif"],
        hosts=HostsConfig(names=["ü", "b,c"], silence_timeout_s=1e-3),
    )
    assert from_words(to_words(config)) == config
    assert to_words(LaunchConfig()) == []
    with pytest.raises(ConfigError) as caught:
        from_words(["processes=x", "nothing=1", "hosts=3", "hosts.names={}", "dry_run=maybe", "slurm.nodes.x=1"])
    assert len(caught.value.faults) == 6


# ---------------------------------------------------------------------------------------- two hosts, an sshd on each

SETTINGS = {**TINY, "checkpoint.every_steps": 10, "evaluate.every_steps": 0, "distributed.timeout_s": 120}
STEPS_OF_RUN = 60


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if why := missing():
        pytest.skip(why)
    with two_hosts(tmp_path / "net") as made:
        yield made


def train_words(tokens: Path, run_dir: Path, *more: str, **settings: Any) -> list[str]:
    given = {**SETTINGS, **settings}
    return [
        *more,
        f"data={tokens}",
        f"run_dir={run_dir}",
        f"steps={STEPS_OF_RUN}",
        *(f"{k}={v}" for k, v in given.items()),
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dead_host_ends_the_run_and_the_same_command_resumes_it(tmp_path: Path, hosts: Hosts) -> None:
    """Real training over two hosts; one of them loses its link and all its processes."""
    tokens = write_tokens(tmp_path / "tokens")
    run_dir = tmp_path / "it's a $(touch bad) run"
    program = [sys.executable, "-m", "gpt2train", "launch"]
    (tmp_path / "hosts").write_text("\n".join(ADDRESSES))
    how = ["launcher=hosts", f"hosts.file={tmp_path / 'hosts'}", f"hosts.ssh={json.dumps(hosts.ssh_words())}"]
    how += ['hosts.environment=["GLOO_SOCKET_IFNAME=eth0"]', "hosts.silence_timeout_s=12", "restarts=0"]
    command = [*hosts.inside(0), *program, *train_words(tokens, run_dir, *how)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True, "stdin": subprocess.DEVNULL}
    before = set(hosts.processes(0))
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        deadline_s = time.monotonic() + 240
        while written_steps(run_dir) < 13:
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline_s, "no steps"
            time.sleep(0.02)
        frozen = freeze(run_dir, 2)
        hosts.pull_the_plug(1)
        os.kill(frozen[0], signal.SIGCONT)
        _, err = first.communicate(timeout=240)
    finally:
        first.kill()
    assert first.returncode == 7, err
    assert re.search(rf"host {ADDRESSES[1]} is gone: (its connection ended|nothing was heard)", err), err
    reached = written_steps(run_dir)
    assert 13 <= reached < STEPS_OF_RUN
    deadline_s = time.monotonic() + 30  # sshd takes a moment to see that its client is gone
    while set(hosts.processes(0)) - before:
        assert time.monotonic() < deadline_s, "processes were left behind on the host that lives"
        time.sleep(0.05)

    hosts.boot(1)
    again = subprocess.run(command, capture_output=True, timeout=300, **options)
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.rglob("bad"))

    undisturbed = tmp_path / "undisturbed"
    how = ["processes=2", "restarts=0"]
    alone = subprocess.run(
        [*program, *train_words(tokens, undisturbed, *how)], capture_output=True, timeout=300, **options
    )
    assert alone.returncode == 0, alone.stderr
    assert read_metrics(run_dir)[0] == read_metrics(undisturbed)[0]
    assert len(read_metrics(run_dir)[0]) == STEPS_OF_RUN


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_host_that_comes_back_is_taken_in_again(tmp_path: Path, hosts: Hosts) -> None:
    """One launch, three times without one of its hosts; nobody gives a command again."""
    tokens = write_tokens(tmp_path / "tokens")
    run_dir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    program = [sys.executable, "-m", "gpt2train", "launch"]
    how = ["launcher=hosts", f"hosts.names={json.dumps(ADDRESSES)}", f"hosts.ssh={json.dumps(hosts.ssh_words())}"]
    how += ['hosts.environment=["GLOO_SOCKET_IFNAME=eth0"]', "hosts.silence_timeout_s=20", "restart_pause_s=5"]
    command = [*hosts.inside(0), *program, *train_words(tokens, run_dir, *how, "hosts.connect_timeout_s=30")]
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    with open(tmp_path / "said", "w") as said:
        launched = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, **options)
        try:
            for step in (13, 28, 44):
                deadline_s = time.monotonic() + 900
                while written_steps(run_dir) < step:
                    assert launched.poll() is None, (tmp_path / "said").read_text()
                    assert time.monotonic() < deadline_s, "no steps"
                    time.sleep(0.02)
                frozen = freeze(run_dir, 2)
                hosts.pull_the_plug(1)
                os.kill(frozen[0], signal.SIGCONT)
                announced = "started again in"
                before = (tmp_path / "said").read_text().count(announced)
                while (tmp_path / "said").read_text().count(announced) == before:
                    assert time.monotonic() < deadline_s, (tmp_path / "said").read_text()
                    time.sleep(0.1)
                hosts.boot(1)
            assert launched.wait(1800) == 0, (tmp_path / "said").read_text()
        finally:
            launched.kill()
            launched.wait()
    alone = [*program, *train_words(tokens, undisturbed, "processes=2")]
    assert subprocess.run(alone, capture_output=True, timeout=1800, **options).returncode == 0
    assert read_metrics(run_dir)[0] == read_metrics(undisturbed)[0]
    journal = (run_dir / "logs" / "launch.log").read_text()
    assert journal.count("is gone:") >= 3
    print(f"3 losses of a host, {journal.count('started again in')} restarts, equal losses")


def test_kill_9_of_the_launcher_leaves_nobody_behind_an_sshd(tmp_path: Path, hosts: Hosts) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    notes = tmp_path / "notes"
    notes.mkdir()
    before = {number: set(hosts.processes(number)) for number in (0, 1)}
    how = ["launcher=hosts", f"hosts.names={json.dumps(ADDRESSES)}", f"hosts.ssh={json.dumps(hosts.ssh_words())}"]
    words = [
        str(tmp_path / "run"),
        *how,
        "gpus=none",
        "--",
        sys.executable,
        str(tmp_path / "rank.py"),
        "deaf",
        str(notes),
    ]
    launcher = subprocess.Popen([*hosts.inside(0), sys.executable, "-I", str(ALONE), *words], cwd=tmp_path)
    try:
        deadline_s = time.monotonic() + 60
        while len(list(notes.glob("rank ?"))) < 2:
            assert launcher.poll() is None
            assert time.monotonic() < deadline_s, "the ranks did not start"
            time.sleep(0.02)
        for number in (0, 1):
            assert len(set(hosts.processes(number)) - before[number]) >= 3
    finally:
        launcher.kill()
        launcher.wait()
    deadline_s = time.monotonic() + 30
    while left := [pid for number in (0, 1) for pid in set(hosts.processes(number)) - before[number]]:
        assert time.monotonic() < deadline_s, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.05)
