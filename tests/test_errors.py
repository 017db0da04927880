"""Exit codes: whatever command finds no room to write in ends with code 4, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_corpus_damage import OWN_MOUNTS, own_mounts_fail

from gpt2train import cli, run_folder
from gpt2train.errors import GPT2TrainError, StorageError, write_error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_the_storage_says_has_code_4(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, "told by the kernel")

    monkeypatch.setattr(run_folder.os, "fsync", refuse)
    with pytest.raises(StorageError, match=r"report.html: cannot be written \(told by the kernel\); .* make room"):
        run_folder.replace_file(tmp_path / "report.html", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_rights_is_no_fault_of_the_storage() -> None:
    error = write_error("out=x", PermissionError(errno.EACCES, "Permission denied"), "give another place")
    assert (type(error), error.exit_code) == (GPT2TrainError, 1)
    assert str(error) == "out=x: cannot be written (Permission denied); give another place"


def test_an_error_of_the_disk_that_nobody_put_into_words_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, overrides: list[str]) -> int:
        raise OSError(errno.EIO, "Input/output error", "shard.bin")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["report", "x"]) == 4
    assert capsys.readouterr().err.startswith("gpt2train report: shard.bin: cannot be written (Input/output error)")


@pytest.mark.slow
def test_every_command_on_a_full_disk_ends_with_code_4(tmp_path: Path) -> None:
    """A real one: a tmpfs."""
    if why := own_mounts_fail():
        pytest.skip(f"no mount namespace here: {why}")
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    disk.mkdir()
    folder.mkdir()
    script = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'
    commands = Path(__file__).with_name("full_disk_commands.py")
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", script, "sh", str(disk), sys.executable, str(commands), str(folder), str(disk)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    (answer,) = [line for line in done.stdout.split("\n") if line.startswith("SAID ")] or [done.stderr[-3000:]]
    told = json.loads(answer.removeprefix("SAID "))
    assert len(told) >= 10
    for one in told:
        assert one["code"] == 4, one
        assert "No space left on device" in one["said"], one
        assert one["left"] == [], one
