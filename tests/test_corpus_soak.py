"""Promises 1 and 2 at length: 25 kills of a corpus run with 1 and 2 workers; test_ray_executor has those on Ray."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import copy_archive, finished_steps, kill_again_and_again
from test_pipeline import RESULT, address, corpus_command, run, settings, tree, url_list

__all__ = ["address"]  # a fixture

KILLS = 25


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory, address: str) -> Iterator[Path]:
    """A corpus of eight shards that was made in one go, the archive of all others here."""
    folder = tmp_path_factory.mktemp("soak")
    url_list(folder, address)
    run(*settings(folder, address, folder / "one_go"), "shards=8")
    return folder


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [1, 2])
def test_25_kills_change_no_byte_and_lose_no_row(fetched: Path, address: str, workers: int) -> None:
    one_go, out = fetched / "one_go", copy_archive(fetched / "one_go", fetched / f"killed{workers}")
    overrides = [*settings(fetched, address, out), "shards=8", f"workers={workers}"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            corpus_command(*overrides), stderr=subprocess.DEVNULL, start_new_session=True, text=True
        )

    moments = kill_again_and_again(start, out, kills=KILLS, steps=finished_steps(one_go), seed=workers)
    print(f"\n{workers} workers: {dict(Counter(moments))}")
    assert sum(not m.startswith("ended") for m in moments) == KILLS
    assert Counter(moments)["half written"] >= KILLS // 3
    run(*overrides)
    assert tree(out, *RESULT) == tree(one_go, *RESULT)
    assert json.loads((out / "summary.json").read_text()) == json.loads((one_go / "summary.json").read_text())
    urls = json.loads((out / "summary.json").read_text())["urls"]
    assert urls["in"] == urls["kept"] + urls["dropped"] + urls["failed"]
    assert not list(out.rglob(".*.tmp"))
