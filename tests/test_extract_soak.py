"""`make soak`: a hundred thousand pages through one extracting process: its memory and its time per page stay flat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.clean.extract import Extractor
from data_pipeline.config import ExtractConfig

BESIDE = 10
"""Rounds that the old process and a young one make in turn."""


def used(pid: int) -> tuple[float, float]:
    """(resident MiB, processor seconds) of a process, by Linux's proc(5)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # utime and stime, counted from the field after the name
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, ticks / os.sysconf("SC_CLK_TCK")


class Walker:
    """One extracting process that is given the same pages again and again."""

    def __init__(self, bodies: list[bytes]) -> None:
        self._bodies, self._number = bodies, 0
        self._extractor = Extractor(ExtractConfig(respect_noai=False), pages_per_process=1 << 40, languages=["en"])

    def __enter__(self) -> Walker:
        self._extractor.__enter__()
        self._extractor.extract(self._bodies[0], "https://example.org/first")
        self._pid = self._extractor.pid
        return self

    def __exit__(self, *exception: Any) -> None:
        self._extractor.__exit__(*exception)

    def round(self) -> tuple[float, float]:
        """(resident MiB after it, processor seconds a page) of a round over all pages."""
        assert self._pid is not None
        before_s = used(self._pid)[1]
        for i, body in enumerate(self._bodies):
            # Another page each time, as far as any cache can tell.
            body = body.replace(b"</body>", b"<!-- %d --></body>" % self._number)
            url = f"https://example.org/{self._number}/{i}"
            self._extractor.extract(body, url, "text/html", "2026-11-01T00:00:00Z")
        assert self._extractor.pid == self._pid, "the process was replaced: it crashed or ran out of memory"
        self._number += 1
        memory_mb, now_s = used(self._pid)
        return memory_mb, (now_s - before_s) / len(self._bodies)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_memory_and_cost_are_flat_from_ten_thousand_to_a_hundred_thousand_pages(shared: Path) -> None:
    """The cost is held against a young process that has the same pages at the same time: on a machine with other work
    a page's processor time differs by 10 % from one quarter of an hour to the next, for old and young alike."""
    bodies = [p.read_bytes() for p in sorted((shared / "pages" / "html").glob("*.html"))]
    bodies = [body for body in bodies if len(body) < 75_000]  # the others would treble the time
    assert len(bodies) > 300
    last, early = -(-100_000 // len(bodies)), -(-10_000 // len(bodies))
    with Walker(bodies) as old:
        rounds = [old.round() for _ in range(last - BESIDE)]
        with Walker(bodies) as young:
            for _ in range(3):
                young.round()
            beside = []
            for _ in range(BESIDE):
                rounds.append(old.round())
                beside.append(young.round()[1])
    for number in (1, early, last // 2, last):
        memory_mb, page_s = rounds[number - 1]
        print(f"{number * len(bodies):>7} pages: {memory_mb:.0f} MiB, {1_000 * page_s:.2f} ms a page")
    ratio = sum(page_s for _, page_s in rounds[-BESIDE:]) / sum(beside)
    print(f"behind that a page costs {ratio:.3f} of what it costs a process behind a thousand")
    assert max(memory for memory, _ in rounds[-BESIDE:]) < 1.1 * max(memory for memory, _ in rounds[:early]) + 16
    assert ratio < 1.1
