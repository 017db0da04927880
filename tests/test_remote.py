"""Checkpoints in other storage: a real S3 server on this machine, a run that goes on where there is nothing, faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import holds, tensors
from training import TINY, Ranks, read_metrics, write_tokens, written_steps

from data_pipeline.storage.bucket import Bucket
from gpt2train import checkpoint
from gpt2train.bounds import check
from gpt2train.config import CheckpointConfig, TrainConfig
from gpt2train.errors import REQUEUE_EXIT_CODE, RunExistsError
from gpt2train.run_folder import data_folder
from gpt2train.saving.remote import Remote, Uploader, unsent


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket on an S3 server of this process."""
    moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def settings(address: str, **changes: Any) -> CheckpointConfig:
    return CheckpointConfig(remote=address, remote_retry_s=0.0, **changes)


def local(folder: Path, **changes: Any) -> Remote:
    return Remote(settings(f"file://{folder}", **changes))


def write(run_dir: Path, *steps: int) -> Path:
    """Checkpoints, a curve up to the last of them, and the run's record."""
    for step in steps:
        checkpoint.save(run_dir, step, tensors(step), {"step": step, "model": {}, "validation_loss": 100.0 - step})
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {s}}}\n' for s in range(1, steps[-1] + 1)))
    (run_dir / "run.json").write_text('{"format": "gpt2train run", "id": "a", "identity": {}, "published": 20}')
    return run_dir / "checkpoints"


def test_the_newest_comes_back_with_the_run_s_curve(tmp_path: Path) -> None:
    here, other, there = tmp_path / "here", tmp_path / "other", tmp_path / "there"
    write(here, 10, 20)
    remote = local(there)
    assert remote.steps() == []
    for step in (10, 20):
        remote.send(here, step, checkpoint.Keep())
    assert remote.steps() == [10, 20]
    other.mkdir()
    assert local(there).fetch(other, newer_than=-1) == 20
    assert holds(other / "checkpoints" / "step_00000020", 20)
    assert sorted(p.name for p in (other / "checkpoints").iterdir()) == ["step_00000020"]
    assert (other / "metrics.jsonl").read_bytes() == (here / "metrics.jsonl").read_bytes()
    assert json.loads((other / "run.json").read_text())["id"] == "a"
    assert remote.fetch(other, newer_than=20) is None
    # What was copied down by hand is a run folder.
    assert checkpoint.resolve(there) == there / "checkpoints" / "step_00000020"


def test_a_curve_that_goes_further_here_stays(tmp_path: Path) -> None:
    here = tmp_path / "here"
    write(here, 10, 20)
    remote = local(tmp_path / "there")
    remote.send(here, 20, checkpoint.Keep())
    (here / "metrics.jsonl").write_text('{"step": 25, "loss": 1}\n{"step": 2')
    shutil.rmtree(here / "checkpoints" / "step_00000020")
    assert remote.fetch(here, newer_than=10) == 20
    assert (here / "metrics.jsonl").read_text().startswith('{"step": 25')
    (here / "metrics.jsonl").write_text('{"step": 15, "loss": 1}\n')
    shutil.rmtree(here / "checkpoints" / "step_00000020")
    assert remote.fetch(here, newer_than=10) == 20
    assert (here / "metrics.jsonl").read_text().endswith('{"step": 20, "loss": 20}\n')


@pytest.mark.parametrize("file", ["weights_00000.safetensors", "moments_00000.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "one bit", "swapped", "no manifest"])
def test_a_damaged_copy_is_passed_over(tmp_path: Path, file: str, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    write(here, 10, 20)
    for step in (10, 20):
        local(there).send(here, step, checkpoint.Keep())
    newest = there / "checkpoints" / "step_00000020"
    content = (newest / file).read_bytes()
    if fault == "missing":
        (newest / file).unlink()
    elif fault == "truncated":
        (newest / file).write_bytes(content[:-1])
    elif fault == "one bit":
        (newest / file).write_bytes(content[:5] + bytes([content[5] ^ 4]) + content[6:])
    elif fault == "swapped":
        shutil.copy(newest.with_name("step_00000010") / file, newest / file)
    else:
        (newest / "manifest.json").unlink()
    other.mkdir()
    assert local(there).fetch(other, newer_than=-1) == 10
    assert holds(other / "checkpoints" / "step_00000010", 10)
    assert [p.name for p in (other / "checkpoints").iterdir()] == ["step_00000010"]
    assert ("step_00000020 is not whole and is passed over" in caplog.text) == (fault != "no manifest")


def test_the_rules_of_keeping_hold_there_too(tmp_path: Path) -> None:
    here = tmp_path / "here"
    write(here, 10, 20, 30, 40, 50)
    remote = local(tmp_path / "there")
    keep = checkpoint.Keep(last=1, every_steps=20)
    for step in (10, 20, 30, 40, 50):
        remote.send(here, step, keep)
    assert remote.steps() == [20, 40, 50]
    remote.send(here, 50, checkpoint.Keep(last=1, best=True))
    assert remote.steps() == [50]  # it has the lowest loss
    remote.discard()
    assert remote.steps() == []
    assert remote.fetch(tmp_path / "here", newer_than=-1) is None


def test_another_run_s_place_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write(folder, 10)
    (two / "run.json").write_text('{"format": "gpt2train run", "id": "b", "identity": {}, "published": 10}')
    remote = local(tmp_path / "there")
    remote.send(one, 10, checkpoint.Keep())
    with pytest.raises(RunExistsError, match=r"holds another run than .*two"):
        remote.fetch(two, newer_than=10)


def test_a_copy_cut_short_is_made_anew(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, 10)
    remote = local(there)
    remote.send(here, 10, checkpoint.Keep())
    (there / "checkpoints" / "step_00000010" / "manifest.json").unlink()
    (there / "checkpoints" / "step_00000010" / "weights_00000.safetensors").write_bytes(b"half")
    assert remote.steps() == []
    assert unsent(remote, here) == 10
    remote.send(here, 10, checkpoint.Keep())
    assert unsent(remote, here) is None
    assert holds(there / "checkpoints" / "step_00000010", 10)


def test_a_copy_that_fails_is_told_tried_again_and_overtaken_by_a_newer_one(tmp_path: Path) -> None:
    here, there, told = tmp_path / "here", tmp_path / "there", []
    write(here, 10, 20)
    there.write_text("a file where a folder should be")
    failed = threading.Event()

    def tell(line: str) -> None:
        told.append(line)
        if "not copied" in line:
            failed.set()

    uploader = Uploader(local(there), here, tell)
    uploader.offer(10, checkpoint.Keep())
    assert failed.wait(60)
    assert told[0].startswith("checkpoint of step 10: not copied to ")
    assert "key" not in " ".join(told).lower()
    end = time.monotonic() + 60
    while uploader.needed != frozenset({10}):
        assert time.monotonic() < end
        time.sleep(0.001)
    there.unlink()
    uploader.offer(20, checkpoint.Keep())
    assert uploader.finish(20, 60)
    assert local(there).steps() == [20]
    assert not uploader.needed


def test_what_cannot_be_copied_ends_the_wait(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, 10)
    there.write_text("a file")
    uploader = Uploader(local(there), here, lambda line: None)
    uploader.offer(10, checkpoint.Keep())
    assert not uploader.finish(10, 60)


def test_through_s3(s3: str, tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    write(here, 10, 20)
    remote = Remote(settings(f"{s3}/through"))
    for step in (10, 20):
        remote.send(here, step, checkpoint.Keep(last=1))
    assert Remote(settings(f"{s3}/through")).steps() == [20]
    other.mkdir()
    assert remote.fetch(other, newer_than=-1) == 20
    assert holds(other / "checkpoints" / "step_00000020", 20)
    remote.discard()
    assert remote.steps() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_on_an_empty_machine(s3: str, tmp_path: Path) -> None:
    """Two ranks, killed; another folder takes up from S3 what was copied and comes to the undisturbed run's losses."""
    tokens, store = write_tokens(tmp_path / "tokens"), Bucket(f"{s3}/tokens", retry_s=60)
    for path in tokens.iterdir():
        store.put(path.name, path.read_bytes())
    often = {"data.path": f"{s3}/tokens", "steps": 40, "checkpoint.every_steps": 10, "checkpoint.keep_last": 1}

    def job(name: str, **changes: Any) -> dict[str, Any]:
        changes.setdefault("data__cache", str(tmp_path / f"cache of {name}"))
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return {"train": {**TINY, **often, "run_dir": str(tmp_path / name), **dotted}}

    address = f"{s3}/run"
    first = Ranks(tmp_path / "start1", [job("one", checkpoint__remote=address, steps=40)], 2)
    remote = Remote(settings(address))
    end = time.monotonic() + 120
    while not remote.steps():
        assert time.monotonic() < end, first.stderr()
        time.sleep(0.02)
    os.kill(first.processes[0].pid, signal.SIGKILL)
    first.wait()
    done = job("two", checkpoint__remote=address)
    here = job("undisturbed", data__path=str(tokens))
    second = Ranks(tmp_path / "start2", [done, here], 2)
    assert second.wait(240) == [0, 0]
    told = second.stderr()
    assert f"fetched the checkpoint of step {remote_step(told)} from {address}" in told
    assert read_metrics(tmp_path / "two") == read_metrics(tmp_path / "undisturbed")
    assert remote.steps() == [40]
    # Each machine has brought the tokens, which lay in S3 too; the run's record says where it found them.
    folder = data_folder(tmp_path / "two")
    assert folder is not None
    assert folder.parent == tmp_path / "cache of two"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in tokens.iterdir()}
    # Back on the first machine, whose own newest checkpoint is older: what was copied counts, and that is all.
    third = Ranks(tmp_path / "start3", [job("one", checkpoint__remote=address)], 2)
    assert third.wait(120) == [0, 0]
    assert "fetched the checkpoint of step 40" in third.stderr()
    assert "complete at step 40; nothing to do" in third.stderr()
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "undisturbed")


def remote_step(told: str) -> int:
    (line,) = [line for line in told.splitlines() if line.startswith("fetched the checkpoint of step ")]
    return int(line.split()[5])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_storage_that_fails_costs_the_copy_and_not_the_run(tmp_path: Path) -> None:
    """One rank: complete with code 4, the same command copies; a signal waits for the copy; overwrite empties both."""
    tokens, there = write_tokens(tmp_path / "tokens"), tmp_path / "there"
    run = tmp_path / "run"
    base = {**TINY, "data.path": str(tokens), "run_dir": str(run), "checkpoint.remote": f"file://{there}"}
    base |= {"checkpoint.remote_retry_s": 0.0, "checkpoint.every_steps": 5, "evaluate.every_steps": 0}
    there.write_text("a file where a folder should be")
    ranks = Ranks(tmp_path / "refused", [{"train": base | {"steps": 10}}], 1)
    assert ranks.wait(120) == [4]
    assert not run.exists() or not (run / "checkpoints").exists()  # whether there is a run to go on with is not known
    there.unlink()

    blocked = tmp_path / "there" / "checkpoints"
    blocked.parent.mkdir()
    blocked.write_text("a file where a folder should be")
    ranks = Ranks(tmp_path / "blocked", [{"train": base | {"steps": 10}}], 1)
    codes = ranks.wait(120)
    assert codes == [4], ranks.stderr()
    assert len(read_metrics(run)[0]) == 10
    assert "not copied to" in ranks.stderr()
    assert "the same command copies it" in ranks.answers()[0]["message"]
    blocked.unlink()
    ranks = Ranks(tmp_path / "again", [{"train": base | {"steps": 10}}], 1)
    assert ranks.wait(120) == [0]
    assert "copied the checkpoint of step 10" in ranks.stderr()
    assert checkpoint.resolve(there).name == "step_00000010"

    ranks = Ranks(tmp_path / "stopped", [{"train": base | {"steps": 100_000, "checkpoint.every_steps": 0}}], 1)
    end, before = time.monotonic() + 240, written_steps(run)
    while written_steps(run) == before:
        assert time.monotonic() < end, ranks.stderr()
        time.sleep(0.01)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait(240) == [REQUEUE_EXIT_CODE]
    assert checkpoint.resolve(there).name == checkpoint.resolve(run).name != "step_00000010"

    ranks = Ranks(tmp_path / "anew", [{"train": base | {"steps": 5, "overwrite": True}}], 1)
    assert ranks.wait(120) == [0]
    assert [p.name for p in (there / "checkpoints").iterdir() if any(p.iterdir())] == ["step_00000005"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"remote": "/mnt/runs"}, "checkpoint.remote=/mnt/runs: must be s3://.* give file:///mnt/runs"),
        ({"remote": "http://example.org/x"}, "must be s3://"),
        ({"remote": "s3://"}, "must be s3://"),
        ({"remote_transfers": 0}, "checkpoint.remote_transfers=0: must be at least 1"),
        ({"remote_wait_s": -1.0}, "checkpoint.remote_wait_s=-1.0: must be at least 0"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, Any], fault: str) -> None:
    config = TrainConfig(run_dir="run", steps=10, checkpoint=CheckpointConfig(**change))
    config.data.path = "tokens"
    (line,) = check(config)
    import re

    assert re.search(fault, line)
