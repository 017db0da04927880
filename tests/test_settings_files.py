"""`@FILE`: settings that stand in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2train.cli import main
from gpt2train.commands.settings_files import expand
from gpt2train.errors import ConfigError


def test_lines_are_settings_and_later_ones_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "my site.txt"
    site.write_bytes("﻿# of the site\r\n\r\nlauncher=slurm\r\nslurm.partition=gpu\r\n".encode())
    setup = "slurm.setup=['echo \"$HOME\" # not a comment']"
    (tmp_path / "more").write_text(f"  {setup}  \nslurm.partition=night\n")
    given = [f"@{site}", "device=cpu", f"@{tmp_path / 'more'}", "steps=1"]
    assert expand(given) == [
        *("launcher=slurm", "slurm.partition=gpu", "device=cpu", setup, "slurm.partition=night", "steps=1"),
    ]
    assert main(["launch", *given, "dry_run=true", "data=tokens", f"run_dir={tmp_path / 'run'}"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --partition=night\n" in script
    assert "partition=gpu" not in script
    assert 'echo "$HOME" # not a comment\n' in script


def test_all_that_is_wrong_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("steps\n@other\n--help=1\nsteps=2\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe=1")
    with pytest.raises(ConfigError) as caught:
        expand([f"@{tmp_path / name}" for name in ("bad", "none", "binary")])
    faults = [fault.replace(f"{tmp_path}/", "").split(";")[0] for fault in caught.value.faults]
    assert faults == [
        "@bad, line 1: steps: is not of the form key=value",
        "@bad, line 2: @other: is not of the form key=value",
        "@bad, line 3: --help=1: is not of the form key=value",
        "@none: No such file or directory",
        "@binary: is not UTF-8 text",
    ]
