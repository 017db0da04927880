"""A built wheel holds all it needs: modules, configs, and a command line that works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel that was built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of the files that belong to it")
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(folder / "source")]
    subprocess.run(command, check=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_every_module_and_config_travels(unpacked: Path) -> None:
    for package in ("data_pipeline", "gpt2train", "launch"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".jinja", ".html", ".js", ".css"):
                assert (unpacked / path.relative_to(ROOT)).exists(), path
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert (unpacked / "gpt2train" / path.relative_to(ROOT)).exists(), path


def test_the_command_line_works_from_it(unpacked: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(unpacked)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpt2train", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    where = [sys.executable, "-c", "import gpt2train; print(gpt2train.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(unpacked)
    assert "gpt2train COMMAND" in run("--help").stdout
    assert "model=  one of full, large, little" in run("train", "--help").stdout
    refused = run("train", "model=nanoo")
    assert refused.returncode == 2
    assert "must be among full, large, little" in refused.stderr
