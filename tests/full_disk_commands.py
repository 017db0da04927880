"""Each command that writes, on a disk that is full, for test_errors.py, which runs this in a mount of its own.

    python full_disk_commands.py FOLDER DISK

FOLDER is empty and has room, DISK is an empty tmpfs of some MB. Prints a line of JSON: of each command its exit
code (or the error that no one caught), what it said, and the half-written files it left.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

from test_export import make_run
from training import TINY, write_tokens

from gpt2train.cli import main


def ask(disk: Path, free_bytes: int, *arguments: str) -> dict[str, object]:
    """The command with no more than `free_bytes` on the disk."""
    with open(disk / "filler", "wb") as filler:
        filler.write(b"x" * (shutil.disk_usage(disk).free - free_bytes))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code: object = main([*arguments])
        except BaseException as error:  # what would be a traceback
            code = repr(error)
    left = [path.name for path in disk.rglob("*.tmp") if not path.name.startswith(".step_")]
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"asked": arguments[0], "free": free_bytes, "code": code, "said": said.getvalue(), "left": left}


def work(folder: Path, disk: Path) -> None:
    run = make_run(folder / "run")
    tokens = write_tokens(folder / "tokens", vocabulary=50_257, documents=400)
    assert main(["export", f"run={run}", f"to={folder}/gpt2"]) == 0
    tiny = [f"{name}={value}" for name, value in TINY.items() if name != "model.vocabulary"]
    training = ["train", *tiny, f"data={tokens}", "steps=4", "checkpoint.every_steps=4", "evaluate.every_steps=0"]
    of_run = f"run={run}"
    told = [
        *(ask(disk, free, *training, f"run_dir={disk}/run{free}") for free in (0, 8192, 16384, 65536)),
        ask(disk, 65536, "export", of_run, f"to={disk}/exported"),
        ask(disk, 0, "export", of_run, f"to={disk}/exported"),
        ask(disk, 0, "generate", of_run, "prompt=The", "max_new_tokens=2", f"out={disk}/samples.jsonl", "device=cpu"),
        ask(disk, 0, "evaluate", of_run, f"data={tokens}", "sequences=2", f"out={disk}/evaluation", "device=cpu"),
        ask(disk, 0, "audit", of_run, f"data={tokens}", "windows=2", f"out={disk}/audit.json", "device=cpu"),
        ask(disk, 0, "detect", of_run, "text=The rain in Spain.", f"html={disk}/ranks.html", "device=cpu"),
        ask(disk, 65536, "import", f"path={folder}/gpt2", f"to={disk}/imported"),
    ]
    print("SAID " + json.dumps(told))


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
