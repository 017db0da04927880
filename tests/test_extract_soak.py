"""`make soak`: a hundred thousand pages through one extracting process: its memory and its time per page stay flat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.clean.extract import Extractor
from data_pipeline.config import ExtractConfig


def used(pid: int) -> tuple[float, float]:
    """(resident MiB, processor seconds) of a process, by Linux's proc(5)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # utime and stime, counted from the field after the name
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, ticks / os.sysconf("SC_CLK_TCK")


def walk(bodies: list[bytes], rounds: int) -> list[tuple[float, float]]:
    """(resident MiB after it, processor seconds a page) of each round over `bodies`, all in one process."""
    found = []
    with Extractor(ExtractConfig(respect_noai=False), pages_per_process=1 << 40, languages=["en"]) as extractor:
        extractor.extract(bodies[0], "https://example.org/first")
        pid = extractor.pid
        assert pid is not None
        before_s = used(pid)[1]
        for number in range(rounds):
            for i, body in enumerate(bodies):
                # Another page each time, as far as any cache can tell.
                body = body.replace(b"</body>", b"<!-- %d --></body>" % number)
                extractor.extract(body, f"https://example.org/{number}/{i}", "text/html", "2026-11-01T00:00:00Z")
            assert extractor.pid == pid, "the process was replaced: it crashed or ran out of memory"
            memory_mb, now_s = used(pid)
            found.append((memory_mb, (now_s - before_s) / len(bodies)))
            before_s = now_s
    return found


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_memory_and_cost_are_flat_from_ten_thousand_to_a_hundred_thousand_pages(shared: Path) -> None:
    bodies = [p.read_bytes() for p in sorted((shared / "pages" / "html").glob("*.html"))]
    bodies = [body for body in bodies if len(body) < 500_000][:1_000]
    assert len(bodies) == 1_000
    rounds = walk(bodies, 100)
    for number in (1, 10, 50, 100):
        memory_mb, page_s = rounds[number - 1]
        print(f"{number * len(bodies):>7} pages: {memory_mb:.0f} MiB, {1_000 * page_s:.2f} ms a page")
    early, late = rounds[5:10], rounds[95:100]
    assert max(memory for memory, _ in late) < 1.1 * max(memory for memory, _ in early) + 16
    assert sum(page_s for _, page_s in late) < 1.1 * sum(page_s for _, page_s in early)
